"""Best-fit and seqio's next-fit: every token once, rows that fit, no document cut that fits a row, little padding."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batches.source import Source, StoreData
from data.objectives.objectives import CausalLm, MaskedLm, PrefixLm, SpanCorruption, Supervised, Ul2, tasks_of
from data.objectives.tasks import Budget
from data.packing.best_fit import STUB, BestFitPlanner, cut_long
from data.packing.next_fit import NextFitPlanner
from data.packing.packing import BestFit, NextFit, check_packing
from data.packing.plan import Stream
from tests.data.packing.test_concat_split import stream

CASES = [
  pytest.param(CausalLm(), Budget(0, 200), id='causal'),
  pytest.param(SpanCorruption(), Budget(128, 30), id='spans'),
  pytest.param(SpanCorruption(), Budget(0, 160), id='spans-decoder'),
  pytest.param(PrefixLm(), Budget(64, 64), id='prefix'),
  pytest.param(MaskedLm(), Budget(0, 100), id='mlm'),
]
PLANNERS = [BestFitPlanner, NextFitPlanner]


def planned(planner, objective, budget: Budget, text: Stream):
  """(plan, its pieces, (places that each piece takes, places of a row) for each side)."""
  (task,) = tasks_of(objective)
  plan = planner(lambda shard: text, task, budget).plan(0, 0)
  pieces = plan.pieces(np.arange(len(plan.tasks)))
  rooms = (budget.inputs_length, budget.targets_length)
  sides = [(cost[pieces.lengths], room) for cost, room in zip(budget.costs(task), rooms, strict=True) if room]
  return plan, pieces, sides


def covered(pieces) -> list[int]:
  return sorted(p for place, n in zip(pieces.places, pieces.lengths, strict=True) for p in range(place, place + n))


@pytest.mark.parametrize('planner', PLANNERS)
@settings(derandomize=True, deadline=None, max_examples=80)
@given(
  case=st.sampled_from([tuple(case.values) for case in CASES]),
  lengths=st.lists(st.integers(0, 3) | st.integers(0, 500), min_size=1, max_size=30).filter(any),
  eos=st.integers(0, 1),
)
def test_documents_are_packed_whole_into_rows_that_fit(planner, case, lengths, eos):
  (objective, budget), lengths = case, np.array(lengths, np.int64)
  begins = np.cumsum(lengths + eos) - lengths - eos
  plan, pieces, sides = planned(planner, objective, budget, Stream(begins, lengths, first=100))
  assert covered(pieces) == [p for begin, n in zip(begins, lengths, strict=True) for p in range(begin, begin + n)]
  assert set(pieces.rows.tolist()) == set(range(len(plan.tasks))), 'no row is empty'
  for taken, room in sides:
    assert np.bincount(pieces.rows, taken).max() <= room
  capacity = budget.capacity(tasks_of(objective)[0])
  whole = lengths[pieces.documents - 100]
  assert (pieces.lengths == whole)[whole <= capacity].all(), 'no document is cut that fits a row'
  assert pieces.lengths[pieces.lengths < whole].min(initial=STUB) >= min(STUB, capacity // 2), 'no stub'


def plain_best_fit(sizes: list[int], room: int) -> list[list[int]]:
  """The rows of best-fit decreasing, by looking at every row for every piece."""
  rows: list[list[int]] = []
  for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
    left = [room - sum(sizes[k] for k in row) for row in rows]
    fitting = [k for k, space in enumerate(left) if space >= sizes[i]]
    if fitting:
      rows[min(fitting, key=lambda k: left[k])].append(i)
    else:
      rows.append([i])
  return rows


def test_best_fit_is_best_fit_decreasing():
  text = stream(400)
  plan, pieces, _ = planned(BestFitPlanner, CausalLm(), Budget(0, 200), text)
  sizes = cut_long(text, 200).lengths.tolist()
  wanted = plain_best_fit(sizes, 200)
  room_left = lambda rows: sorted(200 - sum(row) for row in rows)
  got = [pieces.lengths[pieces.rows == row].tolist() for row in range(len(plan.tasks))]
  assert room_left(got) == room_left([[sizes[i] for i in row] for row in wanted])


def test_best_fit_pads_less_than_a_thousandth_where_next_fit_pads_a_fifth():
  rng = np.random.default_rng(0)
  lengths = np.clip(rng.lognormal(np.log(500), 1.1, 50_000), 20, 60_000).astype(np.int64)
  text = Stream(np.cumsum(lengths) - lengths, lengths)
  padding = {}
  for planner in PLANNERS:
    plan, _, ((taken, room),) = planned(planner, CausalLm(), Budget(0, 2048), text)
    padding[planner] = 1 - taken.sum() / (room * len(plan.tasks))
  assert padding[BestFitPlanner] < 1e-3
  assert 0.15 < padding[NextFitPlanner] < 0.25


def test_next_fit_closes_a_row_where_seqio_does():
  """trim_and_pack_dataset: the first example that does not fit ends the row, and so does every 10th example."""
  lengths = np.array([4, 5, 2, 9, 1, 1, 1, 1, 1, 1, 1, 1])
  text = Stream(np.cumsum(lengths) - lengths, lengths)
  plan, pieces, _ = planned(NextFitPlanner, CausalLm(), Budget(0, 10), text)
  assert [pieces.lengths[pieces.rows == row].tolist() for row in range(len(plan.tasks))] == [
    [4, 5], [2], [9, 1], [1, 1, 1, 1, 1], [1, 1],
  ]  # fmt: skip


def config(packing, **options) -> StoreData:
  return StoreData(batch_size=2, targets_length=8, sources=(Source(path='a'),), packing=packing, **options)


@pytest.mark.parametrize('packing', [BestFit(), NextFit()])
def test_objectives_that_a_packing_does_not_support_are_refused(packing):
  with pytest.raises(ValueError, match=r"is for objectives of one task, objective.name='ul2' has 7; set data.packing"):
    check_packing(config(packing), Ul2())
  with pytest.raises(ValueError, match=r'data.attend_across_documents=True makes one of all'):
    check_packing(config(packing, attend_across_documents=True), CausalLm())
  if isinstance(packing, BestFit):
    check_packing(config(packing), Supervised())
    return
  with pytest.raises(ValueError, match=r"pairs and conversations go whole into rows: set data.packing.name='best"):
    check_packing(config(packing), Supervised())
