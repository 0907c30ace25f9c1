"""Stores on an object store, over the real S3 protocol: a moto server on loopback, set by AWS_ENDPOINT_URL."""

import boto3
import numpy as np
import pytest
import requests
import tensorstore
from moto import server

from data.errors import DataError
from data.prepare.prepare import prepare
from data.stores import arrays
from data.stores.store import StoreWriter, open_store
from data.stores.verify import verify
from data.stores.vocabulary import EOS, Tokenizer

URL = 's3://texts/some/store'


@pytest.fixture(scope='module')
def endpoint():
  moto = server.ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False)
  moto.start()
  host, port = moto.get_host_and_port()
  yield f'http://{host}:{port}'
  moto.stop()


@pytest.fixture
def bucket(endpoint, monkeypatch):
  """A client of the server, with an empty bucket."""
  values = {'AWS_ENDPOINT_URL': endpoint, 'AWS_ACCESS_KEY_ID': 'key', 'AWS_SECRET_ACCESS_KEY': 'secret'}
  for name, value in values.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(arrays, '_CONTEXT', tensorstore.Context({'s3_request_retries': {'max_retries': 1}}))
  requests.post(f'{endpoint}/moto-api/reset', timeout=10)
  client = boto3.client('s3', region_name='us-east-1')
  client.create_bucket(Bucket='texts')
  return client


def names(bucket) -> set[str]:
  return {found['Key'] for found in bucket.list_objects_v2(Bucket='texts').get('Contents', [])}


def write(tokenizer_model, documents):
  with StoreWriter(URL, Tokenizer(tokenizer_model, 8), columns={'tag_lengths': 'int32'}, shard_tokens=5000) as writer:
    writer.add(documents, columns={'tag_lengths': np.arange(len(documents), dtype=np.int32)})
    writer.finish()
  return open_store(URL)


def test_a_store_is_written_opened_read_and_verified(bucket, tokenizer_model):
  wanted = [np.random.default_rng(i).integers(3, 400, 50 * i).tolist() for i in range(1, 40)]
  store = write(tokenizer_model, wanted)
  ranges = list(zip(store.offsets[:-1].tolist(), np.diff(store.offsets).tolist(), strict=True))
  assert [ids.tolist() for ids in store.read(ranges)] == [[*ids, EOS] for ids in wanted]
  assert store.tag_lengths(1).tolist() == list(store.shards[1].documents)
  assert 'some/store/tokens/c/0' in names(bucket)
  assert list(verify(URL)) == []


def test_text_is_prepared_to_s3(bucket, tmp_path, tokenizer_model):
  (tmp_path / 'm').write_bytes(tokenizer_model)
  (tmp_path / 't.txt').write_text('the work of the license')
  for place in (URL, tmp_path / 's'):
    prepare([tmp_path / 't.txt'], place, tokenizer=tmp_path / 'm')
  assert open_store(URL).fingerprint == open_store(tmp_path / 's').fingerprint
  with pytest.raises(DataError, match='s3://texts/some/store already exists'):
    prepare([tmp_path / 't.txt'], URL, tokenizer=tmp_path / 'm')


@pytest.mark.parametrize('how', ['flipped', 'cut off', 'gone'])
def test_damage_on_s3_is_detected(bucket, tokenizer_model, how):
  write(tokenizer_model, [[5] * 900] * 9)
  key = {'Bucket': 'texts', 'Key': 'some/store/tokens/c/0'}
  raw = bucket.get_object(**key)['Body'].read()
  if how == 'gone':
    bucket.delete_object(**key)
  else:
    bucket.put_object(**key, Body=raw[:-9] if how == 'cut off' else bytes([raw[0] ^ 1]) + raw[1:])
  with pytest.raises(DataError, match=r'^DATA-CORRUPT: s3://texts/some/store: .*Nothing was changed'):
    open_store(URL).read([(0, 9)])
  assert any(line.startswith('tokens/c/0: tokens 0 to ') for line in verify(URL))


def test_a_failed_prepare_leaves_nothing_new_in_the_bucket(bucket, tmp_path, tokenizer_model):
  bucket.put_object(Bucket='texts', Key='some/store/notes.txt', Body=b'mine')
  (tmp_path / 'm').write_bytes(tokenizer_model)
  (tmp_path / 't.txt').write_bytes(b'the work\n' * 9 + b'\xff')
  with pytest.raises(DataError, match='is not UTF-8 text'):
    prepare([tmp_path / 't.txt'], URL, tokenizer=tmp_path / 'm')
  assert names(bucket) == {'some/store/notes.txt'}


def test_a_missing_bucket_wrong_credentials_and_no_server_are_one_line(bucket, endpoint, tokenizer_model, monkeypatch):
  none = StoreWriter('s3://none/x', Tokenizer(tokenizer_model, 8))
  with pytest.raises(DataError, match=r'^DATA: s3://none/x cannot be written: .*NoSuchBucket.*exist. Check its'), none:
    pass
  with pytest.raises(DataError, match=r'^DATA: no token store at s3://none/x; make one with'):
    open_store('s3://none/x')
  requests.post(f'{endpoint}/moto-api/reset-auth', data=b'0', timeout=10)
  with pytest.raises(DataError, match=r'manifest.json cannot be read: .*InvalidAccessKeyId.*Check .* credentials'):
    open_store(URL)
  requests.post(f'{endpoint}/moto-api/reset-auth', data=b'inf', timeout=10)
  monkeypatch.setenv('AWS_ENDPOINT_URL', 'http://127.0.0.1:9')
  with pytest.raises(DataError, match=r'manifest.json cannot be read: .*Could not connect'):
    open_store(URL)
