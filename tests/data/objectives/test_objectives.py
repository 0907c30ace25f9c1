"""Objectives: what each does to a piece, and which configs cannot be."""

import re

import numpy as np
import pytest

from data.objectives.corrupt import Corruption, example
from data.objectives.fitting import check_objective, num_sentinels
from data.objectives.lexicon import Lexicon
from data.objectives.objectives import (
  Bart,
  CausalLm,
  Denoiser,
  FillInTheMiddle,
  IidDenoising,
  Instruction,
  MaskedLm,
  ObjectiveMixture,
  Part,
  PrefixLm,
  SpanCorruption,
  Supervised,
  Ul2,
  Ul2r,
  tasks_of,
)
from data.objectives.tasks import Budget, block_of
from data.ragged import join
from data.stores.vocabulary import EOS, Vocabulary

VOCABULARY = Vocabulary(1000, 128)
NLU, NLG, S2S = VOCABULARY.mode_ids
IID = [
  IidDenoising(hide=hide, targets=targets)
  for hide in ('sentinel_per_run', 'mask', 'drop')
  for targets in ('noise', 'full')
]
TEXTS = (IidDenoising(hide='mask', targets='full', random=0.3), Bart(), FillInTheMiddle(), CausalLm())
ALL_TASKS = (
  *tasks_of(Ul2()),
  *tasks_of(Ul2(s_mode='last_quarter', mode_tokens=False)),
  *tasks_of(Ul2r()),
  *tasks_of(SpanCorruption(random_roll=True)),
  *tasks_of(PrefixLm()),
  *(task for objective in (*IID, *TEXTS) for task in tasks_of(objective)),
)
SPLIT = [t for t in ALL_TASKS if t.kind in ('uniform_prefix', 'last_quarter', 'spans') and not t.random_roll]
EXACT = [t for t in SPLIT if t.kind != 'uniform_prefix']


def mixture(*objectives) -> ObjectiveMixture:
  return ObjectiveMixture(parts=tuple(Part(objective=objective) for objective in objectives))


def restore(inputs: list[int], targets: list[int]) -> list[int]:
  """The text, from inputs and targets without mode token and EOS: a sentinel of one is a run of the other, in turn."""
  sides, low, high = [], VOCABULARY.pieces, VOCABULARY.first_sentinel
  for side in (inputs, targets):
    found = [t for t in side if low <= t <= high]
    assert found == list(range(high, high - len(found), -1))
    sides.append(''.join('|' if low <= t <= high else chr(t) for t in side).split('|'))
    assert all(sides[-1][1:-1]), 'no run is empty'
  runs = [[run for run in side if run] for side in sides]
  turn, text = int(not inputs or low <= inputs[0] <= high), ''
  while runs[turn]:
    text, turn = text + runs[turn].pop(0), 1 - turn
  assert not any(runs)
  return [ord(t) for t in text]


@pytest.mark.parametrize('task', [*SPLIT, *tasks_of(IID[0]), *tasks_of(SpanCorruption(random_roll=True))], ids=str)
@pytest.mark.parametrize('length', [1, 2, 3, 17, 200, 400])
def test_inputs_and_targets_together_are_the_text(task, length):
  rng = np.random.default_rng(length)
  tokens = rng.integers(3, VOCABULARY.pieces, length)
  got = example(tokens, task, VOCABULARY, rng)
  inputs, targets = got['inputs'].tolist(), got['targets'].tolist()
  assert (inputs.pop(), targets.pop()) == (EOS, EOS)
  if task.mode is not None:
    assert inputs.pop(0) == VOCABULARY.mode_ids[task.mode]
  assert restore(inputs, targets) == tokens.tolist()


@pytest.mark.parametrize('task', ALL_TASKS, ids=str)
def test_costs_bound_every_example_and_never_fall(task):
  rng, lengths = np.random.default_rng(0), np.arange(500)
  inputs, targets = task.costs(lengths)
  assert (np.diff(inputs) >= 0).all()
  assert (np.diff(targets) >= 0).all()
  total = task.total_costs(lengths)
  for length in (1, 2, 3, 9, 100, 499):
    got = example(np.full(length, 7), task, VOCABULARY, rng)
    assert len(got['inputs']) <= inputs[length]
    assert len(got['targets']) <= targets[length]
    assert len(got['inputs']) + len(got['targets']) <= total[length]


@pytest.mark.parametrize('task', EXACT, ids=str)
def test_costs_are_exact_for_tasks_without_randomness(task):
  got = example(np.full(321, 7), task, VOCABULARY, np.random.default_rng(0))
  assert (len(got['inputs']), len(got['targets'])) == tuple(int(c[0]) for c in task.costs(np.array([321])))


def test_a_piece_is_corrupted_the_same_alone_and_among_others():
  rng = np.random.default_rng(5)
  lengths = rng.integers(1, 200, 80)
  tokens = join([rng.integers(3, 1000, n) for n in lengths])
  tasks = np.arange(80) % len(ALL_TASKS)
  bits = rng.integers(0, 2**64, lengths.sum() + 80, np.uint64)
  recipes = Corruption(ALL_TASKS, 200, VOCABULARY, Lexicon(VOCABULARY, None), ends=True)
  tokens.values[np.cumsum(lengths)[::3] - 1] = EOS
  inputs, targets = (side.split() for side in recipes.apply(tokens, tasks, bits))
  own_bits = np.split(bits, np.cumsum(lengths + 1)[:-1])
  for i, piece in enumerate(tokens.split()):
    alone = recipes.apply(join([piece]), tasks[i : i + 1], own_bits[i])
    assert alone[0].values.tolist() == inputs[i].tolist()
    assert alone[1].values.tolist() == targets[i].tolist()


def test_ul2_has_the_seven_denoisers_of_its_table_and_their_modes():
  tasks = tasks_of(Ul2())
  assert [(t.label, VOCABULARY.mode_ids[t.mode]) for t in tasks] == [
    ('R(mu=3, r=0.15)', NLU), ('R(mu=8, r=0.15)', NLU), ('X(mu=3, r=0.5)', NLG), ('X(mu=8, r=0.5)', NLG),
    ('X(mu=64, r=0.15)', NLG), ('X(mu=64, r=0.5)', NLG), ('S', S2S),
  ]  # fmt: skip
  assert len(block_of([t.rate for t in tasks], 'rates')) == 7


def test_ul2r_is_half_s_a_quarter_r_and_a_quarter_x():
  tasks = tasks_of(Ul2r())
  assert [(t.label, t.rate) for t in tasks] == [
    ('S', 0.5), ('R(mu=3, r=0.15)', 0.25), ('X(mu=32, r=0.15)', 0.125), ('X(mu=3, r=0.5)', 0.125),
  ]  # fmt: skip
  assert np.bincount(block_of([t.rate for t in tasks], 'rates')).tolist() == [4, 2, 1, 1]


def test_a_uniform_prefix_ends_anywhere_and_no_part_is_empty():
  (task,) = tasks_of(PrefixLm())
  rng = np.random.default_rng(0)
  sizes = [len(example(range(10, 15), task, VOCABULARY, rng)['inputs']) - 1 for _ in range(2000)]
  counts = np.bincount(sizes, minlength=5)
  assert counts[0] == 0
  assert len(counts) == 5
  assert (np.abs(counts[1:] - 500) < 100).all()


def test_mode_tokens_can_be_left_out():
  with_mode, without = (tasks_of(Ul2(s_mode='last_quarter', mode_tokens=m))[-1] for m in (True, False))
  a, b = (
    example(range(10, 18), t, VOCABULARY, np.random.default_rng(0))['inputs'].tolist() for t in (with_mode, without)
  )
  assert a == [S2S, *b]


def test_a_causal_example_is_the_text_itself():
  (task,) = tasks_of(CausalLm())
  got = example([5, 6, EOS], task, VOCABULARY, np.random.default_rng(0))
  assert (got['inputs'].tolist(), got['targets'].tolist()) == ([], [5, 6, EOS])


@pytest.mark.parametrize(
  ('objective', 'inputs', 'targets', 'sentinels', 'message'),
  [
    (Ul2(), 512, 512, 100, 'data.sentinels=100 but denoiser X(mu=3, r=0.5) at 512 inputs makes 128 spans; '
     'set data.sentinels >= 128.'),
    (Ul2(mode_tokens=False), 1024, 1024, 255, 'at 1024 inputs makes 256 spans; set data.sentinels >= 256.'),
    (SpanCorruption(random_roll=True), 512, 114, 28, 'makes 29 spans'),
    (Ul2r(), 0, 512, 50, 'at 512 tokens makes 64 spans'),
    (CausalLm(), 512, 512, 0, "objective.name='causal_lm' is decoder-only, data.inputs_length=512"),
    (PrefixLm(loss_on_prefix=True), 64, 64, 0, 'objective.loss_on_prefix=True needs a decoder-only model'),
    (MaskedLm(), 64, 64, 9, "objective.name='mlm' is encoder-only, data.inputs_length=64; set 0."),
    (MaskedLm(), 0, 64, 0, "objective.name='mlm' hides tokens behind <extra_id_0>, data.sentinels=0; set data.sent"),
    (MaskedLm(mask=0.8, random=0.3), 0, 64, 9, 'objective.mask=0.8 and objective.random=0.3 are shares of the chosen '
     'tokens, together 1.1; lower one, so that they are at most 1.'),
    (MaskedLm(), 0, 2, 9, 'leave no room for two tokens of text with denoiser mlm(r=0.15)'),
    (Ul2(), 2, 2, 9, 'leave no room for two tokens of text'),
    (Supervised(inputs_length=8), 64, 64, 0, 'objective.inputs_length=8 is for a decoder; here data.inputs_length=64 '
     'is the length of inputs: remove it.'),
    (Supervised(), 0, 64, 0, "objective.name='supervised' on a decoder needs objective.inputs_length: inputs are cut "
     'to it, targets to the rest of data.targets_length=64; set it.'),
    (Supervised(inputs_length=64), 0, 64, 0, 'objective.inputs_length=64 leaves no place for targets in rows of '
     'data.targets_length=64; lower it, or use longer rows.'),
    (IidDenoising(), 512, 512, 100, 'data.sentinels=100 but denoiser iid(r=0.15, sentinel_per_run, noise) at 512 '
     'inputs makes up to 147 spans; set data.sentinels >= 147.'),
    (IidDenoising(hide='mask'), 64, 64, 0, 'hides text behind <extra_id_0>; set data.sentinels >= 1.'),
    (Bart(), 64, 64, 0, 'denoiser bart(mu=3, r=0.3) at 64 inputs hides text behind <extra_id_0>; set data.sentinels'),
    (IidDenoising(random=0.1), 64, 64, 64, "objective.random=0.1 with objective.hide='sentinel_per_run' and "
     "objective.targets='noise': nothing would tell random pieces from text; set objective.hide='mask' and "
     "objective.targets='full', or random to 0."),
    (FillInTheMiddle(), 64, 64, 64, "objective.name='fim' is decoder-only, data.inputs_length=64; set 0."),
    (FillInTheMiddle(), 0, 64, 2, "objective.name='fim' marks its parts with the last 3 sentinels, data.sentinels=2; "
     'set data.sentinels >= 3.'),
    (FillInTheMiddle(), 0, 4, 3, 'leave no room for two tokens of text with denoiser fim(r=0.5, spm=0.5)'),
    (ObjectiveMixture(parts=()), 0, 64, 9, "objective.parts is empty; name at least one, e.g. {'rate': 0.5, 'objec"),
    (mixture(CausalLm(), MaskedLm()), 0, 64, 9, "objective.parts[1] ('mlm') is for an encoder, objective.parts[0] "
     "('causal_lm') for a model that writes; no model learns both: remove one."),
    (mixture(SpanCorruption(), CausalLm()), 64, 64, 9, "objective.name='mixture' (by its parts) is decoder-only"),
    (mixture(CausalLm(), IidDenoising(random=0.1)), 0, 64, 64, 'objective.parts[1].objective.random=0.1 with objec'),
    (mixture(Ul2r(), FillInTheMiddle()), 0, 512, 64, 'but denoiser X(mu=3, r=0.5) at 512 tokens makes '
     '64 spans beside the 3 of fim; set data.sentinels >= 67.'),
    (ObjectiveMixture(parts=(Part(rate=0.1234, objective=CausalLm()), Part(rate=0.9, objective=PrefixLm()))), 0, 64, 9,
     'use rounder numbers'),
    (SpanCorruption(noise_density=1.0), 64, 64, 64, 'noise_density=1.0 must lie in (0, 1)'),
    (SpanCorruption(mean_noise_span_length=0.5), 64, 64, 64, 'mean_noise_span_length=0.5 be at least 1'),
    (SpanCorruption(noise_density=0.9, mean_noise_span_length=1.0), 64, 64, 64, 'noise spans among 1 other tokens'),
    (Instruction(loss_on=()), 0, 64, 0, "objective.loss_on is empty, nothing would be learnt; name a role, e.g. ('"),
    (Instruction(), 64, 64, 0, "objective.name='instruction' is decoder-only, data.inputs_length=64; set 0, or make "
     'pairs of what is asked and answered (pretrain data prepare --inputs_field=… --targets_field=…)'),
    (Ul2(denoisers=()), 64, 64, 64, 'objective.denoisers is empty'),
    (Ul2(denoisers=(Denoiser(kind='S', noise_density=0.3),)), 64, 64, 64, "of kind 'S' takes no mean_noise"),
    (Ul2(denoisers=(Denoiser(kind='R', noise_density=0.3),)), 64, 64, 64, "of kind 'R' needs both mean_noise"),
    (Ul2(denoisers=(Denoiser(kind='S', rate=0.0),)), 64, 64, 64, 'every one must be greater than 0'),
    (Ul2(denoisers=(Denoiser(kind='S', rate=0.1234), Denoiser(kind='S', rate=0.9))), 64, 64, 64, 'use rounder numbers'),
  ],
)  # fmt: skip
def test_an_invalid_objective_is_refused(objective, inputs, targets, sentinels, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    check_objective(objective, inputs, targets, sentinels)


@pytest.mark.parametrize(
  'objective', [Ul2(), Ul2(s_mode='last_quarter'), SpanCorruption(random_roll=True), PrefixLm(), *IID, Bart()]
)
@pytest.mark.parametrize(('inputs', 'targets'), [(64, 64), (512, 114), (0, 256)])
def test_the_required_sentinels_are_enough_for_every_length(objective, inputs, targets):
  budget = Budget(inputs, targets)
  need = max(num_sentinels(task, budget) for task in tasks_of(objective))
  check_objective(objective, inputs, targets, need)
  vocabulary, rng = Vocabulary(1000, need), np.random.default_rng(0)
  for task in tasks_of(objective):
    for length in (budget.capacity(task), budget.capacity(task) - 1):
      got = example(np.full(length, 7), task, vocabulary, rng)
      ids = set(got['inputs'].tolist() + got['targets'].tolist()) - {7, EOS, *vocabulary.mode_ids}
      assert ids <= set(range(1000, 1000 + need))


def test_a_block_holds_exact_rates():
  assert np.bincount(block_of([0.4 / 2] * 2 + [0.4 / 4] * 4 + [0.2], 'rates')).tolist() == [2, 2, 1, 1, 1, 1, 2]
  assert np.bincount(block_of([1 / 3, 2 / 3], 'weights')).tolist() == [1, 2]


def test_the_rates_of_a_mixture_are_the_rates_of_its_parts():
  parts = (Part(rate=1.0, objective=CausalLm()), Part(rate=0.5, objective=Ul2()), Part(rate=0.5, objective=PrefixLm()))
  tasks = tasks_of(ObjectiveMixture(parts=parts))
  assert np.bincount(block_of([t.rate for t in tasks], 'rates')).tolist() == [14, *[1] * 7, 7]
