"""Plans in files: those that would be made; made once; damage is named; `pretrain data plan` makes them ahead."""

import hashlib

import numpy as np
import pytest

from data.batches.plan_report import keep_plans
from data.batches.source import Source, StoreData, open_data
from data.errors import DataError
from data.examples import makers
from data.objectives.objectives import CausalLm, SpanCorruption, Ul2
from data.packing import kept_plans
from data.packing.full_rows import FullRows
from data.packing.packing import BestFit, ConcatSplit
from data.stores.store import StoreWriter
from data.stores.vocabulary import Tokenizer
from tests.data.batches.test_guarantees import sharded  # noqa: F401
from tests.data.batches.test_source import SENTINELS, assert_equal

URL = 'gs://runs/cache/plans'


@pytest.fixture(autouse=True)
def small_stores_are_large(monkeypatch):
  monkeypatch.setattr(makers, 'LARGE', 1)


def opened(sharded, cache, objective=Ul2(), inputs=64, packing=ConcatSplit(), seed=0, url=None):  # noqa: B008, F811
  cfg = StoreData(
    batch_size=8, inputs_length=inputs, targets_length=64, sentinels=SENTINELS, packing=packing,
    sources=(Source(path=f'{sharded}/b'),),
  )  # fmt: skip
  return open_data(cfg, objective, seed=seed, vocab_size=600, cache_dir=cache, plans_url=url)


@pytest.mark.parametrize(
  ('objective', 'inputs', 'packing'),
  [
    (Ul2(), 64, ConcatSplit()),
    (SpanCorruption(), 64, BestFit()),
    (CausalLm(), 0, ConcatSplit()),
    (Ul2(), 64, FullRows()),
  ],
)
def test_batches_are_the_same_from_files_and_nothing_is_planned_again(
  sharded, tmp_path, monkeypatch, objective, inputs, packing  # noqa: F811
):  # fmt: skip
  first = opened(sharded, tmp_path, objective, inputs, packing)
  wanted = [first.batch(step, slice(0, 8)) for step in range(40)]
  monkeypatch.setattr(kept_plans, '_arrays', None)  # whoever plans again fails
  again = opened(sharded, tmp_path, objective, inputs, packing)
  for step, batch in enumerate(wanted):
    assert_equal(again.batch(step, slice(0, 8)), batch)
  monkeypatch.undo()
  without = opened(sharded, tmp_path / 'other', objective, inputs, packing)
  assert_equal(without.batch(7, slice(0, 8)), wanted[7])


def test_the_name_of_a_plan_contains_everything_it_depends_on(sharded, tmp_path):  # noqa: F811
  for options in ({}, {'seed': 1}, {'inputs': 48}, {'objective': SpanCorruption()}):
    opened(sharded, tmp_path, **options).batch(0, slice(0, 8))
  assert len(list((tmp_path / 'plans').iterdir())) == 4
  opened(sharded, tmp_path, objective=SpanCorruption(), seed=5).batch(0, slice(0, 8))
  assert len(list((tmp_path / 'plans').iterdir())) == 4, 'of one task: the same for every seed'


def test_the_error_names_a_damaged_plan(sharded, tmp_path):  # noqa: F811
  opened(sharded, tmp_path).batch(0, slice(0, 8))
  (folder,) = (tmp_path / 'plans').iterdir()
  for path in folder.glob('0-0*.npz'):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
  with pytest.raises(DataError, match=r'DATA-CORRUPT: .*npz is damaged .*; delete it, it will be made again'):
    opened(sharded, tmp_path).batch(0, slice(0, 8))


def test_errors_name_an_empty_plan_and_a_path_that_is_no_folder(sharded, tmp_path):  # noqa: F811
  opened(sharded, tmp_path).batch(0, slice(0, 8))
  next(tmp_path.glob('plans/*/0-00000.npz')).write_bytes(b'')
  with pytest.raises(DataError, match=r'DATA-CORRUPT: .*npz is damaged \(No data left in file\); delete it'):
    opened(sharded, tmp_path).batch(0, slice(0, 8))
  (tmp_path / 'file').touch()
  with pytest.raises(DataError, match=r'cannot be read \(Not a directory\); check the folder \(PRETRAIN_CACHE\)'):
    opened(sharded, tmp_path / 'file').batch(0, slice(0, 8))
  with pytest.raises(DataError, match=r'cannot be written \(No such file or directory\);.* set PRETRAIN_CACHE'):
    opened(sharded, '/proc/none').batch(0, slice(0, 8))


@pytest.mark.parametrize('workers', [1, 2])
def test_all_plans_can_be_made_before_a_run(sharded, tmp_path, workers):  # noqa: F811
  source = opened(sharded, tmp_path)
  shards = len(source.sources[0].store.shards)
  assert keep_plans(source, workers) == shards * source.sources[0].variants
  (folder,) = (tmp_path / 'plans').iterdir()
  assert len(list(folder.glob('*-0*.npz'))) == shards * 8
  assert not list(folder.glob('*.tmp'))


def test_another_host_finds_the_plans_in_a_store(sharded, tmp_path, gcs, monkeypatch):  # noqa: F811
  wanted = opened(sharded, tmp_path / 'a', url=URL).batch(0, slice(0, 8))
  made = {path.relative_to(tmp_path / 'a').as_posix(): path for path in (tmp_path / 'a').rglob('*.npz')}
  there = {name.removeprefix('cache/'): data for (_, name), (data, _) in gcs.objects.items()}
  assert there == {name: path.read_bytes() for name, path in made.items()}
  assert len(made) > 1
  monkeypatch.setattr(kept_plans, '_arrays', None)  # whoever plans again fails
  gcs.log.clear()
  assert_equal(opened(sharded, tmp_path / 'b', url=URL).batch(0, slice(0, 8)), wanted)
  assert gcs.log['GET /storage/v1/b/runs/o/NAME'] == len(made)
  gcs.log.clear()
  assert_equal(opened(sharded, tmp_path / 'b', url=URL).batch(0, slice(0, 8)), wanted)
  assert not gcs.log, 'this host has them now'


def test_a_damaged_plan_in_a_store_is_named_and_stays_there(sharded, tmp_path, gcs):  # noqa: F811
  opened(sharded, tmp_path / 'a', url=URL).batch(0, slice(0, 8))
  for key, (data, generation) in list(gcs.objects.items()):
    gcs.objects[key] = data[: len(data) // 2], generation
  with pytest.raises(DataError, match=rf'DATA-CORRUPT: {URL}/.*npz is damaged .*; delete it, it will be made again'):
    opened(sharded, tmp_path / 'b', url=URL).batch(0, slice(0, 8))
  assert not list((tmp_path / 'b').rglob('*.npz'))


def test_plans_that_this_host_has_already_are_brought_to_the_store(sharded, tmp_path, gcs):  # noqa: F811
  opened(sharded, tmp_path).batch(0, slice(0, 8))
  assert not gcs.objects
  number = keep_plans(opened(sharded, tmp_path, url=URL), 1)
  assert number == len([name for name in gcs.names('runs') if name.endswith('.npz') and 'counts' not in name])
  gcs.fault('POST', 403, times=99)
  with pytest.raises(DataError, match=rf'^DATA: {URL}/\w+ cannot be written: .*Check its bucket, and the credentials'):
    opened(sharded, tmp_path / 'b', url=URL, seed=1).batch(0, slice(0, 8))


def test_other_plans_have_another_version(tokenizer_model, tmp_path):
  """Files that an older release has left are not read. Where this fails: raise `kept_plans.VERSION`, then write down
  what the plans are now."""
  with StoreWriter(tmp_path / 'b', Tokenizer(tokenizer_model, sentinels=32)) as writer:
    writer.add([np.full(1 + 37 * i % 211, 7, np.int32) for i in range(400)])
    writer.finish(source='lengths')
  for objective, inputs, packing in ((Ul2(), 64, ConcatSplit()), (CausalLm(), 0, BestFit())):
    opened(tmp_path, tmp_path, objective, inputs, packing).batch(0, slice(0, 8))
  found = hashlib.sha256()
  for path in sorted(tmp_path.glob('plans/*/0-0*.npz'), key=lambda path: path.stat().st_size):
    with np.load(path) as file:
      for name in sorted(file.files):
        found.update(name.encode() + np.asarray(file[name], '<i8').tobytes())
  assert {kept_plans.VERSION: found.hexdigest()[:16]} == {2: 'b9ab6e84891d3a16'}
