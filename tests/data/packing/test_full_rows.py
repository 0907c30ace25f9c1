"""Full rows: every token once, exact rates in every block of text, each segment its own task, both sides full."""

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batches.show import explain_row, show_row
from data.batches.source import Source, StoreData, open_data
from data.objectives.objectives import Bart, CausalLm, IidDenoising, PrefixLm, SpanCorruption, Ul2, tasks_of
from data.objectives.tasks import Budget
from data.packing.full_rows import FullRows, FullRowsPlanner, check_full_rows, shortest_targets
from data.packing.packing import check_packing
from data.packing.plan import Stream
from data.stores.store import StoreWriter, open_store
from data.stores.vocabulary import EOS, Tokenizer
from tests.data.packing.test_concat_split import stream
from tests.data.packing.test_packing import covered

MODES = {'R': 0, 'X': 1, 'S': 2}
# The tokens of text in a row of one denoiser at 512 + 512 (docs/reproduce_ul2.md), in the order of the paper's Table 1.
EXAMPLES_512 = {
  'R(mu=3, r=0.15)': 567, 'R(mu=8, r=0.15)': 587, 'X(mu=3, r=0.5)': 765, 'X(mu=8, r=0.5)': 907,
  'X(mu=64, r=0.15)': 599, 'X(mu=64, r=0.5)': 1004, 'S': 511,
}  # fmt: skip


def law(length: int, label: str) -> tuple[int, int, int]:
  """(encoder, decoder, spans) of a piece, with mode token and EOS: T5's counts in float32."""
  mu, r = map(float, re.findall(r'[\d.]+', label))
  noise = int(np.clip(np.rint(np.float32(length) * np.float32(r)), 1, length - 1)) if length > 1 else 0
  spans = max(int(np.rint(np.float32(max(noise, 1)) / np.float32(mu))), 1)
  return length - noise + spans + 2, noise + spans + 1, spans


def planner(objective, budget: Budget, text: Stream, seed: int = 0) -> FullRowsPlanner:
  return FullRowsPlanner(lambda shard: text, tasks_of(objective), budget, seed=seed, purpose='test')


def listed(plan):
  return plan.pieces(np.arange(len(plan.tasks)))


CASES = [
  (Ul2(), Budget(64, 48)),
  (Ul2(s_mode='last_quarter'), Budget(128, 90)),
  (Ul2(mode_tokens=False), Budget(24, 20)),
  (SpanCorruption(), Budget(128, 30)),
  (PrefixLm(), Budget(40, 40)),
  (IidDenoising(), Budget(64, 64)),
  (Bart(), Budget(48, 64)),
  (Ul2(), Budget(8, 8)),
]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
  case=st.sampled_from(CASES),
  lengths=st.lists(st.integers(0, 3) | st.integers(0, 500), min_size=1, max_size=30).filter(any),
  variant=st.integers(0, 7),
)
def test_every_token_is_in_one_row_that_has_room_for_it(case, lengths, variant):
  (objective, budget), lengths = case, np.array(lengths, np.int64)
  begins = np.cumsum(lengths + 1) - lengths - 1
  plan = planner(objective, budget, Stream(begins, lengths, first=100)).plan(0, variant)
  pieces, tasks = listed(plan), tasks_of(objective)
  assert covered(pieces) == [p for begin, n in zip(begins, lengths, strict=True) for p in range(begin, begin + n)]
  assert set(pieces.rows.tolist()) == set(range(len(plan.tasks))), 'no row is empty'
  within = (pieces.places >= begins[pieces.documents - 100]) & (
    pieces.places + pieces.lengths <= (begins + lengths)[pieces.documents - 100]
  )
  assert within.all(), 'no piece crosses a document'
  cut = np.array([task.kind != 'uniform_prefix' for task in tasks])[pieces.tasks]
  for side, room in enumerate((budget.inputs_length, budget.targets_length)):
    costs = [tasks[t].costs(np.array([n]))[side][0] for t, n in zip(pieces.tasks, pieces.lengths, strict=True)]
    assert np.bincount(pieces.rows, np.where(cut, costs, 0)).max() <= room


def test_every_block_of_text_has_each_denoisers_exact_share():
  text = stream(4000)
  plan = planner(Ul2(), Budget(512, 328), text).plan(0, 3)
  pieces, labels = listed(plan), [task.label for task in tasks_of(Ul2())]
  assert labels == list(EXAMPLES_512)
  of_token = np.full(text.begins[-1] + text.lengths[-1] + 1, -1)
  for place, length, task in zip(pieces.places, pieces.lengths, pieces.tasks, strict=True):
    of_token[place : place + length] = task
  in_order = of_token[of_token >= 0]
  block, wanted = sum(EXAMPLES_512.values()), list(EXAMPLES_512.values())
  assert len(in_order) == text.size >= 60 * block
  for begin in range(0, text.size - block + 1, block):
    assert np.bincount(in_order[begin : begin + block], minlength=7).tolist() == wanted


def test_rates_are_shares_of_examples():
  often, seldom = Ul2().denoisers[0], Ul2().denoisers[3]
  objective = Ul2(denoisers=(dataclasses.replace(often, rate=3.0), seldom))
  pieces = listed(planner(objective, Budget(512, 300), stream(2000)).plan(0, 0))
  whole = int(pieces.lengths.sum()) // (3 * 567 + 907) * (3 * 567 + 907)
  counts = np.bincount(pieces.tasks, pieces.lengths)
  assert abs(counts[0] / counts[1] - 3 * 567 / 907) < 907 / whole * 8


def test_plans_are_the_same_again_and_others_in_the_next_epoch_and_with_another_seed():
  text, budget = stream(300), Budget(64, 48)
  same = [listed(planner(Ul2(), budget, text).plan(0, 1)) for _ in range(2)]
  assert all((a == b).all() for a, b in zip(*same, strict=True))
  for other in (planner(Ul2(), budget, text).plan(0, 2), planner(Ul2(), budget, text, seed=1).plan(0, 1)):
    assert listed(other).lengths.tolist() != same[0].lengths.tolist()


@pytest.fixture(scope='module')
def opened(tokenizer_model, tmp_path_factory):
  """A store of 250,000 tokens in documents of 20 to 5,000 (median 300), in full rows of 512 + 328 tokens."""
  path, rng = tmp_path_factory.mktemp('full') / 'store', np.random.default_rng(0)
  lengths = np.clip(rng.lognormal(np.log(300), 1.0, 600), 20, 5000).astype(int)
  with StoreWriter(path, Tokenizer(tokenizer_model, 128)) as writer:
    writer.add([rng.integers(3, 400, length) for length in lengths])
    writer.finish()
  cfg = StoreData(
    batch_size=8, inputs_length=512, targets_length=328, sentinels=128, sources=(Source(path=str(path)),),
    packing=FullRows(),
  )  # fmt: skip
  return open_data(cfg, Ul2(), seed=0, vocab_size=700, cache_dir='unused'), open_store(path)


@pytest.fixture(scope='module')
def epoch(opened):
  source, _ = opened
  number = source.sources[0].num_rows(0)
  return [source.describe_row(i) for i in range(number)], source.global_rows(0, number)


def test_both_sides_are_full(epoch):
  """Counted in the rows themselves: id 0 is neither text nor sentinel nor mode."""
  _, batch = epoch
  assert (batch['encoder_input_tokens'] != 0).mean() >= 0.97
  assert (batch['decoder_target_tokens'] != 0).mean() >= 0.96, 'of 330 rows; 0.97 of more'


def test_each_segment_has_its_own_task(opened, epoch):
  """Its mode token, its number of sentinels and its lengths fit the denoiser that the plan names."""
  source, store = opened
  rows, batch = epoch
  seen, several = set(), 0
  for i, origin in enumerate(rows):
    assert origin.tasks is not None
    several += len(set(origin.tasks)) > 1
    for k, (label, (_, place, length)) in enumerate(zip(origin.tasks, origin.pieces, strict=True), 1):
      inputs = batch['encoder_input_tokens'][i][batch['encoder_segment_ids'][i] == k]
      targets = batch['decoder_target_tokens'][i][batch['decoder_segment_ids'][i] == k]
      assert inputs[0] == source.vocabulary.mode_ids[MODES[label[0]]]
      marks = [source.vocabulary.is_sentinel(t) for t in targets.tolist()]
      if label == 'S':
        text = store.read([(place, length)])[0]
        assert inputs[1:-1].tolist() + targets[:-1].tolist() == text.tolist()
        assert not any(marks)
      elif length > 1:
        assert (len(inputs), len(targets), sum(marks)) == law(length, label)
      seen.add(label)
  assert seen == set(EXAMPLES_512)
  assert several > 0.9 * len(rows)


def test_splits_of_prefixes_are_uniform(opened, epoch):
  rows, batch = epoch
  shares = []
  for i, origin in enumerate(rows):
    for k, (label, (_, _, length)) in enumerate(zip(origin.tasks, origin.pieces, strict=True), 1):
      if label == 'S' and length > 50:
        inputs = (batch['encoder_segment_ids'][i] == k).sum()
        shares.append((inputs - 2) / length)
  assert len(shares) > 80
  assert abs(np.mean(shares) - 0.5) < 4 * 0.2887 / len(shares) ** 0.5
  assert np.quantile(shares, 0.1) < 0.2 < 0.8 < np.quantile(shares, 0.9)


def test_a_row_of_several_tasks_is_shown_with_the_task_of_each_segment(opened):
  source, _ = opened
  origin = source.describe_row(19)
  assert f'task {" + ".join(dict.fromkeys(origin.tasks))}, epoch 0' in show_row(source, 2, 3)
  table = explain_row(source, 2, 3).splitlines()
  assert table[2].endswith('  task')
  assert [line.split('  ')[-1] for line in table[3:]] == list(origin.tasks)
  assert f'of the store, task {origin.tasks[0]}' in show_row(source, 2, 3)


def shortest_by_law() -> int:
  """From the formula: the positions of one example of each denoiser; a prefix is split in the middle on average."""
  sides = np.array([law(n, label)[:2] if label != 'S' else (n / 2 + 2, n / 2 + 1) for label, n in EXAMPLES_512.items()])
  encoder, decoder = sides.sum(0)
  return int(np.ceil(512 * decoder / encoder))


def test_a_decoder_too_short_for_the_rates_is_refused_with_the_shortest_that_serves():
  shortest = shortest_by_law()
  assert shortest_targets(tasks_of(Ul2()), Budget(512, 1)) == shortest == 323
  check_full_rows(tasks_of(Ul2()), Budget(512, shortest))
  with pytest.raises(ValueError, match='is too short') as caught:
    check_full_rows(tasks_of(Ul2()), Budget(512, 322))
  assert str(caught.value) == (
    "data.targets_length=322 is too short for data.packing.name='full_rows' at the rates of the objective: with "
    'data.inputs_length=512 they need 323 decoder positions in a row; set data.targets_length >= 323.'
  )


def test_full_rows_need_text_and_an_encoder():
  cfg = StoreData(batch_size=2, targets_length=64, sources=(Source(path='a'),), packing=FullRows())
  with pytest.raises(ValueError, match=r"data.inputs_length=0 has no encoder; set data.packing.name='concat_split'"):
    check_packing(cfg, CausalLm())


def test_text_of_the_store_without_its_eos_is_in_the_epoch(opened, epoch):
  _, store = opened
  used = np.zeros(store.num_tokens, int)
  for origin in epoch[0]:
    for _, start, length in origin.pieces:
      used[start : start + length] += 1
  text = store.read([(0, store.num_tokens)])[0]
  assert used.tolist() == (text != EOS).astype(int).tolist()
