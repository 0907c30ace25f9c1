"""Mixtures: exact shares in every block, stage after stage; each source always continues with its next row."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batches.source import MixtureStage, Source, StoreData, _names, check_mixture
from data.errors import DataError
from data.mixing.mixture import Mixture, Stage, by_size, quotas
from data.objectives.objectives import CausalLm
from data.stores.store import StoreWriter
from data.stores.vocabulary import Tokenizer
from tests.data.batches.test_source import SENTINELS, assert_equal, opened, two_stores  # noqa: F401

STAGES = (Stage(0, (0.7, 0.2, 0.1)), Stage(1003, (0.0, 0.5, 0.5)), Stage(2500, (1 / 3 + 1e-6, 1 / 3, 1 / 3)))


@settings(derandomize=True, deadline=None, max_examples=60)
@given(start=st.integers(0, 4000), count=st.integers(1, 700), seed=st.integers(0, 5))
def test_any_range_of_rows_equals_the_whole_and_sources_are_read_in_order(start, count, seed):
  mixture = Mixture(STAGES, seed)
  whole, which = mixture.at(0, 5000)
  for source in range(3):
    assert which[whole == source].tolist() == list(range((whole == source).sum()))
  own = mixture.at(start, count)
  assert own[0].tolist() == whole[start : start + count].tolist()
  assert own[1].tolist() == which[start : start + count].tolist()
  assert mixture.used(start).tolist() == np.bincount(whole[:start], minlength=3).tolist()


def test_every_block_of_a_stage_has_the_exact_shares():
  whole, _ = Mixture(STAGES, 0).at(0, 2500)
  blocks = whole[:1000].reshape(-1, 10)
  assert (np.stack([np.bincount(block, minlength=3) for block in blocks]) == (7, 2, 1)).all()
  assert len({block.tobytes() for block in blocks}) > 50, 'in different orders'
  assert 0 not in whole[1003:2500]
  assert (np.sort(whole[1003:2499].reshape(-1, 2), axis=1) == (1, 2)).all()


def test_shares_are_counted_per_stage_and_within_a_thousandth_at_its_end():
  mixture = Mixture(STAGES, 0)
  for end, stage in ((1003, STAGES[0]), (2500, STAGES[1]), (2500 + 5000, STAGES[2])):
    assert np.abs(mixture.shares(end) - np.array(stage.weights) / sum(stage.weights)).max() < 1e-3
  assert np.abs(mixture.shares(1004) - (0.7, 0.2, 0.1)).max() > 0.1, 'not those of the stage before'


def test_a_mixture_that_begins_later_continues_after_the_used_rows():
  whole = Mixture(STAGES, 3)
  rest = Mixture([Stage(600, (0.7, 0.2, 0.1))], 3, used=whole.used(600))
  sources, which = rest.at(600, 400)
  for source in range(3):
    first = int(whole.used(600)[source])
    assert which[sources == source].tolist() == list(range(first, first + (sources == source).sum()))


def test_weights_without_a_short_block_are_off_by_less_than_a_row_in_4096():
  weights = np.array([np.pi, 1.0, 0.01])
  got = np.bincount(quotas(weights.tolist()))
  assert got.sum() == 4096
  assert np.abs(got - weights / weights.sum() * 4096).max() < 1


def test_weights_are_relative_even_if_tiny():
  assert np.bincount(quotas([7e-6, 3e-6])).tolist() == [7, 3]


def test_a_temperature_that_never_samples_a_source_is_refused(two_stores, tokenizer_model, tmp_path):  # noqa: F811
  with StoreWriter(tmp_path / 'tiny', Tokenizer(tokenizer_model, SENTINELS)) as writer:
    writer.add([[5]])
    writer.finish()
  sources = tuple(Source(path=str(path)) for path in (tmp_path / 'tiny', two_stores[1]))
  assert opened(None, sources=sources, temperature=5.0).mixture.used(10).min() > 0
  with pytest.raises(DataError, match=r'data.temperature=0.4 makes the weights .* give source 0 less than one row'):
    opened(None, sources=sources, temperature=0.4)


def test_source_names_are_unique():
  names = lambda *paths: list(_names(tuple(Source(path=path) for path in paths)))
  assert names('x/a', 'y/a_2', 'z/a') == ['a', 'a_2', 'a_3']
  assert names('x/a', 'y/a/', 's3://bucket/a') == ['a', 'a_1', 'a_2']


def test_temperature_favours_small_sources():
  assert by_size([100, 900], [1.0, 1.0], 1.0) == pytest.approx([0.1, 0.9])
  assert by_size([100, 900], [1.0, 1.0], 2.0) == pytest.approx([0.25, 0.75])


def test_epochs_of_each_source_are_counted(two_stores):  # noqa: F811
  small, large = (Source(path=str(path)) for path in two_stores)
  stages = (MixtureStage(start_step=0, weights=(1.0, 1.0)), MixtureStage(start_step=30, weights=(0.0, 1.0)))
  source = opened(None, CausalLm(), 0, 64, sources=(small, large), stages=stages, batch_size=4)
  seen = [source.describe_row(p) for p in range(300)]
  for name, path in zip(source.names, two_stores, strict=True):
    rows = [o for o in seen if o.path == str(path)]
    per_epoch = source.sources[source.names.index(name)].num_rows(0)
    assert source.progress(300)[name]['epochs'] == pytest.approx(len(rows) / per_epoch)
    keys = [(o.epoch, o.row) for o in rows]
    assert len(set(keys)) == len(keys), 'no row twice in an epoch'
  assert all(o.path == str(two_stores[1]) for o in seen[120:])
  assert source.progress(300)['large']['share'] == 1.0


@pytest.fixture(scope='module')
def stores(tokenizer_model, tmp_path_factory):
  """A folder of stores a, b and c, of 40 rows of 64 tokens each."""
  folder, rng = tmp_path_factory.mktemp('changing'), np.random.default_rng(0)
  for name in 'abc':
    with StoreWriter(folder / name, Tokenizer(tokenizer_model, SENTINELS)) as writer:
      writer.add([rng.integers(3, 400, 63) for _ in range(40)])
      writer.finish()
  return folder


def of(stores, names: str, **options):
  sources = tuple(Source(path=f'{stores}/{name}') for name in names)
  return opened(None, CausalLm(), 0, 64, sources=sources, **{'batch_size': 6} | options)


def changing(stores, *legs):
  """The rows of each store that a run reads; each leg is (names of the sources, number of steps)."""
  position, used, step, seen = {'examples': 0}, {}, 0, {name: [] for name in 'abc'}
  for names, steps in legs:
    data = of(stores, names)
    if step:
      position = json.loads(json.dumps(data.after_change(position, used, step)))
      data = data.at(position)
    for row in range(position['examples'], position['examples'] + 6 * steps):
      origin = data.describe_row(row)
      seen[origin.path[-1]].append((origin.epoch, origin.row))
    position = position | {'examples': position['examples'] + 6 * steps}
    step, used = step + steps, data.used(position['examples'])
  return seen


@pytest.mark.parametrize(
  'legs',
  [
    pytest.param([('ab', 5), ('b', 4)], id='the first is left out'),
    pytest.param([('ab', 5), ('ba', 5), ('cb', 3)], id='in another order, then one for another'),
    pytest.param([('abc', 6), ('c', 3), ('ca', 5), ('bca', 6)], id='left out for a while'),
  ],
)
def test_after_a_change_of_sources_each_continues_with_its_next_rows_in_its_order(stores, legs):
  seen = changing(stores, *legs)
  whole = changing(stores, ('abc', 20))
  for name in 'ab':
    assert seen[name] == whole[name][: len(seen[name])], 'of the order that it began with'
  assert all(len(set(rows)) == len(rows) for rows in seen.values()), 'no row twice in an epoch'


def test_stages_begin_at_their_steps_after_a_change_of_batch_size(stores):
  stages = (MixtureStage(start_step=0, weights=(1.0, 0.0)), MixtureStage(start_step=20, weights=(0.0, 1.0)))
  small = of(stores, 'ab', stages=stages, batch_size=4)
  position = {'examples': 12 * 8}  # 12 steps of 8
  data = small.at(small.after_change(position, {'a': 96, 'b': 0}, 12))
  sources = [data.describe_row(row).path[-1] for row in range(96, 96 + 12 * 4)]
  assert ''.join(sources) == 'a' * 8 * 4 + 'b' * 4 * 4


def test_batches_name_the_source_of_each_row(two_stores):  # noqa: F811
  sources = tuple(Source(path=str(path), weight=w) for path, w in zip(two_stores, (0.25, 0.75), strict=True))
  source = opened(None, sources=sources, batch_size=40)
  batch = source.batch(3, slice(0, 40))
  paths = [source.sources[i].store.path for i in batch['source_index']]
  assert paths == [source.describe_row(120 + row).path for row in range(40)]
  assert np.bincount(batch['source_index']).tolist() == [10, 30]


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'stages': [(0, (1.0,))]}, r'data.stages\[0\].weights has 1 values for 2 sources'),
    ({'stages': [(5, (1.0, 1.0))]}, r'start at steps \[5\]; the first must be 0'),
    ({'stages': [(0, (1.0, 1.0)), (0, (1.0, 2.0))]}, r'start at steps \[0, 0\]; .* must increase'),
    ({'stages': [(0, (1.0, -1.0))]}, r'data.stages\[0\].weights=\[1.0, -1.0\]; they must be finite, >= 0'),
    ({'stages': [(0, (0.0, 0.0))]}, '>= 0, and not all 0'),
    ({'stages': [(0, (1.0, 0.0))]}, r'data.sources\[1\] has weight 0 in every stage; leave it out'),
    (
      {'stages': [(0, (1.0, 1.0))], 'temperature': 2.0},
      'both data.stages and data.temperature set the shares of the sources; remove one',
    ),
    (
      {'stages': [(0, (1.0, 1.0))], 'weights': (1.0, 2.0)},
      'both data.stages and the weights of data.sources set the shares',
    ),
    ({'weights': (1.0, 0.0)}, r'have the weights \[1.0, 0.0\]; each must be finite and > 0'),
    ({'weights': (1.0, float('nan'))}, r'have the weights \[1.0, nan\]; each must be finite and > 0'),
    ({'stages': [(0, (1.0, float('inf')))]}, r'weights=\[1.0, inf\]; they must be finite, >= 0, and not all 0'),
    ({'weights': (1.0, 1e-5)}, r'weights of data.sources \[1.0, 1e-05\] give source 1 less than one row in 4096'),
    ({'stages': [(0, (1e-5, 1.0))]}, r'data.stages\[0\].weights \[1e-05, 1.0\] give source 0 less than'),
  ],
)
def test_invalid_shares_are_refused(options, message):
  weights = options.get('weights', (1.0, 1.0))
  cfg = StoreData(
    batch_size=2, targets_length=8, sources=tuple(Source(path=p, weight=w) for p, w in zip('ab', weights, strict=True)),
    stages=tuple(MixtureStage(start_step=s, weights=w) for s, w in options.get('stages', ())),
    temperature=options.get('temperature'),
  )  # fmt: skip
  with pytest.raises(ValueError, match=message):
    check_mixture(cfg)
