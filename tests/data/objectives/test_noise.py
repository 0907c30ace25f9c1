"""T5's noise: the reference's counts, sizes and replacements, and the law of its masks."""

import json
import math
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from data.objectives.noise import (
  noise_counts,
  noise_masks,
  noise_span_to_unique_sentinel,
  nonnoise_span_to_unique_sentinel,
  random_spans_noise_mask,
  span_corruption_lengths,
)

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / 'golden/t5_seqio.json').read_text())
CASES = [pytest.param(case, id=f'{case["length"]}-{case["density"]}-{case["seed"]}') for case in GOLDEN['cases']]
FIRST = 32099


def mask_of(case) -> np.ndarray:
  return np.array([c == '1' for c in case['mask']])


@pytest.mark.parametrize('case', CASES)
def test_counts_are_the_references(case):
  rng = np.random.default_rng(0)
  mask = random_spans_noise_mask(case['length'], case['density'], case['mean_span'], rng)
  starts = mask & ~np.concatenate([[False], mask[:-1]])
  assert (mask.sum(), starts.sum()) == (case['noise_tokens'], case['spans'])
  assert case['length'] == 1 or (not mask[0] and mask[-1])


def test_counts_are_rounded_in_float32_half_to_even():
  assert noise_counts(190, 0.15, 3.0) == (29, 10)
  assert noise_counts(np.array([190, 2, 5]), 0.5, 3.0)[0].tolist() == [95, 1, 2]


@pytest.mark.parametrize('case', CASES)
def test_inputs_and_targets_are_the_references_given_the_mask(case):
  tokens, mask = np.arange(100, 100 + case['length'], dtype=np.int32), mask_of(case)
  assert noise_span_to_unique_sentinel(tokens, mask, FIRST).tolist() == case['inputs']
  assert nonnoise_span_to_unique_sentinel(tokens, mask, FIRST).tolist() == case['targets']


@pytest.mark.parametrize(('inputs', 'mean', 'density', 'tokens', 'targets'), GOLDEN['sizing'])
def test_sizes_are_the_references(inputs, mean, density, tokens, targets):
  assert span_corruption_lengths(inputs, density, mean) == (tokens, targets)


def test_every_mask_is_equally_likely():
  """20 tokens, density 0.3, spans of 2: 6 noise tokens in 3 spans; C(5, 2) * C(13, 2) = 780 masks."""
  rng, number = np.random.default_rng(1), 60_000
  seen: dict[bytes, int] = {}
  lengths, noise, spans = np.full(number, 20), np.full(number, 6), np.full(number, 3)
  masks = noise_masks(lengths, noise, spans, rng.integers(0, 2**64, 20 * number, np.uint64)).reshape(number, 20)
  for mask in np.packbits(masks, axis=1):
    seen[mask.tobytes()] = seen.get(mask.tobytes(), 0) + 1
  assert len(seen) == math.comb(5, 2) * math.comb(13, 2)
  assert 0.001 < stats.chisquare(list(seen.values())).pvalue < 0.999


def test_one_mask_is_drawn_by_the_same_law():
  """12 tokens, density 0.5, spans of 3: 6 noise tokens in 2 spans; C(5, 1)^2 = 25 masks."""
  rng, seen = np.random.default_rng(2), {}
  for _ in range(4000):
    mask = random_spans_noise_mask(12, 0.5, 3.0, rng).tobytes()
    seen[mask] = seen.get(mask, 0) + 1
  assert len(seen) == 25
  assert 0.001 < stats.chisquare(list(seen.values())).pvalue < 0.999


def test_pieces_are_independent_of_each_other():
  """A piece's mask is that of the piece alone with its own bits."""
  rng = np.random.default_rng(3)
  lengths = rng.integers(1, 300, 50)
  noise, spans = noise_counts(lengths, 0.3, 2.0)
  noise = np.where(lengths > 1, noise, 0)
  bits = rng.integers(0, 2**64, lengths.sum(), np.uint64)
  cuts = np.cumsum(lengths)[:-1]
  together = np.split(noise_masks(lengths, noise, spans, bits), cuts)
  for i, own in enumerate(np.split(bits, cuts)):
    alone = noise_masks(lengths[i : i + 1], noise[i : i + 1], spans[i : i + 1], own)
    assert alone.tolist() == together[i].tolist()


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
  lengths=st.lists(st.integers(1, 80), min_size=1, max_size=12),
  density=st.floats(0.01, 0.5),
  mean=st.floats(2.0, 100.0),  # below, some pieces are refused (check_objective)
  seed=st.integers(0, 2**32),
)
def test_any_pieces_have_their_counts_and_nothing_is_lost(lengths, density, mean, seed):
  """Noise and spans of each piece as counted; text is back when targets are put in the inputs' sentinels."""
  lengths, rng = np.array(lengths), np.random.default_rng(seed)
  noise, spans = noise_counts(lengths, density, mean)
  noise = np.where(lengths > 1, noise, 0)
  masks = noise_masks(lengths, noise, spans, rng.integers(0, 2**64, lengths.sum(), np.uint64))
  for i, mask in enumerate(np.split(masks, np.cumsum(lengths)[:-1])):
    assert mask.sum() == noise[i]
    assert np.diff(mask.astype(int), prepend=0).clip(0).sum() == (spans[i] if lengths[i] > 1 else 0)
    tokens = np.arange(100, 100 + lengths[i], dtype=np.int32)
    inputs = noise_span_to_unique_sentinel(tokens, mask, FIRST).tolist()
    targets = nonnoise_span_to_unique_sentinel(tokens, mask, FIRST).tolist()
    assert restored(inputs, targets) == tokens.tolist()


def restored(inputs: list[int], targets: list[int]) -> list[int]:
  """`inputs` with what follows the same sentinel in `targets` in place of each of theirs."""
  hidden, text = {}, []
  for token in targets:
    if token > FIRST - 1000:
      hidden[token] = []
    else:
      hidden[FIRST + 1 - len(hidden)].append(token)
  for token in inputs:
    text += hidden[token] if token > FIRST - 1000 else [token]
  return text


def test_random_roll_turns_a_mask_to_every_offset():
  rng = np.random.default_rng(4)
  masks = np.stack([random_spans_noise_mask(24, 0.25, 3.0, rng, random_roll=True) for _ in range(3000)])
  assert (masks.sum(1) == 6).all()
  # Without rolling the first token is never noise and the last always is; with it all places are alike.
  assert stats.chisquare(masks.sum(0)).pvalue > 0.001


def test_no_noise_where_the_density_is_zero():
  assert not random_spans_noise_mask(9, 0.0, 3.0, np.random.default_rng(0)).any()


@pytest.mark.parametrize(('length', 'density', 'mean'), [(20, 0.9, 1.0), (20, 0.5, 0.5), (3, 0.9, 1.0)])
def test_more_spans_than_other_tokens_are_refused(length, density, mean):
  with pytest.raises(ValueError, match=r'noise spans among \d+ other tokens'):
    random_spans_noise_mask(length, density, mean, np.random.default_rng(0))


def test_sizes_need_room_for_a_token():
  with pytest.raises(ValueError, match='inputs_length=1 holds no token'):
    span_corruption_lengths(1, 0.15, 3.0)
