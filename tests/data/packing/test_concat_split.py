"""Concat-split: every token once, exact rates in every block, rows that fit, other rows in the next epoch."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.objectives.noise import span_corruption_lengths
from data.objectives.objectives import (
  Bart,
  CausalLm,
  FillInTheMiddle,
  IidDenoising,
  MaskedLm,
  ObjectiveMixture,
  Part,
  PrefixLm,
  SpanCorruption,
  Ul2,
  Ul2r,
  tasks_of,
)
from data.objectives.tasks import Budget
from data.packing.concat_split import STUB, VARIANTS, ConcatSplitPlanner
from data.packing.plan import Stream

MIXTURE = ObjectiveMixture(
  parts=(
    Part(rate=0.5, objective=CausalLm()),
    Part(rate=0.25, objective=Ul2r()),
    Part(rate=0.25, objective=FillInTheMiddle()),
  )
)
CASES = [
  pytest.param(Ul2(), Budget(128, 128), id='ul2'),
  pytest.param(Ul2(), Budget(128, 32), id='ul2-short-targets'),
  pytest.param(Ul2r(), Budget(0, 256), id='ul2r-decoder'),
  pytest.param(Ul2(s_mode='last_quarter'), Budget(0, 128), id='ul2-decoder'),
  pytest.param(SpanCorruption(), Budget(128, 30), id='spans'),
  pytest.param(PrefixLm(), Budget(64, 64), id='prefix'),
  pytest.param(MaskedLm(), Budget(0, 100), id='mlm'),
  pytest.param(CausalLm(), Budget(0, 100), id='causal'),
  pytest.param(IidDenoising(), Budget(128, 100), id='iid'),
  pytest.param(IidDenoising(hide='drop'), Budget(0, 100), id='iid-decoder'),
  pytest.param(Bart(), Budget(128, 128), id='bart'),
  pytest.param(FillInTheMiddle(), Budget(0, 100), id='fim'),
  pytest.param(MIXTURE, Budget(0, 128), id='mixture'),
]


def stream(number: int = 300, eos: int = 1, seed: int = 0) -> Stream:
  """Documents of 0 to 1500 tokens, most of them short, each followed by `eos` tokens that are not in the stream."""
  rng = np.random.default_rng(seed)
  lengths = np.minimum(rng.lognormal(4, 1.2, number).astype(np.int64), 1500)
  lengths[::17] = 0
  return Stream(np.cumsum(lengths + eos) - lengths - eos, lengths)


def planner(
  objective, budget: Budget, *, text: Stream | None = None, seed: int = 0, across: bool = False
) -> ConcatSplitPlanner:
  text = text or stream()
  return ConcatSplitPlanner(
    lambda shard: text, tasks_of(objective), budget, seed=seed, purpose='test', attend_across_documents=across
  )


@pytest.mark.parametrize(('objective', 'budget'), CASES)
@pytest.mark.parametrize('variant', [0, 3])
def test_each_token_is_in_exactly_one_row(objective, budget, variant):
  text = stream()
  plan = planner(objective, budget, text=text).plan(0, variant)
  used = np.zeros(text.begins[-1] + text.lengths[-1] + 1, np.int64)
  pieces = plan.pieces(np.arange(len(plan.tasks))[::-1])
  for place, length in zip(pieces.places, pieces.lengths, strict=True):
    used[place : place + length] += 1
  wanted = np.zeros_like(used)
  for begin, length in zip(text.begins, text.lengths, strict=True):
    wanted[begin : begin + length] += 1
  assert used.tolist() == wanted.tolist()
  assert set(pieces.rows.tolist()) == set(range(len(plan.tasks))), 'no row is empty'


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
  case=st.sampled_from([tuple(case.values) for case in CASES]),
  lengths=st.lists(st.integers(0, 3) | st.integers(0, 300), min_size=1, max_size=30).filter(any),
  eos=st.integers(0, 1),
  across=st.booleans(),
)
@example(case=(Ul2(), Budget(128, 32)), lengths=[0, 1, 0, 0, 129 + STUB, 0], eos=1, across=False)
def test_any_documents_are_cut_in_rows_that_fit_and_hold_all_of_them(case, lengths, eos, across):
  (objective, budget), lengths = case, np.array(lengths, np.int64)
  begins = np.cumsum(lengths + eos) - lengths - eos
  if across:
    lengths, begins = np.array([lengths.sum()]), np.zeros(1, np.int64)
  text, tasks = Stream(begins, lengths), tasks_of(objective)
  plan = planner(objective, budget, text=text, across=across).plan(0, 0)
  assert plan.cuts[0] == 0
  assert plan.cuts[-1] == text.size
  assert (np.diff(plan.cuts) > 0).all()
  pieces = text.pieces(plan.cuts[:-1], plan.cuts[1:])
  covered = [p for place, n in zip(pieces.places, pieces.lengths, strict=True) for p in range(place, place + n)]
  assert covered == [p for begin, n in zip(begins, lengths, strict=True) for p in range(begin, begin + n)]
  for row, task in enumerate(plan.tasks):
    own = pieces.lengths[pieces.rows == row]
    if budget.inputs_length:
      inputs, targets = tasks[task].costs(own)
      assert inputs.sum() <= budget.inputs_length
      assert targets.sum() <= budget.targets_length
    else:
      assert tasks[task].total_costs(own).sum() <= budget.targets_length


@pytest.mark.parametrize(('objective', 'budget'), CASES)
def test_every_row_fits_and_all_but_the_last_are_full(objective, budget):
  text, tasks = stream(), tasks_of(objective)
  made = planner(objective, budget, text=text)
  plan = made.plan(0, 0)
  pieces = text.pieces(plan.cuts[:-1], plan.cuts[1:])
  for row in range(len(plan.tasks)):
    lengths = pieces.lengths[pieces.rows == row]
    task = tasks[plan.tasks[row]]
    sides = task.costs(lengths) if budget.inputs_length else (np.zeros(1, int), task.total_costs(lengths))
    rooms = (budget.inputs_length, budget.targets_length)
    left = [room - int(side.sum()) for side, room in zip(sides, rooms, strict=True)]
    assert min(left) >= 0
    if row < len(plan.tasks) - 1:
      stub = np.array([2 * STUB])
      more = task.costs(stub) if budget.inputs_length else (np.zeros(1, int), task.total_costs(stub))
      assert any(int(m[0]) > x for m, x in zip(more, left, strict=True) if x or m[0]), (
        'a stretch of text would still fit'
      )


def test_every_block_of_rows_holds_the_exact_rates_in_an_order_of_its_own():
  for variant in (0, 1):
    tasks = planner(Ul2(), Budget(64, 64), text=stream(1000)).plan(0, variant).tasks
    whole = tasks[: len(tasks) // 7 * 7].reshape(-1, 7)
    assert len(whole) >= 100
    assert (np.sort(whole, axis=1) == np.arange(7)).all()
    assert len({row.tobytes() for row in whole[:100]}) > 50


def test_variants_shards_and_seeds_differ_and_each_is_reproducible():
  a, again = planner(Ul2(), Budget(64, 64)), planner(Ul2(), Budget(64, 64))
  other = planner(Ul2(), Budget(64, 64), seed=1)
  assert a.variants == VARIANTS
  assert a.plan(0, 1).cuts.tolist() == again.plan(0, 1).cuts.tolist()
  assert a.plan(0, 0).cuts.tolist() != a.plan(0, 1).cuts.tolist()
  first = [made.plan(*which).tasks[:200].tobytes() for made, *which in ((a, 0, 0), (a, 0, 1), (a, 1, 0), (other, 0, 0))]
  assert len(set(first)) == 4


def test_a_single_task_has_one_plan_for_all_epochs():
  assert planner(SpanCorruption(), Budget(128, 30)).variants == 1


@pytest.mark.parametrize(('objective', 'budget'), [case for case in CASES if case.id != 'causal'])
def test_no_document_is_cut_to_a_stub(objective, budget):
  text = stream()
  plan = planner(objective, budget, text=text).plan(0, 0)
  pieces = text.pieces(plan.cuts[:-1], plan.cuts[1:])
  cut = pieces.lengths < text.lengths[pieces.documents]
  assert cut.sum() > 20
  assert pieces.lengths[cut].min() >= STUB


def test_causal_rows_are_full_to_the_last_token():
  text = stream()
  plan = planner(CausalLm(), Budget(0, 100), text=text).plan(0, 0)
  assert set(np.diff(plan.cuts)[:-1].tolist()) == {100}
  assert len(plan.tasks) == -(-text.size // 100)


def chunk_sizes(inputs: int, targets: int, mean: float, density: float) -> set[int]:
  objective = SpanCorruption(mean_noise_span_length=mean, noise_density=density)
  text = Stream(np.zeros(1, np.int64), np.array([10_000]))
  return set(np.diff(planner(objective, Budget(inputs, targets), text=text, across=True).plan(0, 0).cuts)[:-1].tolist())


@pytest.mark.parametrize(('mean', 'density'), [(3.0, 0.15), (8.0, 0.15), (3.0, 0.5), (64.0, 0.5), (32.0, 0.15)])
@pytest.mark.parametrize('inputs', [128, 512])
def test_across_documents_every_example_has_the_references_size(mean, density, inputs):
  tokens, targets = span_corruption_lengths(inputs, density, mean)
  assert chunk_sizes(inputs, targets, mean, density) == {tokens}


def test_where_the_references_size_overflows_its_rows_ours_is_smaller():
  """At 64 inputs and spans of 32 the reference counts no span but makes one: 65 inputs and 13 targets."""
  assert span_corruption_lengths(64, 0.15, 32.0) == (74, 12)
  assert chunk_sizes(64, 13, 32.0, 0.15) == {73}


def test_a_document_longer_than_many_rows_fills_them():
  text = Stream(np.array([0]), np.array([100_000]))
  plan = planner(SpanCorruption(), Budget(512, 114), text=text).plan(0, 0)
  assert set(np.diff(plan.cuts)[:-2].tolist()) == {568}


def test_planning_is_fast_enough():
  """20 Mtok/s in the log; here a tenth of that, for a busy machine."""
  import time

  text = stream(20_000)
  made = planner(Ul2(), Budget(512, 512), text=text)
  start = time.process_time()
  made.plan(0, 0)
  assert text.size / (time.process_time() - start) > 2e6
