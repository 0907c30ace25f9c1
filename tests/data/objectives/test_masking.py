"""BERT's noise: the reference's counts, and the laws of which tokens are chosen and what is read in their places."""

import itertools

import numpy as np
import pytest
from scipy import stats

from data.objectives.features import encoder_features
from data.objectives.masking import choose, mask_tokens
from data.objectives.objectives import MaskedLm, tasks_of
from data.ragged import Ragged, join
from data.stores.vocabulary import EOS, UNKNOWN, Vocabulary

VOCABULARY = Vocabulary(100, 4)
(TASK,) = tasks_of(MaskedLm())


def random_bits(count: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, 2**64, count, np.uint64)


def mask(pieces, objective=None, seed: int = 0):
  """(inputs, targets, chosen) of each piece."""
  tokens = join([np.asarray(piece, np.int32) for piece in pieces])
  (task,) = tasks_of(objective or MaskedLm())
  bits = random_bits(len(tokens.values) + len(pieces), seed)
  inputs, targets, chosen = mask_tokens(tokens, [task], np.zeros(len(pieces), int), bits, VOCABULARY)
  return zip(inputs.split(), *(Ragged(x, inputs.lengths).split() for x in (targets, chosen)), strict=True)


def unlikely(counts, expected=None) -> bool:
  return not 0.001 < stats.chisquare(counts, expected).pvalue < 0.999


@pytest.mark.parametrize('rate', [0.15, 0.4, 0.001, 0.99])
def test_every_piece_has_the_count_of_the_reference(rate):
  """create_masked_lm_predictions: max(1, int(round(len(tokens) * masked_lm_prob)))."""
  pieces = [np.full(n, 7) for n in range(1, 400)]
  for inputs, targets, chosen in mask(pieces, MaskedLm(rate=rate)):
    assert chosen.sum() == max(1, round(rate * (len(inputs) - 1)))
    assert targets.tolist() == [7] * (len(inputs) - 1) + [EOS]


def test_tokens_that_are_not_chosen_are_read_unchanged():
  for inputs, targets, chosen in mask([np.arange(3, 100)] * 50, seed=1):
    assert (inputs == targets)[~chosen].all()
    assert (inputs != targets)[chosen].any()


def test_an_eos_is_never_chosen_and_does_not_count():
  """Inside a piece too, as where documents are joined."""
  pieces = [[EOS], [EOS, 5, EOS], [5, EOS] * 50, [EOS] * 99 + [5, 6]]
  counts = []
  for inputs, targets, chosen in mask(pieces, MaskedLm(rate=0.5)):
    assert (targets[chosen] != EOS).all()
    assert (inputs[targets == EOS] == EOS).all()
    counts.append(int(chosen.sum()))
  assert counts == [0, 1, 25, 1]


def test_every_choice_is_equally_likely():
  """3 of 10 tokens: C(10, 3) = 120 choices."""
  number, found = 60_000, np.zeros(2**10, int)
  candidates = Ragged(np.ones(10 * number, bool), np.full(number, 10))
  chosen = choose(candidates, random_bits(10 * number), 0.3).reshape(number, 10)
  np.add.at(found, chosen @ (1 << np.arange(10)), 1)
  wanted = [sum(1 << i for i in places) for places in itertools.combinations(range(10), 3)]
  assert found[wanted].sum() == number
  assert not unlikely(found[wanted])


@pytest.mark.parametrize(
  'objective',
  [
    MaskedLm(),
    MaskedLm(rate=0.3, mask=0.5, random=0.25),
    MaskedLm(mask=1.0, random=0.0),
    MaskedLm(mask=0.85, random=0.0),
  ],
)
def test_four_fifths_of_the_chosen_are_masked_a_tenth_random_a_tenth_kept(objective):
  """Unknown pieces are never drawn at random, so a chosen one that is read as it stands was kept."""
  parts = mask([np.full(100, UNKNOWN)] * 4000, objective, seed=2)
  read = np.concatenate([inputs[chosen] for inputs, _, chosen in parts])
  masked, kept = (read == VOCABULARY.first_sentinel).sum(), (read == UNKNOWN).sum()
  found = np.array([masked, len(read) - masked - kept, kept])
  shares = np.array([objective.mask, objective.random, 1 - objective.mask - objective.random])
  possible = shares > 1e-9
  assert found[~possible].sum() == 0
  assert possible.sum() == 1 or not unlikely(found[possible], len(read) * shares[possible])


@pytest.mark.parametrize('share', [0.85, 1.0])
def test_a_generator_of_replaced_tokens_predicts_every_chosen_position(share):
  """ELECTRA's (0.85) and DeBERTaV3's (1): pretrain_helpers.mask, given the places and a number in [0, 1) for each."""
  tokens = join([np.random.default_rng(n).integers(3, 100, n) for n in range(1, 60)])
  bits = random_bits(len(tokens.values) + 59, seed=6)
  spec = tasks_of(MaskedLm(mask=share, random=0.0))
  inputs, targets, chosen = mask_tokens(tokens, spec, np.zeros(59, int), bits, VOCABULARY)
  fields = encoder_features(inputs, targets, chosen, np.arange(59), 59, 60)
  for row, own in enumerate(np.split(bits, np.cumsum(tokens.lengths + 1)[:-1])):
    text, asked = tokens.split()[row].tolist(), fields['decoder_loss_weights'][row] > 0
    assert asked.sum() == max(1, round(len(text) * 0.15))  # num_to_predict
    read, drawn = [*text, EOS], (own & np.uint64(2**40 - 1)) / 2.0**40
    for place in np.flatnonzero(asked):
      if drawn[place] < share:
        read[place] = VOCABULARY.first_sentinel
    assert fields['encoder_input_tokens'][row, : len(read)].tolist() == read
    assert fields['decoder_target_tokens'][row, : len(read)].tolist() == [*text, EOS]


def test_random_pieces_are_any_piece_of_text_equally_often():
  parts = mask([np.full(100, 7)] * 20_000, MaskedLm(rate=0.2, mask=0.0, random=1.0), seed=3)
  found = np.bincount(np.concatenate([inputs[chosen] for inputs, _, chosen in parts]), minlength=VOCABULARY.size)
  assert not found[: UNKNOWN + 1].any()
  assert not found[VOCABULARY.pieces :].any()
  assert not unlikely(found[UNKNOWN + 1 : VOCABULARY.pieces])


def test_noise_does_not_depend_on_the_position():
  """The number that chose a token says nothing of how it is read: a table of places by ways is that of chance."""
  parts = mask([np.full(10, UNKNOWN)] * 60_000, MaskedLm(rate=0.3, mask=0.4, random=0.3), seed=4)
  table = np.zeros((10, 3), int)
  for inputs, _, chosen in parts:
    places = np.flatnonzero(chosen)
    ways = np.where(inputs[places] == VOCABULARY.first_sentinel, 0, np.where(inputs[places] == UNKNOWN, 2, 1))
    table[places, ways] += 1
  assert 0.001 < stats.chi2_contingency(table).pvalue < 0.999


def test_pieces_are_independent_of_each_other():
  rng = np.random.default_rng(5)
  lengths = rng.integers(1, 200, 40)
  tokens = join([rng.integers(3, 100, n) for n in lengths])
  bits = random_bits(lengths.sum() + 40)
  together = mask_tokens(tokens, [TASK], np.zeros(40, int), bits, VOCABULARY)
  ends = np.cumsum(lengths + 1)
  for i, piece in enumerate(tokens.split()):
    own = slice(ends[i] - lengths[i] - 1, ends[i])
    alone = mask_tokens(join([piece]), [TASK], np.zeros(1, int), bits[own], VOCABULARY)
    assert alone[0].values.tolist() == together[0].values[own].tolist()
    assert alone[2].tolist() == together[2][own].tolist()
