"""What `pretrain data plan` counts: an epoch's plan, and the positions of rows that hold a token."""

import collections
import itertools

import numpy as np
import pytest

from data.batches import plan_report
from data.batches.loader import loader
from data.batches.plan_report import packed, sampled_batches, used_positions
from data.batches.source import Source
from data.mixing.curriculum import Curriculum
from data.objectives.objectives import CausalLm, SpanCorruption, Ul2
from data.packing.buckets import LengthBuckets
from tests.data.batches.test_guarantees import sharded  # noqa: F401
from tests.data.batches.test_source import CONVERSATIONS, OBJECTIVES, PAIRS, opened, store_for  # noqa: F401
from tests.data.mixing.test_curriculum import scored  # noqa: F401


@pytest.fixture(autouse=True)
def small_sample(monkeypatch):
  monkeypatch.setattr(plan_report, 'SAMPLE', 45)  # five whole batches of 8


def summed(batches) -> dict[str, tuple[int, int]]:
  """side -> (used positions, positions)."""
  found = collections.defaultdict(lambda: np.zeros(2, int))
  for batch in batches:
    for side, counts in batch.positions.items():
      found[side] += int(counts.sum()), len(counts) * batch.lengths[side]
  return {side: tuple(own.tolist()) for side, own in found.items()}


def counted(source, steps: int, first: int = 0) -> dict[str, tuple[int, int]]:
  """The same from the loader's batches, position by position; the token 0 is never a target or an input of text."""
  found = {}
  for _, batch in itertools.islice(loader(source, {'examples': first}, slice(0, 8)), steps):
    for side, name in (('encoder', 'encoder_input_tokens'), ('decoder', 'decoder_target_tokens')):
      if f'{side}_segment_ids' in batch:
        used, size = found.get(side, (0, 0))
        found[side] = used + int((batch[name] != 0).sum()), size + batch[name].size
  return found


@pytest.mark.parametrize(('objective', 'inputs', 'targets'), OBJECTIVES + CONVERSATIONS + PAIRS)
def test_used_positions_are_those_of_the_loader(store_for, objective, inputs, targets):  # noqa: F811
  source = opened(store_for(objective), objective, inputs, targets)
  found = summed(used_positions(source))
  assert found == counted(source, 5)
  sides = {'encoder', 'decoder'} if inputs else {'encoder'} if objective.name == 'mlm' else {'decoder'}
  assert set(found) == sides
  assert all(0 < used <= size == 5 * 8 * (inputs if side == 'encoder' and inputs else targets)
             for side, (used, size) in found.items())  # fmt: skip


def test_a_sample_ends_with_its_phase_and_begins_where_that_does(sharded):  # noqa: F811
  source = opened(sharded / 'b')
  assert sampled_batches(source, 24, 40) == [24, 32]
  assert summed(used_positions(source, 24, 40)) == counted(source, 2, 24)


def test_each_row_is_counted_for_its_source(sharded):  # noqa: F811
  sources = tuple(Source(path=f'{sharded}/{name}', weight=weight) for name, weight in (('a', 3.0), ('b', 1.0)))
  source = opened('', sources=sources)
  (batch, *_) = used_positions(source)
  assert np.bincount(batch.sources).tolist() == [6, 2]
  fields = source.global_rows(0, 8)
  assert batch.positions['decoder'].tolist() == (fields['decoder_target_tokens'] != 0).sum(1).tolist()


@pytest.mark.parametrize('options', [{'packing': LengthBuckets(min_length=16)}, {'order': Curriculum()}])
def test_rows_in_an_order_of_their_own_are_sampled_all_over_an_epoch(sharded, scored, options):  # noqa: F811
  source = opened(scored if 'order' in options else sharded / 'c', CausalLm(), 0, 64, **options)
  starts = sampled_batches(source)
  steps = plan_report._epoch(source) // 8
  assert len(starts) == 5
  assert starts[-1] >= steps * 8 * 0.7, 'the last fifth is among them'
  assert all(start % 8 == 0 for start in starts)
  found = [counted(source, 1, start) for start in starts]
  assert summed(used_positions(source))['decoder'] == tuple(sum(own['decoder'][i] for own in found) for i in (0, 1))


def test_long_rows_are_sampled_fewer(sharded, monkeypatch):  # noqa: F811
  monkeypatch.setattr(plan_report, 'MOST_POSITIONS', 64 * 17)
  assert sampled_batches(opened(sharded / 'b')) == [0, 8]
  monkeypatch.setattr(plan_report, 'MOST_POSITIONS', 1)
  assert sampled_batches(opened(sharded / 'b')) == [0], 'one batch at least'


@pytest.mark.parametrize(('objective', 'inputs'), [(Ul2(), 64), (SpanCorruption(), 64), (CausalLm(), 0)])
def test_the_plan_of_an_epoch_is_counted_over_its_shards(sharded, objective, inputs):  # noqa: F811
  rows = opened(sharded / 'b', objective, inputs).sources[0]
  found = packed(rows)
  assert found.rows == rows.num_rows(0)
  assert found.tokens == rows.store.num_tokens - (0 if objective.name == 'causal_lm' else rows.store.num_documents)
  assert found.documents == rows.store.num_documents
