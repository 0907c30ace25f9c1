"""Files and folders of a store: the methods of a path, conditional writes, and what cannot be a workdir."""

import pathlib

import pytest

from data import buckets
from pretrain.errors import ConfigError
from pretrain.workdirs.folder import as_folder, write_whole
from pretrain.workdirs.fsspec_bridge import register
from pretrain.workdirs.refusals import StoreError
from pretrain.workdirs.store_path import StorePath

RUN = StorePath('gs://runs/some/run')


def test_a_folder_of_a_store_is_read_and_written_like_one_of_a_disk(bucket):
  run = StorePath(bucket.url)
  assert not run.exists()
  assert not run.is_dir()
  assert list(run.iterdir()) == []
  assert run.names() == []
  for name in (
    'config.gin',
    'checkpoints/2/state/d/1',
    'checkpoints/2.corrupt/x',
    'checkpoints/10/MANIFEST.json',
    'é/u',
  ):
    (run / name).write_text(f'of {name}')
  (StorePath(bucket.url + 'ner') / 'other').write_text('a run whose name begins like that of this one')
  assert run.is_dir()
  assert not run.is_file()
  assert run.exists()
  assert run.names() == sorted(
    ['config.gin', 'checkpoints/2/state/d/1', 'checkpoints/2.corrupt/x', 'checkpoints/10/MANIFEST.json', 'é/u']
  )
  assert sorted(path.name for path in run.iterdir()) == ['checkpoints', 'config.gin', 'é']
  assert [path.name for path in (run / 'checkpoints').glob('*.corrupt*')] == ['2.corrupt']
  assert (run / 'checkpoints' / '10').parent.parent == run
  assert (run / 'a.b').stem == 'a'
  assert run.resolve() is run
  assert (run / 'config.gin').is_file()
  assert not (run / 'config').exists()
  assert (run / 'config.gin').read_text() == 'of config.gin'
  with pytest.raises(FileNotFoundError, match='some/run/none'):
    (run / 'none').read_bytes()
  (run / 'config.gin').unlink()
  (run / 'config.gin').unlink()
  (run / 'checkpoints' / '2').copy_tree(run / 'copy', last='d/1')
  (run / 'checkpoints').remove_tree()
  assert run.names() == ['copy/state/d/1', 'é/u']
  write_whole(run / 'eval.json', 'all')
  assert bucket.contents()['eval.json'] == b'all'


def test_a_conditional_write_sees_every_other_writer(bucket):
  path = StorePath(bucket.url) / 'OWNER'
  nothing, version = path.read_version()
  assert nothing is None
  first = path.write_if(b'one', version)
  assert first
  assert path.write_if(b'two', version) is None
  path.create(b'one')  # it is there already, with the same contents
  with pytest.raises(FileExistsError, match='another writer'):
    path.create(b'two')
  second = path.write_if(b'two', first)
  path.remove_if(first)
  assert path.read_version() == (b'two', second)
  path.remove_if(second)
  assert not path.exists()


def test_a_write_whose_answer_was_lost_is_recognised_as_our_own(gcs):
  path = StorePath('gs://runs/a/MANIFEST.json')
  gcs.fault('POST .*MANIFEST', 503, done=True)
  path.create(b'ours')
  assert path.read_bytes() == b'ours'
  assert gcs.faults[0]['times'] == 0
  assert gcs.log['POST /upload/storage/v1/b/runs/o'] == 2  # the second was refused because of the first


def test_errors_that_pass_are_lived_through(gcs):
  gcs.fault('POST .*name=a/x', 503, times=3)
  gcs.fault('GET .*/o/a/x', 429, times=2)
  path = StorePath('gs://runs/a/x')
  path.write_bytes(b'1')
  assert path.read_bytes() == b'1'
  assert [fault['times'] for fault in gcs.faults] == [0, 0]


@pytest.mark.parametrize('status', [401, 403])
def test_a_refusal_names_bucket_and_credentials_without_showing_them(gcs, monkeypatch, status):
  gcs.fault('POST', status, times=99)
  path = StorePath('gs://runs/a/x')
  with pytest.raises(StoreError, match=f'^STORE: gs://runs/a/x cannot be written: these cred.*HTTP {status}') as caught:
    path.write_bytes(b'1')
  text = str(caught.value)
  assert 'bucket runs' in text
  assert 'GOOGLE_AUTH_TOKEN_FOR_TESTING of the environment' in text
  assert '\n' not in text
  assert caught.value.exit_code == 66
  assert isinstance(caught.value, OSError)
  assert caught.value.strerror in text


def test_a_list_that_is_refused_is_not_an_empty_folder(gcs, monkeypatch):
  """TensorStore takes a refusal for the end of the list: a run would begin at step 0 over its own checkpoints."""
  names = [f'x{i}' for i in range(5)]
  for name in names:
    (RUN / name).touch()
  monkeypatch.setattr(gcs, 'page', 2)
  gcs.fault('GET .*/o[?].*pageToken=2', 401)
  assert RUN.names() == names
  assert gcs.faults[0]['times'] == 0
  gcs.fault('GET .*/o[?]', 403)
  assert RUN.names() == names
  assert gcs.faults[1]['times'] == 0
  gcs.fault('GET', 403, times=99)
  for ask in (RUN.names, RUN.is_dir, RUN.remove_tree, lambda: (RUN / 'none').is_dir()):
    with pytest.raises(StoreError, match='PERMISSION_DENIED'):
      ask()
  gcs.faults.clear()
  assert RUN.names() == names


def test_a_missing_bucket_is_named(gcs, s3):
  said = r'cannot be (read|written): there is no such bucket .*bucket none-such.*check its name'
  for act in (StorePath('gs://none-such/run').touch, StorePath('s3://none-such/run').check_reachable):
    with pytest.raises(StoreError, match=said):
      act()


def test_where_credentials_come_from(monkeypatch, tmp_path):
  for name in ('AWS_ACCESS_KEY_ID', 'GOOGLE_APPLICATION_CREDENTIALS', 'GOOGLE_AUTH_TOKEN_FOR_TESTING'):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv('AWS_PROFILE', 'mine')
  assert buckets.credentials_of('s3://b/x') == 'the profile mine of AWS'
  monkeypatch.setenv('CLOUDSDK_CONFIG', str(tmp_path))
  assert 'metadata server' in buckets.credentials_of('gs://b/x')
  (tmp_path / 'application_default_credentials.json').touch()
  assert buckets.credentials_of('gs://b/x') == str(tmp_path / 'application_default_credentials.json')
  monkeypatch.setenv('GOOGLE_APPLICATION_CREDENTIALS', 'key.json')
  assert buckets.credentials_of('gs://b/x') == 'GOOGLE_APPLICATION_CREDENTIALS=key.json'
  monkeypatch.setenv('AWS_ACCESS_KEY_ID', 'SECRET')
  assert buckets.credentials_of('s3://b/x') == 'AWS_ACCESS_KEY_ID of the environment'


@pytest.mark.parametrize(
  ('text', 'said'),
  [
    ('s3://KEY:SECRET@bucket/run', r'--workdir=s3://\*\*\*@bucket/run has credentials in it'),
    ('gs://bucket/run?token=abc', r'--workdir=gs://bucket/run\?token=\*\*\* has credentials in it'),
    ('hdfs://host/run', '--workdir=hdfs://host/run is not the URL of a folder in a store'),
    ('gs://', 'is not the URL of a folder in a store'),
    ('gs://bucket/a/../b', 'is not the URL of a folder in a store'),
    ('gs://bucket//a', 'is not the URL of a folder in a store'),
    ('s3://bucket/a%20b', 'is not the URL of a folder in a store'),
  ],
)
def test_a_url_that_is_no_workdir_is_refused(text, said):
  with pytest.raises(ConfigError, match=said) as caught:
    as_folder(text)
  assert 'SECRET' not in str(caught.value)
  assert 'abc' not in str(caught.value)


def test_a_path_stays_a_path_and_a_url_keeps_both_slashes(tmp_path):
  assert as_folder('gs:/b') == pathlib.Path('gs:/b')
  assert as_folder('./s3://x') == pathlib.Path('./s3://x')
  assert str(as_folder('gs://bucket/run/')) == 'gs://bucket/run'
  assert as_folder(as_folder('s3://bb')) == StorePath('s3://bb')
  with pytest.raises(TypeError):
    pathlib.Path(as_folder('gs://bucket/run'))  # it would become gs:/bucket/run
  write_whole(tmp_path / 'new' / 'a.json', 'x')
  assert [path.name for path in (tmp_path / 'new').iterdir()] == ['a.json']


def test_epath_reads_and_writes_a_store(bucket):
  from etils import epath

  register()
  folder = epath.Path(bucket.url)
  (folder / 'a').mkdir(parents=True)
  assert (folder / 'a').is_dir()
  assert not (folder / 'b').exists()
  with (folder / 'a' / 'x').open('wb') as file:
    file.write(b'12')
  file = (folder / 'a' / 'y').open('wb')
  file.write(b'half of it')
  file.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
  assert (folder / 'a' / 'x').read_bytes() == b'12'
  assert [path.name for path in (folder / 'a').iterdir()] == ['x']
  (folder / 'a').rmtree()
  assert bucket.contents() == {}


def test_a_copy_ends_with_the_object_that_makes_it_whole(gcs):
  for name in ('MANIFEST.json', 'a', 'z/y'):
    (RUN / '2' / name).write_text(name)
  (RUN / '2').copy_tree(RUN / '2.corrupt', last='MANIFEST.json')
  written = {name: version for (_, name), (_, version) in gcs.objects.items() if '/2.corrupt/' in name}
  assert sorted(written, key=written.get) == [f'some/run/2.corrupt/{name}' for name in ('a', 'z/y', 'MANIFEST.json')]
