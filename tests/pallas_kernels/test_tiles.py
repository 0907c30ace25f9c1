"""The list of tiles contains every visible pair and writes every block of the output once."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.attention import reference, tiles
from pallas_kernels.attention.reference import Visibility
from pallas_kernels.attention.tiles import FIRST, LAST, LIVE, MASKED, NEAR, Spec, Vectors

BLOCK = 4


def make_spec(q_length, kv_length, **options) -> Spec:
  sizes = {'block_q': BLOCK, 'block_kv': BLOCK, 'compute': BLOCK, 'heads': 1, 'group': 1, 'scale': 1.0}
  return Spec(**sizes, q_length=q_length, kv_length=kv_length, **options)


@st.composite
def rows(draw):
  """(spec, vectors, dense mask) of one row; with arbitrary segments, positions and prefixes."""
  numbers = lambda n, high: np.array(draw(st.lists(st.integers(0, high), min_size=n, max_size=n)), np.int32)[None]
  blocks = st.sampled_from((1, 3))  # every pair is programs of its own
  causal, segmented, positioned = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
  t, s = BLOCK * draw(blocks), BLOCK * draw(blocks)
  window = draw(st.none() | st.integers(1, 9))
  ids = [np.sort(numbers(n, 3)) if draw(st.booleans()) else numbers(n, 3) for n in (t, s)] if segmented else [None] * 2
  q_at, k_at = (numbers(n, 12) if positioned else np.arange(n, dtype=np.int32)[None] for n in (t, s))
  prefix = numbers(s, 5) if positioned else None
  spec = make_spec(
    t, s, causal=causal, segmented=segmented, positioned=positioned, window=window, num_sinks=draw(st.integers(0, 3))
  )
  mask = reference._mask(
    Visibility(
      causal=causal, window=window, num_sinks=spec.num_sinks, q_segment_ids=ids[0], kv_segment_ids=ids[1],
      q_positions=q_at, kv_positions=k_at, prefix_end=prefix,
    )
  )  # fmt: skip
  vectors = dict(zip(('q_segments', 'kv_segments'), ids, strict=True))
  if positioned:
    vectors |= {'q_positions': q_at, 'kv_positions': k_at, 'kv_reach': np.where(k_at < prefix, -tiles.FAR, k_at)}
  vectors = Vectors(**{name: None if x is None else jnp.asarray(x) for name, x in vectors.items()})
  return spec, vectors, np.ones((1, t, s), bool) if mask is None else np.asarray(mask)


def by_tile(mask):
  _, t, s = mask.shape
  return mask[0].reshape(t // BLOCK, BLOCK, s // BLOCK, BLOCK).swapaxes(1, 2)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(rows())
def test_no_tile_with_a_visible_pair_is_dropped_and_no_tile_with_a_hidden_pair_is_unmasked(case):
  spec, vectors, mask = case
  live, near, masked = (np.broadcast_to(x, (1, spec.num_q, spec.num_kv))[0] for x in tiles.classify(spec, vectors))
  dense = by_tile(np.broadcast_to(mask, (1, spec.q_length, spec.kv_length)))
  assert not (dense.any((-1, -2)) & ~live).any()
  clear = live & ~masked & ~(near if spec.diagonal else np.zeros_like(near))
  assert dense[clear].all()


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(rows(), st.booleans())
def test_every_block_starts_and_ends_once_and_every_live_tile_is_visited_once(case, by_keys):
  spec, vectors, _ = case
  words, steps = tiles.walk(spec, vectors, by_keys=by_keys)
  words, (i, j) = np.asarray(words)[0], tiles.unpack(np.asarray(words)[0])
  own, blocks = (j, spec.num_kv) if by_keys else (i, spec.num_q)
  for mark in (FIRST, LAST):
    assert sorted(own[(words & mark) != 0]) == list(range(blocks))
  live = np.broadcast_to(tiles.classify(spec, vectors)[0], (1, spec.num_q, spec.num_kv))[0]
  visited = np.zeros_like(live, int)
  np.add.at(visited, (i, j), (words & LIVE) != 0)
  np.testing.assert_array_equal(visited, live)
  assert not (words[int(steps) :] & (FIRST | LAST | LIVE | NEAR | MASKED)).any()


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(rows(), st.booleans())
def test_bounds_contain_every_live_tile_and_start_and_end_at_one(case, by_keys):
  spec, vectors, _ = case
  live = np.broadcast_to(tiles.classify(spec, vectors)[0], (1, spec.num_q, spec.num_kv))[0]
  ends = np.asarray(tiles.bounds(spec, vectors, by_keys=by_keys))[0]
  for row, (start, end) in zip(live.T if by_keys else live, ends, strict=True):
    places = np.flatnonzero(row)
    assert (start, end) == ((places[0], places[-1] + 1) if places.size else (0, 0))


def test_tiles_between_documents_are_not_visited():
  """Four documents of two blocks each have 4 x 3 live tiles; causality alone would leave 36."""
  segments = jnp.asarray(np.repeat([[1, 2, 3, 4]], 2 * BLOCK, 1).astype(np.int32))
  spec = make_spec(32, 32, causal=True, segmented=True, positioned=False)
  _, steps = tiles.walk(spec, Vectors(q_segments=segments, kv_segments=segments), by_keys=False)
  assert int(steps) == 12


def test_more_blocks_than_fit_a_word_are_refused():
  spec = make_spec(BLOCK * 5000, BLOCK, causal=True, segmented=False, positioned=False)
  with pytest.raises(ValueError, match='flash_attention over 5000 x 1 blocks; 4096 fit, use larger blocks'):
    tiles.walk(spec, Vectors(), by_keys=False)
