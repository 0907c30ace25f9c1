"""Shipped configs equal their goldens: values, parameters, shardings, init, FLOPs. `make golden` renews them."""

import pytest

from scripts.golden import GOLDENS, described, path_of, shipped


@pytest.mark.parametrize('name', shipped())
def test_a_shipped_config_equals_its_golden(name):
  assert described(name) == path_of(name).read_text(), 'if this is meant: make golden'


def test_every_golden_has_a_config():
  assert sorted(GOLDENS.glob('*.txt')) == sorted(map(path_of, shipped()))
