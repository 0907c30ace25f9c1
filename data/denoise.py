"""Pieces of text -> inputs and targets: many pieces at once for rows, one piece for people and tests."""

import numpy as np

from data.masking import mask_tokens
from data.noise import noise_masks, replace_runs, roll
from data.ragged import Ragged, join, starts
from data.tasks import Task
from data.vocabulary import EOS, Vocabulary


class Recipes:
  """The tasks of an objective as tables over (task, length of a piece), for pieces of at most `longest` tokens."""

  def __init__(self, tasks: tuple[Task, ...], longest: int, vocabulary: Vocabulary):
    counts = [task.counts(np.arange(longest + 1)) for task in tasks]
    self._noise, self._spans = (np.stack(table) for table in zip(*counts, strict=True))
    self._sentinels = np.array([task.kind == 'spans' for task in tasks])
    self._rolls = np.array([task.random_roll for task in tasks])
    modes = [-1 if task.mode is None else vocabulary.mode_ids[task.mode] for task in tasks]
    self._modes = np.array(modes, np.int32)
    self._first_sentinel = vocabulary.first_sentinel

  def apply(self, tokens: Ragged, tasks: np.ndarray, bits: np.ndarray) -> tuple[Ragged, Ragged]:
    """(inputs, targets) of each piece: [mode] text with holes EOS, and what was in the holes EOS.

    `tasks` is int[pieces]. `bits` is uint64[tokens + pieces], random: for each piece one for each token, then one
    more. Pieces are not empty. A piece's result depends on its own tokens, task and bits alone.
    """
    lengths = tokens.lengths
    one_more = np.zeros(len(bits), bool)
    one_more[np.cumsum(lengths + 1) - 1] = True
    own = bits[one_more]
    noise, spans = self._noise[tasks, lengths], self._spans[tasks, lengths]
    noise = np.where(noise < 0, lengths - _uniform_prefix(lengths, own), noise)
    mask = noise_masks(lengths, noise, spans, bits[~one_more])
    if self._rolls.any():
      mask = np.where(np.repeat(self._rolls[tasks], lengths), roll(mask, lengths, own), mask)
    begins, sentinels = starts(lengths), np.repeat(self._sentinels[tasks], lengths)
    sides = []
    for hidden, modes in ((mask, self._modes[tasks]), (~mask, np.full(len(lengths), -1, np.int32))):
      values, keep = replace_runs(tokens.values, hidden, begins, self._first_sentinel, sentinels)
      kept = np.add.reduceat(keep, begins, dtype=np.int64)
      sides.append(_frame(Ragged(values[keep], kept), modes))
    return sides[0], sides[1]


def _uniform_prefix(lengths: np.ndarray, bits: np.ndarray) -> np.ndarray:
  """The length of each prefix: uniform in [1, length - 1], 0 for a single token."""
  choices = np.maximum(lengths - 1, 1).astype(np.uint64)
  return np.where(lengths > 1, 1 + (bits % choices).astype(np.int64), 0)


def _frame(pieces: Ragged, modes: np.ndarray) -> Ragged:
  """Each piece between its mode token (none where negative) and EOS."""
  has_mode = modes >= 0
  lengths = pieces.lengths + has_mode + 1
  ends, text = np.cumsum(lengths) - 1, np.ones(lengths.sum(), bool)
  text[ends] = False
  text[starts(lengths)[has_mode]] = False
  values = np.empty(len(text), np.int32)
  values[text] = pieces.values
  values[starts(lengths)[has_mode]] = modes[has_mode]
  values[ends] = EOS
  return Ragged(values, lengths)


def example(tokens, task: Task, vocabulary: Vocabulary, rng: np.random.Generator) -> dict[str, np.ndarray]:
  """{'inputs', 'targets'} of one piece under `task`, both int32 and ending with EOS; a masked one has 'chosen' too.

  >>> from data.objectives import SpanCorruption, tasks_of
  >>> task, = tasks_of(SpanCorruption(noise_density=0.5, mean_noise_span_length=4.0))
  >>> e = example(range(10, 18), task, Vocabulary(100, 4), np.random.default_rng(0))
  >>> e['inputs'].tolist(), e['targets'].tolist()
  ([10, 11, 12, 13, 103, 1], [103, 14, 15, 16, 17, 1])
  >>> from data.objectives import Ul2
  >>> last = tasks_of(Ul2(s_mode='last_quarter'))[-1]
  >>> e = example(range(10, 18), last, Vocabulary(100, 4), np.random.default_rng(0))
  >>> e['inputs'].tolist(), e['targets'].tolist()
  ([106, 10, 11, 12, 13, 14, 15, 1], [16, 17, 1])
  >>> from data.objectives import MaskedLm
  >>> task, = tasks_of(MaskedLm(rate=0.25, mask=1.0, random=0.0))
  >>> e = example(range(10, 18), task, Vocabulary(100, 4), np.random.default_rng(0))
  >>> e['inputs'].tolist(), e['targets'][e['chosen']].tolist()
  ([10, 11, 103, 103, 14, 15, 16, 17, 1], [12, 13])
  """
  piece = join([np.asarray(list(tokens), np.int32)])
  if task.kind == 'causal':
    return {'inputs': np.zeros(0, np.int32), 'targets': piece.values}
  length = len(piece.values)
  if not length:
    raise ValueError('an example needs at least one token.')
  bits = rng.integers(0, 2**64, length + 1, np.uint64)
  if task.kind == 'masked':
    inputs, targets, chosen = mask_tokens(piece, bits, task, vocabulary)
    return {'inputs': inputs.values, 'targets': targets, 'chosen': chosen}
  inputs, targets = Recipes((task,), length, vocabulary).apply(piece, np.zeros(1, np.int64), bits)
  return {'inputs': inputs.values, 'targets': targets.values}
