"""A unigram over tokens: the probability of a filling from token counts alone."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from data.stores.store import Store
from data.stores.vocabulary import Tokenizer


@dataclasses.dataclass(frozen=True)
class Documents:
  """The tokens of each document of a store, and its tokenizer."""

  tokenizer: Tokenizer
  ids: Sequence[np.ndarray]

  def texts(self) -> list[str]:
    """Each document as text, without EOS and other special tokens."""
    is_text, decode = self.tokenizer.vocabulary.is_text, self.tokenizer.decode
    return [decode(own[is_text(own)]) for own in self.ids]


def read_documents(store: Store) -> Documents:
  """All documents of a store, read once."""
  lengths = (store.offsets[1:] - store.offsets[:-1]).tolist()
  return Documents(store.tokenizer(0), store.read(list(zip(store.offsets[:-1].tolist(), lengths, strict=True))))


@dataclasses.dataclass(frozen=True)
class Unigram:
  """`shares` f64[pieces] sum to 1; after each token the filling ends with probability `end`.

  The lengths of its fillings are geometric with mean 1 / `end`.
  """

  shares: np.ndarray
  end: float

  def log_prob(self, ids: Sequence[int]) -> float:
    """Natural log of the probability of the filling `ids` (at least one token), its end included."""
    stay = (len(ids) - 1) * math.log1p(-self.end) if len(ids) > 1 else 0.0
    return float(np.log(self.shares[list(ids)]).sum()) + stay + math.log(self.end)

  def most_frequent(self) -> Iterator[int]:
    """Tokens, the most frequent first; equally frequent ones by id."""
    return iter(np.argsort(-self.shares, kind='stable').tolist())


def count(stores: Iterable[Documents], fillings: Iterable[Sequence[int]]) -> Unigram:
  """The unigram of the text tokens in `stores` (add-one smoothing, as `data.stores.ngrams`).

  Its fillings have the mean length of `fillings`.
  """
  counts: np.ndarray | None = None
  for store in stores:
    vocabulary = store.tokenizer.vocabulary
    for ids in store.ids:
      text = ids[vocabulary.is_text(ids) & (ids != vocabulary.ids.unknown)]
      found = np.bincount(text, minlength=vocabulary.pieces)
      counts = found if counts is None else counts + found
  if counts is None:
    raise ValueError('a unigram needs at least one store; found none.')
  smoothed = counts + 1.0
  sizes = [len(ids) for ids in fillings]
  return Unigram(smoothed / smoothed.sum(), min(1.0, len(sizes) / max(sum(sizes), 1)))
