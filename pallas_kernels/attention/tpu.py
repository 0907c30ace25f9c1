"""Flash attention on TPU: one Mosaic kernel forward, two backward, O(length) memory. The interpreter runs the same.

Differences from `reference.attention`, the definition: a relative bias goes by the difference of indices, so position
j - position i must be j - i inside a segment, as in packed rows; `alibi` has no gradient; no dropout.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tuned
from pallas_kernels.attention import tiles, toeplitz, tpu_kernels
from pallas_kernels.attention.reference import Visibility
from pallas_kernels.attention.tiles import KEPT, Spec, Vectors, pad, padded
from pallas_kernels.attention.toeplitz import LANES
from pallas_kernels.attention.tpu_kernels import LOG2E, NO_ROW

BLOCKS = (2048, 1024, 512, 256, 128)
# Used where tuning/CHIP.json has no entry. Small blocks skip more of the scores of packed rows.
DEFAULT = {'q': 1024, 'kv': 1024, 'compute': 512}
DEFAULT_PACKED = {'q': 512, 'kv': 512, 'compute': 512}
WORDS_AT_ONCE = 2**17  # for the lists of tiles: half of the scalar memory of a core


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
  """Block sizes of queries, of keys, and of keys computed at a time: multiples of 128; the last divides the others."""

  q: int
  kv: int
  compute: int


def choose_block(length: int, most: int) -> int:
  """The largest block that pads `length` by no more than a quarter of what 128 would leave."""
  least = -(-length // LANES) * LANES
  return next(block for block in BLOCKS if block <= most and -(-length // block) * block <= least * 5 / 4)


def choose_blocks(q_length: int, kv_length: int, head_dim: int, *, causal: bool, packed: bool) -> Blocks:
  """The sizes tuned for this chip and class of shapes, or the default; smaller for short rows."""
  shape = shape_class(head_dim, causal=causal, packed=packed)
  default = DEFAULT_PACKED if packed else DEFAULT
  most = tuned.lookup('attention', shape, ('q', 'kv', 'compute')) or default
  q, kv = choose_block(q_length, most['q']), choose_block(kv_length, most['kv'])
  return Blocks(q=q, kv=kv, compute=min(q, kv, most['compute']))


def shape_class(head_dim: int, *, causal: bool, packed: bool) -> str:
  """The key of tuned block sizes: shapes with one key compile to the same layout."""
  return f'd{-(-head_dim // 64) * 64}_{"packed_" if packed else ""}{"causal" if causal else "full"}'


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
  heads_first: bool = False,
  blocks: Blocks | None = None,
  interpret: Any = False,
):
  """`reference.attention`, tile by tile. `interpret`: True, or pltpu.InterpretParams.

  The kernels read and write [batch, heads, length, head_dim]. With `heads_first` that is the order of q, k, v and of
  the result (lse: [batch, heads, length]), and nothing is transposed.
  """
  first = (lambda x: x) if heads_first else (lambda x: jnp.moveaxis(x, 2, 1))
  q, (k, v) = first(q), (first(x) for x in see.silence_padding(k, v, heads_first=heads_first))
  (batch, heads, q_length, head_dim), kv_length = q.shape, k.shape[2]
  if blocks is None:
    blocks = choose_blocks(q_length, kv_length, head_dim, causal=see.causal, packed=see.q_segment_ids is not None)
  q_padded, kv_padded = padded(q_length, blocks.q), padded(kv_length, blocks.kv)
  vectors = tiles.vectors(see, (batch, q_length, kv_length), (q_padded, kv_padded))
  spec = Spec(
    heads=heads, group=heads // k.shape[1], q_length=q_padded, kv_length=kv_padded,
    block_q=blocks.q, block_kv=blocks.kv, compute=blocks.compute,
    segmented=vectors.q_segments is not None, positioned=vectors.q_positions is not None,
    scale=1 / math.sqrt(head_dim) if scale is None else scale, sinks=sink_logits is not None, softcap=softcap,
    q_rows=q_length if q_length < blocks.q else None, kv_rows=kv_length if kv_length < blocks.kv else None,
    interpret=interpret, **tiles.static(see),
  )  # fmt: skip
  major = lambda x, rows: pad(x, 2, rows).reshape(-1, rows, head_dim)
  q_rows, kv_rows = spec.q_rows or spec.q_length, spec.kv_rows or spec.kv_length
  table = None if see.relative_bias is None else see.relative_bias.table
  call = lambda rows: _flash(spec, *rows[:3], table, see.alibi, sink_logits, rows[3])
  arrays = (major(q, q_rows), major(k, kv_rows), major(v, kv_rows), vectors)
  out, lse = in_turns(call, arrays, batch, rows_at_once(spec, vectors, batch))
  last = (lambda x: x) if heads_first else (lambda x: jnp.moveaxis(x, 1, 2))
  out = last(out.reshape(batch, heads, -1, head_dim)[:, :, :q_length])
  return (out, last(lse.reshape(batch, heads, -1)[:, :, :q_length])) if return_lse else out


def rows_at_once(spec: Spec, vectors: Vectors, batch: int) -> int:
  """The largest divisor of `batch` for which the lists of tiles fit; without vectors all rows share one list."""
  if not jax.tree.leaves(vectors):
    return batch
  most = max(1, WORDS_AT_ONCE // (spec.num_q * spec.num_kv))
  return next(rows for rows in range(min(batch, most), 0, -1) if batch % rows == 0)


def in_turns(call, arrays, batch: int, rows: int):
  if rows == batch:
    return call(arrays)
  split = lambda x: x.reshape(batch // rows, -1, *x.shape[1:])
  join = lambda x: x.reshape(-1, *x.shape[2:])
  return jax.tree.map(join, jax.lax.map(call, jax.tree.map(split, arrays)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(spec: Spec, q, k, v, table, alibi, sink_logits, vectors: Vectors) -> tuple[Array, Array]:
  """q[batch * heads, length, head_dim], … -> (o like q, lse f32[batch * heads, length])."""
  return _forward(spec, q, k, v, table, alibi, sink_logits, vectors)[0]


def run_forward(spec: Spec, q, k, v, numbers, vectors: Vectors, dtype) -> tuple[Array, Array]:
  """(o in `dtype`, lse in base 2, NO_ROW for a query without a visible key)."""
  call, f32 = Call.make(spec, numbers, vectors, by_keys=False), jnp.float32
  out = call.run(
    tpu_kernels.forward,
    ins={'q': call.of_q(q), 'k': call.of_kv(k), 'v': call.of_kv(v)},
    outs={'o': call.of_q(_like(q, dtype)),
          'lse': call.row_of_q(jax.ShapeDtypeStruct((q.shape[0], 1, spec.q_length), f32))},
    scratch={'m': ((spec.block_q, LANES), f32), 'l': ((spec.block_q, LANES), f32),
             'acc': ((spec.block_q, q.shape[2]), f32), **call.toe('toe')},
  )  # fmt: skip
  return out['o'], out['lse'][:, 0]


def _like(x, dtype) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, dtype)


def _forward(spec: Spec, q, k, v, table, alibi, sink_logits, vectors: Vectors):
  found = run_forward(spec, q, k, v, _numbers(table, alibi, sink_logits), vectors, q.dtype)
  o, lse = (checkpoint_name(x, KEPT) for x in found)
  natural = lse / LOG2E if table is None else _add_left(spec, lse / LOG2E, table)
  natural = jnp.where(lse == NO_ROW, -jnp.inf, natural)
  return (o, natural), (q, k, v, table, alibi, sink_logits, vectors, o, lse)


def _backward(spec: Spec, saved, gradients):
  q, k, v, table, alibi, sink_logits, vectors, o, lse = saved
  do, dlse = gradients
  numbers = _numbers(table, alibi, sink_logits)
  di = pad(jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), -1), 1, spec.q_length)
  di -= jnp.where(lse == NO_ROW, 0.0, dlse)
  rows = {'lse': lse[:, None], 'di': di[:, None]}
  same = {'q': q, 'k': k, 'v': v, 'do': do.astype(q.dtype), **rows}
  dq, dbias = grad_queries(spec, same, numbers, vectors, q.dtype)
  dk, dv = grad_keys_values(spec, same, numbers, vectors, k.dtype)
  # Kernels count the bias from its far left, but the gradients are those of the bias itself.
  dtable = None if table is None else toeplitz.table_gradient(spec, *dbias).astype(table.dtype)
  dsink = None if sink_logits is None else _grad_sinks(spec, table, sink_logits, lse, di)
  zero = lambda x: np.zeros(x.shape, jax.dtypes.float0)
  dalibi = None if alibi is None else jnp.zeros_like(alibi)
  return dq, dk, dv, dtable, dalibi, dsink, jax.tree.map(zero, vectors)


_flash.defvjp(_forward, _backward)


def _grad_sinks(spec: Spec, table, sink_logits, lse, di) -> Array:
  own = sink_logits.astype(jnp.float32) * LOG2E
  own = own if table is None else own - table[toeplitz.saturated(spec)[0]].astype(jnp.float32) * LOG2E
  weights = jnp.exp2(own[:, None] - lse.reshape(-1, spec.heads, spec.q_length))
  return -(weights * di.reshape(weights.shape)).sum((0, 2)).astype(sink_logits.dtype)


def grad_queries(spec: Spec, arrays: Mapping[str, Array], numbers, vectors: Vectors, dtype):
  """(dq, gradient of the bias: f32[heads, length of its line] and f32[heads, 2] of saturated tiles, or None)."""
  call, f32 = Call.make(spec, numbers, vectors, by_keys=False), jnp.float32
  q = arrays['q']
  outs, scratch = {'dq': call.of_q(_like(q, dtype))}, {'acc': ((spec.block_q, q.shape[2]), f32)}
  scratch |= {f'column_{name}': ((spec.block_q, LANES), f32) for name in ('lse', 'di')}
  if spec.biased:
    outs['dline'] = call.of_head(jax.ShapeDtypeStruct((q.shape[0], 1, toeplitz.length(spec)), f32))
    outs['dsaturated'] = call.of_head(jax.ShapeDtypeStruct((q.shape[0], 2, 8, LANES), f32))
    scratch |= call.toe('toe') | call.toe('dtoe')
  out = call.run(tpu_kernels.grad_queries, call.inputs(arrays), outs, scratch)
  if not spec.biased:
    return out['dq'], None
  per_head = lambda x: x.reshape(-1, spec.heads, *x.shape[1:])
  return out['dq'], (per_head(out['dline']).sum((0, 2)), per_head(out['dsaturated']).sum((0, -1, -2)))


def grad_keys_values(spec: Spec, arrays: Mapping[str, Array], numbers, vectors: Vectors, dtype):
  call, f32 = Call.make(spec, numbers, vectors, by_keys=True), jnp.float32
  k, v = arrays['k'], arrays['v']
  scratch = {name: ((spec.block_kv, k.shape[2]), f32) for name in ('acc_k', 'acc_v')}
  out = call.run(
    tpu_kernels.grad_keys_values, call.inputs(arrays),
    {'dk': call.of_kv(_like(k, dtype)), 'dv': call.of_kv(_like(v, dtype))},
    scratch | call.toe('toe', members=spec.group),
  )  # fmt: skip
  return out['dk'], out['dv']


def _numbers(table, alibi, sink_logits) -> dict[str, Array]:
  """The arrays from which a kernel reads single numbers, one or a few for each head."""
  given = {'table': table, 'slopes': alibi, 'sinks': sink_logits}
  return {name: x.astype(jnp.float32) for name, x in given.items() if x is not None}


def _add_left(spec: Spec, lse: Array, table: Array) -> Array:
  left = table[toeplitz.saturated(spec)[0]].astype(jnp.float32)
  return (lse.reshape(-1, spec.heads, lse.shape[1]) + left[:, None]).reshape(lse.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
  """One pallas_call: its tiles, and the block of each array at each step. Arrays come with their BlockSpec.

  The grid is (heads, batch, tiles), or (kv_heads, batch, tiles, heads that share them) for gradients of keys. Heads and
  batch have a dim each: to separate them, a step would have to divide, which is slow on scalar units.
  """

  spec: Spec
  numbers: dict[str, Array]
  words: Array
  steps: Any
  vectors: dict[str, Array]
  by_keys: bool

  @classmethod
  def make(cls, spec: Spec, numbers: dict[str, Array], vectors: Vectors, *, by_keys: bool) -> 'Call':
    words, steps = tiles.walk(spec, vectors, by_keys=by_keys)
    found = {f.name: getattr(vectors, f.name) for f in dataclasses.fields(vectors)}
    found = {name: x for name, x in found.items() if x is not None}
    if spec.segmented:  # so that padding does not see padding
      found['q_segments'] = jnp.where(found['q_segments'] == 0, -1, found['q_segments'])
    return cls(spec=spec, numbers=numbers, words=jnp.asarray(words), steps=steps, vectors=found, by_keys=by_keys)

  def _block(self, shape, index) -> pl.BlockSpec:
    """`index(i, j, head, kv_head, row)` of a step, for a block of `shape`; head numbers run through the whole batch."""
    spec, group = self.spec, self.spec.group

    def at(own, row, step, *rest):
      member, words = rest[:2] if self.by_keys else (0, rest[0])
      i, j = tiles.unpack(words[row if words.shape[0] > 1 else 0, step])
      kv_head = own if self.by_keys or group == 1 else jax.lax.div(own, group)
      head = own * group + member if self.by_keys else own
      return index(i, j, row * spec.heads + head, row * (spec.heads // group) + kv_head, row)

    return pl.BlockSpec(shape, at)

  def of_q(self, x):
    return x, self._block((None, self.spec.block_q, x.shape[2]), lambda i, j, head, kv_head, row: (head, i, 0))

  def of_kv(self, x):
    return x, self._block((None, self.spec.block_kv, x.shape[2]), lambda i, j, head, kv_head, row: (kv_head, j, 0))

  def row_of_q(self, x):
    return x, self._block((None, 1, self.spec.block_q), lambda i, j, head, kv_head, row: (head, 0, i))

  def of_head(self, x):
    rest = x.shape[1:]
    return x, self._block((None, *rest), lambda i, j, head, kv_head, row: (head, *(0 for _ in rest)))

  def inputs(self, arrays: Mapping[str, Array]) -> dict[str, Any]:
    place = {'k': self.of_kv, 'v': self.of_kv, 'lse': self.row_of_q, 'di': self.row_of_q}
    return {name: place.get(name, self.of_q)(x) for name, x in arrays.items()}

  def toe(self, name: str, members: int | None = None) -> dict[str, Any]:
    if not self.spec.biased:
      return {}
    shape = (LANES, toeplitz.length(self.spec))
    return {name: (shape if members is None else (members, *shape), jnp.float32)}

  def _row_vectors(self) -> dict[str, Any]:
    """The vectors as int32[batch, 1, length], with their blocks."""
    found = {}
    for name, x in self.vectors.items():
      of_q = name.startswith('q_')
      block = self.spec.block_q if of_q else self.spec.block_kv
      place = (lambda i, j, h, g, row: (row, 0, i)) if of_q else (lambda i, j, h, g, row: (row, 0, j))
      found[name] = (x[:, None], self._block((None, 1, block), place))
    return found

  def _columns(self) -> dict[str, Any]:
    """Scratch for the vectors of the rows of a tile: queries, or keys if the tile is transposed."""
    block, side = (self.spec.block_kv, 'kv_') if self.by_keys else (self.spec.block_q, 'q_')
    return {f'column_{name}': ((block, LANES), jnp.int32) for name in self.vectors if name.startswith(side)}

  def run(self, kernel, ins, outs, scratch) -> dict[str, Array]:
    ins = {**self._row_vectors(), **ins}
    scratch = scratch | self._columns()
    names, spec = [*self.numbers, *ins, *outs, *scratch], self.spec
    batch = ins['q'][0].shape[0] // spec.heads
    grid = (
      (spec.heads // spec.group, batch, self.steps, spec.group) if self.by_keys else (spec.heads, batch, self.steps)
    )

    def body(words, *refs):
      kernel(spec, words, dict(zip(names, refs, strict=True)))

    found = pl.pallas_call(
      body, name=f'attention_{kernel.__name__}', interpret=spec.interpret,
      out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x, _ in outs.values()],
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1 + len(self.numbers), grid=grid, in_specs=[block for _, block in ins.values()],
        out_specs=[block for _, block in outs.values()],
        scratch_shapes=[pltpu.VMEM(shape, dtype) for shape, dtype in scratch.values()],
      ),
      # The list of tiles only has blocks that begin inside the arrays; checking that again took a fifth of a step. An
      # array that ends inside its block is read and written up to its end.
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=('parallel', 'parallel', *['arbitrary'] * (len(grid) - 2)), disable_bounds_checks=True
      ),
    )(self.words, *self.numbers.values(), *(x for x, _ in ins.values()))  # fmt: skip
    return dict(zip(outs, found, strict=True))
