"""The cost of a step of each row length, and the cost of a run up to each of its evaluations."""

import pathlib
import statistics
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from data.batches.source import open_data
from models.flops import flops_per_step
from pretrain.devices.compilation_cache import cache_dir
from pretrain.devices.mesh import to_global
from pretrain.experiment.experiment import Experiment
from pretrain.experiment.program import build_program
from pretrain.records.metrics import read_metrics

Rows = Sequence[Mapping[str, float]]
LOSS = 'eval/builtin/loss'
ROUNDS = 25


def last_loss(cfg: Experiment, workdir: pathlib.Path) -> dict[str, float]:
  """The held-out loss of the final weights."""
  return {'loss': read_metrics(workdir)[-1][LOSS]}


def step_times(cfg: Experiment, workdir: pathlib.Path) -> dict[str, float]:
  """CPU and wall seconds of a step of each row length: 'cpu 64 median', …; one length after another, `ROUNDS` times.

  CPU seconds are those of the whole process; on one core they equal the wall seconds of a step on an idle machine.
  """
  program = build_program(cfg)
  batches = one_of_each(cfg)
  state, taken = program.init(), {}
  for number in range(-1, ROUNDS):  # the first round compiles
    for length, batch in batches.items():
      batch = to_global(batch, program.mesh)
      cpu, wall = time.process_time(), time.perf_counter()
      state, _ = jax.block_until_ready(program.train_step(state, batch))
      if number >= 0:
        taken.setdefault(f'cpu {length}', []).append(time.process_time() - cpu)
        taken.setdefault(f'wall {length}', []).append(time.perf_counter() - wall)
  return {f'{name} {key}': value for name, values in taken.items() for key, value in quartiles(values).items()}


def one_of_each(cfg: Experiment) -> dict[int, dict[str, np.ndarray]]:
  """The first batch of each row length, the shortest first."""
  data = open_data(cfg.data, cfg.objective, seed=0, vocab_size=cfg.model.vocab_size, cache_dir=cache_dir())
  found, step = {}, 0
  while len(found) < len(cfg.data.packing.lengths(cfg.data.targets_length)):
    batch = data.batch(step, slice(0, cfg.data.batch_size))
    found.setdefault(batch['decoder_target_tokens'].shape[1], batch)
    step += 1
  return dict(sorted(found.items()))


def quartiles(values: Sequence[float]) -> dict[str, float]:
  low, median, high = statistics.quantiles(values, n=4)
  return {'low': low, 'median': median, 'high': high}


def step_flops(cfg: Experiment) -> dict[int, float]:
  """FLOPs of a step of each row length, forward and backward."""
  longest = cfg.data.targets_length
  row = lambda length: flops_per_step(cfg.model, inputs_length=0, targets_length=length)
  return {n: cfg.data.batch_size * (longest // n) * row(n) for n in cfg.data.packing.lengths(longest)}


def row_lengths(rows: Rows, longest: int) -> np.ndarray:
  """int[steps]: the row length of each step. Raises ValueError if a step was not logged."""
  if [row['step'] for row in rows] != list(range(1, len(rows) + 1)):
    raise ValueError(f'{len(rows)} rows do not cover all of {rows[-1]["step"]} steps; set train.log_every=1.')
  return np.array([int(row.get('row_length', longest)) for row in rows])


def curve(rows: Rows, costs: Mapping[int, float]) -> tuple[np.ndarray, np.ndarray]:
  """(cost of the steps before each evaluation, its loss); `costs`: cost of a step by row length."""
  spent = np.cumsum([costs[n] for n in row_lengths(rows, max(costs)).tolist()])
  found = [i for i, row in enumerate(rows) if LOSS in row]
  return spent[found], np.array([rows[i][LOSS] for i in found])


def logged_seconds(rows: Rows, longest: int) -> dict[int, list[float]]:
  """The `step_seconds` of each row length, without the rows that include compilation.

  A step is dispatched before the previous one is logged, so two rows are excluded: the first of a length and the one
  before it.
  """
  lengths, found = row_lengths(rows, longest), {}
  compiled = {int(np.flatnonzero(lengths == n)[0]) for n in np.unique(lengths)}
  for i, (length, row) in enumerate(zip(lengths.tolist(), rows, strict=True)):
    if not compiled & {i, i + 1}:
      found.setdefault(length, []).append(row['step_seconds'])
  return found
