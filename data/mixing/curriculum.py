"""The `data.order` section of a config, and the order of rows by a score of their documents.

A curriculum orders the rows within a window of shards (packing/order.py); the order of windows is random. A store of at
most WINDOW shards therefore has one curriculum per epoch, and a larger store has one per window.
"""

import dataclasses
from typing import Annotated, Literal, assert_never

import numpy as np

from data.bits import permute, stream_key, uniform
from data.packing.plan import Plan

FIRST_COMPETENCE = 0.01  # c0 of Platanios et al.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random:
  """Rows in random order."""

  name: Literal['random'] = 'random'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curriculum:
  """Rows ordered by the mean over their tokens of the document's `score`, which `pretrain data prepare` has stored.

  strict: in the order of the score. interleaved: `folds` random parts, one after another, each in that order. paced:
  after a share t of a window, a random unused row among the first sqrt(t (1 - c0^2) + c0^2), c0 = 0.01, of that order.
  Every row still comes exactly once per epoch. If an objective has several tasks, the rows of each task are ordered.

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
  """Raises ValueError if the `order` of a data config cannot be combined with its other keys."""
  if not isinstance(cfg.order, Curriculum):
    return
  if cfg.name != 'store':
    raise ValueError(
      f"data.order.name='curriculum' needs scores, but data.name='{cfg.name}' has none; make a store with: pretrain "
      f"data prepare --scores={cfg.order.score} …, and set data.name='store'."
    )
  if cfg.packing.name == 'length_buckets':
    raise ValueError(
      "data.order.name='curriculum' orders rows of one length, but data.packing.name='length_buckets' has its own "
      'order; remove either.'
    )
  if cfg.attend_across_documents:
    raise ValueError(
      "data.order.name='curriculum' needs documents, but data.attend_across_documents=True joins them; remove either."
    )


def row_scores(plan: Plan, scores: np.ndarray, first: int) -> np.ndarray:
  """float64[rows]: the mean score of each row's tokens. `scores` belong to the documents `first`, `first + 1`, …"""
  pieces = plan.pieces(np.arange(len(plan.tasks)))
  tokens = np.bincount(pieces.rows, pieces.lengths, len(plan.tasks))
  return np.bincount(pieces.rows, pieces.lengths * scores[pieces.documents - first], len(plan.tasks)) / tokens


def arrange(cfg: Curriculum, scores: np.ndarray, seed: int, purpose: str, *counter: int) -> np.ndarray:
  """int64[rows]: the order in which the rows with these scores come, each once. Ties are in random order."""
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
  """A permutation whose element at p is an unused number below competence(p), chosen by `draws`, uniform in [0, 1)."""
  size = len(draws)
  begun = competence(size)
  picks = (draws * (begun - np.arange(size))).astype(np.int64)  # one number is used up by each earlier position
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
  """int64[size]: how many of `size` rows, counted from the first in order, are allowed at each position.

  It is always more than the number of earlier positions, so an unused row is left.

  >>> competence(10).tolist()
  [4, 5, 6, 7, 8, 8, 9, 9, 10, 10]
  """
  t = np.arange(1, size + 1) / size
  allowed = np.ceil(size * np.sqrt(t * (1 - FIRST_COMPETENCE**2) + FIRST_COMPETENCE**2)).astype(np.int64)
  return np.clip(allowed, np.arange(1, size + 1), size)
