"""The inner attention of a ring in plain JAX, by the scan of `blockwise`: every feature, on any platform."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array

from pallas_kernels.attention import tiles
from pallas_kernels.attention.blockwise import scan
from pallas_kernels.attention.blockwise.attention import BLOCK, BLOCK_OF_BUCKETS, choose_block, split
from pallas_kernels.attention.reference import Visibility
from pallas_kernels.attention.ring.circulate import Arrays, Shard
from pallas_kernels.attention.tiles import FAR, pad


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


def specify(q: Array, k: Array, see: Visibility, softcap: float | None, blocks: tuple[int, int] | None) -> scan.Spec:
  """For q[batch, length, heads, head_dim] and k of the same order."""
  bias = see.relative_bias
  most = (BLOCK, BLOCK) if bias is None else (BLOCK_OF_BUCKETS, BLOCK_OF_BUCKETS)
  block_q, block_kv = most if blocks is None else blocks
  return scan.Spec(
    q_length=q.shape[1], kv_length=k.shape[1], block_q=choose_block(q.shape[1], block_q),
    block_kv=choose_block(k.shape[1], block_kv), by_index=False, prefixed=see.prefix_end is not None,
    see=Visibility(causal=see.causal, window=see.window, num_sinks=see.num_sinks), softcap=softcap,
    bias=None if bias is None else (bias.bidirectional, bias.max_distance),
  )  # fmt: skip


def join(x: Array, length: int) -> Array:
  """[blocks, batch, kv_heads, group, block, ...] -> [batch, length, heads, ...]."""
  x = jnp.moveaxis(x, (0, 4), (1, 2))
  return x.reshape(x.shape[0], -1, x.shape[3] * x.shape[4], *x.shape[5:])[:, :length]


def stacked(vectors: Mapping[str, Array], block: int) -> Array:
  """int32[vectors, blocks, batch, block] of int32[batch, length] each; positions beyond the last are equal to it, so
  that padding makes no tile live.
  """
  whole = lambda x: -(-x.shape[1] // block) * block
  padded = [pad(x, 1, whole(x), 'constant' if name.endswith('segment_ids') else 'edge') for name, x in vectors.items()]
  return jnp.stack([split(x, block) for x in padded])
