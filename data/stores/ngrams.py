"""What counting can do: interpolated Kneser-Ney models, the bars that a trained model must pass.

Source: Chen and Goodman 1999, "An empirical study of smoothing techniques for language modeling", §2.7 (interpolated
Kneser-Ney, one discount for each order, D = n1 / (n1 + 2 n2)).
"""

import dataclasses

import numpy as np

from data.stores.store import Store
from data.stores.vocabulary import EOS, PAD

_READ = 2**22


@dataclasses.dataclass(frozen=True)
class NgramLoss:
  """Mean nats per text token of the held-out store, and how many there are."""

  unigram: float
  bigram: float
  trigram: float
  num_tokens: int


def ngram_loss(train: Store, heldout: Store) -> NgramLoss:
  """How well models counted on `train` predict `heldout`.

  Predicted tokens are text alone: an EOS is context at most. Context begins anew with each document. A text token that
  the training text lacks has the probability that the unigram spreads over all pieces (add one).
  """
  pieces = train.manifest['pieces']
  models = _count(_histories(train), pieces)
  contexts = _histories(heldout)
  tokens = contexts[2]
  losses = [-np.log(p).mean() for p in _probabilities(models, contexts, pieces)]
  return NgramLoss(*map(float, losses), num_tokens=len(tokens))


def _histories(store: Store) -> np.ndarray:
  """int64[3, tokens]: for each text token the two before it in its document (PAD before the first) and itself."""
  ranges = [(start, min(_READ, store.num_tokens - start)) for start in range(0, store.num_tokens, _READ)]
  tokens = np.concatenate([store.read([r])[0] for r in ranges]).astype(np.int64)
  first = np.zeros(len(tokens), bool)
  first[store.offsets[:-1]] = True
  before = np.where(first, PAD, np.roll(tokens, 1))
  second = first | np.roll(first, 1)
  second[:1] = True
  earlier = np.where(second, PAD, np.roll(tokens, 2))
  text = tokens > EOS
  return np.stack([earlier, before, tokens])[:, text]


@dataclasses.dataclass(frozen=True)
class _Order:
  """Discounted probabilities of one order: `keys` are sorted n-grams, `contexts` sorted beginnings of n-grams."""

  keys: np.ndarray
  shares: np.ndarray  # (count - D) / count of the context
  contexts: np.ndarray
  backoff: np.ndarray  # what the discounts leave for the lower order

  def interpolate(self, keys: np.ndarray, contexts: np.ndarray, lower: np.ndarray) -> np.ndarray:
    share, _ = _look_up(self.keys, self.shares, keys)
    backoff, known = _look_up(self.contexts, self.backoff, contexts)
    return np.where(known, share + backoff * lower, lower)


def _look_up(table: np.ndarray, values: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(the value of each key, 0 where it is unknown; whether it is known)."""
  at = np.minimum(np.searchsorted(table, keys), len(table) - 1)
  known = table[at] == keys
  return np.where(known, values[at], 0.0), known


def _order(keys: np.ndarray, counts: np.ndarray, base: int) -> _Order:
  """The model of n-grams `keys` (sorted; the last token is `key % base`) that were counted `counts` times."""
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

  Lower orders of a Kneser-Ney model count the distinct contexts of a token, not how often it stands.
  """
  a, b, c = histories
  trigrams, counts = np.unique((a * base + b) * base + c, return_counts=True)
  pairs = np.unique(b * base + c)
  unigram = np.bincount(c, minlength=base) + 1.0
  continuation = np.bincount(pairs % base, minlength=base).astype(float)
  spread = _discount(continuation[continuation > 0])
  # The lowest order: discounted numbers of contexts, and what that leaves spread over all pieces.
  lowest = np.maximum(continuation - spread, 0) / continuation.sum()
  lowest += (1 - lowest.sum()) / base
  # Below the trigram, a pair counts once for each token that precedes it; at the top of a bigram model, each time.
  middle = _order(*np.unique(trigrams % (base * base), return_counts=True), base)
  bigram = _order(*np.unique(b * base + c, return_counts=True), base)
  return unigram / unigram.sum(), lowest, (bigram, middle), _order(trigrams, counts, base)


def _probabilities(models, histories: np.ndarray, base: int):
  """The unigram's, bigram's and trigram's probability of each token."""
  unigram, lowest, (bigram, middle), trigram = models
  a, b, c = histories
  yield unigram[c]
  yield bigram.interpolate(b * base + c, b, lowest[c])
  yield trigram.interpolate((a * base + b) * base + c, a * base + b, middle.interpolate(b * base + c, b, lowest[c]))
