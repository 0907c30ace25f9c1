"""The three kernels for GPU, which Triton lowers: forward, the gradient of queries (and of the bias), those of keys.

A program holds one block of queries (of keys, for their gradients) and visits the tiles of the other side between the
bounds of `tiles.bounds`. Scores are in base 2. Every tile is masked exactly; T5's bias is one number in a saturated
tile, and gathered by distance in the others.
Source: Dao 2023, arXiv:2307.08691; jax/experimental/pallas/ops/gpu/attention.py lays it out for Triton.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels.attention.tiles import Spec

LOG2E = math.log2(math.e)
HIDDEN = -2e30  # below LOWEST: a query without a visible key has weights of 0, not NaN
LOWEST = -1e30
NO_ROW = 1e30  # log-sum-exp of such a query, for the backward pass: exp2(score - NO_ROW) = 0
SLOPE, SINK = range(2)  # indices of the numbers of a head
NUMBERS = 2
QUERIES = ('q', 'do', 'lse', 'di', 'q_segments', 'q_positions')
KEYS = ('k', 'v', 'kv_segments', 'kv_positions', 'kv_reach')
OF_HEADS = ('q', 'do', 'lse', 'di')


def dot(a: Array, b: Array, *, trans_b: bool = False) -> Array:
  """A product in f32. Exact for f32 inputs, where Triton would use TF32, which has 10 bits."""
  return triton.dot(a, b, trans_b=trans_b, precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None)


def load_queries(spec: Spec, ref, i, member=0) -> dict[str, Array]:
  """Block i of the vectors of queries; `member` selects one of the heads that share keys and lie one after another."""
  start = {name: member * spec.q_length if name in OF_HEADS else 0 for name in QUERIES if name in ref}
  return {name: ref[name][pl.ds(first + i * spec.block_q, spec.block_q)] for name, first in start.items()}


def load_keys(spec: Spec, ref, j) -> dict[str, Array]:
  return {name: ref[name][pl.ds(j * spec.block_kv, spec.block_kv)] for name in KEYS if name in ref}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
  """Block i of queries times block j of keys: [block_q, block_kv], or the transpose."""

  spec: Spec
  ref: Any
  i: Any
  j: Any
  q: Mapping[str, Array]
  kv: Mapping[str, Array]
  member: Any = 0
  transposed: bool = False

  def number(self, n: int) -> Array:
    return self.ref['numbers'][self.member * NUMBERS + n]

  def of_q(self, x: Array) -> Array:
    return x[None, :] if self.transposed else x[:, None]

  def of_kv(self, x: Array) -> Array:
    return x[:, None] if self.transposed else x[None, :]

  def product(self, q: Array, k: Array) -> Array:
    return dot(k, q, trans_b=True) if self.transposed else dot(q, k, trans_b=True)

  @property
  def offset(self):
    """First key - first query."""
    return self.j * self.spec.block_kv - self.i * self.spec.block_q

  def ahead(self) -> Array:
    """Index of the key - index of the query."""
    query, key = jnp.arange(self.spec.block_q), jnp.arange(self.spec.block_kv)
    return self.of_kv(key + self.offset) - self.of_q(query)

  def distance(self) -> Array:
    """Position of the key - position of the query."""
    if self.spec.positioned:
      return self.of_kv(self.kv['kv_positions']) - self.of_q(self.q['q_positions'])
    return self.ahead()

  def visible(self) -> list[Array]:
    """The conditions under which a query sees a key."""
    spec, found = self.spec, []
    if spec.diagonal:
      found.append(self.ahead() <= 0)
    if spec.segmented:
      found.append(self.of_kv(self.kv['kv_segments']) == self.of_q(self.q['q_segments']))
    if spec.causal and spec.positioned:
      found.append(self.of_kv(self.kv['kv_reach']) <= self.of_q(self.q['q_positions']))
    if spec.window is not None:
      found.append(self._in_window())
    return found

  def _in_window(self) -> Array:
    near = jnp.abs(self.distance()) < self.spec.window
    if not self.spec.num_sinks:
      return near
    index = self.j * self.spec.block_kv + jnp.arange(self.spec.block_kv)
    return near | (self.of_kv(self.kv.get('kv_positions', index)) < self.spec.num_sinks)

  def near(self) -> Array:
    """Whether the bias of this tile has more than one value."""
    far = self.spec.max_distance or 0
    return (self.offset + self.spec.block_kv - 1 > -far) & (self.offset - self.spec.block_q + 1 < far)

  def place(self) -> Array:
    """The index of each pair in arrays by distance: 0 is far behind, 2 * max_distance far ahead."""
    far = self.spec.max_distance or 0
    return jnp.clip(self.ahead(), -far, far) + far

  @property
  def saturated(self):
    """`place` of all pairs of a tile that is not near."""
    # After Triton's lowering, jnp.where of two literals has the type of its condition.
    return jax.lax.select(self.offset < 0, jnp.int32(0), jnp.int32(2 * (self.spec.max_distance or 0)))

  def _bias(self, shape) -> Array:
    bias, first = self.ref['bias'], self.member * (2 * (self.spec.max_distance or 0) + 1)
    saturated = lambda: jnp.full(shape, bias[first + self.saturated])
    return jax.lax.cond(self.near(), lambda: bias[first + self.place()], saturated)

  def scores(self) -> tuple[Array, Array | None]:
    """(scores in base 2, the derivative of the cap)."""
    spec, slope, x = self.spec, None, self.product(self.q['q'], self.kv['k'])
    if spec.softcap is None:
      x = x * (spec.scale * LOG2E)
    else:
      bent = jnp.tanh(x * (spec.scale / spec.softcap))
      x, slope = bent * (spec.softcap * LOG2E), 1 - bent * bent
    if spec.biased:
      x = x + self._bias(x.shape)
    if spec.alibi:
      x = x - self.number(SLOPE) * jnp.abs(self.distance()).astype(jnp.float32)
    seen = self.visible()
    return (jnp.where(functools.reduce(jnp.logical_and, seen), x, HIDDEN) if seen else x), slope

  def gradient(self) -> tuple[Array, Array, Array]:
    """(p, the gradient of the scores, the gradient of the products divided by `scale`)."""
    s, slope = self.scores()
    p = jnp.exp2(s - self.of_q(self.q['lse']))
    ds = p * (self.product(self.q['do'], self.kv['v']) - self.of_q(self.q['di']))
    return p, ds, ds if slope is None else ds * slope


def forward(spec: Spec, ref) -> None:
  """Writes o[block_q, head_dim] and the log-sum-exp in base 2, [block_q]."""
  i = pl.program_id(0)
  q = load_queries(spec, ref, i)

  def step(j, carry):
    m, l, acc = carry
    tile = Tile(spec=spec, ref=ref, i=i, j=j, q=q, kv=load_keys(spec, ref, j))
    s, _ = tile.scores()
    new = jnp.maximum(m, s.max(1))
    p, keep = jnp.exp2(s - new[:, None]), jnp.exp2(m - new)
    v = tile.kv['v']
    return new, keep * l + p.sum(1), keep[:, None] * acc + dot(p.astype(v.dtype), v)

  # A sink is a weight of 1 at its own maximum.
  m = jnp.full((spec.block_q,), ref['numbers'][SINK] if spec.sinks else LOWEST, jnp.float32)
  l = jnp.full((spec.block_q,), 1.0 if spec.sinks else 0.0, jnp.float32)
  acc = jnp.zeros(q['q'].shape, jnp.float32)
  m, l, acc = jax.lax.fori_loop(ref['bounds'][0], ref['bounds'][1], step, (m, l, acc))
  some = l > 0
  safe = jnp.where(some, l, 1.0)
  ref['o'][...] = (acc / safe[:, None]).astype(ref['o'].dtype)
  ref['lse'][...] = jnp.where(some, m + jnp.log2(safe), NO_ROW)


def grad_queries(spec: Spec, ref) -> None:
  """Writes dq[block_q, head_dim] and, for the bias, the gradients of the scores summed by bucket: dbuckets[buckets]."""
  i = pl.program_id(0)
  q = load_queries(spec, ref, i)

  def step(j, carry):
    acc, sums = carry
    tile = Tile(spec=spec, ref=ref, i=i, j=j, q=q, kv=load_keys(spec, ref, j))
    _, ds, dx = tile.gradient()
    k = tile.kv['k']
    acc = acc + dot(dx.astype(k.dtype), k)
    return acc, sums + sum_by_bucket(tile, ds) if spec.biased else sums

  sums = jnp.zeros(ref['dbuckets'].shape if spec.biased else (1,), jnp.float32)
  acc = jnp.zeros(q['q'].shape, jnp.float32)
  acc, sums = jax.lax.fori_loop(ref['bounds'][0], ref['bounds'][1], step, (acc, sums))
  ref['dq'][...] = (acc * spec.scale).astype(ref['dq'].dtype)
  if spec.biased:
    ref['dbuckets'][...] = sums


def sum_by_bucket(tile: Tile, ds: Array) -> Array:
  """f32[buckets, padded]. One pass over the tile for each bucket: the order is fixed, unlike that of atomic adds."""
  lanes = jnp.arange(tile.ref['dbuckets'].shape[0])
  total = lambda x: x.sum(1).sum(0)

  def near():
    bucket = tile.ref['buckets'][tile.place()]
    add = lambda b, sums: jnp.where(lanes == b, total(jnp.where(bucket == b, ds, 0.0)), sums)
    return jax.lax.fori_loop(0, lanes.size, add, jnp.zeros(lanes.shape, jnp.float32))

  def saturated():
    return jnp.where(lanes == tile.ref['buckets'][tile.saturated], total(ds), 0.0)

  return jax.lax.cond(tile.near(), near, saturated)


def grad_keys_values(spec: Spec, ref) -> None:
  """Writes dk, dv[block_kv, head_dim], summed over the query heads that share them."""
  j = pl.program_id(0)
  kv = load_keys(spec, ref, j)

  def add_head(member, carry):
    def step(i, carry):
      dk, dv = carry
      q = load_queries(spec, ref, i, member)
      tile = Tile(spec=spec, ref=ref, i=i, j=j, q=q, kv=kv, member=member, transposed=True)
      p, _, dx = tile.gradient()
      q, do = tile.q['q'], tile.q['do']
      return dk + dot(dx.astype(q.dtype), q), dv + dot(p.astype(do.dtype), do)

    return jax.lax.fori_loop(ref['bounds'][0], ref['bounds'][1], step, carry)

  zeros = jnp.zeros(kv['k'].shape, jnp.float32)
  dk, dv = jax.lax.fori_loop(0, spec.group, add_head, (zeros, zeros))
  ref['dk'][...] = (dk * spec.scale).astype(ref['dk'].dtype)
  ref['dv'][...] = dv.astype(ref['dv'].dtype)
