"""The cost of saving: blocks of steps that start with a save and blocks without one, alternating.

python scripts/bench/saves.py [--rounds 5] [--every 50] [--rows 1] [--embed 768]

- stall: the time training waits for a save (`save_stall` of metrics.jsonl), as a share of `every` steps without one.
  Bar: <= 2%.
- in all: how much longer `every` steps take with a save, which the same cores write and hash at the same time.
"""

import argparse
import contextlib
import os
import pathlib
import statistics
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = ROOT / 'configs/decoder/bench.gin'
sys.path.insert(0, str(ROOT))


def spread(values: list[float], unit: float = 1.0) -> str:
  low, high = min(values) * unit, max(values) * unit
  return f'{statistics.median(values) * unit:.3g} [{low:.3g} .. {high:.3g}]'


def stretch(program, state, batches, number: int, checkpoints=None, saved=None) -> tuple[object, float, float]:
  """(the state after the steps, their seconds, seconds of waiting for a save); adds the results of saves to `saved`."""
  import jax

  start, stall, before = time.perf_counter(), 0.0, None
  if checkpoints is not None:
    checkpoints.save(number, state, {'loader': {}, 'data': {}}, '')
    stall = time.perf_counter() - start
  for batch in batches:
    state, metrics = program.train_step(state, batch)
    if before is not None:
      jax.device_get(before)  # as a run does: reads the numbers of a step while the next one runs
    before = metrics
    if checkpoints is not None:
      saved += checkpoints.poll()
  jax.block_until_ready(state)
  return state, time.perf_counter() - start, stall


def bench(options: argparse.Namespace, folder: pathlib.Path) -> None:
  import jax

  from data.batches.loader import loader
  from data.batches.source import open_data
  from pretrain.checkpoints.checkpoints import Checkpoints
  from pretrain.checkpoints.config import CheckpointConfig
  from pretrain.config import bindings
  from pretrain.devices.compilation_cache import cache_dir
  from pretrain.devices.mesh import host_rows, to_global
  from pretrain.experiment.experiment import Experiment
  from pretrain.experiment.program import build_program

  keys = [f'model.embed={options.embed}', f'model.mlp.hidden={4 * options.embed}', f'data.batch_size={options.rows}',
          f'model.heads={options.embed // 64}']  # fmt: skip
  cfg = bindings.load(Experiment, [str(CONFIG)], keys)
  program = build_program(cfg)
  source = open_data(cfg.data, cfg.objective, seed=0, vocab_size=cfg.model.vocab_size, cache_dir=cache_dir())
  found = loader(source, {'examples': 0}, host_rows(program.mesh, cfg.data.batch_size))
  batches = [to_global(next(found)[1], program.mesh) for _ in range(options.every)]
  state, off, on, stalls, saved = program.init(), [], [], [], []
  with contextlib.closing(Checkpoints(folder, CheckpointConfig(keep=1))) as checkpoints:
    state, _, _ = stretch(program, state, batches[:2], 1, checkpoints, [])  # compiles
    checkpoints.poll(wait=True)
    for number in range(2, options.rounds + 2):
      state, seconds, _ = stretch(program, state, batches, number)
      off.append(seconds)
      state, seconds, stall = stretch(program, state, batches, number, checkpoints, saved)
      on.append(seconds)
      stalls.append(stall)
      saved += checkpoints.poll(wait=True)
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / 2**20
  share = [stall / seconds for stall, seconds in zip(stalls, off, strict=True)]
  more = [a / b - 1 for a, b in zip(on, off, strict=True)]
  written = [result.seconds for result in saved]
  print(f'state {size:.0f} MiB, step {spread(off, 1 / options.every)} s, save {spread(written)} s, behind the run')
  print(f'stall {spread(stalls, 1000)} ms: {spread(share, 100)}% of {options.every} steps (bar 2)')
  print(f'in all {spread(more, 100)}% more for {options.every} steps')


def main() -> None:
  flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  flags.add_argument('--rounds', type=int, default=5)
  flags.add_argument('--every', type=int, default=50, help='steps from one save to the next')
  flags.add_argument('--rows', type=int, default=1, help='of 512 tokens, in a step')
  flags.add_argument('--embed', type=int, default=768)
  options = flags.parse_args()
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  with tempfile.TemporaryDirectory() as folder:
    bench(options, pathlib.Path(folder))


if __name__ == '__main__':
  main()
