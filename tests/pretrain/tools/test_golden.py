"""Shipped configs mean what they meant: values, parameters, shardings, init, FLOPs. `make golden` renews them."""

import pytest

from scripts.golden import GOLDENS, described, path_of, shipped


@pytest.mark.parametrize('name', shipped())
def test_a_shipped_config_means_what_it_meant(name):
  assert described(name) == path_of(name).read_text(), 'if this is meant: make golden'


def test_there_is_no_golden_without_a_config():
  assert sorted(GOLDENS.glob('*.txt')) == sorted(map(path_of, shipped()))
