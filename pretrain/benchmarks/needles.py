"""A fact in a long text, asked for at its end: the share of answers that are right, by length and depth.

Source: G. Kamradt 2023, "Needle in a haystack"; passkeys: Mohtashami and Jaggi 2023, arXiv:2305.16300, §4.2.
"""

import dataclasses
import itertools
from typing import Any

import numpy as np

from data.objectives.objectives import Instruction, Supervised
from pretrain.benchmarks.scoring import Piece, Scorer
from pretrain.errors import ConfigError
from pretrain.evaluation.prompts import continues_text, framed
from pretrain.evaluation.writer import Writer

FILLER = (
  'The road goes along the river and then up the hill. There are trees on both sides, and the grass is green. '
  'In the morning people walk to the market, and in the evening they walk home. The sky is blue and the sun is warm. '
)
PLACES = ('garden', 'kitchen', 'library', 'station', 'harbour', 'museum', 'school', 'bridge')


@dataclasses.dataclass(frozen=True)
class Haystacks:
  """`trials` questions for each length (tokens, question and answer included) and depth (0: the beginning)."""

  lengths: tuple[int, ...]
  depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
  trials: int = 8
  seed: int = 0


def check_haystacks(wanted: Haystacks) -> None:
  """Raises ConfigError, naming the flag, for a value out of range."""
  if bad := [depth for depth in wanted.depths if not 0 <= depth <= 1]:
    raise ConfigError(f'--needle_depths: {bad[0]:g} is no depth; each must be from 0 (the beginning) to 1 (the end).')
  if wanted.trials < 1:
    raise ConfigError(f'--needle_trials={wanted.trials}; it must be at least 1.')


def probe(scorer: Scorer, wanted: Haystacks, said=lambda done: None) -> dict[str, Any]:
  """`accuracy` and `nats_per_token` of the answers, [lengths][depths].

  An answer is right if each of its tokens is the most likely one after those before it: a greedy output would be right.
  Raises ConfigError for a length that has no room for the question.
  """
  objective = scorer.writer.cfg.objective
  if isinstance(objective, Supervised | Instruction):
    raise ConfigError(
      f"--needle_lengths: a run with objective.name='{objective.name}' neither continues text nor fills blanks; use "
      '--exact or --rank with your own questions.'
    )
  cells = list(itertools.product(wanted.lengths, wanted.depths))
  keys = [(length, depth, trial) for length, depth in cells for trial in range(wanted.trials)]
  scored = iter(scorer([haystack(scorer.writer, *key, wanted.seed) for key in keys], said))
  blank = not continues_text(scorer.writer.cfg)
  found = [[next(scored) for _ in range(wanted.trials)] for _ in cells]
  shape = len(wanted.lengths), len(wanted.depths)
  right = [np.mean([own.correct[blank:].all() for own in cell]) for cell in found]
  nats = [np.mean([own.nats[blank:].mean() for own in cell]) for cell in found]
  return {
    'lengths': list(wanted.lengths), 'depths': list(wanted.depths), 'trials': wanted.trials,
    'accuracy': np.reshape(right, shape).tolist(), 'nats_per_token': np.reshape(nats, shape).tolist(),
  }  # fmt: skip


def haystack(writer: Writer, length: int, depth: float, trial: int, seed: int) -> Piece:
  """Filler with a needle at `depth`, and the question; the answer is the targets. All of it has `length` tokens.

  A model that does not continue text is asked with a blank, whose sentinel comes first in the targets.
  """
  rng = np.random.default_rng([seed, trial])
  place, number = PLACES[rng.integers(len(PLACES))], rng.integers(10_000, 100_000)
  encode, blank = writer.data.tokenizer.encode, not continues_text(writer.cfg)
  question = f'The secret number of the {place} is'
  needle, asked = encode(f'{question} {number}.'), encode(question)
  answer = encode(f'{question} {number}')[len(asked) :]
  targets = [writer.data.vocabulary.first_sentinel, *answer] if blank else answer
  frame = len(framed([], writer.cfg, writer.data, blank))
  room = length - len(needle) - len(asked) - len(targets) - frame
  if room < 0:
    raise ConfigError(
      f'--needle_lengths: {length} tokens do not hold the question, which has {length - room} in this trial; use more, '
      f'e.g. {2 * (length - room)}.'
    )
  filler = encode(FILLER)
  filler = (filler * (room // len(filler) + 1))[:room]
  cut = round(depth * room)
  return Piece(framed([*filler[:cut], *needle, *filler[cut:], *asked], writer.cfg, writer.data, blank), targets)
