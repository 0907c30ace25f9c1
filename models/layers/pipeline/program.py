"""A stack of layers over stages of a mesh: in each tick each stage works on another microbatch, and hands it on."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from models.layers.pipeline.groups import AXIS, in_order, of_stages
from models.layers.pipeline.schedule import Schedule
from models.layers.pipeline.slots import either, for_each, lend, like, put, take
from models.partition import constrain, per_shard

FLOW = ('stages', 'batch', 'length', 'embed')
# run(x[batch, length, embed], rows, (layers, observed)) -> (x, what each layer gives beside it, [layers of a group, …])
Run = Callable[[Array, Any, Any], tuple[Array, Any]]
Accounts = list[Array | None]


class Now(NamedTuple):
  """One tick. Of each stage, [stages]: its microbatch, its repeat, whether it works; `observed`: see `pipelined`."""

  microbatch: Array
  repeat: Array
  active: Array
  observed: Any


class Ends(NamedTuple):
  """The microbatch of the first and of the last stage in one tick, and whether they work."""

  first: tuple[Array, Array]
  last: tuple[Array, Array]


class Flow(NamedTuple):
  """What passes from tick to tick: `x` [stages, batch, length, embed], which each stage gets from the one before, and
  `store` [stages, microbatches, batch, length, embed], in which the first stage keeps the microbatches that wait for
  the next round.
  """

  x: Array
  store: Array
  layers: Accounts
  rows: Accounts


def pipelined(
  run: Run, x: Array, rows: Any, layers: Any, observed: Any, schedule: Schedule, weights: Array,
  keeping: Callable[[Callable], Callable],
) -> tuple[Array, Any]:  # fmt: skip
  """(x[batch, length, embed], what each layer gives beside it, [layers, …]), as from `run` of all layers and rows:
  the latter are means over microbatches, whose shares are `weights` f32[microbatches].

  Leaves of `rows` are [batch, …], leaves of `layers` and `observed` [layers, …]; gradients of `observed` are joined by
  their maximum. With repeats a stage selects its layers in each tick; `keeping` is a rematerialisation policy that does
  not save the selected parameters for the backward pass. An idle stage computes on zeros, and its results are masked.
  """
  rows, of_rows = jax.tree.flatten(jax.tree.map(lambda a: _everywhere(a, schedule), rows))
  layers, of_layers = jax.tree.flatten(jax.tree.map(lambda a: of_stages(a, schedule), layers))
  observed = jax.tree.map(lambda a: for_each(of_stages(a, schedule), schedule.ticks), observed)
  several = schedule.repeats > 1

  def stage(flow: Flow, layers: list[Array], rows: list[Array], now: Now) -> tuple[Flow, Any]:
    of_repeat = _borrowed(flow.layers, layers, now.repeat) if several else ([], [a[0] for a in layers])
    of_microbatch = _borrowed(flow.rows, rows, now.microbatch)
    seen = jax.tree.map(lambda a: a[now.repeat], now.observed)
    y, aux = run(flow.x, of_rows.unflatten(of_microbatch[1]), (of_layers.unflatten(of_repeat[1]), seen))
    return Flow(y, flow.store, of_repeat[0], of_microbatch[0]), aux

  each = jax.vmap(keeping(stage) if several else stage, spmd_axis_name=AXIS)
  store = constrain(_everywhere(x, schedule), 'stages', None, *FLOW[1:])
  flow = Flow(jnp.zeros_like(store[:, 0]), store, _accounts(layers) if several else [], _accounts(rows))
  layers, rows = (jax.lax.stop_gradient(layers) if several else layers), jax.lax.stop_gradient(rows)
  flow, aux = jax.lax.scan(lambda flow, now: _tick(each, flow, layers, rows, *now), flow, _table(schedule, observed))
  return _joined(_of_first(flow.store)), jax.tree.map(lambda a: _mean(a, schedule, weights), aux)


def _tick(each: Callable, flow: Flow, layers: list[Array], rows: list[Array], now: Now, ends: Ends) -> tuple[Flow, Any]:
  """All stages at work, then each hands on what it has; the last one puts it into the store of the first."""
  store, fresh = take(flow.store, *ends.first)
  x = either(_is_first(fresh), fresh, flow.x)
  x = constrain(either(now.active, x, jnp.zeros_like(x)), *FLOW)
  flow, aux = each(flow._replace(x=x, store=None), layers, rows, now)
  x = per_shard(_handed_on, (FLOW,), FLOW)(flow.x)
  return flow._replace(x=x, store=put(store, *ends.last, x)), aux


def _handed_on(x: Array) -> Array:
  """What the stage before this one has, and of the last one for the first: on each device."""
  stages = jax.lax.axis_size(AXIS)
  return jax.lax.ppermute(x, AXIS, [(i, (i + 1) % stages) for i in range(stages)])


def _table(schedule: Schedule, observed: Any) -> tuple[Now, Ends]:
  microbatch, repeat, active = (jnp.asarray(a) for a in schedule.table())
  # Apart, because the partitioner divides [ticks, stages] over stages.
  first, last = ((microbatch[:, stage], active[:, stage]) for stage in (0, -1))
  return Now(microbatch, repeat, active, observed), Ends(first, last)


def _is_first(x: Array) -> Array:
  return jnp.arange(x.shape[0]) == 0


def split(x: Array, number: int) -> Array:
  """`x[batch, …]` as [microbatches, batch, …], of strided rows, so that each lies on all devices: no data moves."""
  return jnp.swapaxes(x.reshape(-1, number, *x.shape[1:]), 0, 1)


def _everywhere(x: Array, schedule: Schedule) -> Array:
  """`x[batch, …]` as [stages, microbatches, batch, …], the same in each stage."""
  parts = split(x, schedule.microbatches)
  return jnp.broadcast_to(parts, (schedule.stages, *parts.shape))


def _of_first(store: Array) -> Array:
  """The part of the first stage, on all stages: a sum with zeros, which the partitioner adds over devices."""
  # Not `jnp.sum`, which adds bfloat16 up in float32: the sum is over devices, with zeros.
  own = jax.lax.reduce(jnp.where(like(_is_first(store), store), store, 0), np.zeros((), store.dtype), jax.lax.add, (0,))
  return constrain(own, None, *FLOW[1:])


def _joined(parts: Array) -> Array:
  """The opposite of `split`."""
  x = jnp.swapaxes(parts, 0, 1)
  return constrain(x.reshape(-1, *x.shape[2:]), *FLOW[1:])


def _accounts(leaves: list[Array]) -> Accounts:
  return [a if jnp.issubdtype(a.dtype, jnp.inexact) else None for a in leaves]


def _borrowed(accounts: Accounts, leaves: list[Array], slot: Array) -> tuple[Accounts, list[Array]]:
  """(the accounts, each leaf at `slot`): what has gradients is lent."""
  index = lambda a: jax.lax.dynamic_index_in_dim(a, slot, 0, keepdims=False)
  both = [
    (None, index(a)) if account is None else lend(account, a, slot) for account, a in zip(accounts, leaves, strict=True)
  ]
  return [account for account, _ in both], [a for _, a in both]


def _mean(aux: Array, schedule: Schedule, weights: Array) -> Array:
  """`aux[ticks, stages, layers of a group, …]` as [layers, …]: the mean over the microbatches of each layer."""
  microbatch, repeat, active = schedule.table()
  share = jnp.where(active, weights[microbatch], 0)[..., None] * jax.nn.one_hot(repeat, schedule.repeats)
  aux = jnp.where(active.reshape(*active.shape, *(1 for _ in aux.shape[2:])), aux, 0)
  return in_order(jnp.einsum('tsr,ts...->sr...', share, aux, precision=jax.lax.Precision.HIGHEST))
