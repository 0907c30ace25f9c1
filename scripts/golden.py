"""Writes tests/golden/ again: the output of `pretrain config` for each shipped config. Read the diff before a commit.

A golden file holds the resolved text, the parameter table with shardings and init, and FLOPs. An unintended change of
any of them fails tests/pretrain/tools/test_golden.py.
"""

import pathlib

from pretrain.config import bindings
from pretrain.experiment import checks, experiment
from pretrain.tools import describe

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS, GOLDENS = ROOT / 'configs', ROOT / 'tests/golden'


def shipped() -> list[str]:
  """The names of the shipped configs: ul2/tiny, …"""
  return sorted(path.relative_to(CONFIGS).with_suffix('').as_posix() for path in CONFIGS.rglob('*.gin'))


def described(name: str) -> str:
  cfg = bindings.load(experiment.Experiment, [str(CONFIGS / f'{name}.gin')])
  checks.check(cfg)
  return describe.describe(cfg) + '\n'


def path_of(name: str) -> pathlib.Path:
  return GOLDENS / f'{name.replace("/", ".")}.txt'


if __name__ == '__main__':
  GOLDENS.mkdir(exist_ok=True)
  for old in GOLDENS.glob('*.txt'):
    old.unlink()
  for name in shipped():
    path_of(name).write_text(described(name))
    print(path_of(name).relative_to(ROOT))
