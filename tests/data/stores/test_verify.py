"""`verify` names damaged files and documents; `inspect` and `stats` agree with a naive reading of the store."""

import collections
import json
import re

import numpy as np
import pytest

from data.prepare.inspect import inspect
from data.stores import arrays, stats
from data.stores.arrays import CHUNK
from data.stores.stats import store_stats
from data.stores.store import StoreWriter, open_store
from data.stores.verify import verify
from data.stores.vocabulary import Tokenizer
from pretrain.cli.main import main

COLUMNS = {'scores/quality': 'float32', 'tag_lengths': 'int32'}


@pytest.fixture
def path(tokenizer_model, tmp_path, monkeypatch):
  """200 documents of about 1,000 tokens in three shards and several files; document 150 repeats document 3."""
  monkeypatch.setattr(arrays, 'FILE', CHUNK)
  rng = np.random.default_rng(0)
  documents = [rng.integers(3, 400, rng.integers(1, 2000)).tolist() for _ in range(200)]
  documents[3] = rng.integers(3, 400, 5000).tolist()
  documents[150] = documents[3]
  columns = {'scores/quality': np.arange(200, dtype=np.float32), 'tag_lengths': np.ones(200, np.int32)}
  with StoreWriter(tmp_path / 's', Tokenizer(tokenizer_model, 8), columns=COLUMNS, shard_tokens=80_000) as writer:
    writer.add(documents, columns=columns)
    writer.finish(inputs=['a.txt'])
  return str(tmp_path / 's')


def test_an_undamaged_store_passes(path, capsys):
  assert main(['data', 'verify', path]) == 0
  assert capsys.readouterr().out == f'{path}: whole\n'


@pytest.mark.parametrize(
  ('file', 'message'),
  [
    ('tokens/c/1', r'damaged: tokens/c/1: tokens 65536 to 7\d{4}, of documents \d+ to \d+: .*tokens/c/1'),
    ('document_offsets/c/0', r'damaged: .*document_offsets/c/0'),
    ('scores/quality/c/0', r'damaged: .*scores/quality/c/0'),
    ('tag_lengths/c/0', r'damaged: .*tag_lengths/c/0'),
    ('tokenizer.model', r'damaged: .*tokenizer.model does not match manifest.json'),
  ],
)
@pytest.mark.parametrize('how', ['flipped', 'cut off', 'gone'])
def test_damage_is_reported_with_file_and_documents(path, tmp_path, capsys, file, message, how):
  damaged = tmp_path / 's' / file
  raw = damaged.read_bytes()
  place = len(raw) // 3
  flipped = raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]
  damaged.unlink()
  if how != 'gone':
    damaged.write_bytes(flipped if how == 'flipped' else raw[: len(raw) // 2])
  assert main(['data', 'verify', path]) == 65
  out = capsys.readouterr().out
  assert any(re.match(message, line) for line in out.splitlines()), out
  assert re.search(r'/s: damaged places: \d; restore it from a copy, or prepare it again$', out)


def test_tokens_of_another_store_are_detected_by_their_hash(path, tokenizer_model, tmp_path):
  """The files of another store are undamaged: none of their checksums fails."""
  store = open_store(path)
  with StoreWriter(tmp_path / 'other', Tokenizer(tokenizer_model, 8), append_eos=False) as writer:
    (tokens,) = store.read([(0, store.num_tokens)])
    tokens[90_000] ^= 1
    writer.add([tokens])
    writer.finish()
  (tmp_path / 's/tokens').rename(tmp_path / 'old')
  (tmp_path / 'other/tokens').rename(tmp_path / 's/tokens')
  documents = store.shards[1].documents
  assert list(verify(path)) == [
    f'tokens of documents {documents.start} to {documents.stop - 1} (shard 1) do not match manifest.json'
  ]


def test_inspect_shows_the_manifest_and_documents_with_their_positions(path):
  store, text = open_store(path), inspect(path, 2)
  assert f'{store.num_tokens:,} tokens'.split()[0] in text
  for part in ('in 200 documents, each ends with EOS', 'scores/quality (float32), tag_lengths (int32)', 'a.txt'):
    assert part in text
  first, second = store.offsets[1:3].tolist()
  assert f'document 1: tokens {first} to {second - 1} ({second - first}, quality 1, 1 tag tokens)' in text


def test_inspect_labels_the_two_documents_of_a_pair(pair_store):
  text = inspect(str(pair_store), 2)
  assert 'document 0 (inputs of pair 0): tokens 0 to ' in text
  assert 'document 1 (targets of pair 0): tokens ' in text


def test_stats_equal_a_naive_count(path, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(stats, 'STEP', 1000)  # so that documents span several blocks
  assert main(['data', 'stats', path, f'--out={tmp_path}/found']) == 0
  assert '1 documents (0.50%) repeat one before' in capsys.readouterr().out
  found = json.loads((tmp_path / 'found/stats.json').read_text())
  store = open_store(path)
  sizes = np.diff(store.offsets)
  counts = collections.Counter(store.read([(0, store.num_tokens)])[0].tolist())
  assert found['length_percentiles']['50'] == np.percentile(sizes, 50, method='inverted_cdf')
  assert found['length_percentiles']['100'] == sizes.max()
  assert {t['id']: t['count'] for t in found['frequent_tokens']} == dict(
    sorted(counts.items(), key=lambda item: (-item[1], item[0]))[: stats.MOST_FREQUENT]
  )
  assert sum(b['documents'] for b in found['length_histogram']) == 200
  assert all(b['documents'] == ((sizes >= b['from']) & (sizes <= b['to'])).sum() for b in found['length_histogram'])
  assert found['duplicate_documents'] == 1
  assert (tmp_path / 'found/stats.png').read_bytes()[:4] == b'\x89PNG'


def test_nearly_equal_documents_are_not_duplicates(tokenizer_model, tmp_path):
  with StoreWriter(tmp_path / 's', Tokenizer(tokenizer_model, 8)) as writer:
    writer.add([[5, 6], [5, 6, 7], [5], [6], [5, 6], [5, 6]])
    writer.finish()
  assert store_stats(str(tmp_path / 's')).num_duplicates == 2
