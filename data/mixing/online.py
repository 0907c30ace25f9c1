"""Online mixing: weights of the sources from their training losses, decided anew every few steps.

What was decided, and from what, is part of a run's position (JSON), so that it goes on bit-exactly from any step.
Losses are those of the global batch: any number of hosts decides alike.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, assert_never

import numpy as np

from data.objectives.tasks import MAX_BLOCK


@dataclasses.dataclass(frozen=True, kw_only=True)
class Odm:
  """Online data mixing: sources of which the model has most to learn are seen more. A bandit over the sources.

  Every `every` steps the reward of each source becomes smoothing * reward + (1 - smoothing) * exp(its loss since the
  last time), and its weight, after t steps of K sources, eps + (1 - K eps) * share with eps = min(1/K, sqrt(ln K / (K
  t))). The share is that of exp(eps of the last time * reward), or with `shares='linear'` of the reward itself. Until
  `warmup_steps` the weights stay as they were given. A source whose loss was not seen keeps its reward. Weights are
  rounded to whole rows. Batches that were made ahead are dropped at each decision, and `data.workers` start anew.

  Source: Albalak et al. 2023, arXiv:2312.02406; github.com/alon-albalak/online-data-mixing, data_sampling_utils.py
  SmoothedMeanWeightUpdater: `update` is 'exponential', `group_update`, which its training calls, 'linear'.
  """

  name: Literal['odm'] = 'odm'
  every: Annotated[int, '>= 1'] = 100
  warmup_steps: Annotated[int, '>= 0'] = 0
  smoothing: Annotated[float, '[0, 1)'] = 0.9
  shares: Literal['exponential', 'linear'] = 'exponential'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixing:
  """What a run knows of its sources, in their order, at a position: JSON as `dataclasses.asdict` gives it.

  From row `start` of the run on, before which `used` rows of each source were taken, sources have these `weights`
  (None: those of the config). They follow from `rewards` after `steps` steps; `loss` and `tokens` are sums since.
  """

  start: int
  used: Mapping[str, int]
  weights: Sequence[float] | None
  steps: int
  rewards: Sequence[float]
  loss: Sequence[float]
  tokens: Sequence[float]

  def seen(self, loss: np.ndarray, tokens: np.ndarray) -> 'Mixing':
    """This, one step later: of each source, its part of the loss and of the weight of the batch, float[sources].

    A step whose loss is not finite counts, and teaches nothing.
    """
    good = np.isfinite(loss).all()
    return dataclasses.replace(
      self,
      loss=(np.array(self.loss) + np.where(good, loss, 0).astype(float)).tolist(),
      tokens=(np.array(self.tokens) + np.where(good, tokens, 0).astype(float)).tolist(),
    )

  def next_start(self, cfg: Odm, batch_size: int) -> int:
    """The row of the run before which weights are decided next."""
    return self.start + cfg.every * batch_size

  def decided(self, cfg: Odm, start: int, used: Mapping[str, int], batch_size: int) -> 'Mixing':
    """The weights from row `start` on, which is `next_start`."""
    steps, tokens = self.steps + cfg.every, np.array(self.tokens)
    seen = tokens > 0
    # To a thousandth of a nat: the last bits, which another mesh sums in another order, decide nothing.
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
  """What a run that goes on from `position` knows: nothing yet at its beginning, or where its data was changed.

  `used` are rows of each source before it.
  """
  saved = position.get('mixture', {})
  if 'rewards' in saved:
    return Mixing(**saved)
  zeros = [0.0] * len(used)
  start = saved.get('start', position['examples'])
  return Mixing(start=start, used=used, weights=None, steps=0, rewards=zeros, loss=zeros, tokens=zeros)


def exploration(sources: int, steps: int) -> float:
  """eps: the least weight of a source after so many steps."""
  return min(1 / sources, math.sqrt(math.log(sources) / (sources * steps))) if steps else 1 / sources


def mix(cfg: Odm, rewards: np.ndarray, before: int, steps: int) -> np.ndarray:
  """float64[sources], of sum 1: the weights after `steps` steps; the last ones were decided after `before`."""
  sources, rewards = len(rewards), np.array(rewards)
  eps = exploration(sources, steps)
  match cfg.shares:
    case 'exponential':
      powers = exploration(sources, before) * rewards
      shares = np.exp(powers - powers.max())  # the largest is 1: a reward is exp(loss), thousands at first
    case 'linear':
      shares = rewards
    case _:
      assert_never(cfg.shares)
  return eps + (1 - sources * eps) * shares / shares.sum()


def whole_rows(weights: np.ndarray, rows: int) -> list[float]:
  """Weights as whole rows of those until the next decision (or of a block of it), each source at least one of them.

  So what was decided is exactly what comes, however few the rows, and no source is ever lost sight of.

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
  """Raises ValueError where `online` of a data config does not go with the rest of it."""
  if cfg.online is None:
    return
  if cfg.num_sources < 2:
    raise ValueError('data.online decides between sources, and there is one; name others, or remove data.online.')
  if getattr(cfg, 'stages', ()):
    raise ValueError('data.stages say what the shares are, and so does data.online; remove one of them.')
  rows = cfg.online.every * cfg.batch_size
  if rows < cfg.num_sources:
    raise ValueError(
      f'data.online.every={cfg.online.every} steps of data.batch_size={cfg.batch_size} have {rows} rows for '
      f'{cfg.num_sources} sources; set data.online.every >= {-(-cfg.num_sources // cfg.batch_size)}.'
    )
