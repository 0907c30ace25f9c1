"""The three Mosaic kernels: forward, the gradient of queries (and of the bias), the gradients of keys and values.

Scores are in base 2. The grid is sequential along tiles; data of one block of queries or keys stays in scratch from its
FIRST tile to its LAST.
`ref` holds the blocks by name; vectors of the rows of a tile are columns, [rows, 128] with all lanes equal.
A relative bias is counted from its far left: this does not change the softmax, and tiles far left then need no bias. If
it is bidirectional, the tiles saturated on the right come last in a block of queries, so that its maxima are moved once
(CROSS).
Source: Dao et al. 2022, arXiv:2205.14135, as jax's splash_attention lays it out for TPU.
"""

import dataclasses
import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels.attention import tiles, toeplitz
from pallas_kernels.attention.tiles import Spec
from pallas_kernels.attention.toeplitz import LANES

LOG2E = math.log2(math.e)
HIDDEN = -2e30  # below LOWEST: a query without a visible key has weights of 0, not NaN
LOWEST = -1e30
NO_ROW = 1e30  # log-sum-exp of such a query, for the backward pass: exp2(score - NO_ROW) = 0
NT = (((1,), (1,)), ((), ()))  # contracts the minor dim of both
NN = (((1,), (0,)), ((), ()))


def dot(a: Array, b: Array, dims) -> Array:
  return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def wide(x: Array, columns: int) -> Array:
  """(n, 128) of equal lanes -> (n, columns)."""
  return x[:, :columns] if columns <= LANES else jnp.tile(x, (1, -(-columns // LANES)))[:, :columns]


@dataclasses.dataclass(frozen=True)
class Head:
  """Numbers of a head in base 2, read only where they are needed: reading them at every step costs as much as a branch.

  The bias far left is subtracted from the bias far right and from the sink.
  """

  spec: Spec
  ref: Any
  head: Array

  def bias(self, bucket: int) -> Array:
    return (self.ref['table'][bucket, self.head] - self._left) * LOG2E

  @property
  def _left(self) -> Array:
    return self.ref['table'][toeplitz.saturated(self.spec)[0], self.head]

  @property
  def right(self) -> Array:
    return self.bias(toeplitz.saturated(self.spec)[1])

  @property
  def slope(self) -> Array:
    return self.ref['slopes'][self.head] * LOG2E

  @property
  def sink(self) -> Array:
    return (self.ref['sinks'][self.head] - (self._left if self.spec.biased else 0.0)) * LOG2E


@dataclasses.dataclass(frozen=True)
class Piece:
  """A rectangle of a tile."""

  queries: slice
  keys: slice


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
  """A live tile: its place, its class, the numbers of its head; `toe` is the scratch of that head."""

  spec: Spec
  ref: Any
  word: Array
  head: Head
  toe: Any
  flags: int
  transposed: bool

  @property
  def near(self) -> bool:
    return self.flags & tiles.NEAR != 0

  @property
  def masked(self) -> bool:
    return self.flags & tiles.MASKED != 0

  @property
  def cut(self) -> bool:
    return self.flags & tiles.CUT != 0

  @property
  def pieces(self) -> list[Piece]:
    """The parts computed at a time. In a CUT tile, each `strip` of queries has only the keys up to its last query."""
    spec, found = self.spec, []
    for first in range(0, spec.block_kv, spec.compute):
      last = first + spec.compute
      if not self.cut:
        found.append(Piece(slice(0, spec.block_q), slice(first, last)))
        continue
      ends = range(first + spec.strip, last + 1, spec.strip)
      found += [Piece(slice(end - spec.strip, spec.block_q if end == last else end), slice(first, end)) for end in ends]
    return found

  def offset(self, piece: Piece):
    """First key - first query."""
    inside = piece.keys.start - piece.queries.start
    if self.cut:
      return inside
    i, j = tiles.unpack(self.word)
    return j * self.spec.block_kv - i * self.spec.block_q + inside

  def start(self, piece: Piece):
    """The place of a near tile in the line of biases."""
    offsets = self.spec.near_offsets
    return offsets[-1] - self.offset(piece) if self.transposed else self.offset(piece) - offsets[0]

  @property
  def side(self):
    """For a saturated tile: 0 if its keys come before its queries, 1 if after."""
    return 0 if self.spec.diagonal else jnp.where(self.offset(self.pieces[0]) < 0, 0, 1)

  def of_keys(self, name: str, piece: Piece, shape) -> Array:
    """A vector of keys, broadcast over the tile."""
    if self.transposed:
      return wide(self.ref[f'column_{name}'][piece.keys], shape[1])
    return self.ref[name][:, piece.keys]

  def of_queries(self, name: str, piece: Piece, shape) -> Array:
    if self.transposed:
      return self.ref[name][:, piece.queries]
    return wide(self.ref[f'column_{name}'][piece.queries], shape[1])

  def iota(self, shape) -> tuple[Array, Array]:
    """(place of the query in the tile, place of the key)."""
    q_dim = 1 if self.transposed else 0
    return tuple(jax.lax.broadcasted_iota(jnp.int32, shape, dim) for dim in (q_dim, 1 - q_dim))

  def rows(self, name: str, piece: Piece) -> Array:
    """Those of 'q', 'do', 'k' or 'v', with zeros behind the end of the array."""
    of_q = name in ('q', 'do')
    part, end = (piece.queries, self.spec.q_rows) if of_q else (piece.keys, self.spec.kv_rows)
    x = self.ref[name][part]
    if end is None or part.stop <= end:
      return x
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, x.shape, 0) < end - part.start, x, jnp.zeros_like(x))

  def ahead(self, piece: Piece, shape) -> Array:
    """Position of the key - position of the query."""
    if self.spec.positioned:
      return self.of_keys('kv_positions', piece, shape) - self.of_queries('q_positions', piece, shape)
    query, key = self.iota(shape)
    return key - query + self.offset(piece)

  def visible(self, piece: Piece, shape) -> list[Array]:
    """The conditions under which a query sees a key."""
    spec, found = self.spec, []
    if self.near and spec.diagonal and not spec.biased:
      query, key = self.iota(shape)
      found.append(key <= query - self.offset(piece))  # as key - query <= … the VLIW schedule is 6% longer
    if self.masked and spec.segmented:
      found.append(self.of_keys('kv_segments', piece, shape) == self.of_queries('q_segments', piece, shape))
    if self.masked and spec.causal and spec.positioned:
      found.append(self.of_keys('kv_reach', piece, shape) <= self.of_queries('q_positions', piece, shape))
    if self.masked and spec.window is not None:
      found.append(self._in_window(piece, shape))
    return found

  def _in_window(self, piece: Piece, shape) -> Array:
    near = jnp.abs(self.ahead(piece, shape)) < self.spec.window
    if not self.spec.num_sinks:
      return near
    if self.spec.positioned:
      return near | (self.of_keys('kv_positions', piece, shape) < self.spec.num_sinks)
    first = tiles.unpack(self.word)[1] * self.spec.block_kv + piece.keys.start
    return near | (self.iota(shape)[1] < self.spec.num_sinks - first)

  def scores(self, products: Array, piece: Piece) -> tuple[Array, Array | None]:
    """(scores in base 2 without the bias of a saturated tile, the derivative of the cap)."""
    spec, slope = self.spec, None
    # Scale the products, not q or k: rounded to bfloat16, forward and backward scores would differ.
    x = products * (spec.scale * LOG2E if spec.softcap is None else spec.scale / spec.softcap)
    if self.spec.softcap is not None:
      bent = jnp.tanh(x)
      x, slope = bent * (self.spec.softcap * LOG2E), 1 - bent * bent
    if self.spec.biased and self.near:
      rows = self.spec.compute if self.transposed else self.spec.block_q
      x = x + toeplitz.load(self.toe, self.start(piece), rows, x.shape)
    if self.spec.alibi:
      x = x - self.head.slope * jnp.abs(self.ahead(piece, x.shape)).astype(jnp.float32)
    seen = self.visible(piece, x.shape)
    return (jnp.where(functools.reduce(jnp.logical_and, seen), x, HIDDEN) if seen else x), slope


def _each_class(spec: Spec, word: Array, run) -> None:
  """Runs `run(flags)` for the class of this tile: one region of code for each class."""
  classes = spec.tile_classes
  differing = functools.reduce(operator.or_, classes) & ~functools.reduce(operator.and_, classes) | tiles.LIVE
  for flags in classes:
    pl.when((word & differing) == (flags & differing))(functools.partial(run, flags))


def _right(spec: Spec, word: Array, head: Head):
  """The bias of this tile if it is saturated, counted from the far left."""
  if not spec.biased or spec.diagonal:
    return 0.0
  i, j = tiles.unpack(word)
  saturated = ((word & tiles.NEAR) == 0) & (j * spec.block_kv > i * spec.block_q)
  return jnp.where(saturated, head.right, 0.0)


def _at_edges(spec: Spec, word: Array, first, column, head: Head) -> None:
  """Runs `first` at the first tile of a block of queries, and moves `column` at the first tile saturated on the
  right: from there on, scores are computed without that bias. All other tiles pass one branch.
  """
  if not spec.biased or spec.diagonal:
    pl.when((word & tiles.FIRST) != 0)(first)
    return

  @pl.when((word & (tiles.FIRST | tiles.CROSS)) != 0)
  def _():
    pl.when((word & tiles.FIRST) != 0)(first)

    @pl.when((word & tiles.CROSS) != 0)
    def _():
      column[...] -= head.right


def _begin(spec: Spec, words, head, ref) -> tuple[Array, Head]:
  """(this step's word, its head). Program ids are read outside `pl.when`, for the interpreter."""
  row = pl.program_id(1) if words.shape[0] > 1 else 0
  return words[row, pl.program_id(2)], Head(spec, ref, head)


def _build(spec: Spec, head: Head, toe, *, transposed: bool) -> None:
  numbers = [head.bias(bucket) for bucket in range(spec.buckets)]
  toeplitz.build(numbers, spec, toe, hidden=HIDDEN, transposed=transposed)


def _columns(ref) -> None:
  for name in [name for name in ref if name.startswith('column_')]:
    row = ref[name.removeprefix('column_')][...]
    ref[name][...] = jnp.broadcast_to(row, (LANES, row.shape[1])).T


def forward(spec: Spec, words, ref) -> None:
  """Writes o[block_q, head_dim] and the log-sum-exp in base 2, [1, block_q]."""
  (word, head), step = _begin(spec, words, pl.program_id(0), ref), pl.program_id(2)

  def first():
    if spec.biased:
      pl.when(step == 0)(lambda: _build(spec, head, ref['toe'], transposed=False))
    m, l = ref['m'], ref['l']
    m[...] = jnp.full_like(m, head.sink if spec.sinks else LOWEST)
    # `l` is summed over lanes at the end; a sink is a weight of 1 at its own maximum.
    at_start = jax.lax.broadcasted_iota(jnp.int32, l.shape, 1) == 0
    l[...] = jnp.where(at_start, 1.0, 0.0) if spec.sinks else jnp.zeros_like(l)
    ref['acc'][...] = jnp.zeros_like(ref['acc'])
    _columns(ref)

  _at_edges(spec, word, first, ref['m'], head)

  def run(flags: int):
    tile = Tile(spec=spec, ref=ref, word=word, head=head, toe=ref.get('toe'), flags=flags, transposed=False)
    for piece in tile.pieces:
      _forward_piece(tile, piece)

  _each_class(spec, word, run)

  @pl.when((word & tiles.LAST) != 0)
  def _():
    l = jnp.broadcast_to(ref['l'][...].sum(1, keepdims=True), ref['l'].shape)
    some = l > 0
    inverse = wide(jnp.where(some, 1 / l, 0.0), ref['acc'].shape[1])
    ref['o'][...] = (ref['acc'][...] * inverse).astype(ref['o'].dtype)
    lse = ref['m'][...] + jnp.log2(l) + _right(spec, word, head)
    ref['lse'][...] = jnp.where(some, lse, NO_ROW).T[:1]


def _forward_piece(tile: Tile, piece: Piece) -> None:
  ref, keys, queries = tile.ref, piece.keys, piece.queries
  columns = keys.stop - keys.start
  s, _ = tile.scores(dot(tile.rows('q', piece), tile.rows('k', piece), NT), piece)
  old = ref['m'][queries]
  m = jnp.maximum(old, s.max(1, keepdims=True))
  p = jnp.exp2(s - wide(m, columns))
  keep = jnp.exp2(old - m)
  ref['m'][queries] = m
  ref['l'][queries] = keep * ref['l'][queries] + functools.reduce(
    jnp.add, [p[:, x : x + LANES] for x in range(0, columns, LANES)]
  )
  acc, v = ref['acc'], tile.rows('v', piece)
  acc[queries] = wide(keep, acc.shape[1]) * acc[queries] + dot(p.astype(v.dtype), v, NN)


def grad_queries(spec: Spec, words, ref) -> None:
  """Writes dq[block_q, head_dim]; for each head's bias, dline[1, length] and dsaturated[2, 8, 128], to be summed."""
  (word, head), step = _begin(spec, words, pl.program_id(0), ref), pl.program_id(2)

  def once():
    _build(spec, head, ref['toe'], transposed=False)
    ref['dtoe'][...] = jnp.zeros_like(ref['dtoe'])
    ref['dsaturated'][...] = jnp.zeros_like(ref['dsaturated'])

  def first():
    if spec.biased:
      pl.when(step == 0)(once)
    ref['acc'][...] = jnp.zeros_like(ref['acc'])
    _columns(ref)

  _at_edges(spec, word, first, ref['column_lse'], head)

  def run(flags: int):
    tile = Tile(spec=spec, ref=ref, word=word, head=head, toe=ref.get('toe'), flags=flags, transposed=False)
    for piece in tile.pieces:
      _grad_queries_piece(tile, piece)

  _each_class(spec, word, run)

  @pl.when((word & tiles.LAST) != 0)
  def _():
    ref['dq'][...] = (ref['acc'][...] * spec.scale).astype(ref['dq'].dtype)
    if spec.biased:

      @pl.when(tiles.unpack(word)[0] == spec.num_q - 1)
      def _():
        ref['dline'][...] = toeplitz.fold(ref['dtoe'][...])


def _grad_queries_piece(tile: Tile, piece: Piece) -> None:
  ref, keys, queries = tile.ref, piece.keys, piece.queries
  columns = keys.stop - keys.start
  k = tile.rows('k', piece)
  s, slope = tile.scores(dot(tile.rows('q', piece), k, NT), piece)
  p = jnp.exp2(s - wide(ref['column_lse'][queries], columns))
  products = dot(tile.rows('do', piece), tile.rows('v', piece), NT)
  ds = p * (products - wide(ref['column_di'][queries], columns))
  dx = ds if slope is None else ds * slope
  ref['acc'][queries] += dot(dx.astype(k.dtype), k, NN)
  if tile.spec.biased and tile.near:
    toeplitz.add(ref['dtoe'], tile.start(piece), tile.spec.block_q, ds)
  elif tile.spec.biased:
    ref['dsaturated'][tile.side] += toeplitz.partial_sum(ds)


def grad_keys_values(spec: Spec, words, ref) -> None:
  """Writes dk, dv[block_kv, head_dim], summed over the query heads that share them, the last dim of the grid."""
  member, step = pl.program_id(3), pl.program_id(2)
  word, head = _begin(spec, words, pl.program_id(0) * spec.group + member, ref)
  toe = ref['toe'].at[member] if spec.biased else None

  def first():
    for name in ('acc_k', 'acc_v'):
      ref[name][...] = jnp.zeros_like(ref[name])
    _columns(ref)

  @pl.when((word & tiles.FIRST) != 0)
  def _():
    if spec.biased:
      pl.when(step == 0)(lambda: _build(spec, head, toe, transposed=True))
    pl.when(member == 0)(first) if spec.group > 1 else first()

  def run(flags: int):
    tile = Tile(spec=spec, ref=ref, word=word, head=head, toe=toe, flags=flags, transposed=True)
    for piece in tile.pieces:
      _grad_keys_values_piece(tile, piece)

  _each_class(spec, word, run)

  @pl.when(((word & tiles.LAST) != 0) & (member == spec.group - 1))
  def _():
    ref['dk'][...] = (ref['acc_k'][...] * spec.scale).astype(ref['dk'].dtype)
    ref['dv'][...] = ref['acc_v'][...].astype(ref['dv'].dtype)


def _grad_keys_values_piece(tile: Tile, piece: Piece) -> None:
  ref, keys, queries = tile.ref, piece.keys, piece.queries
  q, do = tile.rows('q', piece), tile.rows('do', piece)
  s, slope = tile.scores(dot(tile.rows('k', piece), q, NT), piece)
  right = 0.0 if tile.near else _right(tile.spec, tile.word, tile.head)
  p = jnp.exp2(s - (ref['lse'][:, queries] - right))
  ref['acc_v'][keys] += dot(p.astype(do.dtype), do, NN)
  ds = p * (dot(tile.rows('v', piece), do, NT) - ref['di'][:, queries])
  ds = ds if slope is None else ds * slope
  ref['acc_k'][keys] += dot(ds.astype(q.dtype), q, NN)
