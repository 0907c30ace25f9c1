"""Checkpoints whose files are missing or damaged: one sentence that names the step and what to do."""

import pathlib
import shutil

import pytest

from pretrain.checkpoint import Checkpoints
from pretrain.errors import CheckpointError
from pretrain.runtime import build_program
from tests.pretrain import tiny


@pytest.fixture(scope='module')
def program():
  return build_program(tiny.decoder())


@pytest.fixture(scope='module')
def saved(program, tmp_path_factory) -> pathlib.Path:
  """A run with steps 1 and 2."""
  path, state = tmp_path_factory.mktemp('run'), program.init()
  checkpoints = Checkpoints(path, tiny.decoder().checkpoint)
  for step in (1, 2):
    checkpoints.save(step, state, {'loader': {}, 'data': {}}, '')
  checkpoints.close()
  return path


def no_position(step):
  shutil.rmtree(step / 'position')


def position_without_data(step):
  (step / 'position/metadata').write_text('{"loader": {}}')


def position_no_json(step):
  (step / 'position/metadata').write_text('{')


def no_state(step):
  shutil.rmtree(step / 'state')


def no_metadata(step):
  (step / 'state/_METADATA').unlink()


def damaged_arrays(step):
  for path in (step / 'state/ocdbt.process_0/d').iterdir():
    path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize(
  ('damage', 'what'),
  [
    (no_position, 'position/metadata is missing'),
    (position_without_data, "its position has no 'data'"),
    (position_no_json, 'Expecting property name'),
    (no_state, 'state/_METADATA is missing'),
    (no_metadata, 'state/_METADATA is missing'),
    (damaged_arrays, 'Error reading'),
  ],
)
def test_a_damaged_checkpoint_is_named(saved, program, tmp_path, damage, what):
  shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
  damage(tmp_path / 'checkpoints/2')
  checkpoints = Checkpoints(tmp_path, tiny.decoder().checkpoint)
  with pytest.raises(CheckpointError) as caught:
    checkpoints.restore(program.abstract, checkpoints.latest())
  message = str(caught.value)
  assert message.startswith(f'CKPT-CORRUPT: step 2 of {tmp_path}/checkpoints cannot be read: ')
  assert what in message
  assert message.endswith(f'or move {tmp_path}/checkpoints/2 away to go on from step 1.')
  assert '\n' not in message


def test_the_step_before_a_damaged_one_restores(saved, program, tmp_path):
  """The advice, followed."""
  shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
  shutil.rmtree(tmp_path / 'checkpoints/2')
  checkpoints = Checkpoints(tmp_path, tiny.decoder().checkpoint)
  assert checkpoints.restore(program.abstract, checkpoints.latest()).position == {'loader': {}, 'data': {}}
