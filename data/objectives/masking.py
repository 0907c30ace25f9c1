"""BERT's noise: which tokens of a piece are predicted, and what is read in their place.

Source: Devlin et al. 2019, arXiv:1810.04805, §3.1 and A.1; google-research/bert create_pretraining_data.py
(create_masked_lm_predictions). As there, a piece of n tokens has max(1, round(n * rate)) chosen ones, halves rounded to
even, and never more than it has. Here n leaves special tokens out, there is no bound for a sequence
(max_predictions_per_seq), and a random piece is one of text, where the reference draws from the whole vocabulary.
"""

from collections.abc import Sequence

import numpy as np

from data.objectives.noise import random_subsets
from data.objectives.tasks import Task
from data.ragged import Ragged, starts
from data.stores.vocabulary import Vocabulary

_BITS = 40  # the bits of a token's random number that `random_subsets` does not use


def mask_tokens(
  tokens: Ragged, tasks: Sequence[Task], own: np.ndarray, bits: np.ndarray, vocabulary: Vocabulary
) -> tuple[Ragged, np.ndarray, np.ndarray]:
  """(inputs, targets, chosen) of pieces, each with an EOS behind: what is read, the text itself, bool.

  A tokenizer with a `cls` has it in front of each piece, as BERT has [CLS] and [SEP] around a text.

  Piece i gets the noise of `tasks[own[i]]`. `bits` is uint64[tokens + pieces], random: for each piece one for each
  token, then one more, for its EOS, which is not used. EOS is never chosen, also inside a piece. A piece's
  result depends on its own tokens, task and bits alone.
  """
  lengths = tokens.lengths + 1
  text = np.ones(len(bits), bool)
  text[np.cumsum(lengths) - 1] = False
  targets = np.full(len(bits), vocabulary.ids.end, np.int32)
  targets[text] = tokens.values
  rates, masked, random = (
    np.array([getattr(task, share) for task in tasks])[own] for share in ('noise_density', 'mask', 'random')
  )
  chosen = choose(Ragged(targets != vocabulary.ids.end, lengths), bits, rates)
  read = corrupt(targets, bits, np.repeat(masked, lengths), np.repeat(random, lengths), vocabulary)
  inputs = np.where(chosen, read, targets)
  if (first := vocabulary.ids.cls) is None:
    return Ragged(inputs, lengths), targets, chosen
  before = starts(lengths)
  inputs, targets = (np.insert(x, before, np.int32(first)) for x in (inputs, targets))
  return Ragged(inputs, lengths + 1), targets, np.insert(chosen, before, False)


def choose(candidates: Ragged, bits: np.ndarray, rate: float | np.ndarray) -> np.ndarray:
  """bool[values]: max(1, round(n * rate)) of the n True positions of `candidates` in each piece; none if n is 0.

  `rate` may be an array over pieces.
  """
  number = np.add.reduceat(candidates.values, starts(candidates.lengths), dtype=np.int64)
  counts = np.minimum(np.maximum(np.rint(number * rate).astype(np.int64), 1), number)
  places = np.flatnonzero(candidates.values)
  taken = np.repeat(starts(number), counts) + random_subsets(number, counts, bits[places])
  chosen = np.zeros(len(bits), bool)
  chosen[places[taken]] = True
  return chosen


def corrupt(
  tokens: np.ndarray, bits: np.ndarray, mask: np.ndarray, random: np.ndarray, vocabulary: Vocabulary
) -> np.ndarray:
  """Each token as it is read if chosen: the mask token or a random piece, with these probabilities, or as it is.

  The low 40 bits of its own number select the case and, for `random`, the piece.
  """
  drawn = bits & np.uint64(2**_BITS - 1)
  masked, replaced = (np.rint(share * 2.0**_BITS).astype(np.uint64) for share in (mask, np.minimum(mask + random, 1.0)))
  piece = vocabulary.text_ids[(drawn - masked) % np.uint64(len(vocabulary.text_ids))]
  read = np.where(drawn < replaced, piece.astype(tokens.dtype), tokens)
  return np.where(drawn < masked, np.int32(vocabulary.mask), read)
