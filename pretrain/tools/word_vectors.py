"""Rows for new tokens from multilingual word vectors: OFA.

A token's place in the space of the words is the mean of the vectors of the words that are spelled with it. A new token
is the mean of the rows of its nearest old tokens there, weighted by a softmax of their cosine similarities.

Source: Liu et al. 2024, "OFA: A Framework of Initializing Unseen Subword Embeddings for Efficient Large-scale
Multilingual Continued Pretraining", arXiv:2311.08849, §3; github.com/cisnlp/ofa, ofa/utils.py.
"""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from data.errors import DataError
from data.stores.vocabulary import Tokenizer

NEIGHBOURS, TEMPERATURE = 10, 0.1  # of the reference implementation
BATCH = 1024


@dataclasses.dataclass(frozen=True)
class Nearest:
  """For each new token the old ones that are nearest, and their weights; `known` is false where no word has it."""

  ids: np.ndarray  # int[new, neighbours]
  weights: np.ndarray  # float[new, neighbours], each row adds to 1
  known: np.ndarray  # bool[new]

  def rows(self, old: np.ndarray, seed: int) -> np.ndarray:
    """The rows of the new tokens; for those that are not known, drawn from a normal distribution for each feature."""
    drawn = np.random.default_rng(seed).normal(old.mean(0), old.std(0), (len(self.ids), old.shape[1]))
    return np.where(self.known[:, None], np.einsum('nk,nkd->nd', self.weights, old[self.ids]), drawn)


def nearest(path: pathlib.Path, old: Tokenizer, new: Tokenizer, missing: np.ndarray, most: int | None) -> Nearest:
  """The neighbours of the new tokens `missing`, by the first `most` word vectors of a file.

  Raises DataError for a file that is not readable, or whose words are spelled with none of the new tokens.
  """
  theirs, ours = _places(path, (old, new), most)
  wanted = ours[missing]
  known = wanted.any(1)
  if not known.any():
    raise DataError(
      f'{path}: no word is spelled with any of the {len(missing)} new tokens. Nothing was written; choose vectors of '
      'the languages of --tokenizer.'
    )
  unit, count = _unit(theirs), min(NEIGHBOURS, len(theirs))
  ids, close = np.empty((len(missing), count), np.int64), np.empty((len(missing), count))
  for at in range(0, len(missing), BATCH):
    similar = _unit(wanted[at : at + BATCH]) @ unit.T
    best = np.argpartition(similar, -count)[:, -count:]
    ids[at : at + BATCH], close[at : at + BATCH] = best, np.take_along_axis(similar, best, 1)
  weights = np.exp((close - close.max(1, keepdims=True)) / TEMPERATURE)
  return Nearest(ids, weights / weights.sum(1, keepdims=True), known)


def _unit(rows: np.ndarray) -> np.ndarray:
  """Rows of length 1; zeros stay."""
  length = np.linalg.norm(rows, axis=1, keepdims=True)
  return rows / np.where(length == 0, 1, length)


def _places(path: pathlib.Path, tokenizers: Sequence[Tokenizer], most: int | None) -> list[np.ndarray]:
  """float64[ids, dimensions] for each tokenizer: the mean of the words' vectors; zeros for tokens of no word.

  As in the reference, a word counts once for each of its three spellings that has the token.
  """
  sums: list[np.ndarray] = []
  counts = [np.zeros(tokenizer.vocabulary.size) for tokenizer in tokenizers]
  for word, vector in words(path, most):
    sums = sums or [np.zeros((len(count), len(vector))) for count in counts]
    for tokenizer, total, count in zip(tokenizers, sums, counts, strict=True):
      for text in (word, f' {word}', f' {word[0].upper()}{word[1:]}'):
        own = np.unique(np.asarray(tokenizer.encode(text), np.int64))
        total[own] += vector
        count[own] += 1
  return [total / np.maximum(count, 1)[:, None] for total, count in zip(sums, counts, strict=True)]


def words(path: pathlib.Path, most: int | None = None) -> Iterator[tuple[str, np.ndarray]]:
  """(word, float64[dimensions]) of each line, as word2vec and fastText write text, with or without a first line.

  Raises DataError, with the number of the line, for another format.
  """
  width, found = None, 0
  try:
    with path.open(encoding='utf-8') as file:
      for number, line in enumerate(file, 1):
        parts = line.rstrip().split(' ')
        if number == 1 and len(parts) == 2 and all(part.isdecimal() for part in parts):
          width = int(parts[1])
          continue
        width = width or len(parts) - 1
        yield _word(path, number, parts, width)
        found += 1
        if found == most:
          return
  except (OSError, UnicodeDecodeError) as error:
    reason = error.strerror if isinstance(error, OSError) else 'it is not UTF-8'
    raise DataError(f'--vectors={path} cannot be read: {reason}. Nothing was written; check the path.') from error
  if not found:
    raise DataError(f'--vectors={path} has no words. Nothing was written; check the path.')


def _word(path: pathlib.Path, number: int, parts: list[str], width: int) -> tuple[str, np.ndarray]:
  word = ' '.join(parts[:-width])
  try:
    vector = np.array(parts[-width:], np.float64)
  except ValueError:
    vector = np.array([np.nan])
  if width < 1 or not word or vector.shape != (width,) or not np.isfinite(vector).all():
    raise DataError(
      f'--vectors={path}:{number} is not a word and {width} numbers. Nothing was written; give the text format of '
      'word2vec or fastText (.vec).'
    )
  return word, vector


def factorised(rows: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
  """(coordinates [rows, rank], primitives [rank, features]), whose product is nearest to `rows` for this rank."""
  left, values, right = np.linalg.svd(rows, full_matrices=False)
  return left[:, :rank], values[:rank, None] * right[:rank]
