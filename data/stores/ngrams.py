"""Interpolated Kneser-Ney n-gram models: baselines that a trained model must beat.

Source: Chen and Goodman 1999, "An empirical study of smoothing techniques for language modeling", §2.7 (interpolated
Kneser-Ney, one discount for each order, D = n1 / (n1 + 2 n2)).
"""

import dataclasses

import numpy as np

from data.stores.store import Store

_READ = 2**22


@dataclasses.dataclass(frozen=True)
class NgramLoss:
  """Mean loss (nats per text token) of each model on the held-out store, and the number of those tokens."""

  unigram: float
  bigram: float
  trigram: float
  num_tokens: int


def ngram_loss(train: Store, heldout: Store) -> NgramLoss:
  """The losses on `heldout` of n-gram models counted on `train`.

  Only text tokens are predicted; EOS can only be context. Context starts anew at each document. A text token that does
  not occur in the training text has the probability that the unigram model spreads over all pieces (add-one).
  """
  pieces = train.manifest['pieces']
  models = _count(_histories(train), pieces)
  contexts = _histories(heldout)
  tokens = contexts[2]
  losses = [-np.log(p).mean() for p in _probabilities(models, contexts, pieces)]
  return NgramLoss(*map(float, losses), num_tokens=len(tokens))


def _histories(store: Store) -> np.ndarray:
  """int64[3, tokens]: for each text token the two before it in its document (before the first, an id that is no text)
  and itself."""
  ranges = [(start, min(_READ, store.num_tokens - start)) for start in range(0, store.num_tokens, _READ)]
  tokens = np.concatenate([store.read([r])[0] for r in ranges]).astype(np.int64)
  ids = store.special_ids
  outside = ids.filler
  first = np.zeros(len(tokens), bool)
  first[store.offsets[:-1]] = True
  before = np.where(first, outside, np.roll(tokens, 1))
  second = first | np.roll(first, 1)
  second[:1] = True
  earlier = np.where(second, outside, np.roll(tokens, 2))
  text = ~np.isin(tokens, ids.not_text)
  return np.stack([earlier, before, tokens])[:, text]


@dataclasses.dataclass(frozen=True)
class _Order:
  """Discounted probabilities of one n-gram order: `keys` are sorted n-grams, `contexts` their sorted prefixes."""

  keys: np.ndarray
  shares: np.ndarray  # (count - D) / count of the context
  contexts: np.ndarray
  backoff: np.ndarray  # probability that the discounts leave for the lower order

  def interpolate(self, keys: np.ndarray, contexts: np.ndarray, lower: np.ndarray) -> np.ndarray:
    share, _ = _look_up(self.keys, self.shares, keys)
    backoff, known = _look_up(self.contexts, self.backoff, contexts)
    return np.where(known, share + backoff * lower, lower)


def _look_up(table: np.ndarray, values: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(the value of each key, 0 for unknown keys; bool: whether each key is known)."""
  at = np.minimum(np.searchsorted(table, keys), len(table) - 1)
  known = table[at] == keys
  return np.where(known, values[at], 0.0), known


def _order(keys: np.ndarray, counts: np.ndarray, base: int) -> _Order:
  """The model of the n-grams `keys` (sorted; the last token is `key % base`), which occurred `counts` times."""
  discount = _discount(counts)
  contexts, begins = np.unique(keys // base, return_index=True)
  totals = np.add.reduceat(counts, begins)
  kinds = np.diff(begins, append=len(keys))
  of_key = np.repeat(totals, kinds)
  return _Order(keys, (counts - discount) / of_key, contexts, discount * kinds / totals)


def _discount(counts: np.ndarray) -> float:
  once, twice = np.count_nonzero(counts == 1), np.count_nonzero(counts == 2)
  return once / (once + 2 * twice) if once else 0.5


def _count(histories: np.ndarray, base: int):
  """(unigram, continuation unigram, (bigram, continuation bigram), trigram): arrays over pieces, then orders.

  Lower orders of a Kneser-Ney model count the distinct contexts of a token, not its occurrences.
  """
  a, b, c = histories
  trigrams, counts = np.unique((a * base + b) * base + c, return_counts=True)
  pairs = np.unique(b * base + c)
  unigram = np.bincount(c, minlength=base) + 1.0
  continuation = np.bincount(pairs % base, minlength=base).astype(float)
  spread = _discount(continuation[continuation > 0])
  # The lowest order: discounted numbers of contexts; the remaining probability is spread over all pieces.
  lowest = np.maximum(continuation - spread, 0) / continuation.sum()
  lowest += (1 - lowest.sum()) / base
  # As the lower order of the trigram model, a pair counts once for each distinct token before it; in the bigram model,
  # where it is the highest order, it counts each time.
  middle = _order(*np.unique(trigrams % (base * base), return_counts=True), base)
  bigram = _order(*np.unique(b * base + c, return_counts=True), base)
  return unigram / unigram.sum(), lowest, (bigram, middle), _order(trigrams, counts, base)


def _probabilities(models, histories: np.ndarray, base: int):
  """Yields the probabilities of all tokens under the unigram, the bigram and the trigram model."""
  unigram, lowest, (bigram, middle), trigram = models
  a, b, c = histories
  yield unigram[c]
  yield bigram.interpolate(b * base + c, b, lowest[c])
  yield trigram.interpolate((a * base + b) * base + c, a * base + b, middle.interpolate(b * base + c, b, lowest[c]))
