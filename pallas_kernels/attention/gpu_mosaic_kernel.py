"""The kernel for Hopper, which Mosaic lowers for GPUs: the forward pass of attention, causal by index or full.

A program has three warpgroups. Two attend (wgmma), each for its half of a block of queries; the third copies the tiles
of keys and values that they see (TMA), some tiles ahead. The two take turns: while one multiplies, the other computes
its softmax.
Scores are in base 2.
Source: Shah et al. 2024, arXiv:2407.08608, §3.1; in Mosaic: jax/experimental/pallas/ops/gpu/attention_mgpu.py.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu

LOG2E = math.log2(math.e)
ATTENDING = 2  # warpgroups
# Registers of a thread: 128 * (2 * 232 + 40) of the 65,536 that a multiprocessor has.
ATTENDING_REGISTERS, BRINGING_REGISTERS = 232, 40
SCRATCH_BYTES = 1024  # for sums across warps: not used here, but the least that Mosaic accepts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
  """`q` queries of a program, `kv` keys of a tile, `stages` tiles in shared memory; `group` heads share keys.

  `interpret`: parameters of jax's interpreter for GPUs, or None.
  """

  batch: int
  heads: int
  group: int
  q_length: int
  kv_length: int
  head_dim: int
  dtype: Any
  q: int
  kv: int
  stages: int
  causal: bool
  scale: float
  interpret: Any = None

  @property
  def rows(self) -> int:
    """Queries of a warpgroup."""
    return self.q // ATTENDING

  @property
  def num_kv(self) -> int:
    return self.kv_length // self.kv

  def tiles(self, end: Array) -> Array:
    """How many tiles, from the first on, some query before `end` sees."""
    if not self.causal:
      return jnp.int32(self.num_kv)
    return jnp.minimum(lax.div(end + (self.kv - 1), jnp.int32(self.kv)), self.num_kv)

  def clear(self, first: Array) -> Array:
    """How many tiles, from the first on, all queries from `first` on see completely."""
    if not self.causal:
      return jnp.int32(self.num_kv)
    return jnp.minimum(lax.div(first + 1, jnp.int32(self.kv)), self.num_kv)

  def slot(self, j: Array) -> Array:
    return lax.rem(j, jnp.int32(self.stages))

  def scratch(self) -> dict[str, Any]:
    """The shared memory and barriers of a program, by name."""
    tiles = mosaic_gpu.SMEM((self.stages, self.kv, self.head_dim), self.dtype)
    ready, free = (mosaic_gpu.Barrier(num_barriers=self.stages, num_arrivals=n) for n in (1, ATTENDING))
    return {
      'own_q': mosaic_gpu.SMEM((ATTENDING, self.rows, self.head_dim), self.dtype),
      'own_lse': mosaic_gpu.SMEM((ATTENDING, self.rows), jnp.float32),
      'k_tiles': tiles, 'v_tiles': tiles, 'k_ready': ready, 'v_ready': ready, 'k_free': free, 'v_free': free,
      'q_ready': mosaic_gpu.Barrier(num_barriers=ATTENDING), 'turn': mosaic_gpu.Barrier(num_arrivals=ATTENDING),
    }  # fmt: skip


def forward(spec: Spec, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
  """(o like q[batch, T, heads, head_dim], its log-sum-exp in base 2, f32[batch, heads, T])."""
  scratch = spec.scratch()
  names = ('q', 'k', 'v', 'o', 'lse', *scratch)
  lse = jax.ShapeDtypeStruct((spec.batch, spec.heads, spec.q_length), jnp.float32)

  def attention_forward(*refs):  # named so in profiles
    _program(spec, dict(zip(names, refs, strict=True)))

  return mosaic_gpu.kernel(
    attention_forward,
    out_type=(jax.ShapeDtypeStruct(q.shape, q.dtype), lse),
    scratch_types=list(scratch.values()),
    grid=(spec.heads, spec.q_length // spec.q, spec.batch),
    grid_names=('head', 'block', 'batch'),
    num_threads=ATTENDING + 1,
    thread_name='warpgroup',
    compiler_params=mosaic_gpu.CompilerParams(
      approx_math=True,
      lowering_semantics=mosaic_gpu.LoweringSemantics.Warpgroup,
      reduction_scratch_bytes=SCRATCH_BYTES,
    ),
    interpret=spec.interpret,
  )(q, k, v)


def _program(spec: Spec, ref: Mapping[str, Any]) -> None:
  warpgroup = lax.axis_index('warpgroup')
  # The blocks that see most keys run first.
  block = spec.q_length // spec.q - 1 - lax.axis_index('block')
  first = block * spec.q + warpgroup * spec.rows
  pl.when(warpgroup == ATTENDING)(lambda: _bring(spec, ref, spec.tiles((block + 1) * spec.q)))
  pl.when(warpgroup < ATTENDING)(lambda: _attend(Half(spec=spec, ref=ref, own=warpgroup, first=first, block=block)))


def _bring(spec: Spec, ref: Mapping[str, Any], tiles: Array) -> None:
  """Fills the slots in turn, each after both warpgroups have freed it."""
  mosaic_gpu.set_max_registers(BRINGING_REGISTERS, action='decrease')
  head = lax.div(lax.axis_index('head'), jnp.int32(spec.group))

  def left(name: str, j: Array) -> None:
    mosaic_gpu.barrier_wait(ref[f'{name}_free'].at[spec.slot(j)])

  def fill(name: str, j: Array) -> None:
    slot = spec.slot(j)
    pl.when(j >= spec.stages)(lambda: left(name, j))
    tile = ref[name].at[lax.axis_index('batch'), pl.ds(j * spec.kv, spec.kv), head]
    mosaic_gpu.copy_gmem_to_smem(tile, ref[f'{name}_tiles'].at[slot], ref[f'{name}_ready'].at[slot])

  @pl.loop(0, tiles)
  def _(j):
    fill('k', j)
    fill('v', j)

  @pl.loop(jnp.maximum(tiles - spec.stages, 0), tiles)  # a barrier must exist until all have passed it
  def _(j):
    left('k', j)
    left('v', j)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Half:
  """The queries of one warpgroup, starting at `first`."""

  spec: Spec
  ref: Mapping[str, Any]
  own: Array
  first: Array
  block: Array

  @property
  def q(self):
    return self.ref['own_q'].at[self.own]

  @property
  def place(self):
    """The index of these queries in q and o."""
    return lax.axis_index('batch'), pl.ds(self.first, self.spec.rows), lax.axis_index('head')

  def arrive(self, name: str, *at) -> None:
    mosaic_gpu.barrier_arrive(self.ref[name].at[at] if at else self.ref[name])

  def wait(self, name: str, *at) -> None:
    mosaic_gpu.barrier_wait(self.ref[name].at[at] if at else self.ref[name])

  def swap(self) -> None:
    """Hands the tensor cores to the other half, or takes them from it."""
    self.arrive('turn')
    self.wait('turn')

  def load(self) -> None:
    mosaic_gpu.copy_gmem_to_smem(self.ref['q'].at[self.place], self.q, self.ref['q_ready'].at[self.own])
    self.wait('q_ready', self.own)

  def scores(self, slot: Array) -> Array:
    """q k^T, f32[rows, kv]; the turn ends once the products are issued."""
    keys = self.ref['k_tiles'].at[slot]
    if self.spec.interpret is not None:  # interpreters of older jax cannot multiply transposed arrays
      self.swap()
      return _dot(_read(self.q), _read(keys).T)

    def multiply(scores):
      mosaic_gpu.wgmma(scores, self.q, keys.transpose((1, 0)))
      self.swap()
      return scores[...]

    return pl.run_scoped(multiply, mosaic_gpu.ACC((self.spec.rows, self.spec.kv), jnp.float32))

  def mix(self, acc: Array, p: Array, slot: Array) -> Array:
    """acc + p v, with the weights p in registers."""
    values = self.ref['v_tiles'].at[slot]
    if self.spec.interpret is not None:  # it has no products with operands in registers
      return acc + _dot(p, _read(values))
    return pl.run_state(lambda ref: mosaic_gpu.wgmma(ref, p, values))(mosaic_gpu.ACC.init(acc))

  def mask(self, scores: Array, j: Array) -> Array:
    query, key = (lax.broadcasted_iota(jnp.int32, scores.shape, n) for n in (0, 1))
    return jnp.where(key + j * self.spec.kv <= query + self.first, scores, -jnp.inf)

  def step(self, j: Array, carry, *, masked: bool):
    """One tile: (largest score, sum of weights, weighted values) of the tiles before and of this one."""
    m, l, acc = carry
    slot, scale = self.spec.slot(j), self.spec.scale * LOG2E
    self.wait('k_ready', slot)
    scores = self.scores(slot)
    self.arrive('k_free', slot)
    if masked:
      scores = self.mask(scores, j)
    new = jnp.maximum(m, scores.max(1) * scale)
    p, keep = jnp.exp2(scores * scale - _columns(new, scores)), jnp.exp2(m - new)
    l = keep * l + p.sum(1)
    acc = _columns(keep, acc) * acc
    p = p.astype(self.spec.dtype)
    self.arrive('turn')
    self.wait('v_ready', slot)
    self.wait('turn')
    acc = self.mix(acc, p, slot)
    self.arrive('v_free', slot)
    return new, l, acc

  def skip(self, j: Array, carry) -> None:
    """Passes a tile that only the other half sees: frees its slot and takes part in the turns."""
    slot = self.spec.slot(j)
    for name in ('k', 'v'):
      self.wait(f'{name}_ready', slot)
      self.arrive(f'{name}_free', slot)
      self.swap()

  def store(self, m: Array, l: Array, acc: Array) -> None:
    """Writes the results through the shared memory that held the queries."""
    self.q[...] = (acc / _columns(l, acc)).astype(self.spec.dtype)
    lse = self.ref['own_lse'].at[self.own]
    lse[...] = m + jnp.log(l) * LOG2E
    mosaic_gpu.commit_smem()
    batch, rows, head = self.place
    mosaic_gpu.copy_smem_to_gmem(self.q, self.ref['o'].at[self.place])
    mosaic_gpu.copy_smem_to_gmem(lse, self.ref['lse'].at[batch, head, rows])
    mosaic_gpu.wait_smem_to_gmem(0)


def _attend(half: Half) -> None:
  spec = half.spec
  mosaic_gpu.set_max_registers(ATTENDING_REGISTERS, action='increase')
  half.load()
  pl.when(half.own == 1)(half.swap)  # half a step behind the other
  clear, seen, brought = (
    spec.clear(half.first),
    spec.tiles(half.first + spec.rows),
    spec.tiles((half.block + 1) * spec.q),
  )
  row = lambda value: jnp.full((spec.rows,), value, jnp.float32)
  carry = row(-jnp.inf), row(0.0), jnp.zeros((spec.rows, spec.head_dim), jnp.float32)
  carry = lax.fori_loop(0, clear, functools.partial(half.step, masked=False), carry)
  if spec.causal:
    carry = lax.fori_loop(clear, seen, functools.partial(half.step, masked=True), carry)
    lax.fori_loop(seen, brought, half.skip, None)
  pl.when(half.own == 0)(half.swap)
  half.store(*carry)


def _columns(x: Array, like: Array) -> Array:
  """One number for each row, broadcast to the shape of `like`."""
  return lax.broadcast_in_dim(x, like.shape, (0,))


def _read(ref) -> Array:
  """The value of `ref`, read without wgmma: a fence then orders later copies into `ref`."""
  value = ref[...]
  mosaic_gpu.commit_smem()
  return value


def _dot(a: Array, b: Array) -> Array:
  return jnp.dot(a, b, preferred_element_type=jnp.float32)
