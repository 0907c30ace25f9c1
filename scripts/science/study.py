"""Shared by all studies: the scale of a run, equal numbers of tokens, flags, and writing the document."""

import argparse
import dataclasses
import datetime
import fractions
import functools
import os
import pathlib
import platform
import re
import sys
from collections.abc import Mapping, Sequence

import jax
from trials import Trial

from data.batches.source import open_data
from pretrain.config import bindings
from pretrain.devices.compilation_cache import cache_dir
from pretrain.experiment import experiment

ROOT = pathlib.Path(__file__).resolve().parents[2]
READING = '## Reading\n'
Seeds = tuple[int, ...]
Results = Mapping[str, Mapping[str, float]]
Wanted = Sequence[tuple[str, str, tuple[str, ...]]]  # (name, gin file, overrides); {1/5} is a fifth of the steps


@dataclasses.dataclass(frozen=True)
class Scale:
  tokens: int
  seeds: Seeds


FULL = Scale(tokens=400_000, seeds=(0, 1, 2))
QUICK = Scale(tokens=40_000, seeds=(0,))


@functools.cache
def tokens_per_step(gin_file: str, overrides: tuple[str, ...]) -> float:
  """Tokens of inputs and targets in a batch, without padding: the mean of 20 batches."""
  cfg = bindings.load(experiment.Experiment, [str(ROOT / gin_file)], overrides)
  data = open_data(cfg.data, cfg.objective, seed=0, vocab_size=cfg.model.vocab_size, cache_dir=cache_dir())
  batches = [data.batch(step, slice(0, cfg.data.batch_size)) for step in range(20)]
  return sum(int((v > 0).sum()) for batch in batches for k, v in batch.items() if k.endswith('_segment_ids')) / 20


def at_scale(name: str, gin_file: str, overrides: tuple[str, ...], scale: Scale, seed: int) -> Trial:
  """The trial with the number of steps that uses the tokens of `scale`; {a/b} in an override is that share of steps."""
  unscaled = tuple(o for o in overrides if '{' not in o and not o.startswith('schedule.'))
  steps = round(scale.tokens / tokens_per_step(gin_file, unscaled))
  part = lambda found: str(max(round(steps * float(fractions.Fraction(found[1]))), 1))
  scaled = tuple(re.sub(r'\{([\d/]+)\}', part, o) for o in overrides)
  warmup = f'schedule.warmup_steps={max(steps // 20, 1)}'
  return Trial(f'{name}/{seed}', gin_file, (*scaled, warmup, f'train.steps={steps}', f'seed={seed}'))


def parser(description: str, folder: str, document: str) -> argparse.ArgumentParser:
  """The flags of a study: the folder of its runs and the document it writes."""
  flags = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
  flags.add_argument('--quick', action='store_true')
  flags.add_argument('--folder', type=pathlib.Path, default=pathlib.Path(folder))
  flags.add_argument('--output', type=pathlib.Path, default=ROOT / document)
  return flags


def scale_of(options: argparse.Namespace) -> tuple[Scale, pathlib.Path]:
  """How much to run, and the folder of the runs."""
  return (QUICK, options.folder / 'quick') if options.quick else (FULL, options.folder / 'full')


def made_by() -> str:
  """The sentence that tells how a document was made."""
  command = 'python ' + ' '.join([str(pathlib.Path(sys.argv[0])), *sys.argv[1:]])
  where = f'{len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}, jax {jax.__version__}'
  return f'Made by `{command}` on {datetime.date.today()}: {where}.\n'


def write(document: pathlib.Path, parts: Sequence[str]) -> None:
  """Writes a document; text written by hand under the tables is kept."""
  document.parent.mkdir(parents=True, exist_ok=True)
  document.write_text('\n'.join([*parts, reading(document)]))
  print(document)


def reading(document: pathlib.Path) -> str:
  """The text written by hand under the tables, which is kept when they are made again."""
  old = document.read_text() if document.exists() else ''
  return READING + old.partition(READING)[2] if READING in old else ''
