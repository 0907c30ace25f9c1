"""Steps in an object store: saves that meet errors, damage, and changes that are cut off at any request."""

import contextlib

import pytest

from pretrain.checkpoints import manifest, orbax_stores, step_folders
from pretrain.checkpoints.checkpoints import Checkpoints
from pretrain.checkpoints.config import CheckpointConfig
from pretrain.errors import CheckpointError, ConfigError
from pretrain.workdirs.store_path import StorePath

RUN = StorePath('gs://runs/some/run')
STEPS = RUN / 'checkpoints'
CFG = CheckpointConfig(keep=2)
POSITION = {'loader': {}, 'data': {}}


@pytest.fixture(scope='module')
def saved(fake_server, state):
  """The objects of a run with steps 1 and 2."""
  store = fake_server.RequestHandlerClass.store
  store.objects.clear()
  store.faults.clear()
  assert save(state, 1, 2) == [None, None]
  return dict(store.objects)


@pytest.fixture
def run(saved, gcs):
  """A copy of it."""
  gcs.objects.update(saved)
  return gcs


def save(state, *steps: int, before_commit=lambda: None) -> list:
  """The results of saves."""
  checkpoints, ended = Checkpoints(RUN, CFG, before_commit=before_commit), []
  for step in steps:
    checkpoints.save(step, state, POSITION, '')
    ended += checkpoints.poll(wait=True)
  with contextlib.suppress(CheckpointError):
    checkpoints.close()
  return [found.error for found in ended]


def test_a_step_holds_what_was_saved_and_its_files_are_hashed_as_the_store_has_them(bucket, program, state):
  with contextlib.closing(Checkpoints(StorePath(bucket.url), CFG)) as checkpoints:
    checkpoints.save(3, state, POSITION, '')
  there = bucket.contents()
  written = manifest.decode(there['checkpoints/3/MANIFEST.json'])
  for name, file in written.files.items():
    assert len(there[f'checkpoints/3/{name}']) == file.size
  names = {name.removeprefix('checkpoints/3/') for name in there if name.startswith('checkpoints/3/')}
  assert {name for name in names if name and not name.endswith('/')} - {'MANIFEST.json'} == written.files.keys()
  with contextlib.closing(Checkpoints(StorePath(bucket.url), CFG, read_only=True)) as checkpoints:
    assert checkpoints.restore(program.abstract, 3).position == POSITION  # its values are compared with digests


@pytest.mark.parametrize(
  ('fault', 'requests'),
  [
    ({'match': 'POST .*MANIFEST', 'status': 503, 'times': 3}, 4),
    ({'match': 'POST .*MANIFEST', 'status': 429, 'times': 2}, 3),
    ({'match': 'POST .*MANIFEST', 'status': 503, 'done': True}, 2),  # the answer is lost
    ({'match': 'GET .*MANIFEST', 'status': 503, 'times': 2}, 1),
  ],
)
def test_a_commit_that_meets_errors_happens_once(gcs, state, fault, requests, monkeypatch):
  gcs.fault(**fault)
  act, seen = type(gcs).due, []
  monkeypatch.setattr(type(gcs), 'due', lambda self, what: (seen.append(what), act(self, what))[1])
  assert save(state, 1) == [None]
  assert [fault['times'] for fault in gcs.faults] == [0]
  assert sum('POST' in what and 'MANIFEST' in what for what in seen) == requests
  assert step_folders.finished(STEPS) == [1]
  assert manifest.read(STEPS / '1').step == 1


def test_the_manifest_of_another_writer_is_not_replaced(gcs, state):
  foreign = STEPS / '1' / 'MANIFEST.json'
  (error,) = save(state, 1, before_commit=lambda: foreign.write_bytes(b'of another run'))
  assert error.code == 'CKPT-WRITE'
  assert 'MANIFEST.json: it exists already, and another writer has' in str(error)
  assert foreign.read_bytes() == b'of another run'
  assert (STEPS / '1/commit_success.txt').is_file()
  assert {path.name for path in STEPS.iterdir()} == {'1'}, 'it is not being written any more'


def test_a_run_that_has_lost_its_workdir_leaves_the_files_of_the_step_to_the_new_owner(gcs, state):
  def lost():
    raise ConfigError('another run owns it')

  checkpoints = Checkpoints(RUN, CFG, before_commit=lost)
  checkpoints.save(1, state, POSITION, '')
  with pytest.raises(ConfigError, match='another run owns it'):
    checkpoints.close()
  assert (STEPS / '1/commit_success.txt').is_file()
  assert (STEPS / '1.saving').is_file()


def test_a_save_that_is_refused_is_one_line_and_the_next_one_is_its_retry(gcs, state):
  gcs.fault('POST .*checkpoints/1/state', 403, times=99)
  first, second = save(state, 1, 2)
  text = str(first)
  assert text.startswith(
    'CKPT-WRITE: saving step 1 in gs://runs/some/run/checkpoints failed: these credentials may not'
  )
  assert 'bucket runs' in text
  assert 'credentials from GOOGLE_AUTH_TOKEN_FOR_TESTING' in text
  assert '\n' not in text
  assert text.endswith('Earlier steps are intact.')
  assert second is None
  assert step_folders.finished(STEPS) == [2]
  assert not [n for n in gcs.names('runs') if '/checkpoints/1' in n]


@pytest.mark.parametrize(
  'name',
  ['state/manifest.ocdbt', *(pytest.param(x, marks=pytest.mark.slow) for x in ('MANIFEST.json', 'position/metadata'))],
)
def test_a_changed_byte_sets_the_step_aside_and_the_older_one_is_used(run, program, name, capsys):
  path = STEPS / '2' / name
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(bytes(data))
  files = (STEPS / '2').names()
  with contextlib.closing(Checkpoints(RUN, CFG)) as checkpoints:
    step = checkpoints.newest_whole()
    assert step == 1
    assert checkpoints.restore(program.abstract, step).position == POSITION
  assert f'step 2 of {STEPS}: {name}' in capsys.readouterr().err
  assert step_folders.finished(STEPS) == [1]
  assert step_folders.quarantined(STEPS) == ['2.corrupt']
  assert (STEPS / '2.corrupt').names() == files
  assert (STEPS / '2.corrupt' / name).read_bytes() == bytes(data)
  assert not (STEPS / '2').exists()
  assert not list(STEPS.glob('*.moving'))


class Killed(BaseException):
  """The process is no more."""


@pytest.fixture
def cut_off(monkeypatch):
  """`cut_off(n, act)`: does `act` up to its n-th request that changes the store; returns whether it was cut off."""

  def until(n: int, act) -> bool:
    left = [n]

    def dying(method):
      def call(self, *args, **flags):
        left[0] -= 1
        if left[0] < 0:
          raise Killed
        return method(self, *args, **flags)

      return call

    with monkeypatch.context() as patch:
      for name in ('write_bytes', 'unlink', 'remove_tree'):
        patch.setattr(StorePath, name, dying(getattr(StorePath, name)))
      try:
        act()
      except Killed:
        return True
    return False

  return until


def is_whole(step: int) -> bool:
  written = manifest.read(STEPS / str(step))
  return manifest.damage(STEPS / str(step), written, written.files) == []


@pytest.mark.parametrize('act', ['remove', 'corrupt', 'tidy'])
def test_a_change_that_is_cut_off_anywhere_is_ended_or_undone(gcs, cut_off, act):
  """A step is whole under one name, or gone; and its number can be saved again."""
  for step in (1, 2):
    for name in ('commit_success.txt', 'state/d/1'):
      (STEPS / str(step) / name).write_text(f'{name} of {step}')
    hashes = manifest.hash_files(STEPS / str(step), manifest.names_in(STEPS / str(step)))
    manifest.write(STEPS / str(step), manifest.Manifest(step, hashes, {}))
  before, files, n = dict(gcs.objects), (STEPS / '2').names(), 0
  acts = {
    'remove': lambda: step_folders.remove(STEPS, 2),
    'corrupt': lambda: step_folders.put_aside(STEPS, 2, 'corrupt'),
    'tidy': lambda: step_folders.tidy(STEPS),
  }
  while True:
    gcs.objects.clear()
    gcs.objects.update(before)
    if act == 'tidy':  # what a save that was cut off has left behind
      (STEPS / '2' / 'MANIFEST.json').unlink()
      (STEPS / '2.saving').touch()
    cut = cut_off(n, acts[act])
    listed = step_folders.finished(STEPS)
    assert all(is_whole(step) for step in listed)
    step_folders.tidy(STEPS)
    if act == 'corrupt' and not (STEPS / '2').exists():
      assert (STEPS / '2.corrupt').names() == files
    else:
      assert not (STEPS / '2.corrupt').exists()
    assert not (STEPS / '2').exists() or (STEPS / '2').names() == files
    assert {path.name for path in STEPS.iterdir()} <= {'1', '2', '2.corrupt'}
    if not cut:
      assert n >= 2
      assert step_folders.finished(STEPS) == [1]
      return
    n += 1


@pytest.mark.filterwarnings('ignore::pytest.PytestUnhandledThreadExceptionWarning')
def test_a_save_whose_process_is_gone_leaves_no_step(run, state, program):
  """Killed before the commit: the mark stays, and the next start removes everything."""

  def die():
    raise SystemExit  # it ends this thread alone

  checkpoints = Checkpoints(RUN, CFG, before_commit=die)
  checkpoints.save(3, state, POSITION, '')
  checkpoints._files.wait()
  checkpoints._saving._thread.join()
  assert (STEPS / '3.saving').is_file()
  assert step_folders.finished(STEPS) == [1, 2]
  with contextlib.closing(Checkpoints(RUN, CFG)) as again:
    assert again.newest_whole() == 2
  assert {path.name for path in STEPS.iterdir()} == {'1', '2'}


def test_steps_that_no_rule_keeps_are_removed(run, state):
  assert save(state, 3, 4) == [None, None]
  assert step_folders.finished(STEPS) == [3, 4]
  assert {path.name for path in STEPS.iterdir()} == {'3', '4'}


def test_private_names_of_orbax_are_there_and_a_missing_one_is_named(monkeypatch):
  """If this fails after an upgrade: pretrain/checkpoints/orbax_stores.py says what each name is for."""
  assert orbax_stores.missing_names() == []
  monkeypatch.delattr(orbax_stores.modules()['tensorstore_utils'], '_normalize_path')
  assert orbax_stores.missing_names() == ['orbax.checkpoint._src.serialization.tensorstore_utils._normalize_path']
  with pytest.raises(
    CheckpointError, match=r'^CKPT-ORBAX: this version of orbax-checkpoint has no orbax\..*_normalize_p'
  ):
    orbax_stores.use_stores.__wrapped__()
