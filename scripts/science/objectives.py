"""Objectives, architectures, optimizers, schedules and averages at equal tokens: writes docs/science/objectives.md.

python scripts/science/objectives.py [--quick] [--folder runs/science] [--output docs/science/objectives.md]

Every run has the same number of tokens (inputs and targets, without padding). --quick takes one seed and a tenth of
them: a check that all of it runs, not a result. Finished runs in the folder are kept; delete it to run them again.
The text of the document from `## Reading` on is written by hand, and kept.
"""

import functools
import os
import pathlib

os.environ['JAX_PLATFORMS'] = 'cpu'  # before JAX is imported

from score import score
from sections import GROUPS
from study import Results, Scale, Seeds, Wanted, at_scale, made_by, parser, scale_of, write
from trials import run_all

HEAD = """# Objectives, optimizers, schedules and averages at small scale

The methods of this repository, compared at a size that a laptop can train: {tokens:,} tokens of documentation strings
per run, models with 0.9M parameters, {seeds} seed(s). Numbers are nats per token of held-out text, mean ± half the
range over seeds; lower is better. Differences smaller than the ranges are not significant. The results say nothing
about models with a billion parameters. If an effect from a paper did not appear, the text says so.
"""


def run_group(folder: pathlib.Path, scale: Scale, wanted: Wanted, seeds: Seeds) -> Results:
  """The scores of each wanted run, by `name/seed`."""
  trials = [at_scale(name, file, overrides, scale, seed) for name, file, overrides in wanted for seed in seeds]
  return run_all(trials, folder, score)


def main() -> None:
  flags = parser(__doc__, 'runs/science', 'docs/science/objectives.md')
  flags.add_argument('--groups', nargs='+', default=list(GROUPS), choices=list(GROUPS))
  options = flags.parse_args()
  scale, folder = scale_of(options)
  head = HEAD.format(tokens=scale.tokens, seeds=len(scale.seeds))
  run = functools.partial(run_group, folder, scale)
  write(options.output, [head, made_by(), *(GROUPS[name](run, scale.seeds) for name in options.groups)])


if __name__ == '__main__':
  main()
