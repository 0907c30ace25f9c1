"""The `data.order` section of a config, and the order of rows by a score of their documents.

A curriculum orders the rows of a window of shards (packing/order.py); the windows themselves come at random. So it goes
through a store of at most WINDOW shards once in each epoch, and through a larger one once in each window.
"""

import dataclasses
from typing import Annotated, Literal, assert_never

import numpy as np

from data.bits import permute, stream_key, uniform
from data.packing.plan import Plan

FIRST_COMPETENCE = 0.01  # c0 of Platanios et al.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random:
  """Any row may be next."""

  name: Literal['random'] = 'random'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curriculum:
  """Rows by the mean `score` of their tokens' documents, one that `pretrain data prepare` has kept.

  strict: in the order of the score. interleaved: `folds` random parts, one after another, each in that order. paced:
  at the share t of a window any row, not yet used, of the first sqrt(t (1 - c0^2) + c0^2), c0 = 0.01, of that order.
  Every row comes once in an epoch all the same; where an objective has several tasks the rows of each are ordered.

  Sources: Platanios et al. 2019, arXiv:1903.09848, eq. 7 (competence, which there draws with replacement); Zhang et al.
  2025, arXiv:2506.11300 (scores; vanilla, paced and interleaved curricula).
  """

  name: Literal['curriculum'] = 'curriculum'
  score: str = 'compression'
  direction: Literal['ascending', 'descending'] = 'ascending'
  pacing: Literal['strict', 'paced', 'interleaved'] = 'paced'
  folds: Annotated[int, '>= 1'] = 8


Order = Random | Curriculum


def check_order(cfg) -> None:
  """Raises ValueError where the `order` of a data config does not go with the rest of it."""
  if not isinstance(cfg.order, Curriculum):
    return
  if cfg.name != 'store':
    raise ValueError(
      f"data.order.name='curriculum' needs scores, which data.name='{cfg.name}' has not; make a store with: pretrain "
      f"data prepare --scores={cfg.order.score} …, and set data.name='store'."
    )
  if cfg.packing.name == 'length_buckets':
    raise ValueError(
      "data.order.name='curriculum' orders rows of one length, data.packing.name='length_buckets' has its own order; "
      'remove either.'
    )
  if cfg.attend_across_documents:
    raise ValueError(
      "data.order.name='curriculum' goes by documents, data.attend_across_documents=True makes one of all; remove "
      'either.'
    )


def row_scores(plan: Plan, scores: np.ndarray, first: int) -> np.ndarray:
  """float64[rows]: the mean score of the tokens of each row. `scores` are those of documents `first`, first + 1, …"""
  pieces = plan.pieces(np.arange(len(plan.tasks)))
  tokens = np.bincount(pieces.rows, pieces.lengths, len(plan.tasks))
  return np.bincount(pieces.rows, pieces.lengths * scores[pieces.documents - first], len(plan.tasks)) / tokens


def arrange(cfg: Curriculum, scores: np.ndarray, seed: int, purpose: str, *counter: int) -> np.ndarray:
  """The rows with these scores in the order in which they come: int64, each once. Equal ones come at random."""
  size = len(scores)
  key = stream_key(seed, purpose, *counter)
  shuffled = permute(np.arange(size), size, key)
  keys = (shuffled, scores if cfg.direction == 'ascending' else -scores)
  match cfg.pacing:
    case 'strict':
      return np.lexsort(keys)
    case 'interleaved':
      return np.lexsort((*keys, shuffled * cfg.folds // size))
    case 'paced':
      return np.lexsort(keys)[_paced(uniform(stream_key(seed, purpose + ' pace', *counter, np.arange(size))))]
    case _:
      assert_never(cfg.pacing)


def _paced(draws: np.ndarray) -> np.ndarray:
  """A permutation in which place p has any number, not yet used, below competence(p): `draws` in [0, 1) say which."""
  size = len(draws)
  begun = competence(size)
  picks = (draws * (begun - np.arange(size))).astype(np.int64)  # one has gone for each place before
  pool: list[int] = []
  order = np.empty(size, np.int64)
  known = 0
  for place, (end, pick) in enumerate(zip(begun.tolist(), picks.tolist(), strict=True)):
    pool.extend(range(known, end))
    known = end
    order[place], pool[pick] = pool[pick], pool[-1]
    pool.pop()
  return order


def competence(size: int) -> np.ndarray:
  """int64[size]: how many of `size` rows, the easiest, may come at each place; always more than came before it.

  >>> competence(10).tolist()
  [4, 5, 6, 7, 8, 8, 9, 9, 10, 10]
  """
  t = np.arange(1, size + 1) / size
  allowed = np.ceil(size * np.sqrt(t * (1 - FIRST_COMPETENCE**2) + FIRST_COMPETENCE**2)).astype(np.int64)
  return np.clip(allowed, np.arange(1, size + 1), size)
