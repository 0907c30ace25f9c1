"""What a plan is: the pieces of text that each row of a shard holds, and the task of each row.

A shard is a run of whole documents of a store. Plans are made shard by shard, so their memory does not grow with the
store. A planner (concat_split.py, …) decides how text is packed into rows; data/packing/order.py decides in which order
training reads the rows.
"""

import dataclasses
import functools
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from data.ragged import Ragged, spread, starts


class Pieces(NamedTuple):
  """int64 arrays over pieces: the row that each belongs to (ascending), its document, its first token, its length.

  `tasks` (int8) is the task of each, None where all pieces of a row have the row's.
  """

  rows: np.ndarray
  documents: np.ndarray
  places: np.ndarray
  lengths: np.ndarray
  tasks: np.ndarray | None = None

  def take(self, own: np.ndarray, rows: np.ndarray) -> 'Pieces':
    """The pieces at `own` (int or bool over pieces), in these rows."""
    return Pieces(rows, *(None if values is None else values[own] for values in self[1:]))


@dataclasses.dataclass(frozen=True)
class Stream:
  """The documents of a shard, one after another: `first` is the number of the first one in its store.

  `begins` and `lengths` (int64[documents]) are where a document's text lies in the store, without the EOS that some
  objectives add on their own. Positions in the stream count text tokens only.
  """

  begins: np.ndarray
  lengths: np.ndarray
  first: int = 0

  @functools.cached_property
  def ends(self) -> np.ndarray:
    return np.cumsum(self.lengths)

  @property
  def size(self) -> int:
    return int(self.ends[-1]) if len(self.lengths) else 0

  def pieces(self, first: np.ndarray, last: np.ndarray) -> Pieces:
    """The pieces of intervals [first, last) of the stream, none of them empty, in order; `rows` counts intervals."""
    begin = np.searchsorted(self.ends, first, side='right')
    count = np.searchsorted(self.ends, last, side='left') - begin + 1
    documents = spread(begin, count)
    origin = self.ends[documents] - self.lengths[documents]
    left = np.maximum(np.repeat(first, count), origin)
    lengths = np.minimum(np.repeat(last, count), self.ends[documents]) - left
    stretches = np.repeat(np.arange(len(first)), count)
    places = self.begins[documents] + left - origin
    some = lengths > 0  # empty documents have no piece
    return Pieces(stretches[some], self.first + documents[some], places[some], lengths[some])


@runtime_checkable
class Plan(Protocol):
  """The rows of a shard; `tasks` (int8[rows]) is the task of each row, 0 where pieces have their own."""

  tasks: np.ndarray

  def pieces(self, rows: np.ndarray) -> Pieces:
    """The pieces of these rows, none of them empty; `rows` of the answer counts them from 0."""
    ...


@dataclasses.dataclass(frozen=True)
class Cuts:
  """A plan whose row r holds `stream` from `cuts[r]` to `cuts[r + 1]`."""

  tasks: np.ndarray
  cuts: np.ndarray
  stream: Stream

  def pieces(self, rows: np.ndarray) -> Pieces:
    return self.stream.pieces(self.cuts[rows], self.cuts[rows + 1])


@dataclasses.dataclass(frozen=True)
class Bins:
  """A plan that lists its pieces: row r has those from `firsts[r]` to `firsts[r + 1]`, of any document."""

  tasks: np.ndarray
  firsts: np.ndarray
  listed: Pieces

  def pieces(self, rows: np.ndarray) -> Pieces:
    counts = self.firsts[rows + 1] - self.firsts[rows]
    own = spread(self.firsts[rows], counts)
    return self.listed.take(own, np.repeat(np.arange(len(rows)), counts))


@runtime_checkable
class Planner(Protocol):
  """Makes plans: pure functions of its own arguments, the shard and the variant.

  Epoch e follows variant `e % variants` of a shard's plan: with several tasks, text meets others in the next epoch.
  """

  variants: int

  def plan(self, shard: int, variant: int) -> Plan: ...


def joined(parts: list[tuple[np.ndarray, Pieces]]) -> Pieces:
  """Pieces of several shards as one: of each, the number that each of its rows has in the whole."""
  placed = zip(*((places[p.rows], *p[1:]) for places, p in parts), strict=True)
  whole = Pieces(*(None if own[0] is None else np.concatenate(own) for own in placed))
  order = np.argsort(whole.rows, kind='stable')
  return whole.take(order, whole.rows[order])


def runs_of(pieces: Pieces, gap: int) -> tuple[list[tuple[int, int]], np.ndarray]:
  """([(first token, length)], where each piece lies in them, end to end) for as few reads as serve all pieces.

  Pieces of a row that follow each other in the store, with at most `gap` tokens between, are one read.
  """
  if not len(pieces.rows):
    return [], pieces.places
  ends = pieces.places + pieces.lengths
  apart = pieces.places[1:] - ends[:-1]
  new = np.flatnonzero(np.concatenate([[True], (np.diff(pieces.rows) != 0) | (apart < 0) | (apart > gap)]))
  last = np.append(new[1:], len(ends)) - 1
  lengths = ends[last] - pieces.places[new]
  shift = np.repeat(starts(lengths) - pieces.places[new], last - new + 1)
  return list(zip(pieces.places[new].tolist(), lengths.tolist(), strict=True)), pieces.places + shift


def cut_out(read: np.ndarray, places: np.ndarray, lengths: np.ndarray) -> Ragged:
  """The pieces that begin at `places` of the tokens that were read."""
  if len(read) == lengths.sum():  # no tokens between the pieces
    return Ragged(read, lengths)
  return Ragged(read[spread(places, lengths)], lengths)
