"""Flash attention on GPU through Triton: one kernel forward, two backward, O(length) memory; the interpreter runs the
same kernels. It lowers for CUDA and equals the definition in the interpreter, and on an H200 without a relative bias
(docs/LOG.md). Its block sizes are not tuned. jax 0.12 still lowers it, with a warning that Pallas will drop Triton in
favour of Mosaic.

Differences from `reference.attention`, the definition: a relative bias goes by the difference of indices, so position
j - position i must be j - i inside a segment, as in packed rows; `alibi` has no gradient; no dropout.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from pallas_kernels import tuned
from pallas_kernels.attention import gpu_kernels, tiles
from pallas_kernels.attention.gpu_kernels import LOG2E, NO_ROW, SINK
from pallas_kernels.attention.reference import Visibility, relative_position_bucket
from pallas_kernels.attention.tiles import KEPT, Spec, Vectors, pad, padded
from pallas_kernels.errors import KernelError

LEAST = 16  # rows or columns of a tensor core's product
Ins = Mapping[str, tuple[Array, pl.BlockSpec]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
  """Block sizes of queries and of keys, forward and for gradients: powers of 2, at least 16. A block has `warps` warps
  and loads `stages` tiles at once.
  """

  q: int
  kv: int
  grad_q: int
  grad_kv: int
  warps: int = 4
  stages: int = 2
  grad_warps: int = 4
  grad_stages: int = 2


def choose_blocks(q_length: int, kv_length: int, head_dim: int, dtype) -> Blocks:
  """The sizes tuned for this chip, or defaults, which are not tuned. Triton 3.9 compiled these for H100, causal up to
  head_dim 256 and all features at 128: at most 137 KiB of shared memory (A100 has 163), up to 1.3 KiB of spills in f32.
  """
  exact, large = jnp.dtype(dtype).itemsize > 2, head_dim > 128
  fit = lambda length, most: min(most, max(LEAST, pl.next_power_of_2(length)))
  q, kv, grad = (32, 32, 32) if exact else (64, 32, 32) if large else (128, 64, 64)
  warps = 4 if head_dim <= 64 else 8
  found = tuned.lookup('attention', shape_class(head_dim, dtype), tuple(f.name for f in dataclasses.fields(Blocks)))
  blocks = (
    Blocks(q=q, kv=kv, grad_q=grad, grad_kv=grad, warps=warps, grad_warps=warps) if found is None else Blocks(**found)
  )
  return dataclasses.replace(
    blocks, q=fit(q_length, blocks.q), grad_q=fit(q_length, blocks.grad_q),
    kv=fit(kv_length, blocks.kv), grad_kv=fit(kv_length, blocks.grad_kv),
  )  # fmt: skip


def shape_class(width: int, dtype) -> str:
  """The key of tuned block sizes."""
  return f'd{width}_{jnp.dtype(dtype).name}'


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
  blocks: Blocks | None = None,
  interpret: bool = False,
):
  """`reference.attention`, tile by tile. Raises KernelError for arrays that Triton's lowering cannot address."""
  (batch, q_length, heads, head_dim), kv_length = q.shape, k.shape[1]
  width = max(LEAST, pl.next_power_of_2(head_dim))
  blocks = choose_blocks(q_length, kv_length, width, q.dtype) if blocks is None else blocks
  lengths = padded(q_length, max(blocks.q, blocks.grad_q)), padded(kv_length, max(blocks.kv, blocks.grad_kv))
  vectors = tiles.vectors(see, (batch, q_length, kv_length), lengths)
  spec = Spec(
    heads=heads, group=heads // k.shape[2], q_length=lengths[0], kv_length=lengths[1], block_q=blocks.q,
    block_kv=blocks.kv, compute=blocks.kv, segmented=vectors.q_segments is not None,
    positioned=vectors.q_positions is not None, scale=1 / math.sqrt(head_dim) if scale is None else scale,
    sinks=sink_logits is not None, softcap=softcap, interpret=interpret, **tiles.static(see),
  )  # fmt: skip
  _check_size(spec, batch, width, "kernels.attention='triton'")
  k, v = see.silence_padding(k, v)
  major = lambda x, n: pad(pad(jnp.moveaxis(x, 2, 1), 2, n), 3, width).reshape(-1, n, width)
  table = None if see.relative_bias is None else see.relative_bias.table
  rows = major(q, lengths[0]), major(k, lengths[1]), major(v, lengths[1])
  out, lse = _flash(spec, blocks, *rows, table, see.alibi, sink_logits, vectors)
  out = jnp.moveaxis(out.reshape(batch, heads, -1, width)[:, :, :q_length, :head_dim], 1, 2)
  if not return_lse:
    return out
  return out, jnp.moveaxis(lse.reshape(batch, heads, -1)[:, :, :q_length], 1, 2)


def _check_size(spec: Spec, batch: int, width: int, what: str) -> None:
  """Raises KernelError for arrays too large for Triton's int32 indices, which would wrap, or for CUDA's grid, which has
  65,535 rows.
  """
  rows, shared = batch * spec.heads, batch * spec.heads // spec.group
  numbers = max(rows * spec.q_length, shared * spec.kv_length) * width
  if numbers >= 2**31 or rows > 65535:
    raise KernelError(
      f'{what} over {batch} x {spec.heads} heads, {numbers} numbers; 65535 heads and {2**31 - 1} numbers fit: use a '
      'smaller batch for each device.'
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _flash(spec: Spec, blocks: Blocks, q, k, v, table, alibi, sink_logits, vectors: Vectors) -> tuple[Array, Array]:
  """q[batch * heads, length, width], … -> (o like q, lse f32[batch * heads, length])."""
  return _forward(spec, blocks, q, k, v, table, alibi, sink_logits, vectors)[0]


def _forward(spec: Spec, blocks: Blocks, q, k, v, table, alibi, sink_logits, vectors: Vectors):
  row = jax.ShapeDtypeStruct(q.shape[:2], jnp.float32)
  out = _run(
    spec, gpu_kernels.forward, (spec.num_q, q.shape[0]),
    ins=_of_queries(spec, {'q': q, 'k': k, 'v': v}, _of_heads(spec, table, alibi, sink_logits), vectors),
    outs={'o': _block(q, spec.block_q), 'lse': _block(row, spec.block_q)}, size=(blocks.warps, blocks.stages),
  )  # fmt: skip
  o, lse = (checkpoint_name(out[name], KEPT) for name in ('o', 'lse'))
  natural = jnp.where(lse == NO_ROW, -jnp.inf, lse / LOG2E)
  return (o, natural), (q, k, v, table, alibi, sink_logits, vectors, o, lse)


def _backward(spec: Spec, blocks: Blocks, saved, gradients):
  q, k, v, table, alibi, sink_logits, vectors, o, lse = saved
  do, dlse = gradients
  spec = dataclasses.replace(spec, block_q=blocks.grad_q, block_kv=blocks.grad_kv, compute=blocks.grad_kv)
  di = jnp.sum(o.astype(jnp.float32) * do.astype(jnp.float32), -1) - jnp.where(lse == NO_ROW, 0.0, dlse)
  arrays = {'q': q, 'k': k, 'v': v, 'do': do.astype(q.dtype), 'lse': lse, 'di': di}
  per_head = _of_heads(spec, table, alibi, sink_logits)
  size = blocks.grad_warps, blocks.grad_stages
  dq, dtable = _grad_queries(spec, size, arrays, per_head, vectors, table)
  dk, dv = _grad_keys_values(spec, size, arrays, per_head, vectors)
  dsink = None if sink_logits is None else _grad_sinks(spec, per_head['numbers'][:, SINK], lse, di, sink_logits.dtype)
  zero = lambda x: np.zeros(x.shape, jax.dtypes.float0)
  dalibi = None if alibi is None else jnp.zeros_like(alibi)
  return dq, dk, dv, dtable, dalibi, dsink, jax.tree.map(zero, vectors)


_flash.defvjp(_forward, _backward)


def plain_gradients(saved, gradients, *, causal: bool, scale: float, interpret: bool) -> tuple[Array, Array, Array]:
  """(dq, dk, dv) of attention by index without other features, for the Hopper kernel, which has no backward pass.

  `saved`: q[batch, T, heads, head_dim], k, v[batch, S, kv_heads, head_dim], o like q, and lse in base 2, f32[batch,
  heads, T]; every query sees a key. `gradients`: of o, and of the natural lse[batch, T, heads]. head_dim is a power of
  2, lengths are multiples of 16 at least.
  """
  q, k, v, o, lse = saved
  (batch, q_length, heads, width), kv_length = q.shape, k.shape[1]
  blocks = choose_blocks(q_length, kv_length, width, q.dtype)
  blocks = dataclasses.replace(
    blocks, grad_q=math.gcd(blocks.grad_q, q_length), grad_kv=math.gcd(blocks.grad_kv, kv_length)
  )
  spec = Spec(
    heads=heads, group=heads // k.shape[2], q_length=q_length, kv_length=kv_length, block_q=blocks.grad_q,
    block_kv=blocks.grad_kv, compute=blocks.grad_kv, causal=causal, segmented=False, positioned=False, scale=scale,
    interpret=interpret,
  )  # fmt: skip
  _check_size(spec, batch, width, "the gradient of kernels.attention='mosaic_gpu'")
  rows = lambda x: jnp.moveaxis(x, 2, 1).reshape(-1, x.shape[1], *x.shape[3:])
  flat = rows(q), rows(k), rows(v), None, None, None, Vectors(), rows(o), lse.reshape(-1, q_length)
  dq, dk, dv, *_ = _backward(spec, blocks, flat, [rows(x) for x in gradients])
  back = lambda x: jnp.moveaxis(x.reshape(batch, -1, *x.shape[1:]), 1, 2)
  return back(dq), back(dk), back(dv)


def _grad_queries(spec: Spec, size: tuple[int, int], arrays, per_head, vectors: Vectors, table):
  """(dq, the table's gradient or None)."""
  q = arrays['q']
  ins, outs = _of_queries(spec, arrays, per_head, vectors), {'dq': _block(q, spec.block_q)}
  if table is not None:
    lanes = pl.next_power_of_2(table.shape[0])
    buckets = _buckets(spec, table)
    ins['buckets'] = (buckets, pl.BlockSpec(buckets.shape, lambda n, h: (0,)))
    sums = jax.ShapeDtypeStruct((q.shape[0], spec.num_q, lanes), jnp.float32)
    outs['dbuckets'] = (sums, pl.BlockSpec((None, None, lanes), lambda n, h: (h, n, 0)))
  out = _run(spec, gpu_kernels.grad_queries, (spec.num_q, q.shape[0]), ins, outs, size)
  if table is None:
    return out['dq'], None
  sums = out['dbuckets'].reshape(-1, spec.heads, *out['dbuckets'].shape[1:]).sum((0, 2))
  return out['dq'], sums[:, : table.shape[0]].T.astype(table.dtype)


def _grad_keys_values(spec: Spec, size: tuple[int, int], arrays, per_head, vectors: Vectors):
  k, v, group = arrays['k'], arrays['v'], spec.group
  kv_heads = spec.heads // group
  shared = lambda x: x.reshape(-1, group * x.shape[1], *x.shape[2:])  # one head after another
  own = {name: shared(x) if name in gpu_kernels.OF_HEADS else x for name, x in arrays.items()}
  ins = {name: _whole(x, lambda h: h) for name, x in own.items()}
  ins |= {name: _whole(shared(x), lambda h: h % kv_heads) for name, x in per_head.items()}
  ins |= _of_rows(spec, vectors, kv_heads, by_keys=True)
  outs = {'dk': _block(k, spec.block_kv), 'dv': _block(v, spec.block_kv)}
  out = _run(spec, gpu_kernels.grad_keys_values, (spec.num_kv, k.shape[0]), ins, outs, size)
  return out['dk'], out['dv']


def _grad_sinks(spec: Spec, sinks: Array, lse: Array, di: Array, dtype) -> Array:
  """A sink is a key without a value. `sinks` and `lse` are in base 2."""
  per_head = lambda x: x.reshape(-1, spec.heads, spec.q_length)
  return -(jnp.exp2(sinks[:, None] - per_head(lse)) * per_head(di)).sum((0, 2)).astype(dtype)


def _buckets(spec: Spec, table: Array) -> Array:
  """int32[2 * max_distance + 1]: the bucket of each distance; larger distances have the bucket of the largest."""
  far = spec.max_distance or 0
  return relative_position_bucket(
    jnp.arange(-far, far + 1), buckets=table.shape[0], bidirectional=spec.bidirectional, max_distance=far
  )


def _of_heads(spec: Spec, table, alibi, sink_logits) -> dict[str, Array]:
  """f32[heads, …], in base 2: the slope and sink of each head, and its bias by distance."""
  none = jnp.zeros(spec.heads, jnp.float32)
  numbers = [none if x is None else x.astype(jnp.float32) for x in (alibi, sink_logits)]
  found = {'numbers': jnp.stack(numbers, -1) * LOG2E}
  return found if table is None else found | {'bias': table.astype(jnp.float32)[_buckets(spec, table)].T * LOG2E}


def _whole(x: Array, index: Callable) -> tuple[Array, pl.BlockSpec]:
  """All of `x[index(head)]`, from which a kernel loads what it needs."""
  return x, pl.BlockSpec((None, *x.shape[1:]), lambda n, h: (index(h), *(0 for _ in x.shape[1:])))


def _block(x, size: int) -> tuple[Any, pl.BlockSpec]:
  """A program's own block."""
  return x, pl.BlockSpec((None, size, *x.shape[2:]), lambda n, h: (h, n, *(0 for _ in x.shape[2:])))


def _of_queries(spec: Spec, arrays, per_head, vectors: Vectors) -> dict[str, tuple[Array, pl.BlockSpec]]:
  """The inputs of a program for a block of queries of one head."""
  shared = lambda h: h // spec.group
  ins = {name: _whole(x, shared if name in gpu_kernels.KEYS else lambda h: h) for name, x in arrays.items()}
  ins |= {name: _whole(x, lambda h: h % spec.heads) for name, x in per_head.items()}
  return ins | _of_rows(spec, vectors, spec.heads, by_keys=False)


def _of_rows(spec: Spec, vectors: Vectors, per_row: int, *, by_keys: bool) -> dict[str, tuple[Array, pl.BlockSpec]]:
  """The vectors of each row of the batch, and the bounds of the tiles of each block."""
  found = {f.name: getattr(vectors, f.name) for f in dataclasses.fields(vectors)}
  found = {name: x for name, x in found.items() if x is not None}
  if spec.segmented:  # so that padding does not see padding
    found['q_segments'] = jnp.where(found['q_segments'] == 0, -1, found['q_segments'])
  bounds = tiles.bounds(spec, vectors, by_keys=by_keys)
  row = (lambda h: h // per_row) if bounds.shape[0] > 1 else (lambda h: 0)
  ends = {'bounds': (bounds, pl.BlockSpec((None, None, 2), lambda n, h: (row(h), n, 0)))}
  return {name: _whole(x, lambda h: h // per_row) for name, x in found.items()} | ends


def _run(
  spec: Spec, kernel, grid: tuple[int, int], ins: Ins, outs: Mapping[str, Any], size: tuple[int, int]
) -> dict[str, Array]:
  """`kernel(spec, refs by name)` over a grid of (blocks, batch * heads), in programs of `size` (warps, stages)."""
  names, (warps, stages) = (*ins, *outs), size
  shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x, _ in outs.values()]
  results = pl.pallas_call(
    lambda *refs: kernel(spec, dict(zip(names, refs, strict=True))),
    grid=grid,
    in_specs=[where for _, where in ins.values()],
    out_specs=[where for _, where in outs.values()],
    out_shape=shapes,
    # Without these parameters a kernel for CUDA would be lowered through Mosaic.
    compiler_params=triton.CompilerParams(num_warps=warps, num_stages=stages),
    interpret=spec.interpret,
    name=kernel.__name__,
  )(*(x for x, _ in ins.values()))
  return dict(zip(outs, results, strict=True))
