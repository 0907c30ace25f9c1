"""Checkpoints on a faulty disk: a damaged step is named, set aside and never loaded; a cut-off save is no step."""

import contextlib
import dataclasses
import json
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import jax
import pytest

from pretrain.checkpoints import manifest, step_folders
from pretrain.checkpoints.checkpoints import Checkpoints, DamagedError
from pretrain.checkpoints.config import CheckpointConfig
from pretrain.cli.main import main
from pretrain.errors import CheckpointError
from pretrain.experiment.program import build_program
from pretrain.replicas import digest
from tests.pretrain import tiny

CFG = tiny.decoder().checkpoint
POSITION = {'loader': {}, 'data': {}}


@pytest.fixture(scope='module')
def saved(state, tmp_path_factory) -> pathlib.Path:
  """A run with steps 1 and 2."""
  path = tmp_path_factory.mktemp('run')
  with contextlib.closing(Checkpoints(path, CFG)) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, state, POSITION, '')
  return path


@pytest.fixture
def run(saved, tmp_path):
  """A copy of it."""
  return pathlib.Path(shutil.copytree(saved, tmp_path / 'run'))


def go_on(run: pathlib.Path, program, cfg=CFG) -> int:
  """The step that a run resumes from."""
  with contextlib.closing(Checkpoints(run, cfg)) as checkpoints:
    step = checkpoints.newest_whole()
    assert checkpoints.restore(program.abstract, step).position == POSITION
    return step


def some_file(step: pathlib.Path, pattern: str) -> pathlib.Path:
  return max(step.glob(pattern), key=lambda path: path.stat().st_size)


def flip(path: pathlib.Path, place: int = -3) -> None:
  data = bytearray(path.read_bytes())
  data[place] ^= 4
  path.write_bytes(data)


def longer(path: pathlib.Path) -> None:
  path.write_bytes(path.read_bytes() + b'\n')


def shorter(path: pathlib.Path) -> None:
  path.write_bytes(path.read_bytes()[:-1])


def symbolic_link(path: pathlib.Path) -> None:
  path.rename(path.parent / 'elsewhere')
  path.symlink_to('elsewhere')


def of_another_step(path: pathlib.Path) -> None:
  shutil.copy(path.parents[1] / '1' / path.name, path)


FILES = {  # one of each class of file
  'arrays': 'state/ocdbt.process_0/d/*', 'index': 'state/d/*', 'manifest.ocdbt': 'state/manifest.ocdbt',
  'metadata': 'state/_METADATA', 'sharding': 'state/_sharding', 'array_metadatas': 'state/array_metadatas/*',
  'position': 'position/metadata', 'config': 'config/metadata', 'commit': 'commit_success.txt',
  'step metadata': '_CHECKPOINT_METADATA',
}  # fmt: skip
DAMAGE = [
  *((pattern, flip, r' bytes\) has sha256 \w{8}.., \w{8}.. in MANIFEST.json') for pattern in FILES.values()),
  (FILES['arrays'], shorter, r' has (\d+) bytes, \d+ in MANIFEST.json'),
  (FILES['arrays'], pathlib.Path.unlink, r' \(\d+ bytes\) is missing'),
  (FILES['arrays'], symbolic_link, ' is a symbolic link'),
  (FILES['position'], longer, 'position/metadata has 27 bytes, 26 in MANIFEST.json'),
  (manifest.FILE, flip, r'MANIFEST.json \(\d+ bytes\) has changed since it was written'),
  (manifest.FILE, shorter, r'MANIFEST.json \(\d+ bytes\) has changed since it was written'),
  (manifest.FILE, pathlib.Path.unlink, 'MANIFEST.json is missing'),
  (manifest.FILE, of_another_step, 'MANIFEST.json belongs to step 1'),
]


@pytest.mark.parametrize(('pattern', 'damage', 'what'), DAMAGE)
def test_a_damaged_step_is_set_aside_and_the_run_resumes_from_the_one_before(
  run, program, capsys, pattern, damage, what
):
  damage(some_file(run / 'checkpoints/2', pattern))
  assert go_on(run, program) == 1
  err = capsys.readouterr().err
  assert err.startswith(f'CKPT-CORRUPT: step 2 of {run}/checkpoints: ')
  assert re.search(what, err), err
  assert err.endswith('. Quarantined as 2.corrupt; resuming from step 1. Nothing deleted.\n')
  assert sorted(path.name for path in (run / 'checkpoints').iterdir()) == ['1', '2.corrupt']


def resign(folder: pathlib.Path, key: str) -> None:
  """Makes the manifest that of other values at `key`."""
  written = manifest.read(folder)
  leaf = dataclasses.replace(written.leaves[key], digest='0' * 16)
  manifest.write(folder, dataclasses.replace(written, leaves={**written.leaves, key: leaf}))


def test_other_files_beside_the_steps_are_not_touched(run, program):
  names = ['notes.saving', 'old.deleting', '03']
  for name in names:
    (run / 'checkpoints' / name).mkdir()
  assert step_folders.finished(run / 'checkpoints') == [1, 2] == [*step_folders.folders(run / 'checkpoints')]
  assert go_on(run, program) == 2
  assert {path.name for path in (run / 'checkpoints').iterdir()} == {'1', '2', *names}


@pytest.mark.parametrize(
  ('part', 'what'), [('2', 'its folder is'), ('2/state', 'lies behind one'), ('2/MANIFEST.json', 'MANIFEST.json is')]
)
def test_a_step_behind_a_symbolic_link_is_not_used(run, program, capsys, part, what):
  """Anybody who can write the target could exchange it between the comparison and the reading."""
  place = run / 'checkpoints' / part
  place.rename(run / 'elsewhere')
  place.symlink_to(run / 'elsewhere')
  assert go_on(run, program) == 1
  assert 'symbolic link' in (err := capsys.readouterr().err)
  assert what in err
  assert (run / 'elsewhere').exists()


def test_verify_detects_wrong_values_in_intact_files(run, capsys):
  key = max(manifest.read(run / 'checkpoints/1').leaves)
  resign(run / 'checkpoints/1', key)
  before_manifests(run / 'checkpoints/2')
  assert main(['checkpoints', 'verify', f'--workdir={run}']) == 66
  assert capsys.readouterr().out.splitlines() == [
    f'step 1  DAMAGED     the values of {key} differ from those that were saved',
    'step 2  unverified  written before there was MANIFEST.json: nothing to compare it with',
  ]


@pytest.mark.parametrize(('pattern', 'damage', 'what'), [case for case in DAMAGE if case[0] != manifest.FILE][::4])
def test_no_reader_loads_a_damaged_step_and_none_renames_it(run, program, pattern, damage, what):
  damage(some_file(run / 'checkpoints/2', pattern))
  checkpoints = Checkpoints(run, CFG, read_only=True)
  with pytest.raises(CheckpointError, match=what) as caught:
    checkpoints.restore_params(program.abstract.params, 2)
  assert str(caught.value).endswith('Nothing was changed; restore its files from a copy, or use step 1.')
  assert '\n' not in str(caught.value)
  assert (run / 'checkpoints/2').exists()


def test_if_no_step_is_intact_none_is_renamed_and_no_run_starts_at_step_0(run):
  for step in (1, 2):
    flip(some_file(run / f'checkpoints/{step}', FILES['arrays']))
  for _ in range(2):
    with pytest.raises(
      CheckpointError, match=r'CKPT-CORRUPT: 2 checkpoints in .*, none intact \(2: state/.*; 1: state/'
    ):
      Checkpoints(run, CFG).newest_whole()
  assert sorted(path.name for path in (run / 'checkpoints').iterdir()) == ['1', '2']


def test_a_step_that_was_set_aside_still_prevents_a_start_at_step_0(run):
  for step in (1, 2):
    step_folders.quarantine(run / 'checkpoints', step)
  with pytest.raises(CheckpointError, match=r'2 checkpoints in .*2.corrupt: quarantined\). Not starting from step 0'):
    Checkpoints(run, CFG).newest_whole()


def test_a_second_damaged_step_with_the_same_number_gets_another_name(run):
  directory = run / 'checkpoints'
  names = [step_folders.quarantine(directory, 1)]
  (directory / '1').mkdir()
  names.append(step_folders.quarantine(directory, 1))
  assert names == ['1.corrupt', '1.corrupt.1']
  assert (directory / '1.corrupt' / manifest.FILE).exists()


def test_wrong_values_in_intact_files_are_detected(run, program, capsys):
  """Damage on the way to the disk: the hashes match the files, but the files differ from the state."""
  key = max(manifest.read(run / 'checkpoints/2').leaves)
  resign(run / 'checkpoints/2', key)
  checkpoints = Checkpoints(run, CFG)
  assert checkpoints.newest_whole() == 2
  with pytest.raises(DamagedError, match=f'the values of {key} differ from those that were saved'):
    checkpoints.restore(program.abstract, 2)
  assert checkpoints.newest_whole() == 1
  assert (run / 'checkpoints/2').exists(), 'until an older one has been read'
  assert checkpoints.restore(program.abstract, 1).position == POSITION
  assert 'Quarantined as 2.corrupt; resuming from step 1.' in capsys.readouterr().err
  assert not (run / 'checkpoints/2').exists()


@pytest.mark.slow
def test_if_all_values_are_wrong_no_step_is_renamed(run, program, monkeypatch):
  """The fault may be in the program."""
  mix = digest.mix
  monkeypatch.setattr(digest, 'mix', lambda x, constants: mix(x, constants) + jax.numpy.uint32(1))
  jax.clear_caches()
  checkpoints = Checkpoints(run, CFG)
  for step in (2, 1):
    assert checkpoints.newest_whole() == step
    with pytest.raises(DamagedError):
      checkpoints.restore(program.abstract, step)
  with pytest.raises(
    CheckpointError, match=r'2 checkpoints in .*, none intact \(2: the values of .*; 1: the values of '
  ):
    checkpoints.newest_whole()
  monkeypatch.undo()
  jax.clear_caches()
  assert sorted(path.name for path in (run / 'checkpoints').iterdir()) == ['1', '2']


def test_parameters_alone_are_saved_in_small_files(tmp_path, monkeypatch):
  """Orbax holds what a file will have; training writes few large files."""
  monkeypatch.setattr('pretrain.checkpoints.checkpoints.SMALL_FILE', 2**16)
  params = {'x': jax.random.normal(jax.random.key(0), (16, 2**14))}
  with contextlib.closing(Checkpoints(tmp_path, CFG)) as checkpoints:
    checkpoints.save_params(0, params, POSITION, '')
    checkpoints._save(1, {'params': params}, POSITION, '', {})
  count = lambda step: len(list((tmp_path / f'checkpoints/{step}/state/ocdbt.process_0/d').iterdir()))
  assert count(0) > 8 > 4 > count(1)
  with contextlib.closing(Checkpoints(tmp_path, CFG, read_only=True)) as checkpoints:
    for step in (0, 1):
      found = checkpoints.arrays(step, ['params/x'])['params/x']
      assert (found == params['x']).all()


def test_a_layer_can_be_read_alone(tmp_path, monkeypatch):
  """Of a large array each layer has chunks of its own; of a smaller one, all of it stays in memory meanwhile."""
  monkeypatch.setattr('pretrain.checkpoints.checkpoints.SMALL_FILE', 2**16)
  monkeypatch.setattr('pretrain.checkpoints.stored.PART', 2**14)
  params = {'x': {'y': jax.random.normal(jax.random.key(0), (4, 64, 512)), 'z': jax.numpy.float32(3)}}
  with contextlib.closing(Checkpoints(tmp_path, CFG)) as checkpoints:
    checkpoints.save_params(0, params, POSITION, '')
    checkpoints._save(1, {'params': params}, POSITION, '', {})
    monkeypatch.setattr('pretrain.checkpoints.orbax_files.CHUNK', 2**15)
    checkpoints._save(2, {'params': params}, POSITION, '', {})
  with contextlib.closing(Checkpoints(tmp_path, CFG, read_only=True)) as checkpoints:
    for step, chunk in ((0, (1, 64, 256)), (1, (4, 64, 512)), (2, (1, 64, 128))):
      found = checkpoints.stored(step, ['params/x/y', 'params/x/z'])
      y, z = found['params/x/y'], found['params/x/z']
      assert (y.shape, y._chunk, z.shape, z.all()) == ((4, 64, 512), chunk, (), 3)
      for place, part in zip(((2,), (0,), (3, 5)), y.parts([(2,), (0,), (3, 5)]), strict=True):
        assert (part == params['x']['y'][place]).all()
    broken = checkpoints.stored(0, ['params/x/y'])['params/x/y']
    for path in (tmp_path / 'checkpoints/0/state/ocdbt.process_0/d').iterdir():
      path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(CheckpointError, match=r'step 0 of .* cannot be read'):
      broken.all()


def test_a_step_can_be_saved_again_after_it_was_set_aside(run, program, state):
  flip(some_file(run / 'checkpoints/2', FILES['arrays']))
  checkpoints = Checkpoints(run, CFG)
  checkpoints.restore(program.abstract, checkpoints.newest_whole())
  checkpoints.save(2, state, POSITION, '')
  checkpoints.close()
  assert Checkpoints(run, CFG).newest_whole() == 2


def before_manifests(step: pathlib.Path) -> None:
  (step / manifest.FILE).unlink()
  (step / FILES['config']).write_text(json.dumps({'text': ''}))


def test_a_step_from_before_manifests_is_read_with_a_warning(run, program, capsys):
  before_manifests(run / 'checkpoints/2')
  checkpoints = Checkpoints(run, CFG)
  assert checkpoints.newest_whole() == 2
  assert checkpoints.restore(program.abstract, 2).position == POSITION
  assert 'CKPT-UNVERIFIED: step 2 of' in capsys.readouterr().err


def test_digests_do_not_depend_on_the_mesh(saved, program, state):
  """The arrays that one device saved, placed on 2 x 4 and on 8: equal to the digests in the manifest."""
  leaves = manifest.read(saved / 'checkpoints/2').leaves
  for mesh in (('mesh.fsdp=2', 'mesh.tensor=4'), ('mesh.fsdp=8',)):
    abstract = build_program(tiny.decoder(*mesh)).abstract
    moved = Checkpoints(saved, CFG, read_only=True).restore(abstract, 2).state
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(moved.params))
    found = digest.digests({'params': moved.params, 'opt_state': moved.opt_state})
    assert {key: digest.text(sums) for key, sums in found.items()}.items() <= {
      k: x.digest for k, x in leaves.items()
    }.items()


KILLED = """
import os, pathlib, signal
from pretrain.checkpoints import checkpoints as checkpoint
from pretrain.checkpoints import manifest
from pretrain.step import train_step
manifest.write = lambda folder, whole: os.kill(os.getpid(), signal.SIGKILL)
import jax.numpy as jnp
x = jnp.ones(3)
checkpoints = checkpoint.Checkpoints({workdir!r}, checkpoint.CheckpointConfig())
checkpoints.save(4, train_step.TrainState(x, x, x, x), {{'loader': 0, 'data': 0}}, '')
checkpoints.close()
"""


def test_a_kill_between_the_files_and_the_manifest_leaves_no_step(run, state):
  code = KILLED.format(workdir=str(run))
  done = subprocess.run([sys.executable, '-c', code], cwd=tiny.ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
  directory = run / 'checkpoints'
  assert sorted(path.name for path in directory.iterdir()) == ['1', '2', '4', '4.saving']
  assert (directory / '4' / step_folders.ORBAX_COMMIT).exists(), 'to Orbax it is a step'
  assert Checkpoints(run, CFG, read_only=True).latest() == 2
  checkpoints = Checkpoints(run, CFG)
  assert checkpoints.newest_whole() == 2
  checkpoints.save(4, state, POSITION, '')
  checkpoints.close()
  assert sorted(path.name for path in directory.iterdir()) == ['1', '2', '4']


def test_a_kill_after_the_manifest_leaves_a_step(run):
  step_folders.begin(run / 'checkpoints', 2)
  assert Checkpoints(run, CFG).newest_whole() == 2
  assert not step_folders.is_marked(run / 'checkpoints', 2)


def test_a_removal_that_was_cut_off_is_finished_at_the_next_start(run):
  (run / 'checkpoints/1').rename(run / 'checkpoints/1.deleting')
  assert Checkpoints(run, CFG).newest_whole() == 2
  assert sorted(path.name for path in (run / 'checkpoints').iterdir()) == ['2']


def test_the_best_steps_are_kept_and_the_newest_is_resumed_from(state, tmp_path):
  cfg = CheckpointConfig(keep=1, keep_best=2, best_of='eval/a/loss')
  with contextlib.closing(Checkpoints(tmp_path, cfg)) as checkpoints:
    for step, loss in enumerate((3.0, 1.0, float('nan'), 2.0, 5.0), 1):
      checkpoints.save(step, state, POSITION, '', {'eval/a/loss': loss})
  assert step_folders.finished(tmp_path / 'checkpoints') == [2, 4, 5]
  assert Checkpoints(tmp_path, cfg).newest_whole() == 5


def test_the_highest_accuracy_is_the_best(state, tmp_path):
  cfg = CheckpointConfig(keep=1, keep_best=1, best_of='eval/a/accuracy')
  with contextlib.closing(Checkpoints(tmp_path, cfg)) as checkpoints:
    for step, accuracy in enumerate((0.1, 0.9, 0.2), 1):
      checkpoints.save(step, state, POSITION, '', {'eval/a/accuracy': accuracy})
  assert step_folders.finished(tmp_path / 'checkpoints') == [2, 3]


def test_verify_prints_a_line_for_each_step_and_exits_with_the_worst_code(run, capsys, monkeypatch):
  monkeypatch.setattr('pretrain.tools.verify.GROUP_BYTES', 300_000)  # several reads
  assert main(['checkpoints', 'verify', f'--workdir={run}', '--steps=2']) == 0
  assert [line.split()[:3] for line in capsys.readouterr().out.splitlines()] == [['step', '2', 'whole']]
  flip(file := some_file(run / 'checkpoints/2', FILES['arrays']))
  assert main(['checkpoints', 'verify', f'--workdir={run}']) == 66
  first, second = capsys.readouterr().out.splitlines()
  assert first.startswith('step 1  whole')
  name = file.relative_to(run / 'checkpoints/2')
  assert second.startswith(f'step 2  DAMAGED     {name} ({file.stat().st_size} bytes) has sha256 ')
