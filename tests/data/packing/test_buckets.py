"""Length buckets: every token once, a length to a step, as many tokens in each, the curriculum that was asked for."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batches.loader import loader
from data.batches.show import explain_row
from data.batches.source import Source, StoreData
from data.objectives.objectives import CausalLm, SpanCorruption
from data.packing.buckets import BucketOrder, LengthBuckets, decompose, joined_plans
from data.packing.packing import check_packing
from data.packing.plan import Stream
from data.stores.store import open_store
from tests.data.batches.test_source import SENTINELS, assert_equal, opened

LENGTHS = (8, 16, 32)


def bucketed(store, **options):
  packing = LengthBuckets(min_length=16, **{'cycles': 1} | options)
  return opened(store, CausalLm(), 0, 64, batch_size=4, packing=packing)


@settings(derandomize=True, deadline=None, max_examples=120)
@given(
  lengths=st.lists(st.integers(0, 3) | st.integers(0, 200), min_size=1, max_size=30).filter(any),
  eos=st.integers(0, 1),
)
def test_documents_are_split_by_their_binary_digits_and_a_rest(lengths, eos):
  lengths = np.array(lengths, np.int64)
  text = Stream(np.cumsum(lengths + eos) - lengths - eos, lengths, first=50)
  plans = decompose(text, LENGTHS)
  found = [plan.pieces(np.arange(len(plan.tasks))) for plan in plans]
  whole = [(p, n) for own in found for p, n in zip(own.places.tolist(), own.lengths.tolist(), strict=True)]
  covered = sorted(i for place, n in whole for i in range(place, place + n))
  wanted = [i for begin, n in zip(text.begins.tolist(), lengths.tolist(), strict=True) for i in range(begin, begin + n)]
  assert covered == wanted
  for size, plan, own in zip(LENGTHS, plans, found, strict=True):
    assert set(own.rows.tolist()) == set(range(len(plan.tasks)))
    assert np.bincount(own.rows, own.lengths, 1).max() <= size
    if size > LENGTHS[0]:
      assert (own.lengths == size).all(), 'one piece fills a row'
  number = lambda size: sum((own.lengths == size).sum() for own in found)
  assert number(32) == (lengths // 32).sum()
  assert number(16) == (lengths // 16 % 2).sum()
  rests = [n for n in (lengths % 8).tolist() if n]
  assert len(plans[0].tasks) - (lengths // 8 % 2).sum() >= -(-sum(rests) // 8), 'rests are packed'
  for own in found:
    owner = np.searchsorted(text.begins, own.places, side='right') - 1
    assert (own.documents - 50 == owner).all()


def test_a_rest_shares_its_row_and_nothing_is_dropped():
  lengths = np.array([8 + 3, 5, 32, 4])
  (shortest, *_) = decompose(Stream(np.cumsum(lengths) - lengths, lengths), LENGTHS)
  rows = shortest.pieces(np.arange(len(shortest.tasks)))
  assert [rows.lengths[rows.rows == row].tolist() for row in range(3)] == [[8], [3, 5], [4]]


def test_shards_are_joined_row_by_row():
  lengths = np.array([40, 13, 7])
  text = Stream(np.cumsum(lengths) - lengths, lengths)
  parts = [decompose(text, LENGTHS)[0], decompose(text, LENGTHS)[0]]
  both, alone = joined_plans(parts), parts[0]
  number = len(alone.tasks)
  again = both.pieces(np.arange(number, 2 * number))
  assert [values.tolist() for values in again[:4]] == [v.tolist() for v in alone.pieces(np.arange(number))[:4]]


def test_every_token_occurs_once_in_an_epoch(text_store):
  source, store = bucketed(text_store), open_store(text_store)
  for first in (0, source._rows.order.steps_per_epoch):
    used = np.zeros(store.num_tokens, int)
    for step in range(source._rows.order.steps_per_epoch):
      place = source._rows.order.place(first + step)
      rows = source._rows.order.rows(place, 0, int(source._rows.per_step[place.bucket]))
      pieces = source._rows.pieces(place, rows)
      for begin, length in zip(pieces.places, pieces.lengths, strict=True):
        used[begin : begin + length] += 1
    assert (used == 1).all()


def test_every_step_has_rows_of_one_length_and_the_same_number_of_positions(text_store):
  source = bucketed(text_store)
  shapes = {source.batch(step, slice(0, 4))['decoder_target_tokens'].shape for step in range(20)}
  assert shapes == {(4, 64), (8, 32), (16, 16)}
  batch = source.batch(0, slice(0, 4))
  assert batch['decoder_target_tokens'].shape == (4, 64), 'the longest first'
  origin, fields = source.row(4, 1)
  assert_equal(fields, {name: values[1] for name, values in source.batch(1, slice(0, 4)).items()})
  (piece,) = origin.pieces
  text = source._rows.store.read([piece[1:]])[0]
  assert fields['decoder_target_tokens'][: len(text)].tolist() == text.tolist()


def test_a_row_of_a_batch_that_is_shorter_is_explained(text_store):
  source = bucketed(text_store)
  place, row = next(
    (step * 4, row)
    for step in range(source._rows.order.steps_per_epoch)
    for row in range(source.batch_rows(step * 4))
    if source.row(step * 4, row)[0].row < 0
  )
  assert 'shard 0, padding: the batch has fewer rows' in explain_row(source, 0, row, place)
  assert 'row 0 of its plan' in next(
    text for step in range(100) if 'row 0 of' in (text := explain_row(source, step, 0, step * 4))
  )


@pytest.mark.parametrize('hosts', [2, 4])
def test_hosts_together_have_the_batch_of_a_single_host(text_store, hosts):
  own = 4 // hosts
  for step in range(0, 30, 3):
    whole = bucketed(text_store).batch(step, slice(0, 4))
    parts = [bucketed(text_store).batch(step, slice(h * own, (h + 1) * own)) for h in range(hosts)]
    assert_equal(whole, {name: np.concatenate([part[name] for part in parts]) for name in whole})


def test_a_resumed_stream_is_the_rest_of_the_first(text_store):
  take = lambda position, count: list(itertools.islice(loader(bucketed(text_store), position, slice(0, 4)), count))
  whole = take({'examples': 0}, 12)
  for (position, batch), (again, other) in zip(whole[5:], take(whole[4][0], 7), strict=True):
    assert position == again
    assert_equal(batch, other)


def order(**options) -> BucketOrder:
  """Two windows; of four lengths 400, 200, 100 and 50 steps in the first."""
  counts = np.array([[400 * 8, 200 * 4, 100 * 2, 50], [8, 4, 2, 1]])
  return BucketOrder(counts, LengthBuckets(**options), np.array([8, 4, 2, 1]), seed=0, purpose='test')


def lengths_of(made: BucketOrder) -> np.ndarray:
  places = [made.place(step) for step in range(made.steps_per_epoch)]
  return np.array([place.bucket for place in places if place.window == 0])


def test_an_epoch_has_each_step_once_in_every_order():
  for options in ({}, {'odds': 1.0}, {'odds': 100.0, 'cycles': 1}, {'longest_first': False}):
    made = order(**options)
    places = [made.place(step) for step in range(made.steps_per_epoch)]
    assert len(set(places)) == made.steps_per_epoch == 754
    assert {place.epoch for place in places} == {0}
    assert made.place(754).epoch == 1


def test_the_curriculum_follows_its_odds():
  rank = lambda lengths: np.corrcoef(np.arange(len(lengths)), lengths)[0, 1]
  one = {'cycles': 1, 'longest_first': False}
  assert abs(rank(lengths_of(order(odds=1.0, **one)))) < 0.1
  assert 0.15 < rank(lengths_of(order(odds=2.0, **one))) < rank(lengths_of(order(odds=100.0, **one)))
  assert rank(lengths_of(order(odds=0.01, **one))) < -0.5
  cycled = lengths_of(order(odds=100.0, cycles=4, longest_first=False))
  quarters = np.array_split(cycled, 4)
  assert all(rank(quarter) > 0.5 for quarter in quarters)
  assert all(95 <= (quarter == 0).sum() <= 105 for quarter in quarters)


def test_the_longest_rows_come_first_if_configured():
  longest_of_window = {0: 3, 1: 3}
  for seed in range(3):
    counts = np.array([[400 * 8, 200 * 4, 100 * 2, 50], [8, 4, 2, 1]])
    made = BucketOrder(counts, LengthBuckets(odds=100.0), np.array([8, 4, 2, 1]), seed=seed, purpose='test')
    first = made.place(0)
    assert first.bucket == longest_of_window[first.window]
    later = made.place(made.steps_per_epoch)
    assert later.epoch == 1
    assert later.bucket == 0, 'only in the first epoch'


@pytest.mark.parametrize(
  ('changes', 'objective', 'message'),
  [
    ({'packing': LengthBuckets(min_length=24)}, CausalLm(), r'min_length=24 doubled leads to 96, not to data.targets_'),
    ({}, SpanCorruption(), "is for objective.name='causal_lm', not 'span_corruption'"),
    ({'sources': (Source(path='a'), Source(path='b'))}, CausalLm(), 'is for one source, not 2'),
  ],
)
def test_unsupported_uses_of_buckets_are_refused(changes, objective, message):
  options = {'packing': LengthBuckets(min_length=16), 'sources': (Source(path='a'),)} | changes
  cfg = StoreData(batch_size=2, targets_length=64, sentinels=SENTINELS, **options)
  with pytest.raises(ValueError, match=message):
    check_packing(cfg, objective)
