"""Full rows against rows of one denoiser, at equal text: writes docs/science/full_rows.md.

python scripts/science/full_rows.py [--quick] [--folder runs/science_full_rows] [--output docs/science/full_rows.md]

--quick takes one seed and a tenth of the tokens: a check that all of it runs, not a result. Finished runs in the folder
are kept; delete it to run them again. The text of the document from `## Reading` on is written by hand, and kept.
"""

import dataclasses
import os
import pathlib
import statistics

os.environ['JAX_PLATFORMS'] = 'cpu'  # before JAX is imported

from score import questions, score
from study import ROOT, Results, at_scale, made_by, parser, scale_of, tokens_per_step, write
from trials import group, run_all, summary, table

from models.flops import flops_per_step
from pretrain.config import bindings
from pretrain.experiment import experiment

FILE = 'configs/ul2/quickstart.gin'
TIMES = 5  # the tokens of other studies: 300 steps, as many as the quickstart has
SHOWN = {'UL2': "UL2's tasks", 'infill': 'infilling', 'prefix': 'prefix'}
SAME = ('mesh.data=1', 'schedule.steps={1}', 'evaluation.every=1000000', 'checkpoint.every=1000000')
# 34 rows of one denoiser have as much text as 32 full rows, within 1%: the steps of both have the same size.
CASES = {
  'one denoiser a row, 128 + 128': ('data.batch_size=34',),
  'full rows, 128 + 81': ("data.packing.name='full_rows'", 'data.targets_length=81', 'data.batch_size=32'),
}
SCORED = {'data.packing.name': 'concat_split', 'data.targets_length': 128, 'data.batch_size': 32}
HEAD = """# Full rows against rows of one denoiser

UL2's quickstart (`{file}`, 3.4M parameters) for {tokens:,} tokens of inputs and targets per run, {seeds} seed(s).
Full rows hold segments of different denoisers, so that encoder and decoder are both full
([data.md](../data.md#full-rows)). The steps of both have the same amount of text within 1%, and there are equally many.
All runs are scored on the same held-out rows of 128 + 128, each of one task. Losses are nats per token of text, mean ±
half the range over seeds; lower is better.
"""


def name_of(case: str) -> str:
  return case.partition(',')[0].replace(' ', '_')


def measure(cfg: experiment.Experiment, workdir: pathlib.Path) -> dict[str, float]:
  """The losses on held-out text, in rows that are the same for all cases."""
  cfg = bindings.override(cfg, SCORED, 'the study')
  return score(cfg, workdir, {'UL2': cfg.objective, **questions(cfg)})


def flops_of(case: str) -> float:
  """FLOPs of a step."""
  cfg = bindings.load(experiment.Experiment, [str(ROOT / FILE)], CASES[case])
  lengths = {'inputs_length': cfg.data.inputs_length, 'targets_length': cfg.data.targets_length}
  return cfg.data.batch_size * flops_per_step(cfg.model, **lengths)


def section(results: Results) -> str:
  first, lines = next(iter(CASES)), []
  mean = lambda case: statistics.mean(group(results, name_of(case), 'UL2'))
  for case, overrides in CASES.items():
    flops, losses = flops_of(case), [summary(group(results, name_of(case), key)) for key in SHOWN]
    lines.append([
      case, f'{tokens_per_step(FILE, overrides):,.0f}', f'{flops / 1e9:.1f}', f'{flops / flops_of(first):.2f}', *losses,
      f'{mean(case) - mean(first):+.3f}',
    ])  # fmt: skip
  header = ['rows', 'tokens a step', 'GFLOPs a step', 'to the first', *SHOWN.values(), "UL2's, to the first"]
  return f'## Losses at equal text\n\n{table(header, lines)}\n'


def main() -> None:
  options = parser(__doc__, 'runs/science_full_rows', 'docs/science/full_rows.md').parse_args()
  scale, folder = scale_of(options)
  scale = dataclasses.replace(scale, tokens=TIMES * scale.tokens)
  trials = [at_scale(name_of(case), FILE, (*SAME, *CASES[case]), scale, seed) for seed in scale.seeds for case in CASES]
  results = run_all(trials, folder, measure)
  head = HEAD.format(file=FILE, tokens=scale.tokens, seeds=len(scale.seeds))
  write(options.output, [head, made_by(), section(results)])


if __name__ == '__main__':
  main()
