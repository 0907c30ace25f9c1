"""Gradients over `replica`, the mesh axis across slices: once a step, only each device's part, in a stated dtype."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from pretrain.step.train_step import NOTHING, Tracks

AXIS = 'replica'


def across_replicas(value_and_grad: Callable, mesh: Mesh, shardings: Any, dtype: Any, tracks: Tracks = NOTHING):
  """`value_and_grad`, as of `accumulate`, of the whole batch: the sum over replicas of what each finds in its rows.

  Inside, nothing crosses replicas. Gradients are summed inside a slice first, until each device has a part of its own,
  and that part, in `dtype`, is all that its replicas exchange: once, after all microbatches. `shardings` are those of
  the parameters. Values, metrics and observations are summed in their own dtype, gradients of `read` combined by
  `Track.join`.

  Source: sums at two levels as in Austin et al. 2025, jax-ml.github.io/scaling-book/training, "Training across pods".
  """
  specs = jax.tree.map(lambda sharding: sharding.spec, shardings)
  everywhere, by_replica = PartitionSpec(), PartitionSpec(AXIS)

  def own(params, batch, key, weight, read):
    """Of the rows of one replica: gradients with a dim in front, all else combined with that of the others."""
    value, (grads, felt) = value_and_grad(params, batch, key, weight, read)
    joined = {name: jax.tree.map(functools.partial(_joined, tracks[name].join), felt[name]) for name in felt}
    return jax.lax.psum(value, AXIS), (jax.tree.map(lambda grad: grad[None], grads), joined)

  # Without the check of what varies over `replica`: with it, a gradient of parameters is summed where it arises.
  each = jax.shard_map(
    own, mesh=mesh, in_specs=(everywhere, by_replica, everywhere, everywhere, everywhere),
    out_specs=(everywhere, (by_replica, everywhere)), axis_names={AXIS}, check_vma=False,
  )  # fmt: skip

  def across(params, batch, key, weight, read):
    value, (grads, felt) = each(params, batch, key, weight, read)
    return value, (jax.tree.map(lambda grad, spec: _summed(grad, spec, mesh, dtype), grads, specs), felt)

  return across


def parts_of(shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> PartitionSpec:
  """`spec` with the mesh axes that it does not name, but for `replica`, on dims that they divide: then no two devices
  of a slice send the same part. An axis that divides no dim is left out.
  """
  entries = [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in (*spec, *(None,) * len(shape))]
  entries = entries[: len(shape)]
  named = {axis for entry in entries for axis in entry} | {AXIS}
  for axis in [axis for axis, n in mesh.shape.items() if n > 1 and axis not in named]:
    for dim, size in enumerate(shape):
      if size % (mesh.shape[axis] * math.prod(mesh.shape[other] for other in entries[dim])) == 0:
        entries[dim] += (axis,)
        break
  return PartitionSpec(*(entry or None for entry in entries))


def _summed(grads: Array, spec: PartitionSpec, mesh: Mesh, dtype: Any) -> Array:
  """The sum of `grads[replica, ...]`, of which a device sends what `parts_of` gives it, in their dtype again."""
  parts = parts_of(grads.shape[1:], spec, mesh)
  # Over all axes of the mesh: over `replica` alone XLA's compiler for CPU aborts at a sum in bfloat16.
  own = lambda part: jax.lax.psum(part[0].astype(dtype), AXIS).astype(grads.dtype)
  return jax.shard_map(own, mesh=mesh, in_specs=PartitionSpec(AXIS, *parts), out_specs=parts, check_vma=False)(grads)


def _joined(join: Callable[[Array, Array], Array], x: Array) -> Array:
  return functools.reduce(join, jax.lax.all_gather(x, AXIS))
