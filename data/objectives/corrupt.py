"""Pieces of text -> inputs and targets of their tasks: many at once for rows, one for people and tests."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from data.objectives.denoise import Recipes
from data.objectives.fim import FillInMiddle
from data.objectives.infilling import Infilling
from data.objectives.lexicon import Lexicon
from data.objectives.masking import mask_tokens
from data.objectives.tasks import LEFT_TO_RIGHT, Task
from data.ragged import Ragged, first_of, join, merge, select
from data.stores.vocabulary import Vocabulary


@runtime_checkable
class Maker(Protocol):
  def apply(self, tokens: Ragged, tasks: np.ndarray, bits: np.ndarray) -> tuple[Ragged, Ragged]: ...


class Causal:
  """The text is its own target; there are no inputs."""

  def apply(self, tokens: Ragged, tasks: np.ndarray, bits: np.ndarray) -> tuple[Ragged, Ragged]:
    return Ragged(np.zeros(0, np.int32), np.zeros_like(tokens.lengths)), tokens


class Corruption:
  """The tasks of an objective, for pieces of at most `longest` tokens.

  `ends`: pieces may end with the EOS of their document, since some tasks see it; the others put their own, and leave
  that one out (unless it is all there is).
  """

  def __init__(self, tasks: Sequence[Task], longest: int, vocabulary: Vocabulary, lexicon: Lexicon, *, ends: bool):
    makers = {
      ('causal',): Causal,
      ('fim',): lambda: FillInMiddle(tasks, vocabulary, lexicon.halves),
      ('infilling',): lambda: Infilling(tasks, longest, vocabulary, lexicon),
      ('uniform_prefix', 'last_quarter', 'spans', 'iid'): lambda: Recipes(tasks, longest, vocabulary),
    }
    self._parts: list[tuple[np.ndarray, bool, Maker]] = []  # (which tasks, whether they leave EOS out, the maker)
    self._eos = vocabulary.ids.end
    for kinds, make in makers.items():
      own = np.array([task.kind in kinds for task in tasks])
      if own.any():
        self._parts.append((own, ends and kinds[0] not in LEFT_TO_RIGHT, make()))

  def apply(self, tokens: Ragged, tasks: np.ndarray, bits: np.ndarray) -> tuple[Ragged, Ragged]:
    """(inputs, targets) of each piece.

    `tasks` is int[pieces]. `bits` is uint64[tokens + pieces], random: for each piece one for each token, then one
    more. Pieces are not empty. A piece's result depends on its own tokens, task and bits alone.
    """
    found = []
    drawn = Ragged(bits, tokens.lengths + 1)
    for served, leave_out, maker in self._parts:
      own = served[tasks]
      if own.any():
        part, part_bits = select(tokens, own), select(drawn, own)
        if leave_out:
          part, part_bits = _without_eos(part, part_bits, self._eos)
        found.append((own, maker.apply(part, tasks[own], part_bits.values)))
    inputs, targets = (merge([(own, sides[k]) for own, sides in found]) for k in (0, 1))
    return inputs, targets


def _without_eos(tokens: Ragged, bits: Ragged, eos: int) -> tuple[Ragged, Ragged]:
  last = tokens.values[np.cumsum(tokens.lengths) - 1]
  lengths = tokens.lengths - ((last == eos) & (tokens.lengths > 1))
  return first_of(tokens, lengths), first_of(bits, lengths + 1)


def example(
  tokens, task: Task, vocabulary: Vocabulary, rng: np.random.Generator, lexicon: Lexicon | None = None
) -> dict[str, np.ndarray]:
  """{'inputs', 'targets'} of one piece under `task`, both int32; a masked one has 'chosen' too.

  Without `lexicon` each token is a word of one character.

  >>> from data.objectives.objectives import SpanCorruption, tasks_of
  >>> task, = tasks_of(SpanCorruption(noise_density=0.5, mean_noise_span_length=4.0))
  >>> e = example(range(10, 18), task, Vocabulary(100, 4), np.random.default_rng(0))
  >>> e['inputs'].tolist(), e['targets'].tolist()
  ([10, 11, 12, 13, 103, 1], [103, 14, 15, 16, 17, 1])
  >>> from data.objectives.objectives import Ul2
  >>> last = tasks_of(Ul2(s_mode='last_quarter'))[-1]
  >>> e = example(range(10, 18), last, Vocabulary(100, 4), np.random.default_rng(0))
  >>> e['inputs'].tolist(), e['targets'].tolist()
  ([106, 10, 11, 12, 13, 14, 15, 1], [16, 17, 1])
  >>> from data.objectives.objectives import MaskedLm
  >>> task, = tasks_of(MaskedLm(rate=0.25, mask=1.0, random=0.0))
  >>> e = example(range(10, 18), task, Vocabulary(100, 4), np.random.default_rng(0))
  >>> e['inputs'].tolist(), e['targets'][e['chosen']].tolist()
  ([10, 11, 103, 103, 14, 15, 16, 17, 1], [12, 13])
  """
  piece = join([np.asarray(list(tokens), np.int32)])
  length = len(piece.values)
  if not length:
    raise ValueError('an example needs at least one token.')
  bits, own = rng.integers(0, 2**64, length + 1, np.uint64), np.zeros(1, np.int64)
  if task.kind == 'masked':
    inputs, targets, chosen = mask_tokens(piece, [task], own, bits, vocabulary)
    return {'inputs': inputs.values, 'targets': targets, 'chosen': chosen}
  maker = Corruption([task], length, vocabulary, lexicon or Lexicon(vocabulary, None), ends=False)
  inputs, targets = maker.apply(piece, own, bits)
  return {'inputs': inputs.values, 'targets': targets.values}
