"""The token store returns what was written; an unfinished one cannot be opened; damage is an error naming the file."""

import hashlib
import itertools
import json
import pathlib
import pickle
import re
import shutil

import numpy as np
import pytest
import tensorstore

from data.errors import DataError
from data.prepare.prepare import train_sentencepiece
from data.ragged import Ragged
from data.stores import arrays
from data.stores.arrays import CHUNK
from data.stores.store import StoreWriter, open_store
from data.stores.verify import verify
from data.stores.vocabulary import EOS, Tokenizer


@pytest.fixture
def tokenizer(tokenizer_model):
  return Tokenizer(tokenizer_model, sentinels=8)


LICENSE = pathlib.Path(__file__).parents[3] / 'LICENSE'


def write(path, tokenizer, documents, **options):
  with StoreWriter(path, tokenizer, **options) as writer:
    writer.add(documents)
    writer.finish(source='test')
  return open_store(path)


def documents(number=400, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.integers(3, 400, rng.integers(1, 2000)).tolist() for _ in range(number)]


def test_documents_are_read_back_with_their_eos(tokenizer, tmp_path):
  wanted = documents()
  store = write(tmp_path / 's', tokenizer, wanted)
  ranges = [(int(a), int(b - a)) for a, b in zip(store.offsets[:-1], store.offsets[1:], strict=True)]
  assert [ids.tolist() for ids in store.read(ranges)] == [[*ids, EOS] for ids in wanted]
  assert (store.num_documents, store.num_tokens) == (400, sum(len(d) + 1 for d in wanted))
  assert store.num_tokens > 3 * CHUNK, 'reads cross chunks'


def test_any_range_equals_a_slice_of_all_tokens(tokenizer, tmp_path, monkeypatch):
  monkeypatch.setattr(arrays, 'CACHE_BYTES', 4 * CHUNK)
  store = write(tmp_path / 's', tokenizer, documents())
  whole = np.concatenate(store.read([(0, store.num_tokens)]))
  rng = np.random.default_rng(0)
  ranges = [(int(a), int(n)) for a, n in zip(rng.integers(0, 200_000, 50), rng.integers(0, 2 * CHUNK, 50), strict=True)]
  for (start, length), ids in zip(ranges, store.read(ranges), strict=True):
    assert ids.tolist() == whole[start : start + length].tolist()
    assert ids.dtype == np.int32


def test_each_file_is_written_as_soon_as_it_is_full(tokenizer, tmp_path, monkeypatch):
  monkeypatch.setattr(arrays, 'FILE', 2 * CHUNK)
  wanted = documents()
  with StoreWriter(tmp_path / 's', tokenizer) as writer:
    for document in wanted:
      writer.add([document])
    writer.finish()
  store = open_store(tmp_path / 's')
  assert len(list((tmp_path / 's/tokens/c').iterdir())) == -(-store.num_tokens // (2 * CHUNK)) > 2
  assert store.read([(0, store.num_tokens)])[0].tolist() == [t for d in wanted for t in [*d, EOS]]


def test_a_document_may_be_added_in_segments_and_without_eos(tokenizer, tmp_path):
  with StoreWriter(tmp_path / 's', tokenizer, append_eos=False) as writer:
    writer.add([[5, 6], [7]], last=[False, True])
    writer.add([[8], [], [9]], last=[False, True, True])
    writer.finish()
  store = open_store(tmp_path / 's')
  assert store.offsets.tolist() == [0, 3, 4, 5]
  assert store.read([(0, 5)])[0].tolist() == [5, 6, 7, 8, 9]
  assert not store.append_eos


def test_plain_paths_and_file_urls_are_the_same_store(tokenizer, tmp_path):
  write(f'file://{tmp_path}/s', tokenizer, [[5, 6]])
  assert open_store(tmp_path / 's').fingerprint == open_store(f'file://{tmp_path}/s').fingerprint


def test_a_store_on_an_object_store_does_not_exist_before_its_manifest(tokenizer):
  """memory:// stands for gs:// and s3://: it cannot rename either."""
  url = 'memory://bucket/s'
  with StoreWriter(url, tokenizer) as writer:
    writer.add([[5, 6]])
    with pytest.raises(DataError, match='no token store at memory://bucket/s'):
      open_store(url)
    writer.finish()
  store = open_store(url)
  assert store.read([(0, 3)])[0].tolist() == [5, 6, EOS]
  assert store.tokenizer(8).fingerprint == tokenizer.fingerprint
  with pytest.raises(DataError, match='memory://bucket/s already exists'):
    StoreWriter(url, tokenizer)


def test_an_unfinished_store_leaves_nothing_behind(tokenizer, tmp_path):
  def fail():
    with StoreWriter(tmp_path / 's', tokenizer) as writer:
      writer.add([[5, 6]])
      raise RuntimeError('cut off')

  with pytest.raises(RuntimeError, match='cut off'):
    fail()
  assert list(tmp_path.iterdir()) == []


def test_a_store_is_never_overwritten(tokenizer, tmp_path):
  before = write(tmp_path / 's', tokenizer, [[5, 6]]).fingerprint
  with pytest.raises(DataError, match=r'DATA: .*/s already exists\. Nothing was changed'):
    StoreWriter(tmp_path / 's', tokenizer)
  assert open_store(tmp_path / 's').fingerprint == before


def test_an_empty_store_is_refused(tokenizer, tmp_path):
  with StoreWriter(tmp_path / 's', tokenizer) as writer, pytest.raises(DataError, match='not contain a complete'):
    writer.finish()


def test_the_error_for_a_missing_store_gives_the_command_to_make_one(tmp_path):
  with pytest.raises(DataError, match=r'DATA: no token store at .*/none; make one with: pretrain data prepare --out='):
    open_store(tmp_path / 'none')


def test_an_unsupported_url_scheme_is_an_error():
  with pytest.raises(DataError, match='unsupported URL scheme'):
    open_store('nowhere://x')


def test_another_format_is_refused(tokenizer, tmp_path):
  write(tmp_path / 's', tokenizer, [[5, 6]])
  manifest = tmp_path / 's/manifest.json'
  manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {'format': 99}))
  with pytest.raises(DataError, match='is a token store of format 99, but this version reads format 2'):
    open_store(tmp_path / 's')


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'num_tokens': None}, 'manifest.json has num_tokens=None, expected int. Nothing was changed'),
    ({'pairs': True}, '/s has 1 documents, but its manifest.json says that they are pairs. Nothing was changed'),
    ({'pairs': 'no'}, "manifest.json has pairs='no', expected bool"),
    ({'append_eos': 1}, 'manifest.json has append_eos=1, expected bool'),
    ({'shards': None}, 'manifest.json has shards=None, expected list'),
    ({'shards': [{'documents': 1}]}, 'manifest.json has shards[0].tokens=None, expected int'),
    ({'shards': [3]}, 'manifest.json has shards[0].documents=3, expected int'),
    ({'num_tokens': 9}, '/s has 3 tokens in 1 documents, but its manifest.json says 9 in 1. Nothing was changed'),
    ({'shards': []}, '/s has 0 tokens in 0 documents in shards, but its'),
    ({'num_documents': 2}, '/s has 3 tokens in 1 documents, but its manifest.json says 3 in 2'),
  ],
)
def test_an_incomplete_or_wrong_manifest_is_refused(tokenizer, tmp_path, change, message):
  write(tmp_path / 's', tokenizer, [[5, 6]])
  manifest = tmp_path / 's/manifest.json'
  changed = {k: v for k, v in (json.loads(manifest.read_text()) | change).items() if v is not None}
  manifest.write_text(json.dumps(changed))
  with pytest.raises(DataError, match='^DATA-CORRUPT: .*' + re.escape(message)):
    open_store(tmp_path / 's')


@pytest.mark.parametrize('text', ['', '{', '[]', '{"num_tokens": 1}'])
def test_an_invalid_manifest_is_refused(tmp_path, text):
  (tmp_path / 'manifest.json').write_text(text)
  with pytest.raises(DataError, match=r'DATA-CORRUPT: .*manifest.json is not a manifest of a token store'):
    open_store(tmp_path)


@pytest.mark.parametrize('file', ['tokens/c/0', 'document_offsets/c/0', 'tokenizer.model'])
@pytest.mark.parametrize('place', [0.01, 0.5, 0.99])
def test_a_flipped_byte_is_an_error_naming_the_file(tokenizer, tmp_path, file, place):
  write(tmp_path / 's', tokenizer, documents(60))
  damaged = tmp_path / 's' / file
  raw = bytearray(damaged.read_bytes())
  raw[int(len(raw) * place)] ^= 1
  damaged.write_bytes(raw)
  with pytest.raises(DataError, match=f'DATA-CORRUPT: .*{file.split("/")[0]}'):
    read_everything(tmp_path / 's')


@pytest.mark.parametrize('file', ['tokens/c/0', 'document_offsets/c/0', 'tokenizer.model', 'tokens/zarr.json'])
def test_a_missing_file_is_an_error(tokenizer, tmp_path, file):
  write(tmp_path / 's', tokenizer, documents(20))
  (tmp_path / 's' / file).unlink()
  with pytest.raises(DataError, match=f'DATA-CORRUPT: .*{file.split("/")[0]}'):
    read_everything(tmp_path / 's')


def read_everything(path):
  store = open_store(path)
  store.tokenizer(8)
  return store.offsets, store.read([(0, store.num_tokens)])


def test_the_fingerprint_depends_only_on_the_contents(tokenizer, tmp_path):
  a = write(tmp_path / 'a', tokenizer, [[5, 6], [7]])
  shutil.move(tmp_path / 'a', tmp_path / 'moved')
  assert open_store(tmp_path / 'moved').fingerprint == a.fingerprint
  assert write(tmp_path / 'b', tokenizer, [[5, 6, 7]]).fingerprint != a.fingerprint


def test_a_store_can_be_sent_to_another_process(tokenizer, tmp_path):
  store = write(tmp_path / 's', tokenizer, [[5, 6]])
  store.read([(0, 1)])
  assert pickle.loads(pickle.dumps(store)).read([(0, 3)])[0].tolist() == [5, 6, EOS]


def test_errors_keep_their_code_between_processes():
  error = pickle.loads(pickle.dumps(DataError('x', 'DATA-CORRUPT')))
  assert (str(error), error.code, error.exit_code) == ('DATA-CORRUPT: x', 'DATA-CORRUPT', 65)


def test_empty_documents_are_kept_only_in_pairs(tokenizer, tmp_path):
  text, pairs = [write(tmp_path / name, tokenizer, [[], [5, 6]], pairs=p) for name, p in (('text', 0), ('pairs', 1))]
  assert (text.pairs, text.offsets.tolist()) == (False, [0, 3])
  assert (pairs.pairs, pairs.offsets.tolist()) == (True, [0, 1, 4])
  assert pairs.read([(0, 4)])[0].tolist() == [EOS, 5, 6, EOS]


def test_pairs_and_text_with_the_same_tokens_have_different_fingerprints(tokenizer, tmp_path):
  text, pairs = (write(tmp_path / str(p), tokenizer, [[5], [6]], pairs=p) for p in (False, True))
  assert text.manifest['shards'] == pairs.manifest['shards']
  assert text.fingerprint != pairs.fingerprint


LIMIT = 20_000


def sharded(path, tokenizer, wanted, calls, **options):
  """A store of `wanted` in shards of at most LIMIT tokens, added in `calls` calls as two segments per document."""
  segments = [part for ids in wanted for part in ((ids[:3], False), (ids[3:], True))]
  with StoreWriter(path, tokenizer, shard_tokens=LIMIT, **options) as writer:
    for part in np.array_split(np.arange(len(segments)), calls):
      writer.add([segments[i][0] for i in part], last=[segments[i][1] for i in part])
    writer.finish()
  return open_store(path)


@pytest.mark.parametrize('pairs', [False, True])
def test_shards_are_whole_documents_cut_at_the_last_one_that_fits(tokenizer, tmp_path, pairs):
  wanted = [*documents(300), [7] * 3 * LIMIT, [8] * 3 * LIMIT, *documents(100, seed=1)]  # two exceed any shard
  store = sharded(tmp_path / 's', tokenizer, wanted, 5, pairs=pairs)
  ends, unit, cut = store.offsets, 2 if pairs else 1, [0]
  while cut[-1] < len(wanted):
    most = int(np.searchsorted(ends, ends[cut[-1]] + LIMIT, 'right')) - 1
    cut.append(max(most // unit * unit, cut[-1] + unit))
  assert [shard.documents for shard in store.shards] == [range(a, b) for a, b in itertools.pairwise(cut)]
  assert [shard.tokens for shard in store.shards] == [range(ends[a], ends[b]) for a, b in itertools.pairwise(cut)]
  for i, shard in enumerate(store.shards):
    assert store.offsets_of(i).tolist() == ends[shard.documents.start : shard.documents.stop + 1].tolist()


@pytest.mark.parametrize('pairs', [False, True])
def test_a_store_does_not_depend_on_the_number_of_calls_that_wrote_it(tokenizer, tmp_path, pairs):
  wanted = [*documents(100), [7] * 3 * LIMIT, *documents(51, seed=1)]
  stores = [sharded(tmp_path / str(calls), tokenizer, wanted, calls, pairs=pairs) for calls in (1, 5, 304)]
  assert [store.manifest for store in stores] == 3 * [stores[0].manifest]
  whole = stores[0].read([(0, stores[0].num_tokens)])[0].astype('<u2')
  hashes = [hashlib.sha256(whole[s.tokens.start : s.tokens.stop].tobytes()).hexdigest() for s in stores[0].shards]
  assert [entry['tokens_sha256'] for entry in stores[0].manifest['shards']] == hashes


def test_opening_a_store_reads_no_offsets(tokenizer, tmp_path):
  """The offsets of a trillion tokens are 25 GB: those of a shard are read on demand."""
  store = sharded(tmp_path / 's', tokenizer, documents(60), 1)
  (tmp_path / 's/document_offsets/c/0').unlink()
  open_store(tmp_path / 's')
  with pytest.raises(DataError, match=r'DATA-CORRUPT: .*document_offsets'):
    store.offsets_of(1)


def test_offsets_that_do_not_match_the_manifest_are_reported_with_their_shard(tokenizer, tmp_path):
  sharded(tmp_path / 'a', tokenizer, documents(60), 1)
  sharded(tmp_path / 'b', tokenizer, documents(60)[::-1], 1)
  shutil.rmtree(tmp_path / 'a/document_offsets')
  shutil.copytree(tmp_path / 'b/document_offsets', tmp_path / 'a/document_offsets')
  store = open_store(tmp_path / 'a')
  last = store.shards[0].documents.stop - 1
  with pytest.raises(DataError, match=rf'a: document_offsets of documents 0 to {last} \(shard 0\) do not match'):
    store.offsets_of(0)


def test_a_store_that_grows_during_a_run_is_refused_by_processes_that_start_later(tokenizer, tmp_path):
  store = write(tmp_path / 's', tokenizer, [[5, 6]])
  sent = pickle.dumps(store)
  shutil.rmtree(tmp_path / 's')
  grown = write(tmp_path / 's', tokenizer, [[5, 6], [7]])
  message = rf's has changed since the run opened it: 3 tokens .*{store.fingerprint[:8]}.* 5 \({grown.fingerprint[:8]}'
  with pytest.raises(DataError, match='^DATA-CORRUPT: .*' + message):
    pickle.loads(sent)


def test_a_store_that_is_replaced_during_a_run_is_refused_at_the_next_read(tokenizer, tmp_path, monkeypatch):
  monkeypatch.setattr('data.stores.arrays._CONTEXT', tensorstore.Context())  # without a cache of the files' indexes
  texts = [[[5 + i] * 70_000 for i in range(first, first + 4)] for first in (0, 100)]
  store, other = (write(tmp_path / name, tokenizer, own) for name, own in zip('sc', texts, strict=True))
  shutil.copytree(tmp_path / 's', tmp_path / 'copy')
  assert store.read([(0, 2)])[0].tolist() == [5, 5]
  shutil.rmtree(tmp_path / 's')
  shutil.copytree(tmp_path / 'copy', tmp_path / 's')
  assert store.read([(70_001, 2)])[0].tolist() == [6, 6], 'a copy of it is the same'
  shutil.rmtree(tmp_path / 's')
  shutil.copytree(tmp_path / 'c', tmp_path / 's')
  assert store.read([(0, 2)])[0].tolist() == [5, 5], 'at hand'
  for _ in range(2):
    with pytest.raises(DataError, match=rf'DATA-CORRUPT: .*has changed since .*{other.fingerprint[:8]}'):
      store.read([(140_002, 2)])


def test_arrays_that_grew_without_their_manifest_are_refused(tokenizer, tmp_path):
  write(tmp_path / 's', tokenizer, [[5, 6]])
  write(tmp_path / 'grown', tokenizer, [[5, 6], [7]])
  for name in ('tokens', 'document_offsets'):
    shutil.rmtree(tmp_path / 's' / name)
    shutil.copytree(tmp_path / 'grown' / name, tmp_path / 's' / name)
  with pytest.raises(DataError, match=r'/s has 5 tokens in 2 documents, but its manifest.json says 3 in 1'):
    open_store(tmp_path / 's')


def test_a_document_of_ten_million_tokens_is_stored_whole(tokenizer, tmp_path):
  long = np.random.default_rng(0).integers(3, 400, 10**7).astype(np.uint32)
  with StoreWriter(tmp_path / 's', tokenizer, shard_tokens=10**6) as writer:
    for part in np.split(long, 10):
      writer.add_joined(Ragged(part, np.array([len(part)])), np.array([False]), {})
    writer.add([[], [5]], last=[True, True])
    writer.finish()
  store = open_store(tmp_path / 's')
  assert store.offsets.tolist() == [0, 10**7 + 1, 10**7 + 3]
  assert [len(shard.documents) for shard in store.shards] == [1, 1]
  assert (store.tokens(range(10**7)) == long).all()
  assert list(verify(str(tmp_path / 's'))) == []


def test_a_replaced_tokenizer_file_is_refused(tokenizer, tmp_path):
  write(tmp_path / 's', tokenizer, [[5, 6]])
  (tmp_path / 's/tokenizer.model').write_bytes(train_sentencepiece([LICENSE.read_text()], 400))
  with pytest.raises(DataError, match=r'^DATA-CORRUPT: .*/s/tokenizer.model does not match manifest.json'):
    open_store(tmp_path / 's').tokenizer(8)
