"""How optimizer state is kept: moments in fewer bits, and where each statistic lies on the mesh."""

import itertools
import math
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models.partition import PARAMETER_RULES
from models.specs import ParamSpec
from pretrain.devices.mesh import replicated
from pretrain.optim.shared import StateDtype, noise, own_size, sides

# The fields of optax's states and ours that hold a moment for each value of a parameter, at first 0; has it a sign?
MOMENTS = {'mu': True, 'ema': True, 'nu': False}
BLOCK, MOST_SHARDS, SMALLEST = 256, 16, 4096


class Blocks(NamedTuple):
  """uint8 codes in the parameter's shape, and the largest value of each block along one of its dims."""

  codes: Array
  scale: Array


DECADES = 7


def decades(signed: bool) -> list[tuple[float, int, int, float]]:
  """(10**exponent, number of codes, first code, smallest value) of each decade of the dynamic map of 8 bits.

  Code 0 is 0; each decade has twice the codes of the one below, at the means of equal parts of 0.1 .. 1; one more code
  is 1. Source: Dettmers et al. 2022, arXiv:2110.02861, §1.3; bitsandbytes functional.py create_dynamic_map.
  """
  found, below = [], 0.0
  for i in range(DECADES):
    ten, num = 10.0 ** (i + 1 - DECADES), 2 ** (i + (not signed))
    first = 1 + num - (1 if signed else 2)
    found.append((ten, num, first, (below + ten * (0.1 + 0.45 / num)) / 2))
    below = ten * (1 - 0.45 / num)
  return found


def encode(x: Array, signed: bool) -> Array:
  """uint8: the nearest code of each of x in -1 .. 1; by arithmetic, because looking up is slow on a TPU."""
  size, code = jnp.abs(x), jnp.zeros(x.shape, jnp.int32)
  for ten, num, first, smallest in decades(signed):
    place = jnp.clip(jnp.floor((size / ten - 0.1) * (num / 0.9)), 0, num - 1).astype(jnp.int32)
    code = jnp.where(size >= smallest, first + place, code)
  code = jnp.where(size >= 1 - 0.225 / num, first + num, code)
  # As in a signed table in ascending order, which has no -1.
  return (jnp.where(x < 0, -jnp.minimum(code, 127), code) + 127 if signed else code).astype(jnp.uint8)


def decode(codes: Array, signed: bool) -> Array:
  """f32 in -1 .. 1."""
  code = codes.astype(jnp.int32) - (127 if signed else 0)
  size, x = jnp.abs(code), jnp.zeros(codes.shape, jnp.float32)
  for ten, num, first, _ in decades(signed):
    x = jnp.where(size >= first, ten * (0.1 + 0.9 / num * (size - first + 0.5)), x)
  x = jnp.where(size == first + num, 1.0, x)
  return jnp.where(code < 0, -x, x)


def block_of(spec: ParamSpec) -> tuple[int, int] | None:
  """(dim, size) of the blocks of a parameter's moments; None where they stay f32, as the paper has it: what is small,
  an embedding, or no matrix.

  Blocks lie along head_dim, else what `tensor` cuts, never along `embed`, which fsdp cuts; in multiples of 16, so that
  no block lies on two devices of tensor = 2, 4, 8 or 16. The state then has one shape on all meshes.
  """
  if own_size(spec) < SMALLEST or sides(spec) is None or spec.axes[0] == 'vocab':
    return None
  order = ('head_dim', 'mlp', 'vocab', 'heads', 'kv_heads', 'one_head')
  dim = min(sides(spec)[1], key=lambda i: order.index(spec.axes[i]))
  size, parts = spec.shape[dim], 1 if PARAMETER_RULES[spec.axes[dim]] is None else MOST_SHARDS
  divisors = [d for d in range(1, min(size, BLOCK) + 1) if size % d == 0]
  return dim, max([d for d in divisors if (size // d) % parts == 0] or divisors)


def split(x: Array, dim: int, size: int) -> Array:
  return x.reshape(*x.shape[:dim], x.shape[dim] // size, size, *x.shape[dim + 1 :])


def quantize(x: Array, spec: ParamSpec, signed: bool) -> Array | Blocks:
  """The nearest code of each value over its block's largest. Without a sign, the root is kept: nu has twice the
  decades of mu, and where it fell to 0 before mu does, mu / sqrt(nu) would explode.
  """
  if (block := block_of(spec)) is None:
    return x
  blocks = split(x if signed else jnp.sqrt(x), *block)
  scale = jnp.max(jnp.abs(blocks), block[0] + 1, keepdims=True)
  codes = encode(blocks / jnp.where(scale > 0, scale, 1), signed)
  return Blocks(codes.reshape(x.shape), scale.squeeze(block[0] + 1))


def empty(spec: ParamSpec, signed: bool, dtype: StateDtype) -> Array | Blocks:
  """Zeros as `shrink` would have them, which XLA would take minutes to fold into constants."""
  block = block_of(spec)
  if dtype == 'bfloat16' or block is None:
    return jnp.zeros(spec.shape, jnp.bfloat16 if dtype == 'bfloat16' else jnp.float32)
  dim, size = block
  scales = (*spec.shape[:dim], spec.shape[dim] // size, *spec.shape[dim + 1 :])
  return Blocks(jnp.full(spec.shape, 127 if signed else 0, jnp.uint8), jnp.zeros(scales, jnp.float32))


def dequantize(stored: Array | Blocks, spec: ParamSpec, signed: bool) -> Array:
  """f32, of a moment in any dtype."""
  if not isinstance(stored, Blocks):
    return stored.astype(jnp.float32)
  block = block_of(spec)
  x = (decode(split(stored.codes, *block), signed) * jnp.expand_dims(stored.scale, block[0] + 1)).reshape(
    stored.codes.shape
  )
  return x if signed else jnp.square(x)


def round_stochastically(x: Array, salt: Array) -> Array:
  """bf16, up or down by chance so that the mean is x: nearest, a moment would stand still once its changes are below
  1/256. Chance is a hash of `salt` and the global index: equal on all meshes.
  """
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (noise(x.shape, salt) >> 16)
  kept = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
  return jnp.where(jnp.isfinite(x), kept, x).astype(jnp.bfloat16)


def shrink(x: Array, spec: ParamSpec, dtype: StateDtype, name: str, path, count: Array) -> Array | Blocks:
  """The moment `name` of the parameter at `path` in `dtype`; each has its own chance at each `count`."""
  if dtype == 'int8':
    return quantize(x, spec, MOMENTS[name])
  salt = zlib.crc32((name + jax.tree_util.keystr(path)).encode())
  return round_stochastically(x, count.astype(jnp.uint32) * jnp.uint32(0x27D4EB2F) + jnp.uint32(salt))


def stored(tx: optax.GradientTransformation, dtype: StateDtype, specs: Mapping[str, Any]):
  """`tx` with the moments of its state (`MOMENTS`) kept in `dtype`; it computes in f32."""
  if dtype == 'float32':
    return tx

  def each(state, f):
    moments = {name: getattr(state, name) for name in MOMENTS if name in state._fields}
    with_name = lambda name: lambda path, spec, x: f(name, path, spec, x)
    return state._replace(
      **{name: jax.tree_util.tree_map_with_path(with_name(name), specs, tree) for name, tree in moments.items()}
    )

  def init(params):
    return each(tx.init(params), lambda name, path, spec, x: empty(spec, MOMENTS[name], dtype))

  def update(grads, state, params=None):
    whole = each(state, lambda name, path, spec, x: dequantize(x, spec, MOMENTS[name]))
    updates, moved = tx.update(grads, whole, params)
    return updates, each(moved, lambda name, path, spec, x: shrink(x, spec, dtype, name, path, moved.count))

  return optax.GradientTransformation(init, update)


def state_shardings(tx: optax.GradientTransformation, params, shardings, mesh: Mesh):
  """Shardings of tx's state: a parameter's statistics lie where it lies, everything else on every device.

  Statistics stand under the parameter's path and have its rank. A dim that its mesh axes do not divide (a mean over
  it, or a few block scales) is whole on every device.
  """
  places = {own_path(path): s for path, s in jax.tree_util.tree_flatten_with_path(shardings)[0]}

  def place(path, leaf) -> NamedSharding:
    sharding = places.get(own_path(path))
    if sharding is None:
      return replicated(mesh)
    entries = zip(sharding.spec, leaf.shape, strict=True)
    return NamedSharding(mesh, PartitionSpec(*(e if divides(e, n, mesh) else None for e, n in entries)))

  return jax.tree_util.tree_map_with_path(place, jax.eval_shape(tx.init, params))


def divides(entry: str | tuple[str, ...] | None, size: int, mesh: Mesh) -> bool:
  names = (entry,) if isinstance(entry, str) else entry or ()
  return size % math.prod(mesh.shape[name] for name in names) == 0


def own_path(path) -> tuple[str, ...]:
  """The last run of dict keys in a path: inside of any optimizer state, the parameter's own."""
  runs = itertools.groupby(path, key=lambda part: isinstance(part, jax.tree_util.DictKey))
  return ([tuple(str(part.key) for part in run) for is_keys, run in runs if is_keys] or [()])[-1]
