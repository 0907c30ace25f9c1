"""Layers of a stack, stored one after the other, as the groups that each stage works on."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from models.layers.pipeline.schedule import Schedule

AXIS = 'stage'


def of_stages(x: Array, schedule: Schedule) -> Array:
  """`x[layers, …]` as [stages, repeats, layers of a group, …]: stage s works on group r * stages + s in repeat r.

  A stage stores consecutive layers. Without repeats these are its group, and nothing moves; with repeats each stage
  sends what it stores to others, a group at a time: at most layers / stages layers, and as many gradients back.
  """
  stages, repeats = schedule.stages, schedule.repeats
  if repeats == 1:
    return x.reshape(stages, 1, -1, *x.shape[1:])
  by_stage = PartitionSpec(AXIS)
  # The number of a stage is an argument: XLA's partitioner for CPU refuses `axis_index` where another axis divides x.
  send = lambda own, me: _sent(own, me[0], schedule)
  sent = jax.shard_map(send, in_specs=(by_stage, by_stage), out_specs=by_stage, axis_names={AXIS})
  return sent(x, jnp.arange(stages, dtype=jnp.int32))


def in_order(x: Array) -> Array:
  """`x[stages, repeats, layers of a group, …]` as [layers, …]."""
  return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[3:])


def exchange(stages: int, repeats: int) -> list[list[tuple[int, int, int]]]:
  """For each transfer and each stage (which of its stored groups it sends, to which stage, for which repeat): every
  stage gets one group in each transfer.

  Stage i stores the groups i * repeats + k, and group q is for stage q % stages. With d = gcd(stages, repeats), stages
  i and i + stages / d would send their k-th groups to the same stage, so one of them begins with its next.

  >>> exchange(2, 2)
  [[(0, 0, 0), (1, 1, 1)], [(1, 1, 0), (0, 0, 1)]]
  """
  alike = stages // math.gcd(stages, repeats)
  which = lambda transfer, i: (transfer + i // alike) % repeats
  group = lambda transfer, i: i * repeats + which(transfer, i)
  at = lambda transfer, i: (which(transfer, i), group(transfer, i) % stages, group(transfer, i) // stages)
  return [[at(transfer, i) for i in range(stages)] for transfer in range(repeats)]


def _sent(own: Array, me: Array, schedule: Schedule) -> Array:
  """[1, repeats, layers of a group, …] of stage `me`, from its part of [layers, …]."""
  stages, repeats = schedule.stages, schedule.repeats
  stored = own.reshape(repeats, -1, *own.shape[1:])
  got, places = [], np.zeros((stages, repeats), np.int32)
  for transfer, sends in enumerate(exchange(stages, repeats)):
    group = jax.lax.dynamic_index_in_dim(stored, _of(me, [which for which, _, _ in sends]), 0, keepdims=False)
    got.append(jax.lax.ppermute(group, AXIS, [(i, to) for i, (_, to, _) in enumerate(sends)]))
    for _, to, repeat in sends:
      places[to, repeat] = transfer
  return jnp.stack(got)[jnp.asarray(places)[me]][None]


def _of(me: Array, values: Sequence[int]) -> Array:
  return jnp.asarray(values, jnp.int32)[me]
