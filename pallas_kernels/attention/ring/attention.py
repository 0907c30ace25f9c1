"""Ring attention: `reference.attention` of rows that an axis of the mesh divides, in O(length / devices) memory.

To be called on each device (`shard_map`) with its parts of q, k, v and of the vectors. It has every feature of the
definition except dropout and position_scores. Positions are vectors, so a device may hold any tokens of a row.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.attention.blockwise.attention import split_heads
from pallas_kernels.attention.reference import Visibility
from pallas_kernels.attention.ring import by_blocks
from pallas_kernels.attention.ring.by_blocks import ByBlocks
from pallas_kernels.attention.ring.circulate import Ring, Shard, circulate

OF_QUERIES = ('q_positions', 'q_segment_ids')
OF_KEYS = ('kv_positions', 'kv_segment_ids', 'prefix_end')


def attention(
  q: Array,
  k: Array,
  v: Array,
  see: Visibility,
  *,
  axis: str | None = None,
  softcap: float | None = None,
  scale: float | None = None,
  sink_logits: Array | None = None,
  return_lse: bool = False,
  blocks: tuple[int, int] | None = None,
):
  """`reference.attention` of q[batch, T / devices, heads, head_dim] over the keys of all devices of `axis`.

  Positions default to indices of rows in order: device n has the n-th part of each row. Sinks inside a window are those
  at positions that are given.
  """
  k, v = see.silence_padding(k, v)
  vectors = placed(q, k, see, axis)
  scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
  spec = by_blocks.specify(q, k, see, softcap, blocks)
  near = {name: vectors[name] for name in OF_QUERIES if name in vectors}
  far = {name: vectors[name] for name in OF_KEYS if name in vectors}
  rows = split_heads(q * jnp.asarray(scale, q.dtype), k.shape[2], spec.block_q)
  columns = tuple(split_heads(x, k.shape[2], spec.block_kv)[:, :, :, 0] for x in (k, v))
  out, lse = circulate(
    Ring(inner=ByBlocks(spec=spec, of_queries=tuple(near), of_keys=tuple(far)), axis=axis),
    Shard(arrays=(rows,), vectors=by_blocks.stacked(near, spec.block_q)),
    Shard(arrays=columns, vectors=by_blocks.stacked(far, spec.block_kv)),
    _numbers(k.shape[2], see, sink_logits),
  )  # fmt: skip
  out = by_blocks.join(out, q.shape[1])
  return (out, by_blocks.join(lse, q.shape[1])) if return_lse else out


def placed(q: Array, k: Array, see: Visibility, axis: str | None) -> dict[str, Array]:
  """int32[batch, length] of each vector of `see`; positions are always there."""
  device = 0 if axis is None else jax.lax.axis_index(axis)
  index = lambda x: device * x.shape[1] + jnp.arange(x.shape[1], dtype=jnp.int32)[None]
  given = {name: getattr(see, name) for name in (*OF_QUERIES, *OF_KEYS)}
  for name, x in (('q_positions', q), ('kv_positions', k)):
    given[name] = index(x) if given[name] is None else given[name]
  length = lambda name: (q if name.startswith('q_') else k).shape[1]
  return {name: jnp.broadcast_to(x, (q.shape[0], length(name))) for name, x in given.items() if x is not None}


def _numbers(kv_heads: int, see: Visibility, sink_logits: Array | None) -> dict[str, Array]:
  """f32[kv_heads, group, ...] of each array of heads."""
  table = None if see.relative_bias is None else see.relative_bias.table.T
  given = {'alibi': see.alibi, 'sinks': sink_logits, 'table': table}
  of_heads = lambda x: x.astype(jnp.float32).reshape(kv_heads, -1, *x.shape[1:])
  return {name: of_heads(x) for name, x in given.items() if x is not None}
