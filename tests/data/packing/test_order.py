"""The order of rows: a permutation of each epoch, exact rates in every block, shards in windows; no memory."""

import collections
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.bits import draws, orders, permute, philox, stream_key
from data.packing.order import Deal, EpochOrder

UL2 = np.arange(7)
GOLDEN = [3, 8, 6, 5, 2, 0, 9, 1, 7, 4]
GOLDEN_LARGE = [65532939181, 397143931448, 772223575495]
GOLDEN_ORDER = [4, 0, 9, 2, 5, 1, 3, 6, 7, 8]


def key(*counter: int) -> np.ndarray:
  return stream_key(0, 'test', *counter)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(size=st.integers(1, 5000), seed=st.integers(0, 2**32))
def test_permute_is_one_to_one(size, seed):
  assert np.sort(permute(np.arange(size), size, stream_key(seed, 'test'))).tolist() == list(range(size))


def test_permute_handles_ranges_larger_than_memory():
  size = 10**15 + 7
  places = np.concatenate([np.arange(1000), size - 1 - np.arange(1000)])
  got = permute(places, size, key())
  assert len(set(got.tolist())) == 2000
  assert 0 <= got.min() < size // 100
  assert size * 0.99 < got.max() < size
  assert abs(np.corrcoef(got[:1000], places[:1000])[0, 1]) < 0.15


@pytest.mark.parametrize('size', [3, 4, 5])
def test_all_orders_are_equally_likely(size):
  number = 60_000
  keys = np.repeat(key(np.arange(number)), size)
  got = permute(np.tile(np.arange(size), number), size, keys).reshape(-1, size)
  counts = collections.Counter(map(tuple, got.tolist()))
  found = np.array([counts[order] for order in itertools.permutations(range(size))])
  chi2 = ((found - found.mean()) ** 2 / found.mean()).sum() / (len(found) - 1)
  assert chi2 < 2.5


@pytest.mark.parametrize('size', [3, 4])
def test_all_orders_of_a_block_are_equally_likely(size):
  got = orders(key(np.arange(60_000)), size)
  counts = collections.Counter(map(tuple, got.tolist()))
  found = np.array([counts[order] for order in itertools.permutations(range(size))])
  assert ((found - found.mean()) ** 2 / found.mean()).sum() / (len(found) - 1) < 2.5


def test_the_order_of_a_key_never_changes():
  """A run that goes on in a later release must find the same rows."""
  assert permute(np.arange(10), 10, stream_key(7, 'golden', 1)).tolist() == GOLDEN
  assert permute(np.arange(3), 10**12, stream_key(7, 'golden', 1)).tolist() == GOLDEN_LARGE
  assert orders(stream_key(7, 'golden', 1), 10)[0].tolist() == GOLDEN_ORDER


def test_a_key_does_not_depend_on_the_type_of_its_counter():
  counters = [(0, 5), (3, 2**40), (2**63, 7)]
  columns = (np.array(column, np.uint64) for column in zip(*counters, strict=True))
  assert key(*columns).tolist() == [key(*counter)[0] for counter in counters]


def test_many_ranges_are_permuted_as_each_alone():
  sizes = np.array([1, 2, 9, 4095, 4096, 4097, 10**9, 10**15])
  keys, places = key(np.arange(8)), sizes // 2
  alone = [permute(places[i : i + 1], int(sizes[i]), keys[i : i + 1])[0] for i in range(8)]
  assert permute(places, sizes, keys).tolist() == alone


def test_draws_are_the_streams_of_their_counters():
  counters = [(0, 3, 9), (0, 3, 10), (2**40, 0, 0)]
  each = [philox(5, 'noise', *counter).random_raw(count) for counter, count in zip(counters, [3, 0, 10], strict=True)]
  assert draws(5, 'noise', counters, [3, 0, 10]).tolist() == np.concatenate(each).tolist()


def test_an_index_outside_is_refused():
  with pytest.raises(ValueError, match=r'indices 0 .. 5 are not all in range\(5\)'):
    permute(np.arange(6), 5, key())


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
  counts=st.lists(st.lists(st.integers(0, 40), min_size=3, max_size=3), min_size=1, max_size=7),
  window=st.integers(1, 4),
)
def test_every_row_of_every_shard_comes_once(counts, window):
  counts = np.array(counts)
  order = EpochOrder(counts, Deal(np.array([0, 0, 1, 2]), 0, 'tasks'), seed=0, purpose='test', epoch=2, window=window)
  assert order.num_rows == counts.sum()
  found = np.stack(order.locate(np.arange(order.num_rows)))
  wanted = {(s, t, k) for s, t in np.ndindex(counts.shape) for k in range(counts[s, t])}
  assert sorted(map(tuple, found.T.tolist())) == sorted(wanted)
  for place in range(0, order.num_rows, 13):
    assert np.stack(order.locate(np.array([place])))[:, 0].tolist() == found[:, place].tolist(), 'each place alone'


def epoch_order(epoch: int = 0, window: int = 2, seed: int = 0) -> EpochOrder:
  """Six shards of 100 rows of each of seven tasks, but a few."""
  counts = np.full((6, 7), 100)
  counts[2, 3] += 2
  return EpochOrder(counts, Deal(UL2, seed, 'tasks'), seed=seed, purpose='test', epoch=epoch, window=window)


def test_every_block_in_training_holds_the_exact_rates():
  _, tasks, _ = epoch_order().locate(np.arange(700))
  blocks = tasks.reshape(-1, 7)
  assert (np.sort(blocks, axis=1) == np.arange(7)).all()
  assert len({block.tobytes() for block in blocks}) > 50


def test_only_a_window_of_shards_is_open_and_their_rows_are_mixed():
  shards, _, rows = epoch_order().locate(np.arange(4202))
  assert [len(set(shards[i : i + 1400].tolist())) for i in (0, 2802)] in ([2, 2], [2, 3], [3, 2], [3, 3])
  assert len(set(shards[:1300].tolist())) == 2
  assert len(set(shards[:50].tolist())) == 2, 'mixed'
  assert abs(np.corrcoef(rows[:1400], np.arange(1400))[0, 1]) < 0.1


def test_epochs_and_seeds_have_orders_of_their_own():
  first = [np.stack(epoch_order(*which).locate(np.arange(200))).tobytes() for which in ((0,), (1,), (0, 2, 1))]
  assert len(set(first)) == 3
  assert first[0] == np.stack(epoch_order().locate(np.arange(200))).tobytes()


def test_a_deal_counts_occurrences():
  numbers, which = Deal(np.array([0, 0, 1]), 3, 'deal').at(np.arange(300))
  assert sorted(zip(numbers.tolist(), which.tolist(), strict=True)) == sorted(
    [(0, k) for k in range(200)] + [(1, k) for k in range(100)]
  )
