"""Curricula: rows ordered by a score of their documents, each once per epoch, as a pure function of position."""

import dataclasses
import functools
import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import data.batches.rows
from data.batches.loader import loader
from data.batches.source import Builtin, Source, StoreData, Synthetic
from data.errors import DataError
from data.mixing.curriculum import FIRST_COMPETENCE, Curriculum, arrange, check_order, competence, row_scores
from data.objectives.objectives import CausalLm, Ul2, tasks_of
from data.objectives.tasks import Budget
from data.packing.best_fit import BestFitPlanner
from data.packing.buckets import LengthBuckets
from data.packing.order import EpochOrder
from data.packing.packing import BestFit, ConcatSplit
from data.packing.plan import Stream
from data.stores.store import StoreWriter, open_store
from data.stores.vocabulary import Tokenizer
from tests.data.batches.test_source import SENTINELS, digest, opened

CURRICULA = [Curriculum(pacing='strict'), Curriculum(pacing='paced'), Curriculum(pacing='interleaved', folds=4)]
IDS = [cfg.pacing for cfg in CURRICULA]


@pytest.fixture(scope='module')
def scored(tokenizer_model, tmp_path_factory):
  """A store of 300 documents in two shards, with random scores."""
  path, rng = tmp_path_factory.mktemp('scored') / 'scored', np.random.default_rng(0)
  columns = {'scores/compression': 'float32'}
  with StoreWriter(path, Tokenizer(tokenizer_model, SENTINELS), columns=columns, shard_tokens=25_000) as writer:
    texts = [rng.integers(3, 400, rng.integers(1, 300)) for _ in range(300)]
    writer.add(texts, columns={'scores/compression': rng.normal(3, 1, 300).astype(np.float32)})
    writer.finish()
  assert len(open_store(path).shards) == 2
  return path


def ordered(store, cfg, objective=None, inputs: int = 0, targets: int = 64, **options):
  return opened(store, objective or CausalLm(), inputs, targets, order=cfg, packing=BestFit(), **options)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
  scores=st.lists(st.floats(-5, 5), max_size=200), pacing=st.sampled_from(IDS), folds=st.integers(1, 9),
  direction=st.sampled_from(['ascending', 'descending']), epoch=st.integers(0, 3),
)  # fmt: skip
def test_every_row_comes_once(scores, pacing, folds, direction, epoch):
  cfg = Curriculum(pacing=pacing, folds=folds, direction=direction)
  found = arrange(cfg, np.array(scores), 0, 'test', epoch)
  assert sorted(found.tolist()) == list(range(len(scores)))


def test_strict_sorts_and_equal_scores_are_in_random_order():
  scores = np.repeat([2.0, 1.0, 3.0], 100)
  orders = [arrange(Curriculum(pacing='strict'), scores, 0, 'test', epoch) for epoch in (0, 1)]
  assert [scores[order].tolist() for order in orders] == [sorted(scores.tolist())] * 2
  assert set(orders[0][:100]) == set(range(100, 200))
  assert abs(np.corrcoef(orders[0][:100], np.arange(100))[0, 1]) < 0.3
  assert orders[0].tolist() != orders[1].tolist()


def test_interleaved_sorts_each_fold_and_folds_are_alike():
  scores = np.random.default_rng(0).normal(size=800)
  folds = scores[arrange(Curriculum(pacing='interleaved', folds=4), scores, 0, 'test')].reshape(4, 200)
  assert (np.sort(folds, axis=1) == folds).all()
  assert stats.f_oneway(*folds).pvalue > 0.01
  assert len(np.unique(folds)) == 800


def test_paced_draws_uniformly_from_the_rows_that_competence_allows():
  size, number = 40, 1500
  scores = np.random.default_rng(0).permutation(size).astype(float)
  orders = np.stack([scores[arrange(Curriculum(), scores, 0, 'test', k)] for k in range(number)])
  t = np.arange(1, size + 1) / size
  allowed = np.sqrt(t * (1 - FIRST_COMPETENCE**2) + FIRST_COMPETENCE**2) * size
  assert (orders < np.ceil(allowed)).all()
  assert competence(size).tolist() == np.ceil(allowed).astype(int).tolist()
  pool = np.ceil(allowed) - np.arange(size)
  for place in (0, 1, 8, 20, 39):
    waits = np.where(np.arange(size)[:, None] < np.ceil(allowed)[:place], 1 - 1 / pool[:place], 1.0).prod(1)
    wanted = number * waits * (np.arange(size) < np.ceil(allowed)[place]) / pool[place]
    counts, likely = np.bincount(orders[:, place].astype(int), minlength=size), wanted > 3
    assert stats.chisquare(counts[likely], wanted[likely] * counts[likely].sum() / wanted[likely].sum()).pvalue > 0.01
    assert abs(counts[likely].sum() - wanted[likely].sum()) < 40


def test_a_row_has_the_mean_score_of_its_tokens():
  text = Stream(np.array([0, 4, 10]), np.array([4, 5, 3]), first=7)
  plan = BestFitPlanner(lambda shard: text, tasks_of(CausalLm())[0], Budget(0, 8)).plan(0, 0)
  found = row_scores(plan, np.array([1.0, 10.0, 100.0], np.float32), 7)
  assert sorted(found.tolist()) == [1.0, (5 * 10 + 3 * 100) / 8]


def epoch_scores(source, count: int, first: int = 0) -> np.ndarray:
  """The mean score of the tokens of rows of a run, from their descriptions."""
  store = source.sources[0].store
  scores = np.concatenate([store.scores('compression', i) for i in range(len(store.shards))])
  rows = [source.describe_row(place).pieces for place in range(first, first + count)]
  return np.array([np.average([scores[d] for d, _, _ in row], weights=[n for *_, n in row]) for row in rows])


@pytest.mark.parametrize('direction', ['ascending', pytest.param('descending', marks=pytest.mark.slow)])
def test_rows_of_a_run_follow_the_score_of_their_documents(scored, direction):
  found = {}
  for cfg in CURRICULA:
    source = ordered(scored, dataclasses.replace(cfg, direction=direction))
    count = source.sources[0].num_rows(0)
    scores = epoch_scores(source, count)
    sign = 1 if direction == 'ascending' else -1
    found[cfg.pacing] = sign * stats.spearmanr(scores, np.arange(count)).statistic
  assert found['strict'] > 0.999
  assert 0.3 < found['paced'] < 0.9
  assert -0.1 < found['interleaved'] < 0.4
  plain = opened(scored, CausalLm(), 0, 64, packing=BestFit())
  assert abs(stats.spearmanr(epoch_scores(plain, count), np.arange(count)).statistic) < 0.1


@pytest.mark.parametrize('cfg', CURRICULA, ids=IDS)
def test_an_epoch_has_every_row_once_and_is_found_from_anywhere(scored, cfg):
  source = ordered(scored, cfg)
  count = source.sources[0].num_rows(0)
  rows = [(origin.shard, origin.row) for origin in map(source.describe_row, range(count))]
  assert len(set(rows)) == count
  assert {source.describe_row(place).epoch for place in (0, count - 1)} == {0}
  assert source.describe_row(count).epoch == 1
  whole = [digest(source.batch(step, slice(0, 8))) for step in range(12)]
  stream = loader(pickle.loads(pickle.dumps(source)), {'examples': 5 * 8}, slice(0, 8))
  assert [digest(batch) for _, batch in itertools.islice(stream, 7)] == whole[5:]
  hosts = [ordered(scored, cfg).batch(7, slice(h * 4, h * 4 + 4)) for h in range(2)]
  assert digest({name: np.concatenate([host[name] for host in hosts]) for name in hosts[0]}) == whole[7]


def test_several_tasks_keep_their_rates_and_each_is_in_order(scored):
  source = opened(scored, Ul2(), 64, 64, order=Curriculum(pacing='strict'))
  rows = source.sources[0]
  count = rows.num_rows(0) // 7 * 7 - 70  # whole blocks
  tasks = rows.locate(0, np.arange(count))[2].reshape(-1, 7)
  assert (np.sort(tasks, axis=1) == np.arange(7)).all()
  for epoch in (0, 1):  # a different epoch pairs text with other tasks in other rows
    first = sum(rows.num_rows(before) for before in range(epoch))
    tasks, scores = rows.locate(epoch, np.arange(count))[2], epoch_scores(source, count, first)
    assert all((np.diff(scores[tasks == task]) >= 0).all() for task in range(7))


def test_each_window_of_shards_has_its_own_curriculum(scored, monkeypatch):
  monkeypatch.setattr(data.batches.rows, 'EpochOrder', functools.partial(EpochOrder, window=1))
  source = ordered(scored, Curriculum(pacing='strict'))
  count = source.sources[0].num_rows(0)
  rows = [(origin.shard, origin.row) for origin in map(source.describe_row, range(count))]
  assert len(set(rows)) == count
  falls = np.flatnonzero(np.diff(epoch_scores(source, count)) < 0)
  assert falls.tolist() == np.flatnonzero(np.diff([shard for shard, _ in rows])).tolist()
  assert len(falls) == 1


def test_a_store_without_the_score_is_refused_before_the_first_batch(text_store):
  with pytest.raises(DataError, match=r"has no score 'wit' \(it has: none\).* pretrain data prepare --scores=wit"):
    ordered(text_store, Curriculum(score='wit'))


@pytest.mark.parametrize(
  ('cfg', 'message'),
  [
    (
      Builtin(batch_size=2, targets_length=8),
      r"data.name='builtin' has none; make a store with: pretrain data prepare",
    ),
    (Synthetic(batch_size=2, targets_length=8), r"needs scores, but data.name='synthetic' has none"),
    (StoreData(batch_size=2, targets_length=8, sources=(Source(path='a'),), packing=LengthBuckets()), 'its own order'),
    (
      StoreData(batch_size=2, targets_length=8, sources=(Source(path='a'),), attend_across_documents=True),
      'data.attend_across_documents=True joins them; remove either',
    ),
  ],
)
def test_options_that_cannot_be_combined_with_a_curriculum_are_refused(cfg, message):
  with pytest.raises(ValueError, match=message):
    check_order(dataclasses.replace(cfg, order=Curriculum()))
  check_order(cfg)


def test_evaluation_sets_ignore_the_curriculum(scored):
  plain, taught = (
    opened(scored, CausalLm(), 0, 64, heldout=(Source(path=str(scored)),), packing=ConcatSplit(), **options)
    for options in ({}, {'order': Curriculum()})
  )
  first = [next(iter(source.heldout(1, slice(0, 8))['scored'])) for source in (plain, taught)]
  assert digest(first[0]) == digest(first[1])
