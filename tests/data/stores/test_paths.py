"""A local store is written to and read from exactly the path given, whatever characters the path contains."""

import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.prepare.prepare import prepare
from data.stores.paths import is_local, local_path
from data.stores.store import StoreWriter, open_store
from data.stores.verify import verify
from data.stores.vocabulary import EOS, Tokenizer

NAMES = [
  'a%20b', '50%off', '%', '%zz', 'a#b', 'a?b', 'a|b', 'a\\b', 'a\\', '..\\b', '\\\\a', ' a ', 'a"b', "it's", 'ünï ☃',
  'a\nb', 'file:x', 'file%3A', 's3:', 'gs:', 'C:', '...', '..a', 'a.', '-a', '*', '[a]', '{a}', '$HOME', 'a&b;c', '~a',
  'x.__lock', '.__lock', 'a.partial-1', 'manifest.json', 'é' * 120, 'a' * 255, '\x01', '\x7f', '\udcff',
]  # fmt: skip


def write(path, tokenizer, ids):
  with StoreWriter(path, tokenizer) as writer:
    writer.add([ids])
    writer.finish()


def tokens(path) -> list[int]:
  store = open_store(path)
  return store.read([(0, store.num_tokens)])[0].tolist()


def listed(folder) -> list[str]:
  return sorted(os.path.join(root, name) for root, _, names in os.walk(folder) for name in names)


legal = st.text(st.characters(exclude_characters='/\0', codec='utf-8'), min_size=1, max_size=40).filter(
  lambda name: name not in ('.', '..') and len(os.fsencode(name)) <= 255
)


def with_examples(test):
  for name in NAMES:
    test = example(name=name)(test)
  return test


@with_examples
@given(name=legal)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_at_a_path_is_read_from_it_and_nothing_else_changes(tokenizer_model, name):
  tokenizer = Tokenizer(tokenizer_model, 8)
  with tempfile.TemporaryDirectory() as folder:
    sibling = local_sibling(folder, name)
    sibling.write_text('mine')
    write(f'{folder}/{name}', tokenizer, [5, 6])
    # The oracle is the file system: it contains one new folder with exactly this name.
    assert sorted(map(os.fsencode, os.listdir(folder))) == sorted(map(os.fsencode, [name, sibling.name]))
    assert sibling.read_text() == 'mine'
    assert pathlib.Path(folder, name, 'manifest.json').is_file()
    assert tokens(pathlib.Path(folder, name)) == [5, 6, EOS]
    assert list(verify(f'{folder}/{name}/')) == []
    write(f'{folder}/{name}/inside/{name}', tokenizer, [7])
    assert tokens(f'{folder}/{name}/inside/{name}') == [7, EOS]
    with pytest.raises(DataError, match='already exists'):
      StoreWriter(f'{folder}/{name}', tokenizer)


def local_sibling(folder: str, name: str) -> pathlib.Path:
  """A file whose name could be confused with that of the store."""
  return pathlib.Path(folder, 'a b' if name != 'a b' else 'a%20b')


@pytest.mark.parametrize('other', ['a b', 'a%2520b', 'a'])
def test_stores_whose_names_differ_only_in_percent_signs_are_different_stores(tokenizer_model, tmp_path, other):
  tokenizer = Tokenizer(tokenizer_model, 8)
  write(tmp_path / 'a%20b', tokenizer, [5])
  write(tmp_path / other, tokenizer, [6])
  assert tokens(tmp_path / 'a%20b') == [5, EOS]
  assert tokens(tmp_path / other) == [6, EOS]


@pytest.mark.parametrize('name', NAMES)
def test_the_working_folder_may_have_any_name(tokenizer_model, tmp_path, monkeypatch, name):
  (tmp_path / name).mkdir()
  monkeypatch.chdir(tmp_path / name)
  write('s', Tokenizer(tokenizer_model, 8), [5, 6])
  assert tokens('s') == tokens(tmp_path / name / 's') == [5, 6, EOS]
  assert os.listdir('.') == ['s']


@pytest.mark.parametrize(
  'name', ['file:x', 's3:/x', 's3:x', './s3://x', './gs://a/b', 'a://b/../../c', '~~/x', '~', '~root/x']
)
def test_relative_paths_that_look_like_urls_are_paths(tokenizer_model, tmp_path, monkeypatch, name):
  monkeypatch.chdir(tmp_path)
  path = os.path.join(tmp_path, name)
  write(path if name.startswith('a:') else name, Tokenizer(tokenizer_model, 8), [5, 6])
  assert (pathlib.Path(tmp_path) / os.path.normpath(name) / 'manifest.json').is_file()
  assert tokens(path) == [5, 6, EOS]


def test_dot_dot_after_a_symbolic_link_is_the_parent_of_its_target(tokenizer_model, tmp_path, monkeypatch):
  (tmp_path / 'real/deep').mkdir(parents=True)
  (tmp_path / 'link').symlink_to('real/deep')
  monkeypatch.chdir(tmp_path)
  write('link/../s', Tokenizer(tokenizer_model, 8), [5, 6])
  assert (tmp_path / 'real/s/manifest.json').is_file()
  assert tokens('link/../s') == [5, 6, EOS]


@pytest.mark.parametrize(
  ('url', 'path'),
  [
    ('file:///a/b', '/a/b'), ('file:///a%20b', '/a b'), ('file://localhost/a', '/a'), ('FILE:///a%25b/', '/a%b'),
    ('file:///%C3%A9', '/é'), ('file:///a b', '/a b'), ('file:///', '/'),
  ],
)  # fmt: skip
def test_file_urls_are_decoded(url, path):
  """RFC 8089; urllib.request.url2pathname is the standard library's reading of it."""
  assert is_local(url)
  assert local_path(url) == path


@pytest.mark.parametrize(
  ('path', 'message'),
  [
    ('file://host/a', "names the host 'host'"), ('file://a', "names the host 'a'"),
    ('file:///50%off', 'has a % .* %25'),
    ('file:///a?b', r'has a \? .* %3F'), ('file:///a#b', 'has a # .* %23'),
    ('', "path ''"), ('a\0b', 'is not valid for'),
  ],
)  # fmt: skip
def test_an_invalid_path_or_file_url_is_refused(path, message):
  with pytest.raises(DataError, match=f'^DATA: .*{message}'):
    open_store(path)


def test_a_file_url_is_read_from_where_it_was_written(tokenizer_model, tmp_path):
  write(f'file://{tmp_path}/a%20b', Tokenizer(tokenizer_model, 8), [5, 6])
  assert os.listdir(tmp_path) == ['a b']
  assert tokens(f'file://{tmp_path}/a%20b') == tokens(tmp_path / 'a b') == [5, 6, EOS]


def test_a_failure_leaves_neither_the_folder_nor_new_parents(tokenizer_model, tmp_path):
  (tmp_path / 'm').write_bytes(tokenizer_model)
  (tmp_path / 't.txt').write_bytes(b'good text\n' * 9 + b'\xff')
  with pytest.raises(DataError, match='is not UTF-8'):
    prepare([tmp_path / 't.txt'], tmp_path / 'new/50%off/s', tokenizer=tmp_path / 'm')
  assert sorted(path.name for path in tmp_path.iterdir()) == ['m', 't.txt']


def test_a_users_folder_with_the_name_of_a_staging_folder_is_not_touched(tokenizer_model, tmp_path):
  own = tmp_path / f's.partial-{os.getpid()}'
  own.mkdir()
  (own / 'x').write_text('mine')
  write(tmp_path / 's', Tokenizer(tokenizer_model, 8), [5, 6])
  assert (own / 'x').read_text() == 'mine'
  assert sorted(path.name for path in tmp_path.iterdir()) == ['s', own.name]


def test_an_error_names_the_path_and_is_one_line(tokenizer_model, tmp_path):
  path = tmp_path / 'a\\b\nc'
  write(path, Tokenizer(tokenizer_model, 8), np.arange(3, 400).tolist())
  (path / 'tokens/c/0').unlink()
  with pytest.raises(DataError, match='DATA-CORRUPT') as caught:
    open_store(path).read([(0, 9)])
  assert 'a\\b\\nc' in str(caught.value)
  assert 'pretrain-paths-' not in str(caught.value)
  assert len(str(caught.value).splitlines()) == 1


def test_temporary_links_are_removed_when_the_process_ends(tokenizer_model, tmp_path):
  write(tmp_path / 'a\\b', Tokenizer(tokenizer_model, 8), [5, 6])
  (tmp_path / 'tmp').mkdir()
  code = 'import sys; from data.stores.store import open_store; print(open_store(sys.argv[1]).num_tokens)'
  done = subprocess.run(
    [sys.executable, '-c', code, str(tmp_path / 'a\\b')], env=os.environ | {'TMPDIR': str(tmp_path / 'tmp')},
    capture_output=True, text=True, check=True,
  )  # fmt: skip
  assert done.stdout == '3\n'
  assert os.listdir(tmp_path / 'tmp') == []
