"""The cost of checks during a run: spike detection and comparison of replicas, against steps without them.

python scripts/bench/guards.py [--rounds 7] [--steps 6]

CPU seconds a step of configs/decoder/bench.gin (8.4M parameters), interleaved on and off in one process; medians and
spread. `spikes.name='skip'` on one device, and one comparison of replicas with each step on two (`mesh.data` = 2).
"""

import argparse
import dataclasses
import os
import pathlib
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # before this folder, whose data.py would be `data`


def cpu_seconds(act) -> float:
  import jax

  start = time.process_time()
  jax.block_until_ready(act())
  return time.process_time() - start


def spread(values: list[float]) -> str:
  return f'{statistics.median(values):.4f} [{min(values):.4f} .. {max(values):.4f}]'


class Steps:
  """A run of steps over one batch, in memory."""

  def __init__(self, cfg):
    from data.batches.loader import loader
    from data.batches.source import open_data
    from pretrain.devices.compilation_cache import cache_dir
    from pretrain.devices.mesh import host_rows, to_global
    from pretrain.experiment.program import build_program

    self.program = build_program(cfg)
    source = open_data(cfg.data, cfg.objective, seed=0, vocab_size=cfg.model.vocab_size, cache_dir=cache_dir())
    _, batch = next(loader(source, {'examples': 0}, host_rows(self.program.mesh, cfg.data.batch_size)))
    self.batch, self.state = to_global(batch, self.program.mesh), self.program.init()

  def make(self, count: int):
    for _ in range(count):
      self.state, metrics = self.program.train_step(self.state, self.batch)
    return metrics


def bench_spikes(cfg, rounds: int, count: int) -> None:
  from pretrain.optim.spikes import SkipSpikes

  off, on = Steps(cfg), Steps(dataclasses.replace(cfg, spikes=SkipSpikes()))
  for steps in (off, on):
    cpu_seconds(lambda steps=steps: steps.make(2))
  pairs = [[cpu_seconds(lambda s=s: s.make(count)) / count for s in (off, on)] for _ in range(rounds)]
  ratios = [b / a - 1 for a, b in pairs]
  print(f'a step, CPU seconds: off {spread([a for a, _ in pairs])}, spikes judged {spread([b for _, b in pairs])}')
  print(f'difference: {statistics.median(ratios):+.2%} [{min(ratios):+.2%} .. {max(ratios):+.2%}]', flush=True)


def bench_replicas(cfg, rounds: int, count: int) -> None:
  import jax

  from pretrain.devices.mesh import MeshConfig
  from pretrain.replicas.compare import Replicas

  steps = Steps(dataclasses.replace(cfg, mesh=MeshConfig(data=2)))
  replicas = Replicas(steps.program.abstract, steps.program.mesh)
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(steps.state)) / 2**20
  cpu_seconds(lambda: (steps.make(2), replicas.digests(steps.state)))
  pairs = [
    (cpu_seconds(lambda: steps.make(count)) / count, cpu_seconds(lambda: replicas.digests(steps.state)))
    for _ in range(rounds)
  ]
  print(f'replicas, CPU seconds: a step {spread([a for a, _ in pairs])}, a comparison of 2 copies of {size:.0f} MiB '
        f'{spread([b for _, b in pairs])}')  # fmt: skip
  share = statistics.median(b / a for a, b in pairs)
  print(f'a comparison is {share:.1%} of a step: every 100 steps {share / 100:.3%}', flush=True)


def main() -> int:
  flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  flags.add_argument('--rounds', type=int, default=7)
  flags.add_argument('--steps', type=int, default=6)
  options = flags.parse_args()
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  os.environ |= {'XLA_FLAGS': '--xla_force_host_platform_device_count=2', 'NPROC': '4'}
  from pretrain.config import bindings
  from pretrain.experiment.experiment import Experiment

  cfg = bindings.load(Experiment, [str(ROOT / 'configs/decoder/bench.gin')], [])
  bench_spikes(cfg, options.rounds, options.steps)
  bench_replicas(cfg, options.rounds, options.steps)
  return 0


if __name__ == '__main__':
  sys.exit(main())
