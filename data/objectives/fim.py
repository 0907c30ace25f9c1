"""Fill in the middle: a text is cut at two characters, and its parts are read in another order.

PSM is <pre> prefix <suf> suffix <mid> middle, SPM <pre> <suf> suffix <mid> prefix middle. The three marks are the last
sentinels: <pre> is <extra_id_{S-1}>, <suf> <extra_id_{S-2}>, <mid> <extra_id_{S-3}> of S. An EOS stays at the end.

Characters are those of the pieces, in which a space is one (SentencePiece's, also that before the first word), and
bytes that make one character are never parted. Only a piece that a cut falls in is spelt anew, in two halves, so that
prefix + middle + suffix is the text, character by character. The reference tokenizes whole parts anew: the pieces may
differ from ours some way beside a cut. A cut that would add more than `spelling.MOST_GROWTH` tokens (one in a hundred)
falls on the nearest character where it does not, so that a plan knows what a row must hold.

Source: Bavarian et al. 2022, arXiv:2207.14255; bigcode-project/Megatron-LM gpt_dataset.py permute (both boundaries
uniform in [0, characters], sorted, so that any part may be empty), which cuts off what grows beyond the row.
"""

import functools
from collections.abc import Sequence

import numpy as np

from data.bits import stream_key
from data.objectives.spelling import Halves
from data.objectives.tasks import Task
from data.ragged import Ragged, first_of, join, weave, where
from data.stores.vocabulary import Vocabulary


class FillInMiddle:
  """The fim tasks of an objective; `apply` takes what `denoise.Recipes.apply` does."""

  def __init__(self, tasks: Sequence[Task], vocabulary: Vocabulary, halves: Halves):
    self._rate, self._spm = (np.array([getattr(task, name) for task in tasks]) for name in ('noise_density', 'spm'))
    self._marks, self._eos = fim_ids(vocabulary), vocabulary.ids.end
    self._halves = halves

  def apply(self, tokens: Ragged, tasks: np.ndarray, bits: np.ndarray) -> tuple[Ragged, Ragged]:
    """(nothing, the text with its parts in the order that is read) of each piece."""
    lengths, last = tokens.lengths, np.cumsum(tokens.lengths) - 1
    ended = tokens.values[last] == self._eos
    text = first_of(tokens, lengths - ended)
    draw = functools.partial(_draw, bits[np.cumsum(lengths + 1) - 1])
    cut, spm = (draw(k) * 2.0**-64 < share[tasks] for k, share in enumerate((self._rate, self._spm)))
    total = np.bincount(np.repeat(np.arange(len(lengths)), text.lengths), self._halves.chars[text.values], len(lengths))
    places = np.sort([(draw(k) % (total.astype(np.uint64) + np.uint64(1))).astype(np.int64) for k in (2, 3)], axis=0)
    first, second = np.where(cut, places, total.astype(np.int64))  # uncut text is all prefix
    head, suffix = self._halves.cut(text, second)
    prefix, middle = self._halves.cut(head, first)
    pre, suf, mid = (where(join([np.array([mark])] * len(lengths)), cut) for mark in self._marks)
    end = where(join([np.array([self._eos])] * len(lengths)), ended)
    late = cut & spm
    parts = [pre, where(prefix, ~late), suf, suffix, mid, where(prefix, late), middle, end]
    return Ragged(np.zeros(0, np.int32), np.zeros_like(lengths)), weave(parts)


def fim_ids(vocabulary: Vocabulary) -> tuple[int, int, int]:
  """The ids of <pre>, <suf> and <mid>: the last three sentinels.

  >>> [Vocabulary(100, 8).special(i) for i in fim_ids(Vocabulary(100, 8))]
  ['<extra_id_7>', '<extra_id_6>', '<extra_id_5>']
  """
  return vocabulary.pieces, vocabulary.pieces + 1, vocabulary.pieces + 2


def _draw(bits: np.ndarray, number: int) -> np.ndarray:
  """uint64[pieces], random, other ones for each number."""
  return stream_key(0, 'fim', bits, number)
