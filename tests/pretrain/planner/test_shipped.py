"""Every shipped config fits the slice that its header names, as compiled; the estimate is within 10% of that."""

import pathlib
import re
import subprocess
import sys

import pytest

from models.build import build
from models.specs import count
from pretrain.config import bindings
from pretrain.devices.chips import parse
from pretrain.experiment.experiment import Experiment
from pretrain.planner import layouts, memory, workload
from tests.pretrain import tiny

MIB, BILLION = 2**20, 10**9
SIZE = re.compile(r'^# Size: ([\d,]+) parameters', re.MULTILINE)
SLICE = re.compile(r'^# Hardware: .*?\b((?:v5e|v5p|v6e|tpu7x):[\dx]+)', re.MULTILINE)
MEMORY = re.compile(r'([\d,]+) in use at once \(estimated ([\d,]+)\)')
CONFIGS = tiny.ROOT / 'configs'


def name(path: pathlib.Path) -> str:
  return path.relative_to(CONFIGS).with_suffix('').as_posix()


def size(path: pathlib.Path) -> int:
  found = SIZE.search(path.read_text())
  return int(found[1].replace(',', '')) if found else 0


EVERY = sorted(CONFIGS.rglob('*.gin'))
LARGE = [path for path in EVERY if size(path) > BILLION]
SLICED = [path for path in EVERY if SLICE.search(path.read_text())]


def slice_of(path: pathlib.Path):
  found = SLICE.search(path.read_text())
  assert found, f'{path} names no slice behind "# Hardware:"'
  return parse(found[1])


def load(path: pathlib.Path) -> Experiment:
  return bindings.load(Experiment, [str(path)], [])


@pytest.mark.slow
def test_the_large_configs_are_those_whose_parameters_say_so():
  """A header without a size hides no config from the tests below."""
  every = [path for path in EVERY if '# Hardware:' in path.read_text()]
  assert len(LARGE) >= 12
  assert set(LARGE) <= set(SLICED)
  assert {name(p) for p in every if count(build(load(p).model).specs) > BILLION} == {name(p) for p in LARGE}


@pytest.mark.slow
@pytest.mark.parametrize('path', LARGE, ids=name)
def test_a_large_config_is_estimated_to_fit_its_slice(path):
  """With the tenth of the memory that the search leaves free."""
  cfg, of = load(path), slice_of(path)
  found = memory.estimate(workload.describe(cfg), layouts.of_config(cfg, of.devices))
  assert found.total < 0.9 * of.chip.hbm


def marks(path: pathlib.Path):
  """The largest step of the mission is compiled by `make test-all`; the others by `make test-slices`."""
  return pytest.mark.slow if name(path) == 'ul2/20b' else pytest.mark.hours


@pytest.mark.aot
@pytest.mark.parametrize(
  'path', [pytest.param(path, marks=marks(path)) for path in SLICED], ids=[name(path) for path in SLICED]
)
def test_a_config_compiles_for_its_slice(path):
  """Within 10% of its estimated memory; in a process of its own, as users run it.

  What does not fit is refused by the compiler (exit code 64).
  """
  of = slice_of(path)
  command = [sys.executable, '-m', 'pretrain', 'plan', f'--gin_file={path}', f'--topology={of.name}', '--explain']
  done = subprocess.run(command, cwd=tiny.ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-3000:]
  assert 'Involuntary full rematerialization' not in done.stderr
  print(done.stdout)
  peak, estimated = (int(found.replace(',', '')) for found in MEMORY.search(done.stdout).groups())
  assert peak * MIB < of.chip.hbm
  assert estimated == pytest.approx(peak, rel=0.1)
