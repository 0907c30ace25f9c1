"""T5's noise: which tokens of a piece are hidden, and the sentinels that stand for them.

Source: Raffel et al. 2020, arXiv:1910.10683, §3.1.4 and §3.3; t5/data/preprocessors.py (random_spans_helper,
random_spans_noise_mask, noise_span_to_unique_sentinel). Counts are float32, rounded half to even, as in the reference:
float64 gives other counts (190 tokens at density 0.15: 28 noise tokens and 9 spans instead of 29 and 10).
"""

import numpy as np

from data.ragged import spread, starts

_SLOT_BITS = 20


def noise_counts(length, noise_density: float, mean_noise_span_length: float):
  """(noise tokens, noise spans) of a piece of `length` tokens; int for an int, int64 arrays for an array.

  >>> noise_counts(190, 0.15, 3.0)
  (29, 10)
  """
  size = np.maximum(length, 2)
  noise = np.rint(np.asarray(size, np.float32) * np.float32(noise_density)).astype(np.int64)
  noise = np.clip(noise, 1, size - 1)
  spans = np.maximum(np.rint(noise.astype(np.float32) / np.float32(mean_noise_span_length)).astype(np.int64), 1)
  return (noise, spans) if np.ndim(length) else (int(noise), int(spans))


def span_corruption_lengths(inputs_length: int, noise_density: float, mean_noise_span_length: float) -> tuple[int, int]:
  """(tokens_length, targets_length): the largest piece whose inputs, with EOS, fit `inputs_length`, and its targets.

  Rounds in float64, as the reference's random_spans_helper does. Raises ValueError where not even one token fits.

  >>> span_corruption_lengths(512, 0.15, 3.0)
  (568, 114)
  """

  def sizes(tokens: int) -> tuple[int, int]:
    noise = round(tokens * noise_density)
    spans = round(noise / mean_noise_span_length)
    return tokens - noise + spans + 1, noise + spans + 1

  tokens = inputs_length - 1
  if tokens < 1:
    raise ValueError(f'inputs_length={inputs_length} holds no token beside EOS; use at least 2.')
  while sizes(tokens + 1)[0] <= inputs_length:
    tokens += 1
  inputs, targets = sizes(tokens)
  if noise_density == 0.5 and targets > inputs:
    return tokens - 1, targets - 1
  return tokens, targets


def random_spans_noise_mask(
  length: int,
  noise_density: float,
  mean_noise_span_length: float,
  rng: np.random.Generator,
  random_roll: bool = False,
) -> np.ndarray:
  """bool[length], True on noise; every mask with the reference's counts is equally likely.

  The first token is never noise and the last always is, unless `random_roll` turns the mask by a random offset.
  One token is never noise. Raises ValueError where there are more noise spans than other tokens to part them.
  """
  if noise_density == 0.0:
    return np.zeros(length, bool)
  noise, spans = noise_counts(length, noise_density, mean_noise_span_length)
  if spans > max(length, 2) - noise:
    raise ValueError(
      f'noise_density={noise_density} and mean_noise_span_length={mean_noise_span_length} make {spans} noise spans '
      f'among {max(length, 2) - noise} other tokens (of {length}); lower the density or lengthen the spans.'
    )
  lengths, noise = np.array([length]), np.array([noise if length > 1 else 0])
  bits = rng.integers(0, 2**64, length + 1, np.uint64)
  mask = noise_masks(lengths, noise, np.array([spans]), bits[:length])
  return roll(mask, lengths, bits[length:]) if random_roll else mask


def noise_masks(lengths, num_noise, num_spans, bits) -> np.ndarray:
  """bool[sum(lengths)]: for each piece, `num_spans` runs of other tokens and noise in turn, drawn uniformly.

  All arguments are arrays over pieces, but `bits`: uint64[sum(lengths)], random, one for each token. A piece may have
  no noise, or nothing but noise, if it has one span.
  """
  groups = np.stack([lengths - num_noise, num_noise], 1).ravel()
  parts = np.repeat(num_spans, 2)
  runs = np.empty(parts.sum(), np.int64)
  # Parts come as all runs of other tokens, then all runs of noise; here they go to even and odd positions in turn.
  runs[2 * spread(np.repeat(starts(num_spans), 2), parts) + np.repeat(np.arange(len(parts)) % 2, parts)] = (
    random_compositions(groups, parts, bits)
  )
  return np.repeat(np.arange(len(runs)) % 2 == 1, runs)


def random_compositions(totals, parts, bits) -> np.ndarray:
  """int64[sum(parts)]: each `totals[i]` cut in `parts[i]` positive lengths, all cuts equally likely.

  A total of 0 has one part of length 0. `bits` is uint64[sum(totals)]. A cut is a subset of parts - 1 of the
  total - 1 gaps between elements.
  """
  begins, places = starts(totals), np.where(parts > 1, totals - 1, 0)
  chosen = random_subsets(places, parts - 1, bits[spread(begins, places)])
  first = np.zeros(totals.sum(), bool)
  first[begins[totals > 0]] = True
  first[np.repeat(begins, parts - 1) + chosen + 1] = True
  lengths = np.zeros(parts.sum(), np.int64)
  lengths[np.repeat(totals > 0, parts)] = np.diff(np.flatnonzero(first), append=len(first))
  return lengths


def random_subsets(sizes, counts, bits) -> np.ndarray:
  """int64[sum(counts)]: `counts[i]` of the positions 0 … sizes[i] - 1 of each group, all subsets equally likely.

  `bits` is uint64[sum(sizes)]: the positions with the smallest first 24 bits are taken, independently of the
  other 40. One sort serves all groups: its keys are (group, 24 random bits, place), so that ties are settled the same
  way everywhere.
  """
  if len(sizes) >= 2 ** (64 - 24 - _SLOT_BITS) or (len(sizes) and sizes.max() >= 2**_SLOT_BITS):
    raise ValueError(f'{len(sizes)} groups of at most {sizes.max()} tokens; both must stay below 2**{_SLOT_BITS}.')
  place = spread(np.zeros_like(sizes), sizes).astype(np.uint64)
  group = np.repeat(np.arange(len(sizes), dtype=np.uint64), sizes)
  keys = (group << np.uint64(44)) | (bits >> np.uint64(40) << np.uint64(_SLOT_BITS)) | place
  keys.sort()
  return (keys[spread(starts(sizes), counts)] & np.uint64(2**_SLOT_BITS - 1)).astype(np.int64)


def roll(mask, lengths, bits) -> np.ndarray:
  """Each piece of `mask` turned by an offset drawn from [0, length); `bits` is uint64[pieces]."""
  offset = np.repeat((bits % np.maximum(lengths, 2).astype(np.uint64)).astype(np.int64), lengths)
  begins = np.repeat(starts(lengths), lengths)
  return mask[begins + (np.arange(len(mask)) - begins - offset) % np.repeat(lengths, lengths)]


def noise_span_to_unique_sentinel(tokens: np.ndarray, mask: np.ndarray, first_sentinel: int) -> np.ndarray:
  """`tokens` with each run of `mask` replaced by one sentinel: first_sentinel, first_sentinel - 1, …

  >>> noise_span_to_unique_sentinel(np.int32([5, 6, 7, 8]), np.array([False, True, True, False]), 99).tolist()
  [5, 99, 8]
  """
  values, keep = replace_runs(tokens, mask, np.zeros(1, np.int64), first_sentinel)
  return values[keep]


def nonnoise_span_to_unique_sentinel(tokens: np.ndarray, mask: np.ndarray, first_sentinel: int) -> np.ndarray:
  """`tokens` with each run outside `mask` replaced by one sentinel.

  >>> nonnoise_span_to_unique_sentinel(np.int32([5, 6, 7, 8]), np.array([False, True, True, False]), 99).tolist()
  [99, 6, 7, 98]
  """
  return noise_span_to_unique_sentinel(tokens, ~mask, first_sentinel)


def replace_runs(tokens, mask, begins, first_sentinel: int, sentinels=True) -> tuple[np.ndarray, np.ndarray]:
  """(values, keep): in each piece, the first token of every run of `mask` becomes a sentinel; the rest is not kept.

  `begins` (int64[pieces]) is where pieces start; runs end there, and sentinels start again at `first_sentinel`.
  Where `sentinels` (bool, or bool over tokens) is False the runs are dropped whole.
  """
  if not len(tokens):
    return tokens, np.zeros(0, bool)
  before = np.concatenate([[False], mask[:-1]])
  before[begins] = False
  first = mask & ~before
  count = np.cumsum(first)
  earlier = np.repeat(count[begins] - first[begins], np.diff(begins, append=len(tokens)))
  values = np.where(first, first_sentinel + 1 - (count - earlier), tokens).astype(tokens.dtype)
  return values, ~mask | (first & sentinels)
