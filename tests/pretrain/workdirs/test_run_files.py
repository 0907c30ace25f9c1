"""The small files of a run in a store: what is uploaded, by whom, and whose copy a start takes."""

import os
import pathlib
import time

import pytest

from pretrain.errors import ConfigError
from pretrain.workdirs import run_files as module
from pretrain.workdirs.copies import local_copy, made_in, small_files
from pretrain.workdirs.refusals import StoreError
from pretrain.workdirs.run_files import run_files
from pretrain.workdirs.store_path import StorePath

RUN = StorePath('gs://runs/some/run')


@pytest.fixture
def opened(gcs):
  """Opens the files of a process of the run; all are closed at the end."""
  found = []

  def start(process=0, owner='first', before=None):
    found.append(run_files(RUN, process))
    found[-1].open(owner, before)
    return found[-1]

  yield start
  for files in found:
    files.close()


def puts(gcs) -> int:
  return gcs.log['POST /upload/storage/v1/b/runs/o']


def test_what_changed_is_uploaded_whole_and_nothing_else(opened, gcs):
  files = opened()
  (files.folder / 'plots').mkdir()
  for name in ('metrics.jsonl', 'plots/loss.png', 'report.tmp'):
    (files.folder / name).write_text(f'of {name}')
  files.push()
  assert RUN.names() == ['metrics.jsonl', 'plots/loss.png']
  before = puts(gcs)
  files.push()
  assert puts(gcs) == before
  with (files.folder / 'metrics.jsonl').open('a') as file:
    file.write(', and more')
  files.push()
  assert puts(gcs) == before + 1
  assert (RUN / 'metrics.jsonl').read_text() == 'of metrics.jsonl, and more'


def test_the_thread_uploads_and_stops_where_the_run_belongs_to_another(gcs, monkeypatch):
  monkeypatch.setattr(module, 'SECONDS', 0.02)
  lost, files = [], run_files(RUN)

  def check():
    if lost:
      raise ConfigError('it belongs to another run now')

  files.open('first', None, check)
  (files.folder / 'a').write_text('1')
  while not (RUN / 'a').exists():
    pass
  lost.append(True)
  files._thread.join(10)
  (files.folder / 'a').write_text('22')
  assert files.close()
  assert (RUN / 'a').read_text() == '1'


def test_another_host_takes_the_copy_of_the_store(opened, gcs):
  for name in ('config.gin', 'metrics.jsonl', 'imported/tokenizer.json', 'OWNER', 'hang_3_p1.txt', 'plots/loss.png'):
    (RUN / name).write_text(f'of {name}')
  (RUN / 'checkpoints' / '10' / 'MANIFEST.json').write_text('large')
  files = opened(owner='second', before='first')
  there = {path.relative_to(files.folder).as_posix() for path in files.folder.rglob('*') if path.is_file()}
  assert there - {'.owner', '.lock'} == {'config.gin', 'metrics.jsonl', 'imported/tokenizer.json'}
  assert files.folder.name == 'run'
  assert puts(gcs) == 7


@pytest.mark.parametrize('mine', [True, False])
def test_a_spool_is_kept_only_if_its_host_was_the_last_to_write(opened, mine):
  """A host that died has rows which were not uploaded. If another host was there since, they are no longer true."""
  files = opened(owner='first')
  (files.folder / 'timeline.jsonl').write_text('1\n')
  files.push()
  (files.folder / 'timeline.jsonl').write_text('1\n2\n')  # and then it was killed
  if not mine:
    (RUN / 'timeline.jsonl').write_text('1\n3\n')
  again = opened(owner='third', before='first' if mine else 'second')
  assert again.folder == files.folder
  assert (again.folder / 'timeline.jsonl').read_text() == (RUN / 'timeline.jsonl').read_text()
  assert (RUN / 'timeline.jsonl').read_text() == ('1\n2\n' if mine else '1\n3\n')


def test_other_processes_have_spools_of_their_own_and_upload_only_their_own_files(opened):
  first = opened()
  (first.folder / 'config.gin').write_text('text')
  first.push()
  second = opened(process=1, owner=None)
  assert second.folder != first.folder
  assert (second.folder / 'config.gin').read_text() == 'text'
  for name in ('metrics.jsonl', 'hang_7_p1.txt'):
    (second.folder / name).write_text('of process 1')
  second.push()
  assert RUN.names() == ['config.gin', 'hang_7_p1.txt']


def test_stacks_are_uploaded_within_a_limit(opened, gcs, monkeypatch):
  files = opened()
  path = files.folder / 'hang_3_p0.txt'
  path.write_text('stacks')
  assert files.upload(path) == 'gs://runs/some/run/hang_3_p0.txt'
  assert (RUN / path.name).read_text() == 'stacks'
  monkeypatch.setattr(module, 'SECONDS_AT_END', 0.05)
  gcs.fault('POST', 503, times=10**6)
  path.write_text('later stacks')
  assert files.upload(path) == str(path)
  gcs.faults.clear()
  while (RUN / path.name).read_text() != 'later stacks':  # the upload continues, and the next test would see it
    time.sleep(0.05)


def test_a_last_upload_that_fails_is_told_and_the_spool_stays(opened, gcs, capsys):
  files = opened()
  (files.folder / 'metrics.jsonl').write_text('rows')
  gcs.fault('POST', 403, times=10**6)
  assert not files.close()
  assert f'only in {files.folder} of this host; the next start' in capsys.readouterr().err
  gcs.faults.clear()


def test_errors_name_the_url_and_not_the_spool(gcs):
  files = run_files(RUN)
  with pytest.raises(ConfigError, match=r'^CONFIG: gs://runs/some/run/config\.gin:3 is wrong$'), files.named():
    raise ConfigError(f'{files.folder}/config.gin:3 is wrong')


def test_on_a_disk_nothing_is_done(tmp_path):
  files = run_files(tmp_path)
  files.open('a', None)
  files.push()
  assert files.close()
  assert files.folder == tmp_path
  assert files.upload(tmp_path / 'x') == str(tmp_path / 'x')
  with small_files(tmp_path) as folder, made_in(tmp_path / 'made') as made:
    assert folder == tmp_path
    assert made == tmp_path / 'made'
    assert local_copy(made) == made
  assert os.listdir(tmp_path) == ['made']


def test_commands_read_and_change_the_small_files_of_a_run(gcs):
  (RUN / 'metrics.jsonl').write_text('rows')
  with small_files(RUN) as folder:
    assert (folder / 'metrics.jsonl').read_text() == 'rows'
    assert folder.name == 'run'
    (folder / 'report.html').write_text('drawn')
  assert not folder.exists()
  assert (RUN / 'report.html').read_text() == 'drawn'
  assert puts(gcs) == 2
  with pytest.raises(ZeroDivisionError), small_files(RUN) as folder:
    (folder / 'report.html').write_text(f'half {1 // 0}')
  assert (RUN / 'report.html').read_text() == 'drawn'


def test_folders_of_other_programs_are_copied(gcs):
  with made_in(RUN / 'imported') as folder:
    (folder / 'a').mkdir()
    (folder / 'a' / 'x').write_bytes(b'\0')
  assert RUN.names() == ['imported/a/x']
  assert (local_copy(RUN / 'imported') / 'a' / 'x').read_bytes() == b'\0'
  assert isinstance(local_copy(RUN / 'imported'), pathlib.Path)


def test_a_store_that_fails_while_a_run_starts_is_one_line(gcs):
  gcs.fault('GET', 403, times=10**6)
  with pytest.raises(StoreError, match='cannot be listed'):
    run_files(RUN).open('first', None)
  gcs.faults.clear()
