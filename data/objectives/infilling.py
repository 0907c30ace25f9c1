"""BART's noise: sentences in another order, spans of whole words behind one mask each, masks that hide nothing.

Source: Lewis et al. 2019, arXiv:1910.13461, §2.2; fairseq/data/denoising_dataset.py (permute_sentences with ratio 1,
add_whole_word_mask with mask_length=span-poisson and replace_length=1, add_insertion_noise), whose <s> and </s> stand
outside our pieces. As there, lengths are drawn until they reach the budget and the last is cut to it; a span covers
whole words from where it begins, to the end of the text at most, and a mask that another span covers is gone.
"""

import math
from collections.abc import Sequence

import numpy as np

from data.bits import stream_key
from data.objectives.lexicon import Lexicon
from data.objectives.noise import random_subsets
from data.objectives.tasks import Task
from data.ragged import Ragged, join, spread, starts, weave
from data.stores.vocabulary import EOS, Vocabulary

LONGEST = 128  # words in a span


class Infilling:
  """The infilling tasks of an objective; `apply` takes what `denoise.Recipes.apply` does."""

  def __init__(self, tasks: Sequence[Task], longest: int, vocabulary: Vocabulary, lexicon: Lexicon):
    self._rate = np.array([task.noise_density for task in tasks], np.float32)
    self._permute = np.array([task.permute for task in tasks])
    self._most = np.stack([task.most_inserted(np.arange(longest + 1)) for task in tasks])
    self._laws = [poisson(task.mean_noise_span_length) if task.kind == 'infilling' else None for task in tasks]
    self._mask = vocabulary.first_sentinel
    self._begins_word, self._ends_sentence = lexicon.begins_word, lexicon.ends_sentence

  def apply(self, tokens: Ragged, tasks: np.ndarray, bits: np.ndarray) -> tuple[Ragged, Ragged]:
    """(text with masks EOS, text EOS) of each piece, which is not empty."""
    lengths = tokens.lengths
    one_more = np.zeros(len(bits), bool)
    one_more[np.cumsum(lengths + 1) - 1] = True
    own, bits = bits[one_more], bits[~one_more]
    text = tokens.values[permute_sentences(tokens, self._ends_sentence, self._permute[tasks], bits)]
    words = Ragged(self._begins_word[text], lengths)
    number = np.add.reduceat(words.values, starts(lengths), dtype=np.int64)
    budget = np.ceil(number.astype(np.float32) * self._rate[tasks]).astype(np.int64)  # in float32, as torch does
    spans, empty = self._spans(budget, tasks, own)
    begins = random_subsets(number, spans.lengths, bits[words.values])
    inputs = hide(Ragged(text, lengths), words.values, number, begins, spans, self._mask)
    inputs = insert(inputs, np.minimum(empty, self._most[tasks, lengths]), own, self._mask)
    end = join([np.array([EOS])] * len(lengths))
    return weave([inputs, end]), weave([tokens, end])

  def _spans(self, budget: np.ndarray, tasks: np.ndarray, own: np.ndarray) -> tuple[Ragged, np.ndarray]:
    """(lengths in words of the spans of each piece, which add up to its budget; how many empty ones were drawn)."""
    counts = budget.copy()
    while True:
      piece, number = np.repeat(np.arange(len(counts)), counts), spread(np.zeros_like(counts), counts)
      drawn = self._draw(tasks[piece], stream_key(0, 'infilling lengths', own[piece], number))
      sums = np.concatenate([[0], np.cumsum(drawn)])
      before = sums[:-1] - sums[starts(counts)][piece]
      reached = np.bincount(piece, drawn, len(counts)) >= budget
      if reached.all():
        break
      counts = np.where(reached, counts, 2 * counts)
    left = (budget[piece] - before).clip(0)
    kept = np.minimum(drawn, left)
    empty = np.bincount(piece[(left > 0) & (drawn == 0)], minlength=len(counts))
    return Ragged(kept[kept > 0], np.bincount(piece[kept > 0], minlength=len(counts))), empty

  def _draw(self, tasks: np.ndarray, bits: np.ndarray) -> np.ndarray:
    uniform = (bits >> np.uint64(11)) * 2.0**-53
    drawn = np.zeros(len(tasks), np.int64)
    for task in np.unique(tasks):
      drawn[tasks == task] = np.searchsorted(self._laws[task], uniform[tasks == task], side='right')
    return drawn


def poisson(mean: float) -> np.ndarray:
  """The probabilities that a span has at most 0, 1, … words; fairseq's, who leaves out what is rarer than 1e-7."""
  chances = [math.exp(-mean)]
  while len(chances) < LONGEST and chances[-1] >= 1e-7:
    chances.append(chances[-1] * mean / len(chances))
  law = np.cumsum(chances) / np.sum(chances)
  law[-1] = 1.0  # exactly, not up to rounding
  return law


def permute_sentences(tokens: Ragged, ends: np.ndarray, permuted: np.ndarray, bits: np.ndarray) -> np.ndarray:
  """int64[tokens]: where the tokens stood, with the sentences of each piece in random order where `permuted`.

  `ends` (bool over ids) are full stops. A sentence ends with the first of a run of them, or with the piece; what is
  left behind a run at its end stays there.
  """
  begins = starts(tokens.lengths)
  stop = ends[tokens.values]
  stop[begins + tokens.lengths - 1] = True
  after = np.concatenate([[False], stop[:-1]])
  after[begins] = False
  last = stop & ~after
  first = np.concatenate([[False], last[:-1]])
  first[begins] = True
  where = np.flatnonzero(first)
  piece = np.searchsorted(begins, where, side='right') - 1
  rest = np.add.reduceat(last, where) == 0
  key = np.where(permuted[piece], stream_key(0, 'sentences', bits[where]), np.uint64(0))
  order = np.lexsort((key, rest, piece))  # stable: where nothing is permuted all stays
  sizes = np.diff(where, append=len(stop))
  return spread(where[order], sizes[order])


def hide(
  tokens: Ragged, is_word: np.ndarray, words: np.ndarray, begins: np.ndarray, spans: Ragged, mask: int
) -> Ragged:
  """`tokens` with a mask for each span of whole words.

  `is_word` (bool[tokens]) marks where words begin; `words` is how many each piece has. Span k of a piece begins at word
  `begins[k]` of it and has `spans.values[k]` words.
  """
  places = np.append(np.flatnonzero(is_word), len(is_word))
  piece = np.repeat(np.arange(len(words)), spans.lengths)
  to = begins + spans.values
  first = places[starts(words)[piece] + begins]
  ends = np.cumsum(tokens.lengths)[piece]
  end = np.where(to < words[piece], places[np.minimum(starts(words)[piece] + to, len(places) - 1)], ends)
  change = np.zeros(len(is_word) + 1, np.int64)
  np.add.at(change, first + 1, 1)  # the first token of a span is its mask, if no other span covers it
  np.add.at(change, end, -1)
  keep = np.cumsum(change[:-1]) == 0
  values = tokens.values.copy()
  values[first] = mask
  return Ragged(values[keep], np.add.reduceat(keep, starts(tokens.lengths), dtype=np.int64))


def insert(tokens: Ragged, counts: np.ndarray, bits: np.ndarray, mask: int) -> Ragged:
  """`tokens` with `counts[i]` more masks in piece i, all positions equally likely; `bits` is uint64[pieces]."""
  sizes = np.where(counts > 0, tokens.lengths + counts, 0)
  drawn = stream_key(0, 'insertions', np.repeat(bits, sizes), spread(np.zeros_like(sizes), sizes))
  chosen = random_subsets(sizes, counts, drawn)
  lengths = tokens.lengths + counts
  is_mask = np.zeros(lengths.sum(), bool)
  is_mask[np.repeat(starts(lengths), counts) + chosen] = True
  values = np.full(len(is_mask), mask, np.int32)
  values[~is_mask] = tokens.values
  return Ragged(values, lengths)
