"""The cost of one update: CPU seconds of each optimizer and state, relative to f32 AdamW in the same round.

python scripts/bench/optimizers.py [--rounds 5] [--updates 4]

The parameters are those of configs/decoder/bench.gin (8.4M), one device; rounds are interleaved. Columns: nanoseconds
per parameter and update, the ratio to adamw, bytes of state per parameter; median [min .. max].
"""

import argparse
import os
import pathlib
import platform
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = ROOT / 'configs/decoder/bench.gin'
sys.path.insert(0, str(ROOT))  # before this folder, whose data.py would be `data`
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

import models.build  # noqa: E402
from models import specs  # noqa: E402
from pretrain.config import bindings  # noqa: E402
from pretrain.devices.mesh import make_mesh  # noqa: E402
from pretrain.experiment.experiment import Experiment  # noqa: E402
from pretrain.optim.optimizer import Adafactor, AdamW, Lion, Muon, make_optimizer  # noqa: E402

OPTIMIZERS = {
  'adamw': AdamW(),
  'adamw bfloat16': AdamW(state_dtype='bfloat16'),
  'adamw int8': AdamW(state_dtype='int8'),
  'lion': Lion(),
  'lion int8': Lion(state_dtype='int8'),
  'adafactor': Adafactor(),
  'adafactor momentum': Adafactor(momentum=0.9),
  'muon': Muon(),
  'muon int8': Muon(state_dtype='int8'),
}


def spread(values: list[float]) -> str:
  return f'{statistics.median(values):6.2f} [{min(values):6.2f} .. {max(values):6.2f}]'


class Case:
  """An optimizer with its compiled update and its state."""

  def __init__(self, cfg, model):
    tx = make_optimizer(cfg, lambda step: 1e-3, model.specs)
    self.params = jax.jit(lambda key: specs.initialize(model.specs, key))(jax.random.key(0))
    self.grads = jax.jit(lambda key: specs.initialize(model.specs, key))(jax.random.key(1))
    self.state = jax.jit(tx.init)(self.params)
    self.bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.state))

    def step(params, state, grads):
      updates, state = tx.update(grads, state, params)
      return jax.tree.map(jnp.add, params, updates), state

    self.step = jax.jit(step, donate_argnums=(0, 1))
    self.seconds(1)

  def seconds(self, updates: int) -> float:
    """CPU seconds per update."""
    start = time.process_time()
    for _ in range(updates):
      self.params, self.state = self.step(self.params, self.state, self.grads)
    jax.block_until_ready((self.params, self.state))
    return (time.process_time() - start) / updates


def main() -> None:
  flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  flags.add_argument('--rounds', type=int, default=5)
  flags.add_argument('--updates', type=int, default=4, help='updates in a round')
  options = flags.parse_args()
  cfg = bindings.load(Experiment, [str(CONFIG)], [])
  model = models.build.build(cfg.model, cfg.kernels, make_mesh(cfg.mesh))
  count = specs.count(model.specs)
  print(f'cores {len(os.sched_getaffinity(0))}, Python {platform.python_version()}, jax {jax.__version__}', flush=True)
  print(f'{count:,} parameters')
  cases = {name: Case(cfg, model) for name, cfg in OPTIMIZERS.items()}
  times = {name: [] for name in cases}
  for _ in range(options.rounds):
    for name, case in cases.items():
      times[name].append(case.seconds(options.updates))
  for name, case in cases.items():
    ratios = [a / b for a, b in zip(times[name], times['adamw'], strict=True)]
    nanoseconds = [1e9 * seconds / count for seconds in times[name]]
    print(f'{name:19} ns {spread(nanoseconds)}  x adamw {spread(ratios)}  bytes {case.bytes / count:5.2f}')


if __name__ == '__main__':
  main()
