"""Length buckets against rows of one length, at equal tokens: writes docs/science/packing.md and packing.png.

python scripts/science/packing.py [--quick] [--seeds 3] [--folder runs/science_packing] [--output …/packing.md]

--quick takes one seed and a tenth of the tokens: a check that all of it runs, not a result. Finished runs in the folder
are kept; delete it to run them again. The text of the document from `## Reading` on is written by hand, and kept.
"""

import dataclasses
import os
import pathlib
import statistics

os.environ['JAX_PLATFORMS'] = 'cpu'  # before JAX is imported

import numpy as np
from steps import Rows, curve, last_loss, logged_seconds, row_lengths, step_flops, step_times
from study import ROOT, Results, Scale, at_scale, made_by, parser, scale_of, write
from trials import Trial, run_all, summary, table

from pretrain.config import bindings
from pretrain.experiment import experiment
from pretrain.records.metrics import read_metrics
from pretrain.records.plots import BLUE, EVALUATION, LOOK, figure, pyplot

BUCKETS = 'configs/decoder/tiny_dd.gin'
COMMON = (
  "schedule.name='cosine'", 'schedule.peak=0.01', 'schedule.steps={1}', 'train.log_every=1', 'evaluation.every={1/8}',
  'evaluation.batches=8',
)  # fmt: skip
CASES = {
  'concat-split': ("data.packing.name='concat_split'",),
  'best-fit': ("data.packing.name='best_fit'",),
  'buckets, odds 2': (),
  'buckets, odds 1': ('data.packing.odds=1.0',),
}
COLORS = dict(zip(CASES, ('#555555', EVALUATION[3], BLUE, EVALUATION[0]), strict=True))
Runs = dict[str, list[Rows]]  # the metrics of each seed
HEAD = """# Rows of several lengths against rows of one

Dataset Decomposition (Pouransari et al. 2024, arXiv:2405.13226) at a size that a laptop can train: the 0.9M-parameter
decoder of `{file}`, {tokens:,} tokens of documentation strings per run, {seeds} seed(s). Rows of
{lengths} tokens, one length per step, are compared with concat-split and best-fit in rows of the longest
length; a step always has {step:,} tokens. AdamW, peak learning rate 0.01, cosine to a tenth. Losses are nats per token
of held-out text, for all runs in concat-split rows of the longest length, mean ± half the range over seeds; lower is
better. Differences smaller than the ranges are not significant.
"""


def run(folder: pathlib.Path, scale: Scale) -> tuple[Results, Runs]:
  """(times of a step of each length, metrics of the runs of each case). Steps are timed after the runs."""
  trials = {case: [trial(case, scale, seed) for seed in scale.seeds] for case in CASES}
  run_all([one for seed in zip(*trials.values(), strict=True) for one in seed], folder, last_loss)
  times = run_all([Trial('step_times', BUCKETS, ('train.steps=1',))], folder, step_times)
  return times, {case: [read_metrics(folder / one.name) for one in own] for case, own in trials.items()}


def trial(case: str, scale: Scale, seed: int) -> Trial:
  return at_scale(case.replace(',', '').replace(' ', '_'), BUCKETS, (*CASES[case], *COMMON), scale, seed)


def times_section(times: Results, runs: Runs, flops: dict[int, float]) -> str:
  own, longest = times['step_times'], max(flops)
  logged = [logged_seconds(rows, longest) for seeds in runs.values() for rows in seeds]
  lines = []
  for n in flops:
    low, median, high = (own[f'cpu {n} {key}'] for key in ('low', 'median', 'high'))
    seconds = [value for found in logged for value in found.get(n, ())]
    lines.append([
      str(n), f'{flops[n] / 1e9:.1f}', f'{flops[n] / flops[longest]:.2f}', f'{median:.3f} ({low:.3f} to {high:.3f})',
      f'{median / own[f"cpu {longest} median"]:.2f}', f'{own[f"wall {n} median"]:.3f}',
      f'{statistics.median(seconds):.3f}' if seconds else '',
    ])  # fmt: skip
  header = ['row length', 'GFLOPs', 'to the longest', 'CPU seconds', 'to the longest', 'wall seconds', 'logged']
  return f"""## What a step takes

Forward and backward pass; medians, with quartiles in brackets. One process on one core ran the lengths one after
another, 25 times each, after the training runs. CPU seconds are those of this process; other work on the machine hardly
changes them. Wall seconds are from the same measurement. "Logged" is `step_seconds` of the training runs themselves,
which ran in parallel on all cores, without the rows in which a length was compiled.

{table(header, lines)}
"""


def losses_section(runs: Runs, seconds: dict[int, float], flops: dict[int, float]) -> str:
  least = min(total(rows, seconds) for seeds in runs.values() for rows in seeds)
  lines = []
  for case, seeds in runs.items():
    shares = np.mean([[(row_lengths(rows, max(flops)) == n).mean() for n in flops] for rows in seeds], 0)
    cut = [float(np.interp(least, *curve(rows, seconds))) for rows in seeds]
    lines.append([
      case, ' / '.join(f'{100 * share:.0f}' for share in shares), f'{statistics.mean(map(tokens_of, seeds)):,.0f}',
      f'{statistics.mean(total(rows, flops) for rows in seeds) / 1e12:.3f}',
      f'{statistics.mean(total(rows, seconds) for rows in seeds):.1f}',
      summary(curve(rows, seconds)[1][-1] for rows in seeds), summary(cut),
    ])  # fmt: skip
  lengths = ' / '.join(map(str, flops))
  header = ['rows', f'% of steps of {lengths}', 'tokens', 'TFLOPs', 'seconds', 'loss', f'loss at {least:.1f} s']
  return f"""## Loss against compute

Seconds are the number of steps of each length times the median CPU seconds of such a step (table above), because wall
time would include other work on the machine. The last column is interpolated linearly between evaluations, at the time
when the cheapest run ends.

{table(header, lines)}

![Held-out loss against seconds of training](packing.png)
"""


def total(rows: Rows, costs: dict[int, float]) -> float:
  return sum(costs[n] for n in row_lengths(rows, max(costs)).tolist())


def tokens_of(rows: Rows) -> float:
  """The number of tokens that a run was trained on, without padding."""
  return sum(row['tokens_per_second'] * row['step_seconds'] for row in rows)


def draw(runs: Runs, seconds: dict[int, float], path: pathlib.Path) -> None:
  """Plots held-out loss against seconds: the mean over seeds, with their range as a band."""
  plt = pyplot()
  with plt.rc_context(LOOK), figure(plt, path, (9.6, 4.2)) as axes:
    for case, seeds in runs.items():
      spent, losses = zip(*(curve(rows, seconds) for rows in seeds), strict=True)
      at = np.mean(spent, 0)
      axes.plot(at, np.mean(losses, 0), 'o-', markersize=3.5, color=COLORS[case], label=case)
      axes.fill_between(at, np.min(losses, 0), np.max(losses, 0), color=COLORS[case], alpha=0.15, linewidth=0)
    axes.set(title='Held-out loss against compute', xlabel='seconds of training on one core', ylabel='nats per token')
    axes.legend()


def main() -> None:
  flags = parser(__doc__, 'runs/science_packing', 'docs/science/packing.md')
  flags.add_argument('--seeds', type=int)
  options = flags.parse_args()
  scale, folder = scale_of(options)
  scale = dataclasses.replace(scale, seeds=tuple(range(options.seeds)) if options.seeds else scale.seeds)
  times, runs = run(folder, scale)
  cfg = bindings.load(experiment.Experiment, [str(ROOT / BUCKETS)])
  flops = step_flops(cfg)
  seconds = {n: times['step_times'][f'cpu {n} median'] for n in flops}
  head = HEAD.format(
    file=BUCKETS, tokens=scale.tokens, seeds=len(scale.seeds), lengths=', '.join(map(str, flops)),
    step=cfg.data.batch_size * cfg.data.targets_length,
  )  # fmt: skip
  parts = [head, made_by(), times_section(times, runs, flops), losses_section(runs, seconds, flops)]
  write(options.output, parts)
  draw(runs, seconds, options.output.with_name('packing.png'))


if __name__ == '__main__':
  main()
