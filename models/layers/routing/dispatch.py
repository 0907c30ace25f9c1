"""Tokens through their experts, on one device or on several that each hold some of the experts.

All functions work on one device's part of the arrays: x[batch, length, embed], `chosen` and `weights`
[batch, length, per_token], matrices [experts of this device, …]. They return [1, batch, length, embed], where the first
dim is that of `mlp`: each device along it has a part of the sum.
"""

import jax
import jax.numpy as jnp
from jax import Array

from models.layers.mlp import ACTIVATIONS
from models.layers.remat import named, product_of_experts
from models.layers.routing.routers import ranked


@jax.custom_vjp
def permuted(x: Array, order: Array, back: Array) -> Array:
  """`x[order]`, whose gradient is a gather by the inverse `back` instead of a scatter."""
  return x[order]


permuted.defvjp(lambda x, order, back: (x[order], back), lambda back, g: (g[back], None, None))


def taken(x: Array, index: Array) -> Array:
  """`x[index]`, zeros where `index` is len(x)."""
  return x.at[index].get(mode='fill', fill_value=0)


@jax.custom_vjp
def picked(x: Array, order: Array, back: Array) -> Array:
  """`permuted` with holes: `taken(x, order)`, and `back[i]` is len(order) where nothing took x[i]."""
  return taken(x, order)


picked.defvjp(lambda x, order, back: (taken(x, order), back), lambda back, g: (taken(g, back), None, None))


def mixture(activation: str, x: Array, chosen: Array, weights: Array, matrices: dict[str, Array]) -> Array:
  """x through the experts `chosen`, all of which are on this device; nothing is dropped.

  Tokens are sorted by expert, so that each expert's are contiguous rows of one product.
  """
  per_token, length = chosen.shape[2], chosen.shape[1]
  order = jnp.argsort(chosen.reshape(-1), stable=True)
  back = jnp.argsort(order)
  sizes = jnp.bincount(chosen.reshape(-1), length=matrices['up'].shape[0]).astype(jnp.int32)
  product = lambda x, name: named(jax.lax.ragged_dot(x, matrices[name], sizes), name)
  rows = permuted(jnp.repeat(x.reshape(-1, x.shape[-1]), per_token, axis=0), order, back)
  hidden = hidden_of(activation, product, rows, matrices)
  if 'dropped' in matrices:
    hidden = hidden * matrices['dropped'][order // (per_token * length)]
  return weighed(permuted(product(hidden, 'down'), back, order), weights)


def hidden_of(activation: str, product, rows: Array, matrices: dict[str, Array]) -> Array:
  hidden, activate = product(rows, 'up'), ACTIVATIONS[activation]
  return activate(product(rows, 'gate')) * hidden if 'gate' in matrices else activate(hidden)


def weighed(each: Array, weights: Array) -> Array:
  """The sum over the choices of a token, times their weights."""
  return (each.reshape(*weights.shape, -1) * weights[..., None].astype(each.dtype)).sum(2)[None]


def gathered(activation: str, x: Array, chosen: Array, weights: Array, matrices: dict[str, Array], axis: str) -> Array:
  """`mixture` where each device along `axis` holds some of the experts, and drops nothing.

  Every device gets all tokens of its group, (n - 1) / n of them from others, and sends back as many sums. Whichever
  device a token chooses, the sizes are the same; sent exactly, it would be `per_token` / n of that.
  """
  everywhere = lambda a: jax.lax.all_gather(a, axis, tiled=True)
  number = matrices['up'].shape[0]
  own = everywhere(chosen) - jax.lax.axis_index(axis) * number
  own = jnp.where((own >= 0) & (own < number), own, number)
  if 'dropped' in matrices:
    matrices = matrices | {'dropped': everywhere(matrices['dropped'])}
  part = of_some(activation, everywhere(x), own, everywhere(weights), matrices)
  return jax.lax.psum_scatter(part, axis, scatter_dimension=1, tiled=True)


def of_some(activation: str, x: Array, chosen: Array, weights: Array, matrices: dict[str, Array]) -> Array:
  """`mixture` of those choices that are below the number of matrices; the others add nothing.

  There are rows for the worst case, that all tokens choose as many of these experts as they can. Those that are not
  used belong to no group: what a ragged product makes of them is replaced by zeros, forward and backward.
  """
  (batch, length, per_token), number = chosen.shape, matrices['up'].shape[0]
  ids, used = chosen.reshape(-1), min(per_token, number) * batch * length
  order = jnp.argsort(ids, stable=True)
  back = jnp.where(ids < number, jnp.argsort(order), used)
  sizes = jnp.bincount(ids, length=number + 1)[:number].astype(jnp.int32)
  filled = (jnp.arange(used) < sizes.sum())[:, None]
  order = jnp.where(filled[:, 0], order[:used], ids.size)

  def product(x: Array, name: str) -> Array:
    return named(jnp.where(filled, jax.lax.ragged_dot(x, matrices[name], sizes), 0), name)

  rows = picked(jnp.repeat(x.reshape(-1, x.shape[-1]), per_token, axis=0), order, back)
  hidden = hidden_of(activation, product, rows, matrices)
  if 'dropped' in matrices:
    hidden = hidden * taken(matrices['dropped'], order // (per_token * length))
  return weighed(picked(product(hidden, 'down'), back, order), weights)


def buffered(
  activation: str, x: Array, chosen: Array, kept: Array, weights: Array, matrices: dict[str, Array], room: int,
  axis: str | None,
) -> Array:  # fmt: skip
  """x through those experts of its choices in which they are `kept`: at most `room` tokens of a row in each.

  Each expert gets `room` tokens of each row, zeros where there are fewer, so all devices along `axis` (None: one) send
  each other equally much: one all-to-all there and one back. Source: Lepikhin et al. 2020, arXiv:2006.16668, §3.2.
  """
  (batch, length, per_token), parts = chosen.shape, 1 if axis is None else jax.lax.axis_size(axis)
  number, room = parts * matrices['up'].shape[0], min(room, length)
  choice_of, slot_of = slots(jnp.where(kept, chosen, number).reshape(batch, -1), number, room)
  rows = picked(jnp.repeat(x.reshape(-1, x.shape[-1]), per_token, axis=0), choice_of, slot_of)
  rows = rows.reshape(number, batch * room, -1)
  dropped = matrices.get('dropped')
  if axis is not None:
    rows = jax.lax.all_to_all(rows, axis, 0, 1, tiled=True)
    dropped = None if dropped is None else jax.lax.all_gather(dropped, axis, tiled=True)
  product = lambda x, name: named(product_of_experts(jnp.einsum('erd,edf->erf', x, matrices[name])), name)
  hidden = hidden_of(activation, product, rows, matrices)
  if dropped is not None:
    hidden = hidden * jnp.repeat(dropped, room, axis=0)
  each = product(hidden, 'down')
  each = each if axis is None else jax.lax.all_to_all(each, axis, 1, 0, tiled=True)
  return weighed(picked(each.reshape(-1, each.shape[-1]), slot_of, choice_of), weights)


def slots(ids: Array, number: int, room: int) -> tuple[Array, Array]:
  """(choice of each slot [number * batch * room], slot of each choice [batch * choices]) for the experts `ids` of the
  choices of each row, `number` for none; where there is no choice or slot, the number of them.
  """
  batch, choices = ids.shape
  order, rank, counts = ranked(ids, number)
  row = jnp.arange(batch)[:, None]
  slot = jnp.where(ids < number, (ids * batch + row) * room + rank, number * batch * room)
  place, starts = jnp.arange(room), jnp.cumsum(counts, 1) - counts
  sorted_at = starts.T[..., None] + place  # [number, batch, room]
  found = jnp.take_along_axis(order[None], jnp.minimum(sorted_at, choices - 1), 2)
  taken_up = place < counts.T[..., None]
  return jnp.where(taken_up, row * choices + found, batch * choices).reshape(-1), slot.reshape(-1)
