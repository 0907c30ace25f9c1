"""The planner's estimates beside published runs: tokens/s/chip, with no overlap of links and with all of it.

  python scripts/bench/planner/published.py

Source of the runs: MaxText, docs/reference/models/tiering.md; rows of a device and what is kept:
benchmarks/maxtext_trillium_model_configs.py. For Llama 2 70B on v5p neither is published: four rows, remat='full'.
Nothing in `pretrain/planner` was fitted to these rows.
"""

import dataclasses
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

# MaxText offloads these to the host; they are not made again.
OFFLOADED = {'qkv': ('query', 'key', 'value'), 'qkv, out': ('query', 'key', 'value', 'out')}
LLAMA3_70B = ('model.vocab_size=128256', 'model.rope_theta=500000.0')


@dataclasses.dataclass(frozen=True)
class Run:
  """A published run. `rate`: tokens/s/chip; `mfu` as its authors count it."""

  name: str
  topology: str
  config: str
  keys: tuple[str, ...]
  rows: int
  length: int
  kept: str
  rate: float
  mfu: float


RUNS = (
  Run('Llama 2 70B', 'v5p:4x8x8', 'decoder/70b', (), 4, 4096, 'full', 692, 0.654),
  Run('Llama 3.1 8B', 'v6e:16x16', 'decoder/llama3_8b', (), 4, 8192, 'qkv, out', 7207, 0.4546),
  Run('Llama 3.1 70B', 'v6e:16x16', 'decoder/70b', LLAMA3_70B, 5, 8192, 'qkv', 960, 0.5033),
)


def estimate(run: Run):
  """(slice, workload, step) of a run, estimated."""
  from pretrain.config import bindings
  from pretrain.devices.chips import parse
  from pretrain.experiment.experiment import Experiment
  from pretrain.planner import layouts, memory, roofline, torus, workload

  memory.KEPT.update(OFFLOADED)
  of = parse(run.topology)
  own = (f'data.batch_size={run.rows * of.devices}', f'data.targets_length={run.length}', 'train.accumulate=1')
  mesh = (f'mesh.fsdp={of.devices}', 'mesh.tensor=1')
  cfg = bindings.load(Experiment, [str(ROOT / 'configs' / f'{run.config}.gin')], [*run.keys, *own, *mesh])
  work = workload.describe(cfg)
  layout = dataclasses.replace(layouts.of_config(cfg, of.devices), remat=run.kept)
  return of, work, roofline.estimate(work, layout, of, torus.groups(layout.sizes, of))


def main() -> None:
  from pretrain.planner import roofline

  print(
    'run            slice      kept      published      no overlap          all overlapped      MFU           binds'
  )
  print('                                    tok/s/chip  tok/s/chip   error  tok/s/chip   error   theirs  ours')
  for run in RUNS:
    of, work, step = estimate(run)
    rates = [roofline.tokens_per_chip(work, of, seconds) for seconds in (step.total, step.overlapped)]
    errors = [f'{rate:>12,.0f} {rate / run.rate - 1:>+7.1%}' for rate in rates]
    mfus = f'{run.mfu:>8.1%} {roofline.mfu(work, of, step.total):>6.1%}'
    print(f'{run.name:<14} {run.topology:<10} {run.kept:<8} {run.rate:>11,.0f}{"".join(errors)}{mfus}  {step.binds}')


if __name__ == '__main__':
  main()
