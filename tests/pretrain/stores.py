"""Object stores on loopback: `gcs` is our fake of Google's, which can inject faults; `bucket` is one of each kind."""

import dataclasses
import importlib.util
import logging
import os
import pathlib
import shutil
from collections.abc import Callable

import pytest

from data import buckets

FAKE = pathlib.Path(__file__).parents[2] / 'scripts/faults/stores/fake_gcs.py'


@pytest.fixture(scope='session')
def fake_server():
  """The fake, with the bucket `runs`; TensorStore has its address, and retries at once."""
  spec = importlib.util.spec_from_file_location('fake_gcs', FAKE)
  fake = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(fake)
  server = fake.serve('runs')
  os.environ['TENSORSTORE_GCS_HTTP_URL'] = f'http://127.0.0.1:{server.server_port}'
  os.environ['GOOGLE_AUTH_TOKEN_FOR_TESTING'] = 'token'
  buckets.RETRIES.update(initial_delay='20ms', max_delay='100ms')
  yield server
  server.shutdown()
  server.server_close()


@pytest.fixture
def gcs(fake_server, tmp_path_factory):
  """The store of the fake, empty and without faults."""
  store = fake_server.RequestHandlerClass.store
  with store.lock:
    store.objects.clear()
    store.faults.clear()
    store.log.clear()
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('PRETRAIN_SPOOL', str(tmp_path_factory.mktemp('spools')))
    yield store


@pytest.fixture(scope='session')
def moto_server():
  """An S3 server with the bucket `runs`; TensorStore has its address."""
  import boto3
  from moto import server

  logging.getLogger('werkzeug').setLevel(logging.ERROR)
  moto = server.ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False)
  moto.start()
  host, port = moto.get_host_and_port()
  url = f'http://{host}:{port}'
  client = boto3.client(
    's3', region_name='us-east-1', endpoint_url=url, aws_access_key_id='key', aws_secret_access_key='secret'
  )
  client.create_bucket(Bucket='runs')
  yield url, client
  moto.stop()


@pytest.fixture
def s3(moto_server, tmp_path_factory):
  """A client of the S3 server, whose bucket is empty."""
  url, client = moto_server
  values = {'AWS_ENDPOINT_URL': url, 'AWS_ACCESS_KEY_ID': 'key', 'AWS_SECRET_ACCESS_KEY': 'secret'}
  for found in client.list_objects_v2(Bucket='runs').get('Contents', []):
    client.delete_object(Bucket='runs', Key=found['Key'])
  with pytest.MonkeyPatch.context() as patch:
    for name, value in values.items():
      patch.setenv(name, value)
    patch.setenv('PRETRAIN_SPOOL', str(tmp_path_factory.mktemp('spools')))
    yield client


@dataclasses.dataclass(frozen=True)
class Bucket:
  """A bucket of either kind: the URL of a folder in it, and what is in that folder, as the server has it."""

  url: str
  contents: Callable[[], dict[str, bytes]]

  def forget_host(self) -> None:
    """What a run has left on this host is gone, as on another host."""
    shutil.rmtree(os.environ['PRETRAIN_SPOOL'], ignore_errors=True)


@pytest.fixture(params=['gs', 's3'])
def bucket(request) -> Bucket:
  """A folder of an empty bucket of each kind."""
  store, root = request.getfixturevalue('gcs' if request.param == 'gs' else 's3'), 'some/run'
  if request.param == 'gs':
    own = lambda: {name[len(root) + 1 :]: data for (_, name), (data, _) in store.objects.items()}
    return Bucket(f'gs://runs/{root}', own)

  def contents() -> dict[str, bytes]:
    pages = store.get_paginator('list_objects_v2').paginate(Bucket='runs')
    keys = [found['Key'] for page in pages for found in page.get('Contents', [])]
    return {key[len(root) + 1 :]: store.get_object(Bucket='runs', Key=key)['Body'].read() for key in keys}

  return Bucket(f's3://runs/{root}', contents)
