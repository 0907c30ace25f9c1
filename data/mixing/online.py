"""Online mixing: weights of the sources computed from their training losses every few steps.

The weights, and the sums that they are computed from, are part of a run's position (JSON), so a run resumes bit-exactly
from any step. Losses come from the global batch, so the number of hosts does not matter.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, assert_never

import numpy as np

from data.objectives.tasks import MAX_BLOCK


@dataclasses.dataclass(frozen=True, kw_only=True)
class Odm:
  """Online data mixing: a bandit algorithm that samples sources with a high training loss more often.

  Every `every` steps the reward of each source becomes smoothing * reward + (1 - smoothing) * exp(its loss since the
  last update), and its weight, after t steps with K sources, eps + (1 - K eps) * share with eps = min(1/K, sqrt(ln K /
  (K t))). Shares are proportional to exp(eps of the last update * reward), or with `shares='linear'` to the reward.
  Until `warmup_steps` the weights keep their configured values. A source without rows since the last update keeps its
  reward. Weights are rounded to whole rows. At each update, prefetched batches are dropped and `data.workers` restart.

  Source: Albalak et al. 2023, arXiv:2312.02406; github.com/alon-albalak/online-data-mixing, data_sampling_utils.py
  SmoothedMeanWeightUpdater: 'exponential' is its `update`; 'linear' is `group_update`, which its training calls.
  """

  name: Literal['odm'] = 'odm'
  every: Annotated[int, '>= 1'] = 100
  warmup_steps: Annotated[int, '>= 0'] = 0
  smoothing: Annotated[float, '[0, 1)'] = 0.9
  shares: Literal['exponential', 'linear'] = 'exponential'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixing:
  """The state of online mixing at a position, saved as JSON by `dataclasses.asdict`. Lists are in the order of sources.

  From row `start` of the run on, the sources have these `weights` (None: those of the config); `used` is the number of
  rows of each source before `start`. The weights were computed from `rewards` after `steps` steps; `loss` and `tokens`
  are sums since then.
  """

  start: int
  used: Mapping[str, int]
  weights: Sequence[float] | None
  steps: int
  rewards: Sequence[float]
  loss: Sequence[float]
  tokens: Sequence[float]

  def seen(self, loss: np.ndarray, tokens: np.ndarray) -> 'Mixing':
    """The state one step later. `loss` and `tokens`, float[sources], are each source's part of the batch's loss and
    loss weight.

    A step with a loss that is not finite is ignored in the sums.
    """
    good = np.isfinite(loss).all()
    return dataclasses.replace(
      self,
      loss=(np.array(self.loss) + np.where(good, loss, 0).astype(float)).tolist(),
      tokens=(np.array(self.tokens) + np.where(good, tokens, 0).astype(float)).tolist(),
    )

  def next_start(self, cfg: Odm, batch_size: int) -> int:
    """The row of the run at which the weights are computed next."""
    return self.start + cfg.every * batch_size

  def decided(self, cfg: Odm, start: int, used: Mapping[str, int], batch_size: int) -> 'Mixing':
    """The state with the weights for the rows from `start` on, which must be `next_start`."""
    steps, tokens = self.steps + cfg.every, np.array(self.tokens)
    seen = tokens > 0
    # Rounded to a thousandth of a nat: meshes sum in different orders, and the last bits must not change the weights.
    now = np.exp(np.minimum(np.round(np.array(self.loss)[seen] / tokens[seen], 3), 100))
    rewards = np.array(self.rewards)
    rewards[seen] = cfg.smoothing * rewards[seen] + (1 - cfg.smoothing) * now
    weights = self.weights
    if steps > cfg.warmup_steps:
      weights = whole_rows(mix(cfg, rewards, self.steps, steps), cfg.every * batch_size)
    zeros = [0.0] * len(rewards)
    return Mixing(
      start=start, used=dict(used), weights=weights, steps=steps, rewards=rewards.tolist(), loss=zeros, tokens=zeros
    )


def begin(position: Mapping[str, Any], used: Mapping[str, int]) -> Mixing:
  """The state of a run that starts or resumes at `position`: a fresh state at the beginning or after a change of data.

  `used` is the number of rows of each source before the position.
  """
  saved = position.get('mixture', {})
  if 'rewards' in saved:
    return Mixing(**saved)
  zeros = [0.0] * len(used)
  start = saved.get('start', position['examples'])
  return Mixing(start=start, used=used, weights=None, steps=0, rewards=zeros, loss=zeros, tokens=zeros)


def exploration(sources: int, steps: int) -> float:
  """eps: the smallest weight of a source after `steps` steps."""
  return min(1 / sources, math.sqrt(math.log(sources) / (sources * steps))) if steps else 1 / sources


def mix(cfg: Odm, rewards: np.ndarray, before: int, steps: int) -> np.ndarray:
  """float64[sources], summing to 1: the weights after `steps` steps. The last update was after `before` steps."""
  sources, rewards = len(rewards), np.array(rewards)
  eps = exploration(sources, steps)
  match cfg.shares:
    case 'exponential':
      powers = exploration(sources, before) * rewards
      shares = np.exp(
        powers - powers.max()
      )  # scaled so that the largest is 1: a reward is exp(loss), at first in the thousands
    case 'linear':
      shares = rewards
    case _:
      assert_never(cfg.shares)
  return eps + (1 - sources * eps) * shares / shares.sum()


def whole_rows(weights: np.ndarray, rows: int) -> list[float]:
  """Weights as whole numbers of rows out of `rows` until the next update (or out of a block), at least 1 per source.

  So the rows match the weights exactly, however few rows there are, and every source stays in use.

  >>> whole_rows(np.array([0.701, 0.2, 0.099]), 10)
  [7.0, 2.0, 1.0]
  """
  rows = min(rows, MAX_BLOCK)
  exact = weights * rows
  counts = np.maximum(np.floor(exact), 1)
  while counts.sum() > rows:
    counts[np.argmax(np.where(counts > 1, counts - exact, -np.inf))] -= 1
  counts[np.argsort(counts - exact, kind='stable')[: int(rows - counts.sum())]] += 1
  return counts.tolist()


def check_online(cfg) -> None:
  """Raises ValueError if the `online` section of a data config cannot be combined with its other keys."""
  if cfg.online is None:
    return
  if cfg.num_sources < 2:
    raise ValueError('data.online mixes several sources, but there is one; add another, or remove data.online.')
  if getattr(cfg, 'stages', ()):
    raise ValueError('both data.stages and data.online set the shares of the sources; remove one of them.')
  rows = cfg.online.every * cfg.batch_size
  if rows < cfg.num_sources:
    raise ValueError(
      f'data.online.every={cfg.online.every} steps of data.batch_size={cfg.batch_size} have only {rows} rows for '
      f'{cfg.num_sources} sources; set data.online.every >= {-(-cfg.num_sources // cfg.batch_size)}.'
    )
