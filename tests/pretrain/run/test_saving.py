"""Failed saves lose nothing, the next save is their retry, and too many in a row end the run."""

import contextlib
import errno
import json
import resource
import subprocess
import sys
import threading

import jax.numpy as jnp
import pytest

from pretrain.checkpoints import manifest, step_folders
from pretrain.checkpoints.checkpoints import Checkpoints, Saved
from pretrain.checkpoints.config import CheckpointConfig
from pretrain.checkpoints.orbax_files import Files
from pretrain.checkpoints.saving import owner
from pretrain.errors import CheckpointError, ConfigError
from pretrain.run import saving
from pretrain.run.train import train
from pretrain.step.train_step import TrainState
from tests.pretrain import tiny

pytestmark = pytest.mark.usefixtures('shared_programs')

POSITION = {'loader': {}, 'data': {}}
FULL = OSError(errno.ENOSPC, 'No space left on device')


def state(size: int = 8) -> TrainState:
  return TrainState(jnp.int32(1), {'w': jnp.arange(size, dtype=jnp.float32)}, {'m': jnp.ones(size)}, {})


@pytest.fixture
def failing(monkeypatch):
  """The saves of these numbers (0, 1, …) fail when their files are to be on the disk."""
  numbers, calls = set[int](), []
  wait = Files.wait

  def fail(files):
    calls.append(1)
    wait(files)
    if len(calls) - 1 in numbers:
      raise FULL

  monkeypatch.setattr(Files, 'wait', fail)
  return numbers


def ended(checkpoints: Checkpoints, step: int) -> list[Saved]:
  checkpoints.save(step, state(), POSITION, '')
  return checkpoints.poll(wait=True)


def test_a_save_reports_its_cost(tmp_path):
  with contextlib.closing(Checkpoints(tmp_path, CheckpointConfig())) as checkpoints:
    assert checkpoints.poll() == []
    (saved,) = ended(checkpoints, 1)
    assert checkpoints.poll(wait=True) == [], 'once'
  folder = tmp_path / 'checkpoints/1'
  files = [path for path in folder.rglob('*') if path.is_file() and path.name != manifest.FILE]
  assert saved.size == sum(path.stat().st_size for path in files)
  assert saved.error is None
  assert 0 < saved.stall < saved.stall + saved.seconds < 60
  assert manifest.read(folder).files.keys() == {path.relative_to(folder).as_posix() for path in files}


def test_the_manifest_is_of_the_files_when_orbax_has_ended(tmp_path, monkeypatch):
  wait = Files.wait

  def slow(files):
    wait(files)
    (tmp_path / 'checkpoints/1/state/late').write_text('the last file')

  monkeypatch.setattr(Files, 'wait', slow)
  with contextlib.closing(Checkpoints(tmp_path, CheckpointConfig())) as checkpoints:
    ended(checkpoints, 1)
  assert manifest.read(tmp_path / 'checkpoints/1').files['state/late'].size == len('the last file')


def test_a_failed_save_is_reported_once_and_leaves_no_files(tmp_path, failing):
  failing.add(1)
  with contextlib.closing(Checkpoints(tmp_path, CheckpointConfig(keep=9))) as checkpoints:
    ended(checkpoints, 1)
    (saved,) = ended(checkpoints, 2)
    assert str(saved.error).startswith('CKPT-NOSPACE: saving step 2 needs 0 MiB, ')
    assert str(saved.error).endswith(f'MiB free on {tmp_path}/checkpoints. Earlier steps are intact. Free space.')
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == ['1'], 'its space is free again'
    assert (checkpoints.latest(), checkpoints.finished()) == (1, [1])
    assert ended(checkpoints, 3)[0].error is None
  assert step_folders.finished(tmp_path / 'checkpoints') == [1, 3]


def test_more_failures_in_a_row_than_retries_end_the_run(tmp_path, failing):
  failing |= {0, 1, 3, 4, 5}
  checkpoints = Checkpoints(tmp_path, CheckpointConfig(retries=2))
  for step in range(1, 6):  # two failures, a success, two failures
    assert bool(ended(checkpoints, step)[0].error) == (step != 3)
  with pytest.raises(CheckpointError, match='CKPT-NOSPACE: saving step 6 ') as caught:
    ended(checkpoints, 6)
  assert caught.value.exit_code == 66


def test_where_no_retry_is_left_no_save_is_begun(tmp_path, failing):
  """It would be cut off when the run ends, and look like a step that lost its manifest."""
  failing.add(0)
  checkpoints = Checkpoints(tmp_path, CheckpointConfig(retries=0))
  checkpoints.save(1, state(), POSITION, '')
  with pytest.raises(CheckpointError, match='CKPT-NOSPACE: saving step 1 '):
    checkpoints.save(2, state(), POSITION, '')
  assert list(checkpoints.directory.iterdir()) == []


def test_a_save_that_is_cut_off_by_the_exit_keeps_its_mark(tmp_path, failing, monkeypatch):
  """Orbax may be writing still; the next start removes what it has written."""
  failing.add(0)
  monkeypatch.setattr('pretrain.checkpoints.saving.threading.main_thread', lambda: threading.Thread())
  checkpoints = Checkpoints(tmp_path, CheckpointConfig())
  ended(checkpoints, 1)
  assert (checkpoints.directory / '1.saving').exists()
  assert Checkpoints(tmp_path, CheckpointConfig()).newest_whole() is None
  assert list(checkpoints.directory.iterdir()) == []


def test_close_raises_a_failure_that_was_not_polled(tmp_path, failing):
  failing.add(0)
  checkpoints = Checkpoints(tmp_path, CheckpointConfig())
  checkpoints.save(1, state(), POSITION, '')
  with pytest.raises(CheckpointError, match='CKPT-NOSPACE'):
    checkpoints.close()


def test_a_step_is_kept_until_the_next_one_has_its_manifest(tmp_path, monkeypatch):
  """Orbax by itself would remove it when its own commit file is there."""
  write, seen = manifest.write, []

  def watch(folder, whole):
    seen.append(sorted(path.name for path in folder.parent.iterdir()))
    write(folder, whole)

  monkeypatch.setattr(manifest, 'write', watch)
  with contextlib.closing(Checkpoints(tmp_path, CheckpointConfig(keep=1))) as checkpoints:
    for step in (1, 2, 3):
      checkpoints.save(step, state(), POSITION, '')
  assert seen == [['1', '1.saving'], ['1', '2', '2.saving'], ['2', '3', '3.saving']]
  assert sorted(path.name for path in (tmp_path / 'checkpoints').iterdir()) == ['3']


def test_a_full_disk_costs_a_run_one_save_and_nothing_else(tmp_path, failing, monkeypatch, capsys):
  """The save of step 4 fails, and so does the first of the last step, which is done again at once."""
  failing |= {1, 3}
  monkeypatch.setattr('pretrain.run.train.write_report', lambda _: None)
  cfg = tiny.decoder('train.steps=7', 'checkpoint.every=2', 'checkpoint.keep=9', 'checkpoint.retries=1')
  assert train(cfg, tmp_path) == 0
  assert step_folders.finished(tmp_path / 'checkpoints') == [2, 6, 7]
  err = capsys.readouterr().err
  assert err.count('CKPT-NOSPACE') == 2
  assert 'Earlier steps are intact. Free space. The next save is its retry.' in err
  rows = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert [row['step'] for row in rows] == list(range(1, 8))
  assert sum('save_stall' in row for row in rows) >= 2
  assert {'save_stall', 'save_seconds', 'save_mib'} <= rows[-1].keys()


def test_a_failure_that_is_reported_after_the_next_save_began_repeats_nothing(tmp_path, failing, monkeypatch):
  """A slow disk: how the save of step 2 ended is known when that of step 4, the last one, has succeeded."""
  failing |= {0}
  report = saving.report_saves
  monkeypatch.setattr(saving, 'report_saves', lambda run, *, wait=False: report(run, wait=wait) if wait else None)
  monkeypatch.setattr('pretrain.run.train.write_report', lambda _: None)
  assert train(tiny.decoder('train.steps=4', 'checkpoint.every=2'), tmp_path) == 0
  assert step_folders.finished(tmp_path / 'checkpoints') == [4]


FILE_TOO_LARGE = """
import resource, sys
from pretrain.checkpoints.checkpoints import Checkpoints, CheckpointConfig
from tests.pretrain.run.test_saving import POSITION, state
checkpoints = Checkpoints(sys.argv[1], CheckpointConfig())
for step in (1, 2, 3):
  limit = 10_000 if step == 2 else resource.RLIM_INFINITY
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
  checkpoints.save(step, state(100_000), POSITION, '')
  print(step, checkpoints.poll(wait=True)[0].error)
checkpoints.close()
"""


@pytest.mark.slow
@pytest.mark.skipif(resource.getrlimit(resource.RLIMIT_FSIZE)[1] != resource.RLIM_INFINITY, reason='a limit is set')
def test_a_disk_that_refuses_to_be_written_is_survived(tmp_path):
  """By the operating system itself: no file may be longer than 10 kB."""
  command = [sys.executable, '-c', FILE_TOO_LARGE, str(tmp_path)]
  done = subprocess.run(command, cwd=tiny.ROOT, capture_output=True, text=True, check=True)
  lines = done.stdout.splitlines()
  assert [lines[0], lines[2]] == ['1 None', '3 None']
  assert lines[1].startswith('2 CKPT-NOSPACE: saving step 2 needs 1 MiB, ')
  assert sorted(path.name for path in (tmp_path / 'checkpoints').iterdir()) == ['1', '3']
  assert 'Traceback' not in done.stderr, 'one line says it'


@pytest.mark.parametrize(
  ('name', 'process'),
  [
    ('state/ocdbt.process_12/d/26b1', 12), ('state/array_metadatas/process_3', 3), ('state/d/26b1', 0),
    ('position/metadata', 0), ('state/manifest.ocdbt', 0),
  ],
)  # fmt: skip
def test_a_file_is_hashed_by_the_process_that_wrote_it(name, process):
  assert owner(name) == process


def test_a_metric_that_no_evaluation_has_is_refused_before_the_run_begins(text_store, tmp_path):
  keys = ('evaluation.every=2', "checkpoint.best_of='eval/books/loss'", 'checkpoint.keep_best=1', 'train.steps=2')
  with pytest.raises(ConfigError) as caught:
    train(tiny.ul2(text_store, *keys), tmp_path)
  assert str(caught.value) == (
    "CONFIG: checkpoint.best_of='eval/books/loss' is not a metric of the held-out sets; it is eval/<set>/<kind> with a "
    'set of license and a kind of loss, text_loss, perplexity, bits_per_byte, accuracy, '
    'exact_match, e.g. eval/license/loss.'
  )
  assert list(tmp_path.iterdir()) == []


def test_a_best_step_that_is_never_evaluated_is_refused():
  with pytest.raises(ConfigError, match=r"best_of='eval/a/loss' with evaluation.every=0 is never computed; set eva"):
    tiny.decoder('checkpoint.keep_best=1', "checkpoint.best_of='eval/a/loss'")


@pytest.mark.slow
def test_a_run_keeps_its_best_step_by_what_it_has_evaluated(text_store, tmp_path, monkeypatch):
  """It keeps the second of four, which is the best, and the last one to resume from."""
  monkeypatch.setattr('pretrain.run.train.write_report', lambda _: None)
  losses = iter((2.0, 1.0, 3.0, 4.0))
  monkeypatch.setattr('pretrain.run.evaluating.evaluate_sets', lambda *_: {'eval/license/loss': next(losses)})
  keys = ('checkpoint.every=1', 'evaluation.every=1', 'checkpoint.keep=1', 'checkpoint.keep_best=1', 'train.steps=4')
  train(tiny.ul2(text_store, *keys, "checkpoint.best_of='eval/license/loss'"), tmp_path)
  assert step_folders.finished(tmp_path / 'checkpoints') == [2, 4]
