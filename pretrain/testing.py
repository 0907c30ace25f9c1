"""For users' own tests: a CPU mesh, and the two promises of a run as assertions.

Simulated devices must exist before JAX starts, and twice as many threads:
XLA_FLAGS=--xla_force_host_platform_device_count=8 NPROC=16 JAX_PLATFORMS=cpu.
"""

import dataclasses
import itertools
import math
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from pretrain.devices.compilation_cache import cache_dir
from pretrain.devices.mesh import MeshConfig, host_rows, make_mesh, to_global
from pretrain.experiment.experiment import Experiment
from pretrain.experiment.program import build_program
from pretrain.records.metrics import read_metrics


def cpu_mesh(num_devices: int, axis: str = 'fsdp') -> Mesh:
  """A mesh of `num_devices` simulated CPU devices along one axis, all other axes of size 1."""
  devices = jax.devices('cpu')
  if len(devices) < num_devices:
    raise RuntimeError(
      f'{num_devices} CPU devices wanted, {len(devices)} exist; '
      f'set XLA_FLAGS=--xla_force_host_platform_device_count={num_devices} before importing jax.'
    )
  return make_mesh(MeshConfig(**{axis: num_devices}), devices[:num_devices])


def losses(cfg: Experiment, steps: int, metric: str = 'loss') -> np.ndarray:
  """The first `steps` training losses of `cfg`, or another metric of the step: float32[steps]. No file is written."""
  from data.batches.loader import loader
  from data.batches.source import open_data

  data = open_data(cfg.data, cfg.objective, seed=cfg.seed, vocab_size=cfg.model.vocab_size, cache_dir=cache_dir())
  program = build_program(cfg)
  state, out = program.init(), []
  batches = loader(data, {'examples': 0}, host_rows(program.mesh, cfg.data.batch_size))
  for _ in range(steps):
    _, batch = next(batches)
    state, metrics = program.train_step(state, to_global(batch, program.mesh))
    out.append(float(metrics[metric]))
  return np.array(out, np.float32)


def assert_layout_invariant(
  cfg: Experiment, layouts: Sequence[MeshConfig], *, steps: int = 20, rtol: float = 1e-5
) -> None:
  """The losses of `cfg` agree on every mesh of `layouts`, step by step, within `rtol`."""
  reference = losses(dataclasses.replace(cfg, mesh=layouts[0]), steps)
  for layout in layouts[1:]:
    got = losses(dataclasses.replace(cfg, mesh=layout), steps)
    np.testing.assert_allclose(got, reference, rtol=rtol, equal_nan=False, err_msg=f'{layout} against {layouts[0]}')


def assert_resumes_exactly(cfg: Experiment, workdir: pathlib.Path, *, steps: int, stop_at: int) -> None:
  """`steps` steps in one go, and stopped after `stop_at` and resumed, log the same losses bit for bit."""
  from pretrain.run.train import train

  def until(last: int, where: str) -> None:
    train(dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, steps=last, log_every=1)), workdir / where)

  until(steps, 'whole')
  until(stop_at, 'resumed')
  until(steps, 'resumed')
  whole, resumed = logged_losses(workdir / 'whole'), logged_losses(workdir / 'resumed')
  if bad := [row for row in whole if not math.isfinite(row[1])]:
    raise AssertionError(f'(step, loss) {bad[0]} is not finite: it shows nothing')
  for a, b in itertools.zip_longest(whole, resumed):
    if a != b:
      raise AssertionError(f'resumed at {stop_at}: first difference {a} != {b} (step, loss)')


def logged_losses(workdir: pathlib.Path) -> list[tuple[int, float]]:
  """(step, loss) of every training line of metrics.jsonl, in file order."""
  return [(row['step'], row['loss']) for row in read_metrics(workdir) if 'loss' in row]
