"""Attention in plain JAX that never writes [length, length]: O(length) memory on any platform, where a device
has whole rows (`mesh.sequence` = 1).

A tile is a block of queries times a block of keys. Tiles that no query sees are left out where that follows from
indices: causality without a prefix, and windows. It has every feature of `reference.attention`, the definition, except
dropout and position_scores.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.attention import reference
from pallas_kernels.attention.blockwise.scan import Spec, attend
from pallas_kernels.attention.reference import Visibility
from pallas_kernels.attention.tiles import pad

BLOCK = 256  # by measurement on a CPU; of 256, 512 and 1,024 it was the fastest
BLOCK_OF_BUCKETS = 128  # where positions are given, the bias of a tile is a product with [block, block, buckets]
MULTIPLE = 16


def choose_block(length: int, most: int) -> int:
  """Blocks of equal size, at most `most` rows, with little padding.

  >>> choose_block(600, 512), choose_block(40, 512)
  (304, 48)
  """
  return -(-length // (-(-length // most) * MULTIPLE)) * MULTIPLE


def attention(
  q: Array,
  k: Array,
  v: Array,
  see: Visibility,
  *,
  softcap: float | None = None,
  scale: float | None = None,
  sink_logits: Array | None = None,
  return_lse: bool = False,
  blocks: tuple[int, int] | None = None,
):
  """`reference.attention` in tiles of `blocks` (queries, keys)."""
  k, v = see.silence_padding(k, v)
  see, scale = see.count_sinks(), 1 / math.sqrt(q.shape[-1]) if scale is None else scale
  spec = _specify(q, k, see, softcap, blocks)
  rows = _split_heads(q * jnp.asarray(scale, q.dtype), k.shape[2], spec.block_q)
  columns = [_split_heads(x, k.shape[2], spec.block_kv)[:, :, :, 0] for x in (k, v)]
  out, lse = attend(spec, rows, *columns, _numbers(spec, q, k, see, sink_logits), _vectors(spec, see))
  out = jnp.moveaxis(out, (0, 4), (1, 2)).reshape(q.shape[0], -1, *q.shape[2:])[:, : q.shape[1]]
  if not return_lse:
    return out
  return out, jnp.moveaxis(lse, (0, 4), (1, 2)).reshape(q.shape[0], -1, q.shape[2])[:, : q.shape[1]]


def _specify(q: Array, k: Array, see: Visibility, softcap: float | None, blocks: tuple[int, int] | None) -> Spec:
  by_index, bias = see.q_positions is None and see.kv_positions is None, see.relative_bias
  most = BLOCK if bias is None or by_index else BLOCK_OF_BUCKETS
  block_q, block_kv = (most, most) if blocks is None else blocks
  return Spec(
    q_length=q.shape[1], kv_length=k.shape[1], block_q=choose_block(q.shape[1], block_q),
    block_kv=choose_block(k.shape[1], block_kv), by_index=by_index, prefixed=see.prefix_end is not None,
    see=Visibility(causal=see.causal, window=see.window, num_sinks=see.num_sinks), softcap=softcap,
    bias=None if bias is None else (bias.bidirectional, bias.max_distance),
  )  # fmt: skip


def split(x: Array, block: int) -> Array:
  """[batch, length, ...] -> [blocks, batch, block, ...], padded with 0."""
  x = pad(x, 1, -(-x.shape[1] // block) * block)
  return jnp.moveaxis(x.reshape(x.shape[0], -1, block, *x.shape[2:]), 1, 0)


def _split_heads(x: Array, kv_heads: int, block: int) -> Array:
  """[batch, length, heads, head_dim] -> [blocks, batch, kv_heads, group, block, head_dim]."""
  x = split(x, block)
  return jnp.moveaxis(x.reshape(*x.shape[:3], kv_heads, -1, x.shape[-1]), 2, 4)


def _vectors(spec: Spec, see: Visibility) -> dict[str, Array]:
  """int32[blocks, batch or 1, block] of each vector of `see`; positions are always there."""
  index = {'q_positions': spec.q_length, 'kv_positions': spec.kv_length}
  found = {name: jnp.arange(length, dtype=jnp.int32)[None] for name, length in index.items()}
  names = ('q_positions', 'kv_positions', 'q_segment_ids', 'kv_segment_ids', 'prefix_end')
  found |= {name: getattr(see, name) for name in names if getattr(see, name) is not None}
  return {name: split(x, spec.block_q if name.startswith('q_') else spec.block_kv) for name, x in found.items()}


def _numbers(spec: Spec, q: Array, k: Array, see: Visibility, sink_logits: Array | None) -> dict[str, Array]:
  """f32 arrays of [kv_heads, group, ...] that have a gradient: `line` is the bias by distance, from the most
  negative one on; where positions are given it is `table`, [kv_heads, group, buckets].
  """
  of_heads = lambda x: x.astype(jnp.float32).reshape(k.shape[2], -1, *x.shape[1:])
  found, bias = {'alibi': see.alibi, 'sinks': sink_logits}, see.relative_bias
  if bias is not None and spec.by_index:
    distance = np.arange(1 - spec.num_q * spec.block_q, spec.num_kv * spec.block_kv + 1)
    zero = jnp.zeros((1, 1), jnp.int32)
    found['line'] = reference._bias(bias, zero, jnp.asarray(distance, jnp.int32)[None])[0, :, 0]
  elif bias is not None:
    found['table'] = bias.table.T
  return {name: of_heads(x) for name, x in found.items() if x is not None}
