"""Objectives, architectures, optimizers, schedules and averages at equal tokens: writes docs/science/objectives.md.

python scripts/science/objectives.py [--quick] [--folder runs/science] [--output docs/science/objectives.md]

Every run has the same number of tokens (inputs and targets, without padding). --quick takes one seed and a tenth of
them: a check that all of it runs, not a result. Finished runs in the folder are kept; delete it to run them again.
What stands in the document from `## Reading` on is written by hand, and kept.
"""

import argparse
import datetime
import fractions
import functools
import os
import pathlib
import platform
import re

os.environ['JAX_PLATFORMS'] = 'cpu'  # before JAX is imported

import jax
from score import score
from sections import GROUPS, Results, Scale, Wanted
from trials import Trial, command_line, run_all

from data.source import open_data
from pretrain import config, experiment, runtime

ROOT = pathlib.Path(__file__).resolve().parents[2]
FULL = Scale(tokens=400_000, seeds=(0, 1, 2))
QUICK = Scale(tokens=40_000, seeds=(0,))
READING = '## Reading\n'
HEAD = """# Objectives, optimizers, schedules and averages at small scale

What the methods of this repository do at a size where a laptop shows it: {tokens:,} tokens of documentation strings for
each run, models of 0.9M parameters, {seeds} seed(s). Numbers are nats per token of held-out text, mean ± half the range
over seeds; lower is better. Differences smaller than the ranges are not differences. Nothing here says what happens at
a billion parameters; where a paper's effect did not show, that is said.

Made by `{command}` on {date}: {cores} cores, Python {python}, jax {jax}.
"""


@functools.cache
def tokens_per_step(gin_file: str, overrides: tuple[str, ...]) -> float:
  """Tokens of inputs and targets in a batch, without padding: the mean of 20 batches."""
  cfg = config.load(experiment.Experiment, [str(ROOT / gin_file)], overrides)
  size, cache = cfg.model.vocab_size, runtime.cache_dir()
  data = open_data(cfg.data, cfg.objective, seed=0, vocab_size=size, cache_dir=cache)
  batch = data.global_rows(0, 20 * cfg.data.batch_size)
  return sum(int((v > 0).sum()) for k, v in batch.items() if k.endswith('_segment_ids')) / 20


def at_scale(name: str, gin_file: str, overrides: tuple[str, ...], scale: Scale, seed: int) -> Trial:
  """The trial with as many steps as make the tokens of `scale`, and {a/b} of them where an override says so."""
  unscaled = tuple(o for o in overrides if '{' not in o and not o.startswith('schedule.'))
  steps = round(scale.tokens / tokens_per_step(gin_file, unscaled))
  part = lambda found: str(max(round(steps * float(fractions.Fraction(found[1]))), 1))
  scaled = tuple(re.sub(r'\{([\d/]+)\}', part, o) for o in overrides)
  warmup = f'schedule.warmup_steps={max(steps // 20, 1)}'
  return Trial(f'{name}/{seed}', gin_file, (*scaled, warmup, f'train.steps={steps}', f'seed={seed}'))


def run_group(folder: pathlib.Path, scale: Scale, wanted: Wanted, seeds: tuple[int, ...]) -> Results:
  """The scores of each wanted run, by `name/seed`."""
  trials = [at_scale(name, file, overrides, scale, seed) for name, file, overrides in wanted for seed in seeds]
  return run_all(trials, folder, score)


def reading(document: pathlib.Path) -> str:
  """What a person has written under the tables, which stays when they are made anew."""
  old = document.read_text() if document.exists() else ''
  return READING + old.partition(READING)[2] if READING in old else ''


def main() -> None:
  flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  flags.add_argument('--quick', action='store_true')
  flags.add_argument('--folder', type=pathlib.Path, default=pathlib.Path('runs/science'))
  flags.add_argument('--output', type=pathlib.Path, default=ROOT / 'docs/science/objectives.md')
  flags.add_argument('--groups', nargs='+', default=list(GROUPS), choices=list(GROUPS))
  options = flags.parse_args()
  scale, folder = (QUICK, options.folder / 'quick') if options.quick else (FULL, options.folder / 'full')
  parts = [HEAD.format(
    tokens=scale.tokens, seeds=len(scale.seeds), command=command_line(), date=datetime.date.today(),
    cores=len(os.sched_getaffinity(0)), python=platform.python_version(), jax=jax.__version__,
  )]  # fmt: skip
  run = functools.partial(run_group, folder, scale)
  parts += [GROUPS[name](run, scale.seeds) for name in options.groups]
  options.output.parent.mkdir(parents=True, exist_ok=True)
  options.output.write_text('\n'.join([*parts, reading(options.output)]))
  print(options.output)


if __name__ == '__main__':
  main()
