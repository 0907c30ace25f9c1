"""Loss spikes: an update whose loss or gradient norm is far above those of the steps before it is not applied.

It is decided inside the train step, from numbers that all processes have: nobody has to agree on it.
"""

import dataclasses
from typing import Annotated, Literal, NamedTuple, assert_never

import jax
import jax.numpy as jnp
import optax
from jax import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoSpikes:
  name: Literal['none'] = 'none'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Judged:
  """A spike is a loss or a gradient norm above mean + `sigmas` x standard deviation of the last `window` updates that
  were none; half of them must be there. Source: OLMo et al. 2024, arXiv:2501.00656, OLMo-core SkipStepOptimizer, which
  has spikes in its window too; 6 and 128 are its defaults, and MaxText's.
  """

  sigmas: Annotated[float, '> 0'] = 6.0
  window: Annotated[int, '>= 4'] = 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class SkipSpikes(Judged):
  """The update of a spike is not applied; after `max_consecutive` in a row the run stops: losses have another level."""

  name: Literal['skip'] = 'skip'
  max_consecutive: Annotated[int, '>= 1'] = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewindSpikes(Judged):
  """The run goes back to a checkpoint at least `steps` before the spike and leaves out the examples from there to it,
  `max_rewinds` times. Source: Chowdhery et al. 2022, arXiv:2204.02311 (PaLM), §5.1: about 100 steps.
  """

  name: Literal['rewind'] = 'rewind'
  steps: Annotated[int, '>= 1'] = 100
  max_rewinds: Annotated[int, '>= 1'] = 3


Spikes = NoSpikes | SkipSpikes | RewindSpikes
NONE = NoSpikes()


class SpikeState(NamedTuple):
  """`when`: the update (from 1) that each entry of the window is of, oldest first, 0 = none; `seen`: its loss and
  gradient norm; `limits`: those that the last update was judged by."""

  total: Array
  consecutive: Array
  updates: Array
  when: Array
  seen: Array
  limits: Array


def guarded(tx: optax.GradientTransformation, cfg: Spikes, since: int) -> optax.GradientTransformation:
  """`tx` that makes no update of a spike; one after another is judged by updates after number `since` alone.

  `tx` is a chain whose first part is `skip_nonfinite`. Its later parts (the schedule's count) continue. The state
  of `tx` comes first in its own, where it would be without it.
  """
  match cfg:
    case NoSpikes():
      return tx
    case SkipSpikes() | RewindSpikes():
      return _guarded(tx, cfg, since)
    case _:
      assert_never(cfg)


def _guarded(tx: optax.GradientTransformation, cfg: Judged, since: int) -> optax.GradientTransformationExtraArgs:
  def init(params):
    return *tx.init(params), empty(cfg.window)

  def update(grads, state, params=None, *, value, **_):
    *own, spikes = state
    updates, (first, *rest) = tx.update(grads, tuple(own), params)
    now = jnp.stack([value, optax.tree.norm(grads)]).astype(jnp.float32)
    spike, spikes = judged(spikes, now, cfg.sigmas, since)
    # -0.0, because 0.0 added to a parameter of -0.0 would change its sign.
    updates = jax.tree.map(lambda u: jnp.where(spike, jnp.full_like(u, -0.0), u), updates)
    inner = jax.tree.map(lambda new, old: jnp.where(spike, old, new), first.inner, own[0].inner)
    return updates, (first._replace(inner=inner), *rest, spikes)

  return optax.GradientTransformationExtraArgs(init, update)


def empty(window: int) -> SpikeState:
  zero = jnp.zeros((), jnp.int32)
  nothing = jnp.zeros((window, 2), jnp.float32)
  return SpikeState(zero, zero, zero, jnp.zeros(window, jnp.int32), nothing, jnp.full(2, jnp.inf, jnp.float32))


def judged(state: SpikeState, now: Array, sigmas: float, since: int) -> tuple[Array, SpikeState]:
  """(whether `now` is a spike, the state after it); a gradient that is not finite is none, and enters no window."""
  limits = limits_of(state, sigmas, since)
  good = jnp.isfinite(now).all() & (now <= limits).all()
  spike = jnp.isfinite(now[1]) & ~good
  count, updates = spike.astype(jnp.int32), state.updates + 1
  entered = lambda entries, entry: jnp.where(good, jnp.concatenate([entries[1:], entry[None]]), entries)
  when, seen = entered(state.when, updates), entered(state.seen, now)
  return spike, SpikeState(state.total + count, (state.consecutive + 1) * count, updates, when, seen, limits)


def limits_of(state: SpikeState, sigmas: float, since: int) -> Array:
  """float32[2]: the largest loss and gradient norm that are no spike; infinite until half of the window is there."""
  counts = (state.when > since).astype(jnp.float32)[:, None]
  number = counts.sum()
  mean = (counts * state.seen).sum(0) / jnp.maximum(number, 1)
  variance = (counts * (state.seen - mean) ** 2).sum(0) / jnp.maximum(number - 1, 1)
  return jnp.where(number >= state.when.size // 2, mean + sigmas * jnp.sqrt(variance), jnp.inf)
