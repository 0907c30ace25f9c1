"""Noise replaced by sentinels, and prefixes: pieces of text -> inputs and targets."""

from collections.abc import Sequence

import numpy as np

from data.objectives.masking import corrupt
from data.objectives.noise import noise_masks, replace_runs, roll
from data.objectives.tasks import Task
from data.ragged import Ragged, starts
from data.stores.vocabulary import Vocabulary


class Recipes:
  """The tasks of an objective as tables over (task, length of a piece), for pieces of at most `longest` tokens."""

  def __init__(self, tasks: Sequence[Task], longest: int, vocabulary: Vocabulary):
    counts = [task.counts(np.arange(longest + 1)) for task in tasks]
    self._noise, self._spans = (np.stack(table) for table in zip(*counts, strict=True))
    self._iid = np.array([task.kind == 'iid' for task in tasks])
    self._density = np.array([task.noise_density for task in tasks])
    self._most = np.stack([task.most_hidden(np.arange(longest + 1)) for task in tasks])
    marked = [task.kind == 'spans' or (task.kind == 'iid' and task.hide == 'sentinel_per_run') for task in tasks]
    self._sentinels = np.array(marked)
    self._one_by_one = np.array([task.kind == 'iid' and task.hide == 'mask' for task in tasks])
    self._random = np.array([task.random if task.kind == 'iid' else 0.0 for task in tasks])
    self._full = np.array([task.full for task in tasks])
    self._rolls = np.array([task.random_roll for task in tasks])
    modes = [-1 if task.mode is None else vocabulary.mode_ids[task.mode] for task in tasks]
    self._modes = np.array(modes, np.int32)
    self._vocabulary = vocabulary

  def apply(self, tokens: Ragged, tasks: np.ndarray, bits: np.ndarray) -> tuple[Ragged, Ragged]:
    """(inputs, targets) of each piece: [mode] text with holes EOS, and what was in the holes EOS.

    `tasks` is int[pieces]. `bits` is uint64[tokens + pieces], random: for each piece one for each token, then one
    more. Pieces are not empty. A piece's result depends on its own tokens, task and bits alone.
    """
    lengths, begins = tokens.lengths, starts(tokens.lengths)
    one_more = np.zeros(len(bits), bool)
    one_more[np.cumsum(lengths + 1) - 1] = True
    own, bits = bits[one_more], bits[~one_more]
    hidden, sentinels = self._hidden(lengths, tasks, own, bits), np.repeat(self._sentinels[tasks], lengths)
    inputs = replace_runs(tokens.values, hidden, begins, self._vocabulary.first_sentinel, sentinels)
    targets = replace_runs(tokens.values, ~hidden, begins, self._vocabulary.first_sentinel, sentinels)
    if self._one_by_one.any():
      inputs = self._mask(tokens.values, hidden, np.repeat(tasks, lengths), bits, inputs)
    if self._full.any():
      full = np.repeat(self._full[tasks], lengths)
      targets = np.where(full, tokens.values, targets[0]), targets[1] | full
    sides = []
    for (values, keep), modes in ((inputs, self._modes[tasks]), (targets, np.full(len(lengths), -1, np.int32))):
      kept = np.add.reduceat(keep, begins, dtype=np.int64)
      sides.append(_frame(Ragged(values[keep], kept), modes, self._vocabulary.ids.end))
    return sides[0], sides[1]

  def _hidden(self, lengths: np.ndarray, tasks: np.ndarray, own: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """bool[tokens]: the tokens that inputs do not show."""
    noise, spans = self._noise[tasks, lengths], self._spans[tasks, lengths]
    noise = np.where(noise < 0, lengths - uniform_prefix(lengths, own), noise)
    mask = noise_masks(lengths, noise, spans, bits)
    if self._rolls.any():
      mask = np.where(np.repeat(self._rolls[tasks], lengths), roll(mask, lengths, own), mask)
    if self._iid.any():
      iid = iid_masks(lengths, self._density[tasks], self._most[tasks, lengths], bits)
      mask = np.where(np.repeat(self._iid[tasks], lengths), iid, mask)
    return mask

  def _mask(self, tokens, hidden, tasks, bits, inputs: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """`inputs`, with the mask token or a random piece for each hidden token, in tasks that hide tokens one by one."""
    own, random = self._one_by_one[tasks], self._random[tasks]
    read = np.where(hidden, corrupt(tokens, bits, 1 - random, random, self._vocabulary), tokens)
    return np.where(own, read, inputs[0]), inputs[1] | own


def iid_masks(lengths: np.ndarray, density: np.ndarray, most: np.ndarray, bits: np.ndarray) -> np.ndarray:
  """bool[tokens]: each token of a piece with probability `density`, but no more than `most` (arrays over pieces).

  The first 24 bits of a token's number decide; the others are independent of them. Source: t5/data/preprocessors.py
  iid_noise_mask.
  """
  mask = bits >> np.uint64(40) < np.repeat(np.rint(density * 2.0**24).astype(np.uint64), lengths)
  count, begins = np.cumsum(mask), starts(lengths)
  before = count[begins] - mask[begins]
  return mask & (count - np.repeat(before, lengths) <= np.repeat(most, lengths))


def uniform_prefix(lengths: np.ndarray, bits: np.ndarray) -> np.ndarray:
  """The length of each prefix: uniform in [1, length - 1], 0 for a single token."""
  choices = np.maximum(lengths - 1, 1).astype(np.uint64)
  return np.where(lengths > 1, 1 + (bits % choices).astype(np.int64), 0)


def _frame(pieces: Ragged, modes: np.ndarray, eos: int) -> Ragged:
  """Each piece between its mode token (none where negative) and `eos`."""
  has_mode = modes >= 0
  lengths = pieces.lengths + has_mode + 1
  ends, text = np.cumsum(lengths) - 1, np.ones(lengths.sum(), bool)
  text[ends] = False
  text[starts(lengths)[has_mode]] = False
  values = np.empty(len(text), np.int32)
  values[text] = pieces.values
  values[starts(lengths)[has_mode]] = modes[has_mode]
  values[ends] = eos
  return Ragged(values, lengths)
