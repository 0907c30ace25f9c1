"""Pairs: each whole and once per epoch, cut as seqio cuts them, with inputs and targets of a pair in one segment."""

import numpy as np
import pytest

from data.batches.source import Source
from data.errors import DataError
from data.objectives.objectives import Supervised, Ul2, pair_lengths
from data.stores.store import StoreWriter, open_store
from data.stores.vocabulary import EOS, Tokenizer
from tests.data.batches.test_source import PAIRS, opened

CASES = pytest.mark.parametrize(('objective', 'inputs', 'targets'), PAIRS)


@pytest.fixture(scope='module')
def six_pairs(tokenizer_model, tmp_path_factory):
  """Inputs and targets of 2 and 1, 1 and 4, 6 and 2, 0 and 3, 3 and 7, 1 and 1 tokens, without their EOS."""
  path = tmp_path_factory.mktemp('pairs') / 'six'
  numbers = iter(range(10, 99))
  documents = [[next(numbers) for _ in range(n)] for n in (2, 1, 1, 4, 6, 2, 0, 3, 3, 7, 1, 1)]
  with StoreWriter(path, Tokenizer(tokenizer_model, 32), pairs=True) as writer:
    writer.add(documents)
    writer.finish()
  return path


def rows_of_epoch(source) -> dict[int, dict[str, np.ndarray]]:
  """Row of the plan -> its fields, for epoch 0."""
  found, position = {}, 0
  while (origin := source.describe_row(position)).epoch == 0:
    found[origin.row] = {name: values[0] for name, values in source.global_rows(position, 1).items()}
    position += 1
  return found


def segments(row: dict[str, np.ndarray]) -> list[tuple[list[int], list[int]]]:
  """(inputs, targets) of each segment of a row, as an encoder-decoder or a decoder receives them."""
  own, found = row['decoder_segment_ids'], []
  for k in range(1, own.max() + 1):
    tokens, asked = row['decoder_target_tokens'][own == k], row['decoder_loss_weights'][own == k] > 0
    encoder = 'encoder_input_tokens' in row
    inputs = row['encoder_input_tokens'][row['encoder_segment_ids'] == k] if encoder else tokens[~asked]
    found.append((inputs.tolist(), tokens[asked].tolist()))
  return found


@CASES
def test_every_pair_comes_once_per_epoch_and_is_whole_unless_it_is_too_long(pair_store, objective, inputs, targets):
  source, store = opened(pair_store, objective, inputs, targets, batch_size=1), open_store(pair_store)
  rows = rows_of_epoch(source)
  got = [pair for row in sorted(rows) for pair in segments(rows[row])]
  ranges = list(zip(store.offsets[:-1].tolist(), np.diff(store.offsets).tolist(), strict=True))
  documents = [ids.tolist() for ids in store.read(ranges)]
  longest = pair_lengths(objective, source.cfg.budget)
  assert got == [(a[: longest[0]], b[: longest[1]]) for a, b in zip(documents[::2], documents[1::2], strict=True)]
  assert max(map(len, documents)) > min(longest), 'some are cut'
  assert got != [(a, b) for (a, _), (_, b) in zip(got, got[1:] + got[:1], strict=True)], 'the mutation: one pair on'
  assert len(rows) < len(got) / 2, 'rows are packed'
  again = [source.describe_row(len(rows) + i) for i in range(len(rows))]
  assert [o.epoch for o in again] == [1] * len(rows)
  assert [o.row for o in again] != list(rows), 'in another order'
  assert sorted(o.row for o in again) == sorted(rows)


def test_a_packed_row_of_an_encoder_decoder_equals_one_made_by_hand(six_pairs):
  """seqio's EncDecFeatureConverter on {inputs: 6, targets: 5}: longer sequences are cut at the end, including EOS."""
  rows = rows_of_epoch(opened(six_pairs, Supervised(), 6, 5, batch_size=1))
  assert [len(segments(rows[r])) for r in sorted(rows)] == [1, 1, 1, 1, 1, 1]
  rows = rows_of_epoch(opened(six_pairs, Supervised(), 8, 7, batch_size=1))
  assert [len(segments(rows[r])) for r in sorted(rows)] == [2, 2, 1, 1]
  wanted = {
    'encoder_input_tokens': [18, 19, 20, 21, 22, 23, 1, 1],
    'encoder_segment_ids': [1, 1, 1, 1, 1, 1, 1, 2],
    'encoder_positions': [0, 1, 2, 3, 4, 5, 6, 0],
    'decoder_input_tokens': [0, 24, 25, 0, 26, 27, 28],
    'decoder_target_tokens': [24, 25, 1, 26, 27, 28, 1],
    'decoder_loss_weights': [1, 1, 1, 1, 1, 1, 1],
    'decoder_segment_ids': [1, 1, 1, 2, 2, 2, 2],
    'decoder_positions': [0, 1, 2, 0, 1, 2, 3],
  }
  assert {name: rows[1][name].tolist() for name in wanted} == wanted
  assert segments(rows[2]) == [([29, 30, 31, EOS], [32, 33, 34, 35, 36, 37, 38])], 'without the EOS of targets'


def test_a_packed_row_of_a_decoder_equals_one_made_by_hand(six_pairs):
  """seqio's PrefixLMFeatureConverter on {inputs: 4, targets: 6}: in each segment, loss is only on the targets."""
  rows = rows_of_epoch(opened(six_pairs, Supervised(inputs_length=4), 0, 12, batch_size=1))
  wanted = {
    'decoder_input_tokens': [0, 10, 11, 1, 12, 0, 13, 1, 14, 15, 16, 17],
    'decoder_target_tokens': [10, 11, 1, 12, 1, 13, 1, 14, 15, 16, 17, 1],
    'decoder_loss_weights': [0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 1, 1],
    'decoder_segment_ids': [1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2],
    'decoder_positions': [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6],
    'decoder_prefix_end': [4, 4, 4, 4, 4, 3, 3, 3, 3, 3, 3, 3],
  }
  assert {name: rows[0][name].tolist() for name in wanted} == wanted


def test_a_store_of_the_wrong_kind_is_refused(text_store, pair_store):
  with pytest.raises(
    DataError, match=r"license holds text, but objective.name='supervised' learns from pairs; make a st"
  ):
    opened(text_store, Supervised())
  with pytest.raises(
    DataError, match=r"pairs holds pairs, but objective.name='ul2' learns from text; set objective.name"
  ):
    opened(pair_store, Ul2())
  with pytest.raises(DataError, match=r"license holds text, but objective.name='supervised' learns from pairs"):
    opened(pair_store, Supervised(), heldout=(Source(path=str(text_store)),))


def test_heldout_pairs_are_spread_evenly_and_have_whole_targets(six_pairs):
  source = opened(six_pairs, Supervised(), 4, 3, heldout=(Source(path=str(six_pairs)),))
  assert source.heldout_pairs(3) == {
    'six': [([10, 11, EOS], [12]), ([18, 19, 20, 21], [24, 25]), ([29, 30, 31, EOS], [32, 33, 34, 35, 36, 37, 38])]
  }
  assert len(source.heldout_pairs(99)['six']) == 6
