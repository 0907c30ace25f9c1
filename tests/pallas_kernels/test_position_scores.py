"""Disentangled attention against its formula: He et al. 2020, arXiv:2006.03654, eq. 3 and 4."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention import api
from pallas_kernels.attention.reference import signed_log_bucket
from pallas_kernels.errors import KernelError

BUCKETS = np.load(pathlib.Path(__file__).parents[1] / 'golden/interchange/deberta_buckets.npz')
B, T, HEADS, DIM, HALF, MOST = 2, 40, 2, 4, 16, 70


@pytest.mark.parametrize('name', BUCKETS.files)
def test_buckets_are_those_of_the_authors(name):
  """`make_log_bucket_position` of `transformers`, whose callers add the middle and clamp."""
  half, most = map(int, name.split('_'))
  expected = np.clip(BUCKETS[name] + half, 0, 2 * half - 1)
  found = signed_log_bucket(np.arange(-600, 601), buckets=2 * half, max_distance=most)
  np.testing.assert_array_equal(found, expected)
  if half > 2:  # the mutation: another largest distance
    assert (signed_log_bucket(np.arange(-600, 601), buckets=2 * half, max_distance=most + 5) != expected).any()


def draw(i: int, *shape: int) -> np.ndarray:
  return np.asarray(jax.random.normal(jax.random.key(i), shape))


Q, K, V = (draw(i, B, T, HEADS, DIM) for i in range(3))
KEYS, QUERIES = draw(3, 2 * HALF, HEADS, DIM), draw(4, 2 * HALF, HEADS, DIM)
SEGMENTS = np.array([[1] * 25 + [2] * 15, [1] * 30 + [0] * 10], np.int32)


def attend(keys, queries, q=Q, k=K, **options):
  scores = api.PositionScores(keys=keys, queries=queries, max_distance=MOST)
  see = api.Visibility(causal=False, q_segment_ids=SEGMENTS, kv_segment_ids=SEGMENTS, position_scores=scores)
  return api.attention(q, k, V, see, scale=(3 * DIM) ** -0.5, **options)


def by_formula(keys, queries) -> np.ndarray:
  distance = np.arange(T)[:, None] - np.arange(T)[None]
  bucket = np.clip(BUCKETS[f'{HALF}_{MOST}'][distance + 600] + HALF, 0, 2 * HALF - 1)
  scores = np.einsum('bihd,bjhd->bhij', Q, K)
  if keys is not None:
    scores = scores + np.einsum('bihd,ijhd->bhij', Q, keys[bucket])
  if queries is not None:
    scores = scores + np.einsum('bjhd,ijhd->bhij', K, queries[bucket])
  same = (SEGMENTS[:, :, None] == SEGMENTS[:, None]) & (SEGMENTS != 0)[:, :, None]
  weights = np.exp(scores / np.sqrt(3 * DIM)) * same[:, None]
  total = np.maximum(weights.sum(-1, keepdims=True), 1e-30)
  return np.einsum('bhij,bjhd->bihd', weights / total, V)


@pytest.mark.parametrize(
  ('keys', 'queries'), [(KEYS, None), (None, QUERIES), (KEYS, QUERIES)], ids=['c2p', 'p2c', 'both']
)
def test_scores_are_those_of_the_formula(keys, queries):
  np.testing.assert_allclose(attend(keys, queries), by_formula(keys, queries), atol=2e-6)


def test_the_formula_tells_mistakes_apart():
  expected = by_formula(KEYS, QUERIES)
  assert np.abs(attend(QUERIES, KEYS) - expected).max() > 0.1, 'the mutation: c2p and p2c swapped'
  assert np.abs(attend(KEYS[::-1], QUERIES[::-1]) - expected).max() > 0.1, 'the mutation: distances turned round'


@pytest.mark.parametrize('name', ['tpu', 'interpret', 'triton', 'mosaic_gpu', 'cudnn'])
def test_kernels_are_refused(name):
  with pytest.raises(
    KernelError, match=f"kernels.attention='{name}' has no disentangled attention, which model.positions"
  ):
    attend(KEYS, QUERIES, implementation=name)


def test_arrays_that_do_not_fit_are_refused():
  with pytest.raises(KernelError, match=r'position_scores\.keys\(32, 1, 4\); pass \[buckets, heads=2, head_dim=4\]'):
    attend(KEYS[:, :1], QUERIES)
  scores = api.PositionScores(keys=KEYS, queries=None, max_distance=MOST)
  positions = jnp.broadcast_to(jnp.arange(T), (B, T))
  see = api.Visibility(causal=False, q_positions=positions, kv_positions=positions, position_scores=scores)
  with pytest.raises(KernelError, match='position_scores and positions; pass rows without positions'):
    api.attention(Q, K, V, see)
