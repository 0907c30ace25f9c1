"""Runs of one config share their compiled programs, and draw no report: two thirds of the time of a tiny run.

A test that takes `monkeypatch` gets programs of its own: what it has changed may be part of them. Where it is not,
`shared_programs` says so; one that has changed it before its first run takes `own_programs`, which its runs share. A
test that takes `reports` gets reports. Processes that a test starts are unchanged.
"""

import dataclasses
import functools
import sys

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

import pretrain.run.train  # before its names are replaced below
from data.batches.source import StoreData
from pretrain.checkpoints.config import CheckpointConfig
from pretrain.experiment import program
from pretrain.experiment.experiment import EvaluationConfig, Experiment
from pretrain.hosts.watchdog import WatchdogConfig
from pretrain.replicas.compare import ReplicasConfig
from pretrain.snapshots.slots import SnapshotConfig
from pretrain.tools import report

KEPT = 24  # programs; a worker has a few MB for each
BUILD, WRITE_REPORT = program.build_program, report.write_report
sharing = drawing = False
owner = ''  # the test that keeps its programs to itself


def of_program(cfg: Experiment) -> Experiment:
  """`cfg` without what is no part of a program. It is built from this: were any of it part of one, tests would fail."""
  data = cfg.data
  if isinstance(data, StoreData):
    sources = tuple(dataclasses.replace(source, path=str(i)) for i, source in enumerate(data.sources))
    data = dataclasses.replace(data, sources=sources, heldout=())
  return dataclasses.replace(
    cfg,
    data=data,
    train=dataclasses.replace(cfg.train, steps=1, log_every=1, profile_steps=None),
    phases=(),
    evaluation=EvaluationConfig(),
    checkpoint=CheckpointConfig(),
    snapshot=SnapshotConfig(),
    watchdog=WatchdogConfig(),
    replicas=ReplicasConfig(),
  )


@functools.lru_cache(KEPT)
def kept(cfg: Experiment, devices, schedule_start: int, start: int, owner: str) -> program.Program:
  return BUILD(cfg, devices, schedule_start=schedule_start, start=start)


@functools.wraps(BUILD)
def build_program(cfg, devices=None, *, schedule_start=0, start=0):
  if not sharing:
    return BUILD(cfg, devices, schedule_start=schedule_start, start=start)
  return kept(of_program(cfg), devices if devices is None else tuple(devices), schedule_start, start, owner)


def write_report(workdir):
  return WRITE_REPORT(workdir) if drawing else None


for module in list(sys.modules.values()):  # those that have taken the names from where they are defined
  if getattr(module, '__name__', '').startswith(('pretrain.', 'tests.')):
    if vars(module).get('build_program') is BUILD:
      module.build_program = build_program
    if module.__name__.startswith('pretrain.run') and vars(module).get('write_report') is WRITE_REPORT:
      module.write_report = write_report
assert pretrain.run.train.write_report is write_report


@pytest.fixture
def reports():
  """Runs draw their reports."""
  global drawing
  drawing = True
  yield
  drawing = False


@pytest.fixture
def shared_programs():
  """The test takes `monkeypatch` and changes nothing that is part of a program."""


@pytest.fixture
def own_programs():
  """What the test has changed with `monkeypatch` is the same for all its runs: they share programs, with no other."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
  global sharing, owner
  owner = item.nodeid if 'own_programs' in item.fixturenames else ''
  sharing = bool(owner) or 'monkeypatch' not in item.fixturenames or 'shared_programs' in item.fixturenames
  try:
    return (yield)
  finally:
    sharing = False


@pytest.fixture
def compiler_output(monkeypatch, capfd):
  """Returns a function that gives what the compiler has written. Programs are compiled again, for only the
  compiler prints warnings: the cache is off, and with `monkeypatch` (above) no program is shared.
  """
  assert jax.config.jax_enable_compilation_cache
  jax.config.update('jax_enable_compilation_cache', False)
  compilation_cache.reset_cache()  # whether it is used is asked once
  yield lambda: ''.join(capfd.readouterr())
  jax.config.update('jax_enable_compilation_cache', True)
  compilation_cache.reset_cache()
