"""The inner attention of a ring by the Mosaic kernels of `tpu`: everything but a relative bias, which they read by
indices; slopes have no gradient there.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array

from pallas_kernels.attention import tiles, tpu
from pallas_kernels.attention.reference import Visibility
from pallas_kernels.attention.ring.circulate import Arrays, Prepared, Shard
from pallas_kernels.attention.tiles import Spec, Vectors, pad, padded
from pallas_kernels.attention.tpu_kernels import LOG2E, NO_ROW

OF_QUERIES = ('q_segments', 'q_positions')
OF_KEYS = ('kv_segments', 'kv_positions', 'kv_reach')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByKernel:
  """Queries are [batch * heads, length, head_dim], keys and values the same with their own heads; vectors are
  int32[batch, length], of the names `of_queries` and `of_keys`.
  """

  spec: Spec
  of_queries: tuple[str, ...]
  of_keys: tuple[str, ...]
  batch: int

  def at_start(self, q: Array, sinks: Array | None) -> Array:
    if sinks is None:
      return jnp.full(q.shape[:2], -jnp.inf)
    return jnp.broadcast_to(jnp.tile(sinks, self.batch)[:, None], q.shape[:2])

  def mix(self, queries: Shard, keys: Shard, numbers: Arrays) -> tuple[Array, Array]:
    def run(rows):
      o, lse = tpu.run_forward(self.spec, *rows[0], numbers, rows[1], jnp.float32)
      return o, jnp.where(lse == NO_ROW, -jnp.inf, lse / LOG2E)

    return self._in_turns(run, (*queries.arrays, *keys.arrays), queries, keys)

  def pull(self, queries: Shard, keys: Shard, numbers: Arrays, result, gradients):
    def run(rows):
      (q, k, v, do, lse, shift), vectors = rows
      same = {'q': q, 'k': k, 'v': v, 'do': do.astype(q.dtype), 'lse': lse[:, None], 'di': shift[:, None]}
      dq, _ = tpu.grad_queries(self.spec, same, numbers, vectors, jnp.float32)
      return dq, tpu.grad_keys_values(self.spec, same, numbers, vectors, jnp.float32)

    lse = jnp.where(jnp.isfinite(result[1]), result[1] * LOG2E, NO_ROW)
    arrays = (*queries.arrays, *keys.arrays, gradients[0], lse, _shift(result, gradients))
    dq, of_keys = self._in_turns(run, arrays, queries, keys)
    return dq, of_keys, {name: jnp.zeros(x.shape, jnp.float32) for name, x in numbers.items()}

  def pull_sinks(self, sinks: Array, result: tuple[Array, Array], gradients: tuple[Array, Array]) -> Array:
    own = (self.batch, self.spec.heads, -1)
    weights = jnp.exp(sinks[:, None] - result[1].reshape(own))
    return -(weights * _shift(result, gradients).reshape(own)).sum((0, 2))

  def _in_turns(self, run, arrays: tuple[Array, ...], queries: Shard, keys: Shard):
    sides = ((self.of_queries, queries), (self.of_keys, keys))
    found = {name: shard.vectors[n] for names, shard in sides for n, name in enumerate(names)}
    vectors = Vectors(**found)
    rows = tpu.rows_at_once(self.spec, vectors, self.batch)
    return tpu.in_turns(run, (arrays, vectors), self.batch, rows)


def _shift(result: tuple[Array, Array], gradients: tuple[Array, Array]) -> Array:
  """f32[batch * heads, length]: d loss / d score = weight * (d loss / d weight - this)."""
  (out, lse), (of_out, of_lse) = result, gradients
  total = jnp.sum(out.astype(jnp.float32) * of_out.astype(jnp.float32), -1)
  return total - jnp.where(jnp.isfinite(lse), of_lse, 0.0)


def prepare(
  q: Array, k: Array, v: Array, see: Visibility, sinks: Array | None, *,
  softcap: float | None, scale: float, blocks: tpu.Blocks | None, interpret: Any,
) -> Prepared:  # fmt: skip
  """For q[batch, heads, length, head_dim] and k and v of the same order, and a `see` with positions."""
  (batch, heads, q_length, head_dim), kv_length = q.shape, k.shape[2]
  if blocks is None:
    packed = see.q_segment_ids is not None
    blocks = tpu.choose_blocks(q_length, kv_length, head_dim, causal=see.causal, packed=packed)
  q_padded, kv_padded = padded(q_length, blocks.q), padded(kv_length, blocks.kv)
  vectors = tiles.vectors(see, (batch, q_length, kv_length), (q_padded, kv_padded))
  named = lambda names: {name: x for name in names if (x := getattr(vectors, name)) is not None}
  near, far = named(OF_QUERIES), named(OF_KEYS)
  spec = Spec(
    heads=heads, group=heads // k.shape[1], q_length=q_padded, kv_length=kv_padded, block_q=blocks.q,
    block_kv=blocks.kv, compute=blocks.compute, segmented='q_segments' in near, positioned=True, scale=scale,
    softcap=softcap, interpret=interpret, **tiles.static(see),
  )  # fmt: skip
  major = lambda x, length: pad(x, 2, length).reshape(-1, length, head_dim)
  numbers = {'slopes': see.alibi, 'sinks': sinks}
  return Prepared(
    inner=ByKernel(spec=spec, of_queries=tuple(near), of_keys=tuple(far), batch=batch),
    queries=Shard(arrays=(major(q, q_padded),), vectors=jnp.stack(list(near.values()))),
    keys=Shard(arrays=(major(k, kv_padded), major(v, kv_padded)), vectors=jnp.stack(list(far.values()))),
    numbers={name: x.astype(jnp.float32) for name, x in numbers.items() if x is not None},
    back=lambda x: x.reshape(batch, heads, q_padded, *x.shape[2:])[:, :, :q_length],
  )
