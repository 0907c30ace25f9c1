"""Ring attention: `reference.attention` of rows that an axis of the mesh divides, in O(length / devices) memory.

To be called on each device (`shard_map`) with its parts of q, k, v and of the vectors. It has every feature of the
definition except dropout and position_scores. Positions are vectors, so a device may hold any tokens of a row.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.attention.reference import Visibility
from pallas_kernels.attention.ring import by_blocks, by_kernel
from pallas_kernels.attention.ring.circulate import Ring, circulate

VECTORS = ('q_segment_ids', 'kv_segment_ids', 'prefix_end')


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
  heads_first: bool = False,
  kernel: bool = False,
  blocks: Any = None,
  interpret: Any = False,
):
  """`reference.attention` of q[batch, T / devices, heads, head_dim] over the keys of all devices of `axis`.

  Positions default to indices of rows in order: device n has the n-th part of each row. Sinks inside a window are those
  at positions that are given. `kernel`: by the kernels for TPU, which have no relative bias. With `heads_first`
  arrays are [batch, heads, length, head_dim] and lse [batch, heads, length].
  """
  turned = (lambda x: x) if heads_first else (lambda x: jnp.swapaxes(x, 1, 2))
  q, (k, v) = turned(q), (turned(x) for x in see.silence_padding(k, v, heads_first=heads_first))
  options = {'softcap': softcap, 'scale': 1 / math.sqrt(q.shape[-1]) if scale is None else scale, 'blocks': blocks}
  placed = _placed(see, (q.shape[0], q.shape[2], k.shape[2]), axis)
  if kernel:
    own = by_kernel.prepare(q, k, v, placed, sink_logits, **options, interpret=interpret)
  else:
    own = by_blocks.prepare(q, k, v, placed, sink_logits, **options)
  out, lse = circulate(Ring(inner=own.inner, axis=axis), own.queries, own.keys, own.numbers)
  out = turned(own.back(out))
  return (out, turned(own.back(lse))) if return_lse else out


def _placed(see: Visibility, shape: tuple[int, int, int], axis: str | None) -> Visibility:
  """`see` with positions, and all vectors for each row of the batch; `shape` is (batch, queries, keys)."""
  batch, lengths = shape[0], {'q': shape[1], 'kv': shape[2]}
  device = 0 if axis is None else jax.lax.axis_index(axis)
  index = lambda n: device * n + jnp.arange(n, dtype=jnp.int32)[None]
  found = {name: x for name in VECTORS if (x := getattr(see, name)) is not None}
  for side, length in lengths.items():
    given = getattr(see, f'{side}_positions')
    found[f'{side}_positions'] = index(length) if given is None else given
  length = lambda name: lengths['q' if name.startswith('q_') else 'kv']
  wide = {name: jnp.broadcast_to(x, (batch, length(name))) for name, x in found.items()}
  return dataclasses.replace(see, **wide)
