"""Pieces -> the named fields of a batch, several pieces to a row.

Source: seqio feature_converters.py (EncDecFeatureConverter, LMFeatureConverter, PrefixLMFeatureConverter).
"""

import numpy as np

from data.ragged import Ragged, interleave, starts

Batch = dict[str, np.ndarray]
First = int | np.ndarray


def encoder_decoder_features(
  inputs: Ragged,
  targets: Ragged,
  rows: np.ndarray,
  num_rows: int,
  inputs_length: int,
  targets_length: int,
  first: First = 0,
) -> Batch:
  """Fields int32[num_rows, length]; piece i is a segment of row `rows[i]` (ascending), in encoder and decoder.

  The decoder reads `first` (an id, or int[pieces]) before the targets.

  Raises ValueError where the pieces of a row are longer than the row.
  """
  encoder = _Placement(inputs.lengths, rows, (num_rows, inputs_length))
  fields = {'encoder_input_tokens': encoder.put(inputs.values), **encoder.describe('encoder')}
  return fields | decoder_fields(targets, rows, (num_rows, targets_length), first=first)


def decoder_features(
  inputs: Ragged | None,
  targets: Ragged,
  rows: np.ndarray,
  num_rows: int,
  length: int,
  loss_on_inputs: np.ndarray | bool = False,
  *,
  first: First = 0,
) -> Batch:
  """Fields int32[num_rows, length] of a decoder-only model: each segment is its inputs, then its targets.

  Every token of a segment sees the inputs, which the decoder reads one position later (shifted right),
  so `decoder_prefix_end` is their number plus one; 0 for a segment without inputs, which is causal. Where `inputs` is
  None all are, and there is no such field. Only targets carry loss, unless `loss_on_inputs` (of all pieces, or
  bool[pieces]): then the model is also asked for tokens that it sees (as in seqio's loss_on_targets_only=False).
  """
  if inputs is None:
    return decoder_fields(targets, rows, (num_rows, length), first=first)
  both, is_input = interleave(inputs, targets)
  weights = ~is_input | np.repeat(np.broadcast_to(loss_on_inputs, rows.shape), both.lengths)
  prefix = np.where(inputs.lengths > 0, inputs.lengths + 1, 0)
  return decoder_fields(both, rows, (num_rows, length), weights, prefix, first=first)


def encoder_features(
  inputs: Ragged, targets: np.ndarray, weights: np.ndarray, rows: np.ndarray, num_rows: int, length: int
) -> Batch:
  """Fields int32[num_rows, length] of an encoder-only model: what each position reads and the token that was there.

  `targets` and `weights` match `inputs.values`; only positions with weight carry loss. Answers use a decoder's field
  names, at the positions of the encoder.
  """
  place = _Placement(inputs.lengths, rows, (num_rows, length))
  return {
    'encoder_input_tokens': place.put(inputs.values),
    **place.describe('encoder'),
    'decoder_target_tokens': place.put(targets),
    'decoder_loss_weights': place.put(weights, np.float32),
  }


def decoder_fields(
  targets: Ragged,
  rows: np.ndarray,
  shape: tuple[int, int],
  weights: np.ndarray | None = None,
  prefix: np.ndarray | None = None,
  *,
  first: First = 0,
) -> Batch:
  """Fields int32[shape] of a decoder; piece i is a segment of row `rows[i]` (ascending) and is read behind `first`.

  Positions without a piece hold 0, which may be text: only their segment id 0 tells padding.

  `weights` (bool[tokens]) marks the tokens that carry loss; None: all. `prefix` (int[pieces]) is `decoder_prefix_end`.
  """
  place = _Placement(targets.lengths, rows, shape)
  shifted = np.empty_like(targets.values)
  shifted[1:] = targets.values[:-1]
  nonempty = targets.lengths > 0
  shifted[starts(targets.lengths)[nonempty]] = np.broadcast_to(first, nonempty.shape)[nonempty]
  weights = np.ones(len(targets.values), bool) if weights is None else weights
  fields = {
    'decoder_input_tokens': place.put(shifted),
    'decoder_target_tokens': place.put(targets.values),
    'decoder_loss_weights': place.put(weights, np.float32),
    **place.describe('decoder'),
  }
  if prefix is not None:
    fields['decoder_prefix_end'] = place.put(np.repeat(prefix, targets.lengths))
  return fields


class _Placement:
  """The positions of the tokens of each piece in `[rows, length]`: after the earlier pieces of its row."""

  def __init__(self, lengths: np.ndarray, rows: np.ndarray, shape: tuple[int, int]):
    self.lengths, self.shape = lengths, shape
    begins, first = starts(lengths), np.searchsorted(rows, rows)
    offset = begins - begins[first]
    if len(rows) and (offset + lengths).max() > shape[1]:
      worst = int((offset + lengths).argmax())
      raise ValueError(f'row {rows[worst]} holds {(offset + lengths)[worst]} tokens, its length is {shape[1]}.')
    self._segments = np.arange(1, len(rows) + 1, dtype=np.int32) - first.astype(np.int32)
    used = np.bincount(rows, lengths, shape[0])
    self._used = None if (used == shape[1]).all() else np.arange(shape[1]) < used[:, None]

  def put(self, values, dtype=np.int32) -> np.ndarray:
    """Rows are filled from their beginning, in the order of the pieces; full ones need no more than another shape."""
    if self._used is None:
      return values.astype(dtype).reshape(self.shape)
    out = np.zeros(self.shape, dtype)
    out[self._used] = values
    return out

  def describe(self, side: str) -> Batch:
    """Segment ids count from 1 in each row; positions from 0 in each segment."""
    total = int(self.lengths.sum())
    begins = np.repeat(starts(self.lengths).astype(np.int32), self.lengths)
    return {
      f'{side}_segment_ids': self.put(np.repeat(self._segments, self.lengths)),
      f'{side}_positions': self.put(np.arange(total, dtype=np.int32) - begins),
    }
