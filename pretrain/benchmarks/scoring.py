"""Nats of given targets after given inputs, many at once: pieces are packed into rows, as in training."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from data.objectives.features import decoder_features, encoder_decoder_features
from data.packing.best_fit import fill
from data.ragged import interleave, join
from pretrain.devices.mesh import BATCH_AXES, batch_shards, replicated, to_global
from pretrain.errors import ConfigError
from pretrain.evaluation.outputs import padded
from pretrain.evaluation.prompts import sees_itself
from pretrain.evaluation.writer import Writer
from pretrain.step.loss import make_token_step


@dataclasses.dataclass(frozen=True)
class Piece:
  """Targets to score after inputs, which are earlier tokens of the row if a decoder reads from left to right.

  Such a row begins with the token that rows of training begin with, or with `first`.
  """

  inputs: list[int]
  targets: list[int]
  first: int | None = None


class Scored(NamedTuple):
  """For each target: -log of its probability, in nats; whether it is the most likely token."""

  nats: np.ndarray
  correct: np.ndarray


def check_batch(batch: int, mesh: Mesh) -> None:
  """Raises ConfigError where the mesh does not divide the rows of a batch."""
  if batch % batch_shards(mesh):
    raise ConfigError(
      f'--batch={batch} does not divide over mesh.{"*".join(BATCH_AXES)}={batch_shards(mesh)}; use a multiple of it.'
    )


class Scorer:
  """Scores pieces with the loss of training, without dropout and z-loss; the softmax is over the whole vocabulary."""

  def __init__(self, writer: Writer, batch: int = 8):
    mesh = writer.model.mesh
    check_batch(batch, mesh)
    self.writer, self.batch = writer, batch
    step = make_token_step(writer.model, writer.cfg.kernels)
    self._step = jax.jit(step, out_shardings=replicated(mesh))

  def __call__(self, pieces: Sequence[Piece], said: Callable[[int], None] = lambda done: None) -> list[Scored]:
    """The scores of each piece; `said` hears how many are done. Raises ConfigError for one beyond the positions."""
    found: list[Scored | None] = [None] * len(pieces)
    done = 0
    for kind in (False, True):
      own = [(number, piece) for number, piece in enumerate(pieces) if self._prefix(piece) == kind]
      size = self._size([piece for _, piece in own])
      for rows in self._batches(own, size):
        for number, scored in self._run(rows, size, kind):
          found[number] = scored
          done += 1
        said(done)
    return found

  @property
  def _pair(self) -> bool:
    return bool(self.writer.cfg.data.inputs_length)

  def _prefix(self, piece: Piece) -> bool:
    return not self._pair and sees_itself(piece.inputs, self.writer.cfg, self.writer.data.vocabulary.ids.end)

  def _lengths(self, piece: Piece) -> tuple[int, int]:
    """Positions of a piece in (encoder, decoder)."""
    if self._pair:
      return len(piece.inputs), len(piece.targets)
    return 0, len(piece.inputs) + len(piece.targets)

  def _batches(self, pieces: list[tuple[int, Piece]], size: tuple[int, int]) -> Iterator[list[list[tuple[int, Piece]]]]:
    """Batches of rows of pieces: the longest first, each in the fullest row that holds it."""
    lengths = np.array([self._lengths(piece) for _, piece in pieces], np.int64).reshape(-1, 2)
    sides = [(lengths[:, side], size[side]) for side in (1, 0) if size[side]]  # by the number of the piece
    bins = fill(np.arange(len(pieces)), *sides) if pieces else np.zeros(0, np.int64)
    rows: list[list[tuple[int, Piece]]] = [[] for _ in range(bins.max(initial=-1) + 1)]
    for row, each in zip(bins.tolist(), pieces, strict=True):
      rows[row].append(each)
    for i in range(0, len(rows), self.batch):
      yield rows[i : i + self.batch]

  def _size(self, pieces: Sequence[Piece]) -> tuple[int, int]:
    """(encoder, decoder) length of rows: that of the longest piece."""
    if not pieces:
      return 0, 0
    longest = tuple(map(max, zip(*map(self._lengths, pieces), strict=True)))
    most = getattr(self.writer.cfg.model, 'max_positions', None)
    if most is not None and max(longest) > most:
      raise ConfigError(f'a piece of {max(longest)} tokens is beyond model.max_positions={most}; use shorter texts.')
    return padded(longest[0]) if self._pair else 0, padded(longest[1])

  def _run(
    self, rows: list[list[tuple[int, Piece]]], size: tuple[int, int], prefix: bool
  ) -> Iterator[tuple[int, Scored]]:
    flat = [(row, number, piece) for row, own in enumerate(rows) for number, piece in own]
    batch = self._fields([piece for _, _, piece in flat], np.array([row for row, _, _ in flat]), size, prefix)
    nats, hits = map(np.asarray, self._step(self.writer.params, to_global(batch, self.writer.model.mesh)))
    ends = [0] * len(rows)
    for row, number, piece in flat:
      ends[row] += self._lengths(piece)[1]
      place = slice(ends[row] - len(piece.targets), ends[row])
      yield number, Scored(nats[row, place].astype(np.float64), hits[row, place] > 0)

  def _fields(self, pieces: Sequence[Piece], rows: np.ndarray, size: tuple[int, int], prefix: bool):
    inputs, targets = (
      join([np.asarray(ids, np.int32) for ids in side])
      for side in ([p.inputs for p in pieces], [p.targets for p in pieces])
    )
    first = np.full(len(pieces), self.writer.data.vocabulary.ids.first_input)
    if self._pair:
      fields = encoder_decoder_features(inputs, targets, rows, self.batch, *size, first)
    elif prefix:
      fields = decoder_features(inputs, targets, rows, self.batch, size[1], first=first)
    else:
      fields = decoder_features(None, interleave(inputs, targets)[0], rows, self.batch, size[1], first=first)
      begins = np.argwhere((fields['decoder_positions'] == 0) & (fields['decoder_segment_ids'] > 0))
      for (row, at), piece in zip(begins, pieces, strict=True):
        if piece.first is not None:
          fields['decoder_input_tokens'][row, at] = piece.first
    return fields | {'example_index': np.zeros(self.batch, np.int32)}
