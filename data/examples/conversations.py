"""Conversations: which turns go into which row, which of their tokens carry loss, and the fields of such rows.

A row of a decoder contains whole conversations, each as its own segment. A conversation that is longer than a row is
cut at its end; if no token with loss remains, it is left out (data/examples/units.py).
"""

from typing import NamedTuple

import numpy as np

from data.errors import DataError
from data.examples.asked import ByDocument, asked
from data.examples.units import Units
from data.objectives.features import Batch, decoder_fields
from data.objectives.objectives import Instruction
from data.packing.plan import Pieces
from data.prepare.messages import ROLES as ROLE_NAMES
from data.ragged import Ragged, starts
from data.stores.store import ROLES, TURNS_LEFT


class TurnLosses(NamedTuple):
  """Number of conversations in a store, largest number of tokens that one may have, and how many are cut to that length
  or left out."""

  conversations: int
  longest: int
  cut: int
  left_out: int

  @property
  def any(self) -> bool:
    return self.cut + self.left_out > 0

  def __str__(self) -> str:
    return (
      f'of its {self.conversations:,} conversations, {self.cut:,} are cut to {self.longest} tokens and '
      f'{self.left_out:,} are left out (no token with loss among the first {self.longest})'
    )


class TurnStream:
  """The conversations of a store, cut for rows of `room` tokens. Raises DataError if all of them are left out."""

  def __init__(self, store, objective: Instruction, room: int):
    self._store, self._room, self._loss_on = store, room, objective.loss_on
    counts = sum(self._cut(shard)[1] for shard in range(len(store.shards)))
    self.losses = TurnLosses(int(counts[0]), room, int(counts[1]), int(counts[2]))
    if self.losses.left_out == self.losses.conversations:
      raise DataError(
        f'{store.path}: {self.losses}; nothing is left to learn from objective.loss_on={list(self._loss_on)}; '
        'choose other roles, or longer rows (data.targets_length).'
      )
    self.turns = ByDocument(store, self._turns)

  def _turns(self, shard: int) -> np.ndarray:
    """int64[2, turns] of a shard: the position in the store where loss begins; the conversation's first turn."""
    store = self._store
    offsets, left = store.offsets_of(shard), store.column(TURNS_LEFT, shard)
    of_roles = np.isin(store.column(ROLES, shard), [ROLE_NAMES.index(role) for role in self._loss_on])
    begins = np.where(of_roles, offsets[:-1] + store.tag_lengths(shard), offsets[1:])
    heads = np.concatenate([[0], np.flatnonzero(left[:-1] == 0) + 1])
    firsts = np.repeat(heads, np.diff(heads, append=len(left)))
    return np.stack([begins, firsts + store.shards[shard].documents.start])

  def _cut(self, shard: int) -> tuple[Units, np.ndarray]:
    """(the conversations of a shard, cut for rows; their numbers (all, cut, left out))."""
    offsets, documents = self._store.offsets_of(shard), np.array(self._store.shards[shard].documents)
    begins, firsts = self._turns(shard)
    ends = np.minimum(offsets[1:], offsets[firsts - documents[0]] + self._room)
    number = np.unique(firsts, return_inverse=True)[1]
    totals = np.bincount(number, np.diff(offsets)).astype(np.int64)
    learnt = np.bincount(number, np.maximum(ends - begins, 0)) > 0
    kept = learnt[number] & (ends > offsets[:-1])
    units = Units(
      np.bincount(number[kept], minlength=len(totals))[learnt], documents[kept], offsets[:-1][kept],
      (ends - offsets[:-1])[kept], [np.minimum(totals, self._room)[learnt]],
    )  # fmt: skip
    return units, np.array([len(totals), (learnt & (totals > self._room)).sum(), (~learnt).sum()])

  def shard(self, shard: int) -> Units:
    return self._cut(shard)[0]


class TurnMaker:
  """Tokens of turns -> the fields of rows, like `make.RowMaker` for text, but without random numbers."""

  def __init__(self, stream: TurnStream, objective: Instruction, length: int, first: int):
    self._first = first
    self._turns, self._prefix, self._length = stream.turns, objective.prefix_attention, length

  def asked(self, pieces: Pieces) -> np.ndarray:
    return asked(pieces, self._turns.of(pieces.documents)[0])

  def segments(self, pieces: Pieces) -> np.ndarray:
    return np.cumsum(self._is_first(pieces))

  def _is_first(self, pieces: Pieces) -> np.ndarray:
    return self._turns.of(pieces.documents)[1] == pieces.documents

  def make(self, tokens: Ragged, pieces: Pieces, tasks: np.ndarray, _bits) -> Batch:
    """Fields of `len(tasks)` rows: the turns of a conversation form a segment. With `prefix_attention`, tokens before
    the first one with loss attend to each other in both directions; the prefix is one longer than these tokens,
    because inputs are shifted right by one."""
    heads = np.flatnonzero(self._is_first(pieces))
    whole = Ragged(tokens.values, np.add.reduceat(tokens.lengths, heads))
    weights = self.asked(pieces)
    prefix = None
    if self._prefix:
      with_loss, begins = np.flatnonzero(weights), starts(whole.lengths)
      prefix = with_loss[np.searchsorted(with_loss, begins)] - begins + 1
    shape = len(tasks), self._length
    return decoder_fields(whole, pieces.rows[heads], shape, weights, prefix, first=self._first)
