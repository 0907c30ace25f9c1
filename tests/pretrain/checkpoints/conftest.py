"""A small program and its first state."""

import pytest

from pretrain.experiment.program import build_program
from tests.pretrain import tiny


@pytest.fixture(scope='module')
def program():
  return build_program(tiny.decoder())


@pytest.fixture(scope='module')
def state(program):
  return program.init()
