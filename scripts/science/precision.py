"""Losses in low precision, and outliers with and without Outlier-Safe Pre-Training: docs/science/precision.md.

python scripts/science/precision.py [--quick] [--finished] [--folder runs/precision] [--output FILE]

Runs are made in parallel, one a core, all of one seed before the next. A finished run is kept and one that was stopped
resumes from its last checkpoint: the same command continues. --finished trains nothing and takes the seeds whose runs
are all finished; --quick takes one seed and 40 steps: a check that all of it runs, not a result. The text of the
document from `## Reading` on is written by hand, and kept.
"""

import os
import pathlib
import statistics
from collections.abc import Sequence

os.environ['JAX_PLATFORMS'] = 'cpu'  # before JAX is imported
os.environ.setdefault('XLA_FLAGS', '--xla_force_host_platform_device_count=1')

from quantized import BATCHES, losses_in
from steps import last_loss
from study import Results, Seeds, made_by, parser, write
from trials import RESULT, Trial, group, run_all, summary, table

from pretrain.config import bindings
from pretrain.experiment.experiment import Experiment
from pretrain.records.metrics import read_metrics

CONFIG = 'configs/science/precision.gin'
STEPS, SEEDS = 1000, (0, 1, 2)
LONGER = 'nvfp4_fp8, fifth'  # the last fifth of the steps in bf16; nvfp4_fp8 has the last tenth
# The largest increase of the loss that is allowed, in per cent of the loss in bf16.
BARS = {'int8': 0.3, 'fp8': 0.3, 'nvfp4_fp8': 1.0, LONGER: 1.0}
OUTLIER_SAFE = ("optimizer.name='muon'", "model.norm.scale='single'", 'model.embedding_rotation=True')
MODELS = {'AdamW': 'bf16', 'outlier-safe': 'outlier_safe'}
SIZES = ((48, 2),)  # (width, layers) of other models with AdamW, one seed: does kurtosis grow with size?
POINTS = 10  # of the curves of kurtosis

HEAD = """# Low precision and outliers at small scale

Losses of the recipes of `precision.recipe` ([precision.md](../precision.md)) and of Outlier-Safe Pre-Training (Park et
al. 2025, arXiv:2506.19697) at a size that a laptop can train: the decoder of `configs/science/precision.gin`,
{steps:,} steps of 2,048 tokens of documentation strings, {seeds} seed(s). Runs of one seed have the same data and,
where they have the same parameters, the same first weights. Losses are nats per token of held-out text, mean ± half the
range over seeds; lower is better. All formats are emulated on a CPU. The results say nothing about models with a
billion parameters.
"""


def trials(steps: int, seeds: Sequence[int]) -> list[Trial]:
  """All runs of the study, those of one seed together."""
  in_bf16 = {'precision.recipe': 'bf16', 'precision.overrides': {}}
  plain = lambda part: f"phases=[{{'start_step': {steps - steps // part}, 'set': {in_bf16}}}]"
  four = ("precision.recipe='nvfp4_fp8'", "precision.overrides={'attention': 'fp8'}")
  own = {
    'bf16': (),
    'outlier_safe': OUTLIER_SAFE,
    **{name: (f"precision.recipe='{name}'",) for name in ('int8', 'fp8')},
  }
  own |= {'nvfp4_fp8': (*four, plain(10)), LONGER: (*four, plain(5))}
  scale = tuple(f'{key}={steps}' for key in ('train.steps', 'schedule.steps', 'evaluation.every'))
  scale += (f'schedule.warmup_steps={steps // 20}', f'schedule.decay_steps={steps // 5}')
  scale += (f'train.log_every={max(steps // 100, 1)}',)
  of = lambda seed: [Trial(f'{name}/{seed}', CONFIG, (*own[name], *scale, f'seed={seed}')) for name in own]
  others = [Trial(f'{sized(*size)}/0', CONFIG, (*_sizes(*size), *scale)) for size in SIZES]
  return [trial for seed in seeds for trial in (*of(seed), *(others if seed == SEEDS[0] else ()))]


def sized(width: int, layers: int) -> str:
  return f'AdamW {width} x {layers}'


def _sizes(width: int, layers: int) -> tuple[str, ...]:
  """The proportions of the config, with more heads of the same size."""
  values = {'model.embed': width, 'model.layers': layers, 'model.heads': width // 24, 'model.mlp.hidden': 2 * width}
  return tuple(f'{key}={value}' for key, value in values.items())


def measured(cfg: Experiment, workdir: pathlib.Path) -> dict[str, float]:
  """The held-out loss as the run logs it, in the recipe of its end; what quantization after training makes of it; and
  the kurtosis of the run's last tenth, as the mean of all layers and in the layer with most.
  """
  kurtosis = curve(workdir)[-1]
  after = {f'loss {name}': loss for name, loss in losses_in(cfg, workdir).items()}
  return {**last_loss(cfg, workdir), **after, 'kurtosis': statistics.mean(kurtosis), 'largest kurtosis': max(kurtosis)}


def curve(workdir: pathlib.Path) -> list[list[float]]:
  """The kurtosis of each layer's output, mean of each tenth of a run's logged steps."""
  rows = [row for row in read_metrics(workdir) if 'kurtosis/decoder/0' in row]
  layers = [key for key in rows[0] if key.startswith('kurtosis/')]
  last = rows[-1]['step']
  parts = [[row for row in rows if (row['step'] - 1) * POINTS // last == part] for part in range(POINTS)]
  return [[statistics.mean(row[key] for row in part) for key in layers] for part in parts]


def differences(values: Sequence[float], plain: Sequence[float]) -> tuple[float, float]:
  """The mean of the paired differences and its standard error, both in per cent of the mean of `plain`."""
  each = [100 * (a - b) / statistics.mean(plain) for a, b in zip(values, plain, strict=True)]
  return statistics.mean(each), statistics.stdev(each) / len(each) ** 0.5 if len(each) > 1 else float('nan')


def recipes(results: Results) -> str:
  plain, rows = group(results, 'bf16', 'loss'), []
  rows.append(['bf16', summary(plain), '', '', ''])
  for name, bar in BARS.items():
    losses = group(results, name, 'loss')
    mean, error = differences(losses, plain)
    rows.append([name, summary(losses), f'{mean:+.3f}% ± {error:.3f}%', f'{bar}%', 'yes' if mean <= bar else 'no'])
  return f"""## Recipes

Differences are those of runs with the same seed: their mean, and its standard error, in per cent of the loss in bf16
(`model.dtype` is float32 here). `int8` and `fp8` are evaluated in their own recipe. `nvfp4_fp8` has weights and
activations of the MLP in four bits forward, attention and all gradients in eight, as Zhou et al. 2025
(arXiv:2502.11458) and `configs/decoder/tiny_fp4.gin`, and the last tenth of the steps and the evaluation in bf16. With
`fifth` the last fifth of the steps is in bf16.

{table(['recipe', 'held-out loss', 'difference from bf16', 'bar', 'met'], rows)}
"""


def outliers(results: Results, folder: pathlib.Path) -> str:
  rows = []
  for model, name in MODELS.items():
    value = lambda key, name=name: group(results, name, key)
    rows.append([model, summary(value('kurtosis')), summary(value('largest kurtosis')), summary(value('loss bf16'))])
    for fmt in ('int4', 'nvfp4'):
      added = [a - b for a, b in zip(value(f'loss {fmt}'), value('loss bf16'), strict=True)]
      rows[-1] += [summary(value(f'loss {fmt}')), summary(added)]
  batches = bindings.load(Experiment, [CONFIG]).evaluation.batches
  header = ['model', 'kurtosis', 'of the layer with most', 'loss', 'in int4', 'added', 'in nvfp4', 'added']
  return f"""## Outliers

AdamW with RMS norms, and the same model with Muon, norms with a single scale, and rotations behind the embedding and
before the head (`configs/decoder/tiny_osp.gin` has all three). Kurtosis is the excess over that of normal numbers, of
the output of each layer, in the last tenth of the steps. The last columns quantize weights and activations of all
blocks after training: `int4` rounds to nearest with one scale for each token and each column of a weight, `nvfp4` has
one scale for each 16 numbers. These losses are means over the first {BATCHES} held-out batches,
those in the table of recipes over {batches}.

{table(header, rows)}

Mean kurtosis of all layers and seeds in each tenth of training. `AdamW WIDTH x LAYERS` is a model of another size, with
one seed. The last column is the largest kurtosis of any layer in the last tenth:

{curves(results, folder)}
"""


def curves(results: Results, folder: pathlib.Path) -> str:
  rows = []
  for model, name in (*MODELS.items(), *((sized(*size),) * 2 for size in SIZES)):
    seeds = [curve(folder / run) for run in results if run.rpartition('/')[0] == name]
    tenths = [[value for layers in part for value in layers] for part in zip(*seeds, strict=True)]
    most = summary(group(results, name, 'largest kurtosis'))
    rows.append([model, *(f'{statistics.mean(tenth):.2f}' for tenth in tenths), most])
  return table(['model', *map(str, range(1, POINTS + 1)), 'largest'], rows)


def finished(steps: int, seeds: Seeds, folder: pathlib.Path) -> Seeds:
  """The seeds whose runs are all finished."""
  return tuple(
    seed for seed in seeds if all((folder / trial.name / RESULT).exists() for trial in trials(steps, [seed]))
  )


def main() -> None:
  flags = parser(__doc__, 'runs/precision', 'docs/science/precision.md')
  flags.add_argument('--finished', action='store_true')
  options = flags.parse_args()
  steps, seeds = (40, SEEDS[:1]) if options.quick else (STEPS, SEEDS)
  folder = options.folder / ('quick' if options.quick else 'full')
  if options.finished and not (seeds := finished(steps, seeds, folder)):
    flags.error(f'no seed has all of its runs in {folder}; run without --finished first.')
  results = run_all(trials(steps, seeds), folder, measured)
  head = HEAD.format(steps=steps, seeds=len(seeds))
  write(options.output, [head, made_by(), recipes(results), outliers(results, folder)])


if __name__ == '__main__':
  main()
