"""Rows, options and comparisons for the tests of attention kernels."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import reference, tpu
from pallas_kernels.attention.reference import RelativeBias, Visibility

SMALL = tpu.Blocks(q=128, kv=128, compute=128)


def row(*lengths: int, padding: int = 0) -> np.ndarray:
  """Segment ids 1, 2, … of these lengths, then padding."""
  return np.concatenate([np.repeat(np.arange(1, len(lengths) + 1), lengths), np.zeros(padding)]).astype(np.int32)


def positions(segments: np.ndarray) -> np.ndarray:
  """0, 1, … inside each segment."""
  new = np.diff(segments, axis=-1, prepend=-1) != 0
  index = np.broadcast_to(np.arange(segments.shape[-1]), segments.shape)
  return (index - np.maximum.accumulate(np.where(new, index, 0), -1)).astype(np.int32)


def packed(segments: np.ndarray) -> dict:
  return {'q_segment_ids': jnp.asarray(segments), 'kv_segment_ids': jnp.asarray(segments)}


def prefixed(segments: np.ndarray, ends: tuple[int, ...]) -> dict:
  """Packed, and the first `ends[n]` tokens of segment n visible to all of it."""
  at = jnp.asarray(positions(segments))
  ends = jnp.asarray(np.array(ends, np.int32)[segments])
  return packed(segments) | {'q_positions': at, 'kv_positions': at, 'prefix_end': ends}


def attend(attention, *arrays, **options):
  """`attention` with the options of `flash_attention`, which are split into a Visibility and the rest."""
  own = {field.name: options.pop(field.name) for field in dataclasses.fields(Visibility) if field.name in options}
  return attention(*arrays, Visibility(**own), **options)


def normal(shape, seed: int, dtype=np.float32) -> jax.Array:
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def draw(q_length: int, kv_length: int | None = None, *, batch=1, heads=2, kv_heads=2, head_dim=16, dtype=np.float32):
  shape = lambda n, h: (batch, n, h, head_dim)
  kv = shape(q_length if kv_length is None else kv_length, kv_heads)
  return tuple(normal(s, seed, dtype) for seed, s in enumerate((shape(q_length, heads), kv, kv)))


def results(function, arrays, options: dict, weights):
  """(out, finite lse) and their gradients to q, k, v, the bias table and the sink logits, as a dict of f64."""
  bias = options.get('relative_bias')
  extra = {} if bias is None else {'table': bias.table}
  extra |= {name: options[name] for name in ('sink_logits',) if name in options}

  def loss(q, k, v, extra):
    own = {name: x for name, x in extra.items() if name != 'table'}
    if bias is not None:
      own['relative_bias'] = RelativeBias(extra['table'], bias.bidirectional, bias.max_distance)
    out, lse = attend(function, q, k, v, **(options | own), return_lse=True)
    seen = jnp.isfinite(lse)
    total = (out.astype(jnp.float32) * weights[0]).sum() + jnp.where(seen, lse * weights[1], 0.0).sum()
    return total, {'out': out, 'lse': jnp.where(seen, lse, 0.0), 'seen': seen}

  (_, values), (dq, dk, dv, more) = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))(*arrays, extra)
  found = values | {'dq': dq, 'dk': dk, 'dv': dv} | {f'd{name}': x for name, x in more.items()}
  return {name: np.asarray(x, np.float64) for name, x in found.items()}


def compare(arrays, options: dict, blocks: Any = SMALL, interpret=True, attention=tpu.attention) -> dict[str, float]:
  """Relative L2 differences between kernel and definition, by name. Fails if `seen` differs."""
  q = arrays[0]
  weights = [normal(q.shape, 3), normal(q.shape[:3], 4)]
  kernel = lambda *x, **more: attention(*x, **more, blocks=blocks, interpret=interpret)
  got, want = (results(f, arrays, options, weights) for f in (kernel, reference.attention))
  np.testing.assert_array_equal(got.pop('seen'), want.pop('seen'))
  return {name: relative(got[name], want[name]) for name in want}


def relative(got, want) -> float:
  """The relative L2 difference; infinite where one of them has a NaN, because `max` passes over NaN."""
  found = np.linalg.norm(got - want) / np.linalg.norm(want)
  return math.inf if np.isnan(found) else float(found)
