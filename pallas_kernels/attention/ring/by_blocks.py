"""The inner attention of a ring in plain JAX, by the scan of `blockwise`: every feature, on any platform."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array

from pallas_kernels.attention import tiles
from pallas_kernels.attention.blockwise import scan
from pallas_kernels.attention.blockwise.attention import BLOCK, BLOCK_OF_BUCKETS, choose_block, split
from pallas_kernels.attention.reference import Visibility
from pallas_kernels.attention.ring.circulate import Arrays, Prepared, Shard
from pallas_kernels.attention.tiles import FAR, pad

OF_QUERIES = ('q_positions', 'q_segment_ids')
OF_KEYS = ('kv_positions', 'kv_segment_ids', 'prefix_end')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByBlocks:
  """`of_queries` and `of_keys` are the names of their vectors, each int32[blocks, batch, block].

  Queries are [blocks, batch, kv_heads, group, block, head_dim], keys and values the same without `group`.
  """

  spec: scan.Spec
  of_queries: tuple[str, ...]
  of_keys: tuple[str, ...]

  def at_start(self, q: Array, sinks: Array | None) -> Array:
    if sinks is None:
      return jnp.full(q.shape[:-1], -jnp.inf)
    return jnp.broadcast_to(sinks[..., None], q.shape[:-1])

  def mix(self, queries: Shard, keys: Shard, numbers: Arrays) -> tuple[Array, Array]:
    vectors = self._vectors(queries, keys)
    return scan.mix(self.spec, *queries.arrays, *keys.arrays, numbers, vectors, live(self.spec, vectors))

  def pull(self, queries: Shard, keys: Shard, numbers: Arrays, result, gradients):
    vectors = self._vectors(queries, keys)
    saved = (*queries.arrays, *keys.arrays, numbers, vectors, *result)
    found = scan.pull(self.spec, saved, gradients, live(self.spec, vectors))
    dq, *of_keys = (found.pop(name) for name in ('q', 'k', 'v'))
    return dq, tuple(of_keys), found

  def pull_sinks(self, sinks: Array, result: tuple[Array, Array], gradients: tuple[Array, Array]) -> Array:
    return -(jnp.exp(sinks[..., None] - result[1]) * scan.shift_of(*result, gradients)).sum((0, 1, 4))

  def _vectors(self, queries: Shard, keys: Shard) -> dict[str, Array]:
    sides = ((self.of_queries, queries), (self.of_keys, keys))
    return {name: shard.vectors[n] for names, shard in sides for n, name in enumerate(names)}


def live(spec: scan.Spec, vectors: Mapping[str, Array]) -> Array:
  """bool[num_q, num_kv]: whether some query of a tile may see some key of it, in some row of the batch."""
  row = lambda name: jnp.moveaxis(vectors[name], 0, 1).reshape(vectors[name].shape[1], -1)
  own = {name: row(name) for name in vectors}
  at, end = own['kv_positions'], own.get('prefix_end')
  found = tiles.Vectors(
    q_segments=own.get('q_segment_ids'), kv_segments=own.get('kv_segment_ids'), q_positions=own['q_positions'],
    kv_positions=at, kv_reach=at if end is None else jnp.where(at < end, -FAR, at),
  )  # fmt: skip
  shape = tiles.Spec(
    heads=1, group=1, q_length=spec.num_q * spec.block_q, kv_length=spec.num_kv * spec.block_kv, scale=1.0,
    block_q=spec.block_q, block_kv=spec.block_kv, compute=spec.block_kv, causal=spec.see.causal,
    segmented='q_segment_ids' in own, positioned=True, window=spec.see.window, num_sinks=spec.see.num_sinks,
  )  # fmt: skip
  return jnp.broadcast_to(tiles.classify(shape, found)[0].any(0), (spec.num_q, spec.num_kv))


def prepare(
  q: Array, k: Array, v: Array, see: Visibility, sinks: Array | None, *,
  softcap: float | None, scale: float, blocks: tuple[int, int] | None,
) -> Prepared:  # fmt: skip
  """For q[batch, heads, length, head_dim] and k and v of the same order, and a `see` with positions."""
  kv_heads, length, bias = k.shape[1], q.shape[2], see.relative_bias
  spec = _specify((length, k.shape[2]), see, softcap, blocks)
  near = {name: x for name in OF_QUERIES if (x := getattr(see, name)) is not None}
  far = {name: x for name in OF_KEYS if (x := getattr(see, name)) is not None}
  numbers = {'alibi': see.alibi, 'sinks': sinks, 'table': None if bias is None else bias.table.T}
  of_heads = lambda x: x.astype(jnp.float32).reshape(kv_heads, -1, *x.shape[1:])
  rows = _split_heads(q * jnp.asarray(scale, q.dtype), kv_heads, spec.block_q)
  columns = tuple(_split_heads(x, kv_heads, spec.block_kv)[:, :, :, 0] for x in (k, v))
  return Prepared(
    inner=ByBlocks(spec=spec, of_queries=tuple(near), of_keys=tuple(far)),
    queries=Shard(arrays=(rows,), vectors=_stacked(near, spec.block_q)),
    keys=Shard(arrays=columns, vectors=_stacked(far, spec.block_kv)),
    numbers={name: of_heads(x) for name, x in numbers.items() if x is not None},
    back=lambda x: _join(x, length),
  )


def _specify(
  lengths: tuple[int, int], see: Visibility, softcap: float | None, blocks: tuple[int, int] | None
) -> scan.Spec:
  bias, (q_length, kv_length) = see.relative_bias, lengths
  most = (BLOCK, BLOCK) if bias is None else (BLOCK_OF_BUCKETS, BLOCK_OF_BUCKETS)
  block_q, block_kv = most if blocks is None else blocks
  return scan.Spec(
    q_length=q_length, kv_length=kv_length, block_q=choose_block(q_length, block_q),
    block_kv=choose_block(kv_length, block_kv), by_index=False, prefixed=see.prefix_end is not None,
    see=Visibility(causal=see.causal, window=see.window, num_sinks=see.num_sinks), softcap=softcap,
    bias=None if bias is None else (bias.bidirectional, bias.max_distance),
  )  # fmt: skip


def _split_heads(x: Array, kv_heads: int, block: int) -> Array:
  """[batch, heads, length, head_dim] -> [blocks, batch, kv_heads, group, block, head_dim], padded with 0."""
  x = pad(x, 2, -(-x.shape[2] // block) * block)
  return jnp.moveaxis(x.reshape(x.shape[0], kv_heads, -1, x.shape[2] // block, block, x.shape[3]), 3, 0)


def _join(x: Array, length: int) -> Array:
  """[blocks, batch, kv_heads, group, block, ...] -> [batch, heads, length, ...]."""
  x = jnp.moveaxis(x, 0, 3)
  return x.reshape(x.shape[0], x.shape[1] * x.shape[2], -1, *x.shape[5:])[:, :, :length]


def _stacked(vectors: Mapping[str, Array], block: int) -> Array:
  """int32[vectors, blocks, batch, block] of int32[batch, length] each; positions beyond the last are equal to it, so
  that padding makes no tile live.
  """
  whole = lambda x: -(-x.shape[1] // block) * block
  padded = [pad(x, 1, whole(x), 'constant' if name.endswith('segment_ids') else 'edge') for name, x in vectors.items()]
  return jnp.stack([split(x, block) for x in padded])
