"""The scan over the tiles of the scores, forward and backward, with a softmax that is corrected as larger scores come.

The backward pass makes the scores again from the log-sum-exp.
Source: Rabe and Staats 2021, arXiv:2112.05682; Dao et al. 2022, arXiv:2205.14135.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.attention import reference
from pallas_kernels.attention.reference import MASKED, RelativeBias, Visibility
from pallas_kernels.attention.tiles import KEPT

Arrays = Mapping[str, Array]
_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
_at = functools.partial(jax.lax.dynamic_index_in_dim, axis=0, keepdims=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
  """The static properties of a call. Lengths are without padding; `see` has no arrays; `bias` is (bidirectional,
  max_distance). `by_index`: positions are indices. `prefixed`: some keys are visible to queries before them.
  """

  q_length: int
  kv_length: int
  block_q: int
  block_kv: int
  see: Visibility
  by_index: bool
  prefixed: bool
  softcap: float | None
  bias: tuple[bool, int] | None

  @property
  def num_q(self) -> int:
    return -(-self.q_length // self.block_q)

  @property
  def num_kv(self) -> int:
    return -(-self.kv_length // self.block_kv)

  def tiles(self) -> np.ndarray:
    """int32[tiles, 2]: (block of queries, block of keys) of each tile in which some query may see some key."""
    i, j = np.meshgrid(np.arange(self.num_q), np.arange(self.num_kv), indexing='ij')
    least = j * self.block_kv - np.minimum((i + 1) * self.block_q, self.q_length) + 1  # index of key - index of query
    most = np.minimum((j + 1) * self.block_kv, self.kv_length) - 1 - i * self.block_q
    live, window = np.ones(i.shape, bool), self.see.window
    if self.by_index and self.see.causal and not self.prefixed:
      live &= least <= 0
    if self.by_index and window is not None:
      live &= ((most > -window) & (least < window)) | (j * self.block_kv < self.see.num_sinks)
    return np.stack([i[live], j[live]], -1).astype(np.int32)


def _see(spec: Spec, vectors: Arrays, i: Array, j: Array) -> Visibility:
  """What the queries of block i see of the keys of block j."""
  return dataclasses.replace(spec.see, **{n: _at(x, i if n.startswith('q_') else j) for n, x in vectors.items()})


def _own(spec: Spec, numbers: Arrays, i: Array, j: Array) -> dict[str, Array]:
  """`numbers` that the scores of a tile read; of the line its part."""
  found = {name: x for name, x in numbers.items() if name != 'sinks'}
  if 'line' in found:
    found['line'] = jax.lax.dynamic_slice_in_dim(
      found['line'], _line_start(spec, i, j), spec.block_q + spec.block_kv, axis=2
    )
  return found


def _line_start(spec: Spec, i: Array, j: Array) -> Array:
  return j * spec.block_kv + (spec.num_q - 1 - i) * spec.block_q


def _scores(spec: Spec, raw: Array, own: Arrays, see: Visibility) -> Array:
  """f32[batch, kv_heads, group, block_q, block_kv] from q k^T: capped, and with the biases."""
  scores = raw if spec.softcap is None else spec.softcap * jnp.tanh(raw / spec.softcap)
  if 'line' in own:
    line = own['line'][:, :, None]
    scores = scores + reference._skew(jnp.broadcast_to(line, (*line.shape[:2], spec.block_q, line.shape[-1])))
  if 'table' in own:
    table = own['table'].reshape(-1, own['table'].shape[-1]).T
    bias = reference._bias(RelativeBias(table, *spec.bias), see.q_positions, see.kv_positions)
    scores = scores + bias.reshape(bias.shape[0], *scores.shape[1:3], *bias.shape[2:])
  if 'alibi' in own:
    distance = jnp.abs(see.kv_positions[:, None, :] - see.q_positions[:, :, None]).astype(jnp.float32)
    scores = scores - own['alibi'][:, :, None, None] * distance[:, None, None]
  return scores


def _mask(spec: Spec, see: Visibility, j: Array) -> Array | None:
  """bool[batch or 1, 1, 1, block_q, block_kv], or None where every query sees every key."""
  mask = reference._mask(see)
  if spec.num_kv * spec.block_kv > spec.kv_length:
    inside = (j * spec.block_kv + jnp.arange(spec.block_kv) < spec.kv_length)[None, None]
    mask = inside if mask is None else mask & inside
  return None if mask is None else mask[:, None, None]


def _hidden(mask: Array | None, scores: Array) -> Array:
  return scores if mask is None else jnp.where(mask, scores, MASKED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(spec: Spec, q: Array, k: Array, v: Array, numbers: Arrays, vectors: Arrays) -> tuple[Array, Array]:
  """(out, in q's shape and dtype; lse f32[blocks, batch, kv_heads, group, block_q]) of what `_split_heads` made."""
  out, lse = mix(spec, q, k, v, numbers, vectors)
  return out.astype(q.dtype), lse


def mix(
  spec: Spec, q: Array, k: Array, v: Array, numbers: Arrays, vectors: Arrays, live: Array | None = None
) -> tuple[Array, Array]:
  """`attend` without gradients, `out` in f32. Of bool[num_q, num_kv] `live`, only true tiles are computed."""

  def tile_of(own, i, j):
    see, (top, total, mixed) = _see(spec, vectors, i, j), own
    raw = _einsum('bkgtd,bksd->bkgts', _at(q, i), _at(k, j))
    scores = _hidden(_mask(spec, see, j), _scores(spec, raw, _own(spec, numbers, i, j), see))
    larger = jnp.maximum(top, scores.max(-1))
    weights, fade = jnp.exp(scores - larger[..., None]), jnp.exp(top - larger)
    found = _einsum('bkgts,bksd->bkgtd', weights.astype(v.dtype), _at(v, j))
    return larger, total * fade + weights.sum(-1), mixed * fade[..., None] + found

  def visit(carry, tile):
    i, j = tile
    own = tuple(_at(x, i) for x in carry)
    changed = _if_live(live, i, j, lambda: tile_of(own, i, j), lambda: own)
    return tuple(jax.lax.dynamic_update_index_in_dim(x, y, i, 0) for x, y in zip(carry, changed, strict=True)), None

  sinks = numbers.get('sinks')
  top = jnp.full(q.shape[:-1], MASKED) if sinks is None else jnp.broadcast_to(sinks[..., None], q.shape[:-1])
  start = top, jnp.full_like(top, 0.0 if sinks is None else 1.0), jnp.zeros(q.shape, jnp.float32)
  (top, total, mixed), _ = jax.lax.scan(visit, start, tuple(spec.tiles().T))
  seen = top > MASKED / 2  # the largest score of a query without a visible key is MASKED
  total = jnp.where(seen, total, 1.0)
  out = jnp.where(seen[..., None], mixed / total[..., None], 0.0)
  return out, jnp.where(seen, top + jnp.log(total), -jnp.inf)


def _if_live(live: Array | None, i: Array, j: Array, compute: Callable, otherwise: Callable):
  return compute() if live is None else jax.lax.cond(live[i, j], compute, otherwise)


def _forward(spec: Spec, q: Array, k: Array, v: Array, numbers: Arrays, vectors: Arrays):
  out, lse = (checkpoint_name(x, KEPT) for x in attend(spec, q, k, v, numbers, vectors))
  return (out, lse), (q, k, v, numbers, vectors, out, lse)


def _backward(spec: Spec, saved, gradients):
  (q, k, v, *_), found = saved, pull(spec, saved, gradients)
  arrays = tuple(found.pop(name).astype(x.dtype) for name, x in (('q', q), ('k', k), ('v', v)))
  return *arrays, found, None


def shift_of(out: Array, lse: Array, gradients: tuple[Array, Array]) -> Array:
  """f32 in lse's shape: d loss / d score = weight * (d loss / d weight - this)."""
  out_gradient, lse_gradient = gradients
  return _einsum('...d,...d->...', out_gradient, out) - jnp.where(jnp.isfinite(lse), lse_gradient, 0.0)


def pull(spec: Spec, saved, gradients: tuple[Array, Array], live: Array | None = None) -> dict[str, Array]:
  """The gradients of q, k, v and `numbers`, in f32, from (q, k, v, numbers, vectors, out, lse), where `out` and `lse`
  may be of more keys than these; `live` as in `mix`.

  Of a query without a visible key all weights are 0: its scores are MASKED, and its lse is taken as 0."""
  (q, k, v, numbers, vectors, out, lse), (out_gradient, _) = saved, gradients
  shift = shift_of(out, lse, gradients)
  lse = jnp.where(jnp.isfinite(lse), lse, 0.0)

  def tile_of(i, j):
    see, own = _see(spec, vectors, i, j), _own(spec, numbers, i, j)
    q_i, k_j, v_j, g = _at(q, i), _at(k, j), _at(v, j), _at(out_gradient, i)
    raw = _einsum('bkgtd,bksd->bkgts', q_i, k_j)
    scores, of_scores = jax.vjp(lambda raw, own: _scores(spec, raw, own, see), raw, own)
    weights = jnp.exp(_hidden(_mask(spec, see, j), scores) - _at(lse, i)[..., None])
    by_weight = _einsum('bkgtd,bksd->bkgts', g, v_j) - _at(shift, i)[..., None]
    raw_gradient, own_gradient = of_scores(weights * by_weight)
    raw_gradient = raw_gradient.astype(q.dtype)
    changes = {
      'q': _einsum('bkgts,bksd->bkgtd', raw_gradient, k_j),
      'k': _einsum('bkgts,bkgtd->bksd', raw_gradient, q_i),
      'v': _einsum('bkgts,bkgtd->bksd', weights.astype(v.dtype), g),
    }
    return changes, own_gradient

  def visit(carry, tile):
    i, j = tile
    nothing = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(tile_of, i, j))
    found, own = _if_live(live, i, j, lambda: tile_of(i, j), nothing)
    changes = {'q': (i, found['q']), 'k': (j, found['k']), 'v': (j, found['v'])}
    return carry | _add_blocks(carry, changes) | _add_numbers(spec, carry, own, i, j), None

  start = {'q': q, 'k': k, 'v': v} | {name: x for name, x in numbers.items() if name != 'sinks'}
  start = {name: jnp.zeros(x.shape, jnp.float32) for name, x in start.items()}
  found, _ = jax.lax.scan(visit, start, tuple(spec.tiles().T))
  if 'sinks' in numbers:  # a weight without a value, so d loss / d weight is 0
    found['sinks'] = -(jnp.exp(numbers['sinks'][..., None] - lse) * shift).sum((0, 1, 4))
  return found


def _add_blocks(carry: Arrays, changes: Mapping[str, tuple[Array, Array]]) -> dict[str, Array]:
  add = lambda x, n, change: jax.lax.dynamic_update_index_in_dim(x, _at(x, n) + change, n, 0)
  return {name: add(carry[name], *change) for name, change in changes.items()}


def _add_numbers(spec: Spec, carry: Arrays, own: Arrays, i: Array, j: Array) -> dict[str, Array]:
  found = {name: carry[name] + x for name, x in own.items() if name != 'line'}
  if 'line' in own:
    start = _line_start(spec, i, j)
    part = jax.lax.dynamic_slice_in_dim(carry['line'], start, own['line'].shape[2], axis=2)
    found['line'] = jax.lax.dynamic_update_slice_in_dim(carry['line'], part + own['line'], start, axis=2)
  return found


attend.defvjp(_forward, _backward)
