"""Which tiles of the scores a kernel visits: computed from vectors in plain JAX, passed as a list of packed words.

A tile is block i of queries times block j of keys. From the smallest and largest segment and position of
each block, `classify` finds whether a tile is live (some query may see some key), near (its relative bias has more than
one value; without a bias: it crosses the diagonal) and masked (some pair may be hidden by segments, positions or a
window). It may call a dead tile live or a clear one masked, never the reverse; kernels apply the exact mask. In a tile
on the diagonal (CUT), a piece of keys is computed only for the queries from its first key on.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.attention.reference import Visibility
from pallas_kernels.errors import KernelError

LANES = 128
INDEX_BITS = 12
MAX_BLOCKS = 1 << INDEX_BITS
FIRST, LAST, LIVE, NEAR, MASKED, CUT, CROSS = (1 << (2 * INDEX_BITS + n) for n in range(7))
FAR = 1 << 30  # beyond every position
KEPT = 'context'  # the name of the output and the log-sum-exp, which jax.checkpoint can keep for the gradient


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
  """The static properties of a call. Lengths are padded to blocks, and so are arrays, but for `q_rows` and `kv_rows`.

  `max_distance` and `buckets` belong to the bias: None and 0 without one. `positioned`: positions are vectors, not
  indices.
  A tile of scores is [block_q, block_kv], computed `compute` keys at a time; `compute` divides both.
  `q_rows`, `kv_rows`: the lengths of the arrays of queries and of keys where they are shorter than the only block, else
  None (TPU alone). What a kernel reads behind their end is undefined, and may be NaN.
  """

  heads: int
  group: int
  q_length: int
  kv_length: int
  block_q: int
  block_kv: int
  compute: int
  causal: bool
  segmented: bool
  positioned: bool
  scale: float
  window: int | None = None
  num_sinks: int = 0
  max_distance: int | None = None
  buckets: int = 0
  bidirectional: bool = False
  alibi: bool = False
  sinks: bool = False
  softcap: float | None = None
  q_rows: int | None = None
  kv_rows: int | None = None
  interpret: Any = False

  @property
  def num_q(self) -> int:
    return self.q_length // self.block_q

  @property
  def num_kv(self) -> int:
    return self.kv_length // self.block_kv

  @property
  def diagonal(self) -> bool:
    """Whether causality goes by indices: the mask is then the same in every row of the batch."""
    return self.causal and not self.positioned

  @property
  def biased(self) -> bool:
    return self.max_distance is not None

  @property
  def cuts(self) -> bool:
    """Whether tiles on the diagonal are a separate class."""
    return self.diagonal and self.block_q == self.block_kv > LANES

  @property
  def strip(self) -> int:
    """Queries computed at a time where the diagonal crosses a piece."""
    return max(LANES, self.compute // 2)

  @property
  def tile_classes(self) -> list[int]:
    """The classes of live tiles that can occur: LIVE with some of NEAR, MASKED, CUT."""
    near = [0, NEAR] if self.biased or (self.diagonal and not self.cuts) else [0]
    near += [NEAR | CUT] if self.cuts else []
    masked = (0, MASKED) if self.segmented or self.positioned or self.window is not None else (0,)
    return [LIVE | n | m for n in near for m in masked]

  @property
  def near_offsets(self) -> range:
    """The possible values of (first key - first query) in pieces of near tiles, `compute` apart."""
    step, reach = math.gcd(self.block_q, self.block_kv), self.max_distance or 0
    low = -(-(-reach - self.block_kv + 2) // step) * step
    high = self.block_q - 1 + (0 if self.diagonal else reach - 1)
    last = 0 if self.cuts else high // step * step + self.block_kv - self.compute
    return range(low, last + 1, self.compute)


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['q_segments', 'kv_segments', 'q_positions', 'kv_positions', 'kv_reach'],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Vectors:
  """int32[batch, padded length] each, or None. Key j is visible under causality iff `kv_reach[j]` <= the query's
  position: `kv_reach` is the key's position, or in a prefix a number below all positions.
  """

  q_segments: Array | None = None
  kv_segments: Array | None = None
  q_positions: Array | None = None
  kv_positions: Array | None = None
  kv_reach: Array | None = None


def static(see: Visibility) -> dict[str, Any]:
  """The fields of `Spec` that follow from `see` alone."""
  bias = see.relative_bias
  found = {'causal': see.causal, 'window': see.window, 'num_sinks': see.num_sinks, 'alibi': see.alibi is not None}
  if bias is not None:
    found |= {'max_distance': bias.max_distance, 'buckets': bias.table.shape[0], 'bidirectional': bias.bidirectional}
  return found


def padded(length: int, block: int) -> int:
  return -(-length // block) * block


def pad(x: Array, dim: int, length: int, mode: str = 'constant') -> Array:
  widths = [(0, length - n if d == dim else 0) for d, n in enumerate(x.shape)]
  return jnp.pad(x, widths, mode=mode) if length != x.shape[dim] else x


def vectors(see: Visibility, shape: tuple[int, int, int], lengths: tuple[int, int]) -> Vectors:
  """The vectors of `see`, for `shape` = (batch, q length, kv length), padded to `lengths`. Padding gets segment 0,
  unless no real query could see it in any case.
  """
  batch, q_length, kv_length = shape
  row = lambda x, length: jnp.broadcast_to(jnp.asarray(x, jnp.int32), (batch, length))
  to_q = lambda x, mode='constant': pad(row(x, q_length), 1, lengths[0], mode)
  to_kv = lambda x, mode='constant': pad(row(x, kv_length), 1, lengths[1], mode)
  positioned = any(x is not None for x in (see.q_positions, see.kv_positions, see.prefix_end))
  unseen = see.causal and not positioned and q_length <= kv_length
  q_segments, kv_segments = see.q_segment_ids, see.kv_segment_ids
  if q_segments is None and kv_length != lengths[1] and not unseen:
    q_segments, kv_segments = jnp.ones((1, q_length), jnp.int32), jnp.ones((1, kv_length), jnp.int32)
  found = {}
  if q_segments is not None:
    found = {'q_segments': to_q(q_segments), 'kv_segments': to_kv(kv_segments)}
  if positioned:
    own = jnp.arange(kv_length)[None] if see.kv_positions is None else see.kv_positions
    reach = own if see.prefix_end is None else jnp.where(own < see.prefix_end, -FAR, own)
    found['q_positions'] = to_q(jnp.arange(q_length)[None] if see.q_positions is None else see.q_positions, 'edge')
    found |= {'kv_positions': to_kv(own, 'edge'), 'kv_reach': to_kv(reach, 'edge')}
  return Vectors(**found)


def classify(spec: Spec, vectors: Vectors):
  """(live, near, masked), bool[batch or 1, num_q, num_kv]: numpy arrays with batch 1 where no vector matters."""
  offset = np.arange(spec.num_kv)[None, None] * spec.block_kv - np.arange(spec.num_q)[None, :, None] * spec.block_q
  live = offset < spec.block_q if spec.diagonal else np.ones_like(offset, bool)
  near, masked = _near(spec, offset), np.zeros_like(live)
  if spec.segmented:
    both, one = _segments(spec, vectors)
    live, masked = live & both, masked | ~one
  if spec.positioned or spec.window is not None:
    some, every = _positions(spec, vectors)
    live, masked = live & some, masked | ~every
  return live, near, masked


def _near(spec: Spec, offset):
  if spec.biased:
    above = spec.diagonal or offset - (spec.block_q - 1) < spec.max_distance
    return (offset + spec.block_kv - 1 > -spec.max_distance) & above
  return offset + spec.block_kv - 1 > 0 if spec.diagonal else np.zeros_like(offset, bool)


def _range(x, block: int):
  blocks = x.reshape(x.shape[0], -1, block)
  return blocks.min(-1), blocks.max(-1)


def _segments(spec: Spec, vectors: Vectors):
  """(whether queries and keys may share a segment, whether all have the same one); segment 0 is padding."""
  ends = []
  for ids, block in ((vectors.q_segments, spec.block_q), (vectors.kv_segments, spec.block_kv)):
    lowest, highest = _range(jnp.where(ids == 0, FAR, ids), block)[0], _range(jnp.where(ids == 0, -FAR, ids), block)[1]
    ends.append((lowest, highest, (lowest == highest) & (_range(ids, block)[0] != 0)))
  (q_low, q_high, q_one), (k_low, k_high, k_one) = ends
  both = (q_low[:, :, None] <= k_high[:, None]) & (k_low[:, None] <= q_high[:, :, None])
  return both, q_one[:, :, None] & k_one[:, None] & (q_low[:, :, None] == k_low[:, None])


def _positions(spec: Spec, vectors: Vectors):
  """(whether some pair may see each other by position, whether every pair does)."""
  index = lambda length: np.arange(length, dtype=np.int32)[None]
  at = lambda given, length: index(length) if given is None else given
  q_low, q_high = (x[:, :, None] for x in _range(at(vectors.q_positions, spec.q_length), spec.block_q))
  k_low, k_high = (x[:, None] for x in _range(at(vectors.kv_positions, spec.kv_length), spec.block_kv))
  some = every = np.ones((1, 1, 1), bool)
  if spec.causal and spec.positioned:
    low, high = (x[:, None] for x in _range(vectors.kv_reach, spec.block_kv))
    some, every = some & (low <= q_high), every & (high <= q_low)
  if spec.window is not None:
    meets = (k_low - q_high < spec.window) & (q_low - k_high < spec.window)
    inside = (k_high - q_low < spec.window) & (q_high - k_low < spec.window)
    some, every = some & (meets | (k_low < spec.num_sinks)), every & (inside | (k_high < spec.num_sinks))
  return some, every


def bounds(spec: Spec, vectors: Vectors, *, by_keys: bool) -> Array:
  """int32[batch or 1, blocks, 2]: for each block of queries (`by_keys`: of keys), the first live tile and the one after
  the last; 0, 0 where none is live. Dead tiles between them are visited.
  """
  live = jnp.asarray(classify(spec, vectors)[0])
  live = jnp.swapaxes(live, 1, 2) if by_keys else live
  ends = jnp.stack([jnp.argmax(live, -1), live.shape[-1] - jnp.argmax(live[..., ::-1], -1)], -1)
  return jnp.where(live.any(-1, keepdims=True), ends, 0).astype(jnp.int32)


def walk(spec: Spec, vectors: Vectors, *, by_keys: bool):
  """(words int32[batch or 1, at most num_q * num_kv], how many are used: an int, or an array if it depends on vectors).

  Tiles of one block of queries (`by_keys`: of keys) follow each other, the first and last are marked, and a block
  without a live tile still has one, so that its output is written. CROSS marks the first tile of a block of queries
  that is saturated on the right. The unused words of a row repeat its last tile without marks: no copy, no work.

  Raises KernelError for more than 4,096 blocks.
  """
  if max(spec.num_q, spec.num_kv) > MAX_BLOCKS:
    raise KernelError(f'flash_attention over {spec.num_q} x {spec.num_kv} blocks; {MAX_BLOCKS} fit, use larger blocks.')
  classes = classify(spec, vectors)
  static = all(isinstance(x, np.ndarray) for x in classes)
  xp, shape = (np if static else jnp), (-1, spec.num_q, spec.num_kv)
  i, j = np.meshgrid(np.arange(spec.num_q), np.arange(spec.num_kv), indexing='ij')
  order = (lambda x: xp.swapaxes(x, 1, 2)) if by_keys else (lambda x: x)
  flat = lambda x: order(xp.reshape(x, shape)).reshape(x.size // i.size, -1)
  live, near, masked = (flat(x) for x in classes)
  own = flat(xp.asarray(j if by_keys else i, np.int32))[0]
  place = flat(xp.asarray(i | j << INDEX_BITS, np.int32))
  some = live.reshape(live.shape[0], -1, spec.num_q if by_keys else spec.num_kv).any(-1)
  begins = np.diff(np.asarray(np.sort(j if by_keys else i, axis=None)), prepend=-1) != 0
  keep = live | (begins[None] & ~some[:, own])
  flags = _flag(xp, live, LIVE) + _flag(xp, near, NEAR) + _flag(xp, masked, MASKED)
  flags = flags + _flag(xp, flat(spec.cuts & (i == j)), CUT)
  right = ~near & flat(j * spec.block_kv > i * spec.block_q) & (spec.biased and not spec.diagonal)
  return _compact(xp, keep, xp.broadcast_to(own, keep.shape), place + flags, place, right)


def _flag(xp, on, bit: int):
  return xp.where(on, np.int32(bit), np.int32(0))


def _compact(xp, keep, own, words, place, right):
  """The words of the tiles kept, in front, with marks at the ends of each block."""
  order = xp.argsort(~keep, axis=-1, stable=True)
  take = lambda x: xp.take_along_axis(xp.broadcast_to(x, keep.shape), order, axis=-1)
  own, used, at = take(own), keep.sum(-1, keepdims=True), np.arange(keep.shape[1])[None]
  right = take(right)
  change, edge = own[:, 1:] != own[:, :-1], xp.ones_like(keep[:, :1])
  first = xp.concatenate([edge, change], -1)
  cross = right & xp.concatenate([edge, change | ~right[:, :-1]], -1)
  last = xp.concatenate([change, edge], -1) | (at == used - 1)
  end = xp.take_along_axis(take(place), used - 1, axis=-1)
  marks = _flag(xp, first, FIRST) + _flag(xp, last, LAST) + _flag(xp, cross, CROSS)
  words = xp.where(at < used, take(words) + marks, end)
  if xp is np:
    return words[:, : int(used.max())].astype(np.int32), int(used.max())
  return words.astype(jnp.int32), used.max()


def unpack(word):
  """(block of queries, block of keys)."""
  return word & (MAX_BLOCKS - 1), (word >> INDEX_BITS) & (MAX_BLOCKS - 1)
