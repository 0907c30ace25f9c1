"""Rows of several pieces have seqio's fields, field by field."""

import json
import pathlib

import numpy as np
import pytest

from data.objectives.features import decoder_features, encoder_decoder_features, encoder_features
from data.ragged import Ragged, join

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / 'golden/t5_seqio.json').read_text())
ENCODER_DECODER, PREFIX = GOLDEN['pack_encdec'], GOLDEN['pack_prefixlm']


def pieces(rows: list[int]) -> tuple[Ragged, Ragged, np.ndarray]:
  """The reference's examples, in the rows where it put them."""
  examples = ENCODER_DECODER['examples']
  inputs, targets = (join([np.int32(e[side]) for e in examples]) for side in ('inputs', 'targets'))
  return inputs, targets, np.array(rows)


def rows_of(golden: dict, field: str) -> list[int]:
  return [row for row, out in enumerate(golden['out']) for _ in range(max(out[field]))]


def test_encoder_decoder_rows_are_seqios():
  inputs, targets, rows = pieces(rows_of(ENCODER_DECODER, 'decoder_segment_ids'))
  got = encoder_decoder_features(inputs, targets, rows, len(ENCODER_DECODER['out']), 16, 10)
  assert set(got) == set(ENCODER_DECODER['out'][0])
  for name, values in got.items():
    assert values.tolist() == [out[name] for out in ENCODER_DECODER['out']], name


def test_prefix_rows_of_a_decoder_are_seqios():
  inputs, targets, rows = pieces(rows_of(PREFIX, 'decoder_segment_ids'))
  got = decoder_features(inputs, targets, rows, len(PREFIX['out']), 20)
  end, position = got.pop('decoder_prefix_end'), got['decoder_positions']
  for name, values in got.items():
    assert values.tolist() == [out[name] for out in PREFIX['out']], name
  visible = (position < end).astype(int)
  assert visible.tolist() == [out['decoder_causal_attention'] for out in PREFIX['out']]


def test_a_causal_row_has_no_prefix_and_loss_everywhere():
  got = decoder_features(None, join([np.int32([5, 6, 1]), np.int32([7])]), np.array([0, 0]), 1, 5)
  assert got['decoder_input_tokens'].tolist() == [[0, 5, 6, 0, 0]]
  assert got['decoder_target_tokens'].tolist() == [[5, 6, 1, 7, 0]]
  assert got['decoder_loss_weights'].tolist() == [[1, 1, 1, 1, 0]]
  assert 'decoder_prefix_end' not in got


def test_a_row_of_an_encoder_has_its_answers_at_the_positions_it_reads():
  inputs, targets = join([np.int32([5, 99, 1]), np.int32([98, 1]), np.int32([7, 1])]), np.int32([5, 6, 1, 9, 1, 7, 1])
  chosen = np.array([0, 1, 0, 1, 0, 1, 0], bool)
  got = encoder_features(inputs, targets, chosen, np.array([0, 0, 1]), 2, 6)
  assert {name: values.tolist() for name, values in got.items()} == {
    'encoder_input_tokens': [[5, 99, 1, 98, 1, 0], [7, 1, 0, 0, 0, 0]],
    'encoder_segment_ids': [[1, 1, 1, 2, 2, 0], [1, 1, 0, 0, 0, 0]],
    'encoder_positions': [[0, 1, 2, 0, 1, 0], [0, 1, 0, 0, 0, 0]],
    'decoder_target_tokens': [[5, 6, 1, 9, 1, 0], [7, 1, 0, 0, 0, 0]],
    'decoder_loss_weights': [[0, 1, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0]],
  }


def test_loss_on_inputs_weighs_the_prefix_too():
  inputs, targets, rows = pieces(rows_of(PREFIX, 'decoder_segment_ids'))
  got = decoder_features(inputs, targets, rows, len(PREFIX['out']), 20, loss_on_inputs=True)
  assert (got['decoder_loss_weights'] == (got['decoder_segment_ids'] > 0)).all()


def test_dtypes_are_int32_and_float32_weights():
  inputs, targets, rows = pieces(rows_of(ENCODER_DECODER, 'decoder_segment_ids'))
  got = encoder_decoder_features(inputs, targets, rows, 6, 16, 10)
  assert {name for name, v in got.items() if v.dtype == np.float32} == {'decoder_loss_weights'}
  assert all(v.dtype == np.int32 for name, v in got.items() if name != 'decoder_loss_weights')


def test_a_row_that_overflows_is_an_error():
  with pytest.raises(ValueError, match='row 0 holds 4 tokens, its length is 3'):
    decoder_features(None, join([np.int32([1, 2]), np.int32([3, 4])]), np.array([0, 0]), 1, 3)
