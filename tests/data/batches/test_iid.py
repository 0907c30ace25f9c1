"""T5's i.i.d. noise: given the mask, inputs and targets equal the reference's; the mask has the right distribution."""

import numpy as np
import pytest
from scipy import stats

from data.objectives.corrupt import Corruption
from data.objectives.denoise import iid_masks
from data.objectives.lexicon import Lexicon
from data.objectives.objectives import IidDenoising, tasks_of
from data.ragged import join
from data.stores.vocabulary import EOS, UNKNOWN, Vocabulary

VOCABULARY = Vocabulary(100, 200)
FIRST = VOCABULARY.first_sentinel


def per_run(tokens: list[int], hidden: list[bool]) -> list[int]:
  """t5's noise_span_to_unique_sentinel."""
  out, sentinel, before = [], FIRST, False
  for token, own in zip(tokens, hidden, strict=True):
    if own and not before:
      out.append(sentinel)
      sentinel -= 1
    if not own:
      out.append(token)
    before = own
  return out


# The functions named in t5's gin files, which make the inputs (and, given tokens and mask, the targets).
INPUTS = {
  'sentinel_per_run': per_run,  # noise_span_to_unique_sentinel
  'mask': lambda tokens, hidden: [FIRST if h else t for t, h in zip(tokens, hidden, strict=True)],  # noise_token_to_…
  'drop': lambda tokens, hidden: [t for t, h in zip(tokens, hidden, strict=True) if not h],  # drop_noise_tokens
}


def seen(hide: str, targets: str, number: int = 40, **keys):
  """(tokens, mask, inputs, targets) of pieces of 1 to `number` tokens; the mask follows from the bits as documented."""
  (task,) = tasks_of(IidDenoising(noise_density=0.4, hide=hide, targets=targets, **keys))
  rng, lengths = np.random.default_rng(0), np.arange(1, number + 1)
  tokens = join([rng.integers(3, 100, n) for n in lengths])
  bits = rng.integers(0, 2**64, lengths.sum() + number, np.uint64)
  maker = Corruption([task], number, VOCABULARY, Lexicon(VOCABULARY, None), ends=False)
  sides = [side.split() for side in maker.apply(tokens, np.zeros(number, int), bits)]
  own = np.split(bits, np.cumsum(lengths + 1)[:-1])
  masks = [(b[:-1] >> np.uint64(40)) < round(0.4 * 2**24) for b in own]
  assert any(mask[0] for mask in masks)
  return zip(tokens.split(), masks, *sides, strict=True)


@pytest.mark.parametrize('hide', ['sentinel_per_run', 'mask', 'drop'])
@pytest.mark.parametrize('targets', ['noise', 'full'])
def test_inputs_and_targets_equal_the_references_given_the_mask(hide, targets):
  """nonnoise_span_to_unique_sentinel, drop_nonnoise_tokens, or no targets_fn: the full text."""
  outside = INPUTS['drop' if hide == 'mask' else hide]
  for tokens, mask, got_inputs, got_targets in seen(hide, targets):
    text, hidden = tokens.tolist(), mask.tolist()
    assert got_inputs.tolist() == [*INPUTS[hide](text, hidden), EOS]
    assert got_targets.tolist() == [*(text if targets == 'full' else outside(text, (~mask).tolist())), EOS]


def test_each_token_is_hidden_independently():
  """5 tokens, density 0.3: all 32 masks occur, each with its probability."""
  number, places = 60_000, np.arange(5)
  bits = np.random.default_rng(0).integers(0, 2**64, 5 * number, np.uint64)
  masks = iid_masks(np.full(number, 5), np.full(number, 0.3), np.full(number, 5), bits).reshape(number, 5)
  found = np.bincount(masks @ (1 << places), minlength=32)
  sizes = np.array([bin(i).count('1') for i in range(32)])
  assert 0.001 < stats.chisquare(found, number * 0.3**sizes * 0.7 ** (5 - sizes)).pvalue < 0.999


def test_tokens_beyond_the_limit_stay_visible():
  mask = iid_masks(np.array([4, 3]), np.ones(2), np.array([2, 5]), np.zeros(7, np.uint64))
  assert mask.tolist() == [True, True, False, False, True, True, True]


def test_random_replacements_are_uniform_over_text_pieces():
  """iid_15_r10s90_f with a larger share of random tokens; the position has no influence on the replacement."""
  read, same = [], 0
  for tokens, mask, got, _ in seen('mask', 'full', number=400, random=0.25):
    assert (got[:-1] == tokens)[~mask].all()
    read.append(got[:-1][mask])
    same += (got[:-1] == tokens)[mask].sum()
  read = np.concatenate(read)
  random = read[read != FIRST]
  assert same < len(random) / 30, 'drawn, not left as they were'
  assert stats.binomtest(len(random), len(read), 0.25).pvalue > 0.001
  counts = np.bincount(random, minlength=VOCABULARY.size)
  assert counts[UNKNOWN + 1 : VOCABULARY.pieces].sum() == len(random)
  assert stats.chisquare(counts[UNKNOWN + 1 : VOCABULARY.pieces]).pvalue > 0.001


def test_the_worst_mask_needs_the_number_of_tokens_that_its_task_reserves():
  """Every other token is hidden, up to the limit: each hidden token and each gap between them has its own sentinel."""
  (task,) = tasks_of(IidDenoising(noise_density=0.15))
  length = 400
  bits = np.where(np.arange(length + 1) % 2, np.uint64(0), np.uint64(2**64 - 1))
  maker = Corruption([task], length, VOCABULARY, Lexicon(VOCABULARY, None), ends=False)
  inputs, targets = maker.apply(join([np.arange(length) % 90 + 3]), np.zeros(1, int), bits)
  cost = [int(own[0]) for own in task.costs(np.array([length]))]
  assert [len(inputs.values), len(targets.values)] == cost
  assert targets.values[targets.values >= 100].min() == FIRST + 1 - task.sentinels(length)
