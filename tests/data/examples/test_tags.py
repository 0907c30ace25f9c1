"""Tags in front of text: read without loss, dropped for some documents in some epochs; no token of text is lost."""

import re

import numpy as np
import pytest

from data.batches.show import explain_row, show_row
from data.batches.source import Source, StoreData, Synthetic, open_data
from data.errors import DataError
from data.examples import makers
from data.examples.tags import TaggedText, Tags, check_tags
from data.objectives.objectives import CausalLm, PrefixLm, Ul2r
from data.packing import kept_plans
from data.packing.buckets import LengthBuckets
from data.packing.packing import BestFit, ConcatSplit, NextFit
from data.ragged import spread
from data.stores.store import StoreWriter, open_store
from data.stores.vocabulary import Tokenizer
from tests.data.batches.test_source import SENTINELS, assert_equal, digest, opened


def tagged(store, drop_rate: float | None, length: int = 64, **options):
  tags = None if drop_rate is None else Tags(drop_rate=drop_rate)
  return opened(store, CausalLm(), 0, length, tags=tags, **options)


@pytest.fixture(scope='module')
def bare(tag_store, tokenizer_model, tmp_path_factory):
  """`tag_store` without its tags."""
  path, store = tmp_path_factory.mktemp('bare') / 'tagged', open_store(tag_store)
  lengths = np.concatenate([store.tag_lengths(shard) for shard in range(len(store.shards))])
  texts = store.read(list(zip(store.offsets[:-1] + lengths, np.diff(store.offsets) - lengths - 1, strict=True)))
  sizes = [len(shard.documents) for shard in store.shards]
  with StoreWriter(path, Tokenizer(tokenizer_model, SENTINELS), shard_tokens=max(map(len, texts)) * 10**6) as writer:
    writer.add(texts)
    writer.finish()
  assert len(sizes) > 1
  return path


def test_rows_equal_those_made_by_hand(tokenizer_model, tmp_path):
  columns = {'tag_lengths': np.array([2, 0, 1], np.int32)}
  with StoreWriter(tmp_path / 's', Tokenizer(tokenizer_model, SENTINELS), columns={'tag_lengths': 'int32'}) as writer:
    writer.add([[3, 4, 10, 11], [20], [5, 30, 31, 32]], columns=columns)
    writer.finish()
  row = {name: values[0].tolist() for name, values in tagged(tmp_path / 's', 0.0, 13).global_rows(0, 1).items()
         if values.ndim == 2}  # fmt: skip
  assert row == {
    'decoder_input_tokens': [0, 3, 4, 10, 11, 0, 20, 0, 5, 30, 31, 32, 0],
    'decoder_target_tokens': [3, 4, 10, 11, 1, 20, 1, 5, 30, 31, 32, 1, 0],
    'decoder_loss_weights': [0, 0, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0],
    'decoder_segment_ids': [1] * 5 + [2] * 2 + [3] * 5 + [0],
    'decoder_positions': [0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4, 0],
  }
  cut = tagged(tmp_path / 's', 0.0, 3, batch_size=1)
  found = [(cut.describe_row(i).pieces, cut.global_rows(i, 1)['decoder_loss_weights'][0].tolist()) for i in range(4)]
  assert (((0, 0, 3),), [0, 0, 1]) in found, 'a row may end inside a document, or begin there'
  assert (((0, 3, 2), (1, 5, 1)), [1, 1, 1]) in found
  without = tagged(tmp_path / 's', 1.0, 10).global_rows(0, 1)
  assert without['decoder_target_tokens'][0].tolist() == [10, 11, 1, 20, 1, 30, 31, 32, 1, 0]
  assert without['decoder_loss_weights'][0].tolist() == [1] * 9 + [0]


def tokens_of(source, epoch: int) -> tuple[np.ndarray, np.ndarray]:
  """(position in the store, weight) of each token read in an epoch."""
  (rows,) = source.sources
  places = np.arange(rows.num_rows(epoch))
  shards, numbers, _ = rows.locate(epoch, places)
  pieces, batch = rows.pieces(epoch, shards, numbers), rows.batch(epoch, places)
  read, used = spread(pieces.places, pieces.lengths), batch['decoder_segment_ids'] > 0
  whole = rows.store.read([(0, rows.store.num_tokens)])[0]
  assert batch['decoder_target_tokens'][used].tolist() == whole[read].tolist()
  return read, batch['decoder_loss_weights'][used]


@pytest.mark.parametrize('packing', [ConcatSplit(), BestFit(), NextFit()], ids=lambda packing: packing.name)
def test_every_epoch_reads_all_text_once_and_kept_tags_without_loss(tag_store, packing):
  """Each tag is whole or absent. Each of eight epochs drops the tags of other documents; then the choices repeat."""
  source, store = tagged(tag_store, 0.3, packing=packing, batch_size=1), open_store(tag_store)
  lengths = np.concatenate([store.tag_lengths(shard) for shard in range(len(store.shards))])
  is_tag = np.zeros(store.num_tokens, bool)
  for begin, n in zip(store.offsets[:-1], lengths, strict=True):
    is_tag[begin : begin + n] = True
  kept = []
  for epoch in range(9):
    places, own = tokens_of(source, epoch)
    counts, weights = np.bincount(places, minlength=store.num_tokens), np.zeros(store.num_tokens)
    weights[places] = own
    assert (counts[~is_tag] == 1).all()
    assert weights.tolist() == (~is_tag).astype(float).tolist()
    whole = [set(counts[begin : begin + n]) for begin, n in zip(store.offsets[:-1], lengths, strict=True) if n]
    assert all(len(own) == 1 for own in whole)
    kept.append([int(own.pop()) for own in whole])
  assert kept[0] == kept[8]
  assert len({tuple(own) for own in kept[:8]}) == 8
  assert 0.6 < np.mean(kept[:8]) < 0.8


def test_with_all_tags_dropped_rows_equal_those_of_a_store_without_tags(tag_store, bare, tmp_path, tokenizer_model):
  """The tagged store is copied into one shard, like `bare`."""
  store, lengths = open_store(tag_store), []
  for shard in range(len(store.shards)):
    lengths.append(store.tag_lengths(shard))
  documents = store.read(list(zip(store.offsets[:-1], np.diff(store.offsets) - 1, strict=True)))
  with StoreWriter(tmp_path / 's', Tokenizer(tokenizer_model, SENTINELS), columns={'tag_lengths': 'int32'}) as writer:
    writer.add(documents, columns={'tag_lengths': np.concatenate(lengths)})
    writer.finish()
  a, b, c = tagged(tmp_path / 's', 1.0), tagged(bare, None), tagged(tmp_path / 's', 0.5)
  for step in (0, 3, 40):
    assert_equal(a.batch(step, slice(0, 8)), b.batch(step, slice(0, 8)))
    assert digest(c.batch(step, slice(0, 8))) != digest(b.batch(step, slice(0, 8)))


def test_with_no_tags_dropped_rows_equal_plain_text_except_for_the_loss(tag_store):
  a, b = (tagged(tag_store, rate, batch_size=30).batch(0, slice(0, 30)) for rate in (0.0, None))
  weights = a.pop('decoder_loss_weights'), b.pop('decoder_loss_weights')
  assert_equal(a, b)
  assert 0 < weights[0].sum() < weights[1].sum()


def test_seed_source_and_epoch_choose_dropped_tags_and_a_higher_rate_drops_more(tag_store):
  store = open_store(tag_store)
  dropped = lambda rate, seed, purpose, variant: tuple(
    np.diff(store.offsets_of(0)) > TaggedText(store, Tags(drop_rate=rate), seed, purpose).stream(0, variant).lengths
  )
  whats = [(0, 'source 0', 0), (1, 'source 0', 0), (0, 'source 1', 0), (0, 'source 0', 1)]
  assert len({dropped(0.5, *what) for what in whats}) == 4
  low, high = (np.array(dropped(rate, *whats[0])) for rate in (0.3, 0.6))
  assert (high >= low).all()
  assert high.sum() > low.sum()


@pytest.mark.parametrize('packing', [ConcatSplit(), BestFit()], ids=lambda packing: packing.name)
def test_plans_from_files_contain_the_text_of_their_epoch(tag_store, tmp_path, monkeypatch, packing):
  rates = {rate: tagged(tag_store, rate, packing=packing) for rate in (0.5, 0.2)}
  digests = lambda source: [digest(source.batch(step, slice(0, 8))) for step in (0, 10, 30)]
  wanted = {rate: digests(source) for rate, source in rates.items()}
  monkeypatch.setattr(makers, 'LARGE', 1)
  make = lambda rate: open_data(rates[rate].cfg, CausalLm(), seed=0, vocab_size=600, cache_dir=tmp_path)
  assert {rate: digests(make(rate)) for rate in rates} == wanted, 'each has files of its own'
  monkeypatch.setattr(kept_plans, '_arrays', None)  # planning again fails
  assert {rate: digests(make(rate)) for rate in rates} == wanted


def test_shown_rows_mark_tags_as_without_loss(tag_store):
  source = tagged(tag_store, 0.0, batch_size=1)
  row = next(i for i in range(99) if source.global_rows(i, 1)['decoder_loss_weights'][0][0] == 0)
  shown = show_row(source, row, 0)
  assert re.search(r'of the store\n  read \(\d+\): part: \d+\n  with loss \(\d+\): \w', shown)
  header, first = explain_row(source, row, 0).splitlines()[2:4]
  assert header.endswith('with loss')
  length, with_loss = int(first.split()[3]), int(first.split()[5])
  assert 0 < with_loss < length


def test_held_out_stores_may_have_no_tags(tag_store, text_store):
  heldout = (Source(path=str(tag_store)), Source(path=str(text_store)))
  sets = tagged(tag_store, 0.0, heldout=heldout).heldout(99, slice(0, 8))
  asked = {name: int(sum((batch['decoder_loss_weights'] > 0).sum() for batch in own)) for name, own in sets.items()}
  store = open_store(text_store)
  assert asked == {'tagged': store.num_tokens, 'license': store.num_tokens}, 'the same text'


def test_tags_without_a_tagged_source_are_refused(text_store, tag_store):
  with pytest.raises(
    DataError, match=r'data.tags.drop_rate=0.1 but no source has tags \(.*license\); make one with tags: pre'
  ):
    tagged(text_store, 0.1)
  sources = (Source(path=str(text_store)), Source(path=str(tag_store)))
  tagged(None, 0.1, sources=sources)


@pytest.mark.parametrize(
  ('objective', 'options', 'message'),
  [
    (Ul2r(), {}, r"data.tags requires objective.name='causal_lm'; 'ul2r' would corrupt .* Remove data.tags"),
    (PrefixLm(), {}, r"data.tags requires objective.name='causal_lm'; 'prefix_lm' would"),
    (
      CausalLm(),
      {'attend_across_documents': True},
      r'data.tags needs separate documents; data.attend_across_documents=True',
    ),
    (CausalLm(), {'packing': LengthBuckets(min_length=8)}, r"data.packing.name='length_buckets' cuts it once for all"),
  ],
)
def test_options_that_cannot_be_combined_with_tags_are_refused(objective, options, message):
  cfg = StoreData(batch_size=2, targets_length=64, sources=(Source(path='a'),), tags=Tags(), **options)
  with pytest.raises(ValueError, match=message):
    check_tags(cfg, objective)


def test_tags_with_synthetic_data_are_refused():
  with pytest.raises(
    ValueError, match=r"data.tags with data.name='synthetic', which has no tags; set data.name='store'"
  ):
    check_tags(Synthetic(batch_size=2, targets_length=64, tags=Tags()), CausalLm())
