"""Copies of an array on several devices: any copy that differs is found, and its device is named."""

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import pretrain.run.train
from pretrain.checkpoints.orbax_files import Files
from pretrain.devices.mesh import MeshConfig, make_mesh
from pretrain.errors import ReplicaError
from pretrain.records.metrics import read_metrics
from pretrain.replicas.compare import Replicas
from pretrain.run import step_numbers
from pretrain.run.train import train
from tests.pretrain import tiny

pytestmark = pytest.mark.usefixtures('shared_programs')

MESH = {'data': 4, 'fsdp': 2}
PLACES = {'w': PartitionSpec('fsdp'), 'scale': PartitionSpec(), 'alone': PartitionSpec(('data', 'fsdp'))}


def tree_on(mesh):
  values = {'w': jnp.arange(32.0).reshape(8, 4) - 16, 'scale': jnp.zeros(4), 'alone': jnp.ones(8)}
  return {key: jax.device_put(x, NamedSharding(mesh, PLACES[key])) for key, x in values.items()}


@pytest.fixture(scope='module')
def checked():
  """(replicas, tree) on eight devices."""
  tree = tree_on(make_mesh(MeshConfig(**MESH)))
  return Replicas(tree, tree['w'].sharding.mesh), tree


def changed(x, device: int, change):
  """`x` with `change(values)` applied only to the copy of one device."""
  shards = []
  for number, shard in enumerate(x.addressable_shards):
    values = np.array(shard.data)
    shards.append(jax.device_put(change(values) if number == device else values, shard.device))
  return jax.make_array_from_single_device_arrays(x.shape, x.sharding, shards)


def flip(place: int, bit: int):
  def change(values):
    values.view(np.uint32).reshape(-1)[place] ^= np.uint32(1 << bit)
    return values

  return change


def judged(checked, **leaves) -> str:
  """The message for the tree with some leaves replaced."""
  replicas, tree = checked
  try:
    replicas.check(np.asarray(replicas.digests(tree | leaves)), 7, 5)
  except ReplicaError as error:
    return str(error)
  return ''


def test_equal_copies_raise_nothing(checked):
  assert judged(checked) == ''


@pytest.mark.parametrize('device', range(8))
def test_a_flipped_bit_in_any_copy_is_found_and_its_device_named(checked, device):
  """A digest of the whole array would read only one copy of each part."""
  for key in ('w', 'scale'):
    said = judged(checked, **{key: changed(checked[1][key], device, flip(3, 0))})
    assert said.startswith(f'REPLICAS: at step 7 the copy of {key} on device cpu:{device} (process 0) differs from its')
    assert 'all were equal at step 5.' in said


@pytest.mark.parametrize(
  ('key', 'change'),
  [('scale', flip(1, 31)), ('w', lambda x: x[::-1].copy()), ('w', lambda x: np.roll(x, 1)), ('w', lambda x: x / 0.5)],
  ids=['the sign of zero', 'order', 'places', 'values'],
)  # fmt: skip
def test_any_change_is_found(checked, key, change):
  assert 'on device cpu:5 ' in judged(checked, **{key: changed(checked[1][key], 5, change)})


def test_an_array_with_one_copy_is_not_compared(checked):
  assert judged(checked, alone=changed(checked[1]['alone'], 3, flip(0, 5))) == ''


def test_both_are_named_if_two_copies_differ():
  tree = {'w': tree_on(make_mesh(MeshConfig(data=2)))['w']}
  replicas = Replicas(tree, tree['w'].sharding.mesh)
  said = judged((replicas, tree), w=changed(tree['w'], 1, flip(2, 7)))
  assert 'on device cpu:0 (process 0), cpu:1 (process 0) (one of them is wrong) differs from its replicas' in said


KEYS = ('train.steps=12', 'checkpoint.every=4', 'mesh.data=4', 'replicas.every=3')


@pytest.fixture
def flips(monkeypatch):
  """`flips(step, change)`: once, after that step, a parameter changes on device 3."""
  monkeypatch.setattr(pretrain.run.train, 'write_report', lambda _: None)
  after, left = step_numbers.numbers_of, []  # what is called after each step

  def flipping(run, *rest):
    if left and left[0][0] == run.step:
      table = changed(run.state.params['embedding']['table'], 3, left.pop()[1])
      params = run.state.params | {'embedding': {'table': table}}
      run.state = dataclasses.replace(run.state, params=params)
    return after(run, *rest)

  monkeypatch.setattr(step_numbers, 'numbers_of', flipping)
  return lambda step, change: left.append((step, change))


def numbers(workdir) -> list[tuple]:
  return [(row['step'], row['loss'], row['grad_norm']) for row in read_metrics(workdir)]


@pytest.mark.slow
@pytest.mark.parametrize(
  ('step', 'found', 'alike', 'saved'), [pytest.param(5, 6, 4, ['4'], marks=pytest.mark.slow), (7, 8, 6, ['4'])]
)
def test_a_run_stops_before_the_next_save_and_resumes_from_the_one_before(tmp_path, flips, step, found, alike, saved):
  """Found at the next check (6), or before the save of step 8: no saved step has a bad copy."""
  assert train(tiny.decoder(*KEYS), tmp_path / 'alone') == 0
  flips(step, flip(17, 30))
  said = rf'at step {found} the copy of params/embedding/table .*cpu:3 .* equal at step {alike}'
  with pytest.raises(ReplicaError, match=said) as caught:
    train(tiny.decoder(*KEYS), tmp_path / 'flipped')
  assert caught.value.exit_code == 74
  assert [p.name for p in (tmp_path / 'flipped/checkpoints').iterdir()] == saved
  assert train(tiny.decoder(*KEYS), tmp_path / 'flipped') == 0
  assert numbers(tmp_path / 'flipped') == numbers(tmp_path / 'alone')


@pytest.mark.slow
def test_a_save_that_fails_at_the_same_time_does_not_hide_the_device(tmp_path, flips, monkeypatch):
  """After code 66 the run must not be started again; after 74 it may."""
  monkeypatch.setattr(Files, 'wait', lambda files: (time.sleep(1), (_ for _ in ()).throw(OSError('no such disk'))))
  flips(5, flip(17, 30))
  with pytest.raises(ReplicaError, match='at step 6 the copy of params/embedding/table'):
    train(tiny.decoder(*KEYS), tmp_path)


@pytest.mark.slow
def test_no_snapshot_has_a_bad_copy(tmp_path, flips, capsys):
  """Replicas are compared before each snapshot can be used, in addition to every `replicas.every` steps."""
  (tmp_path / 'memory').mkdir()
  keys = ('replicas.every=99', 'checkpoint.every=99', 'snapshot.every=2', f"snapshot.folder='{tmp_path / 'memory'}'")
  assert train(tiny.decoder(*KEYS, *keys), tmp_path / 'alone') == 0
  flips(5, flip(17, 30))
  with pytest.raises(ReplicaError, match=r'at step 6 the copy of params/embedding/table .*cpu:3 .* equal at step 4'):
    train(tiny.decoder(*KEYS, *keys), tmp_path / 'flipped')
  capsys.readouterr()
  assert train(tiny.decoder(*KEYS, *keys), tmp_path / 'flipped') == 0
  said = capsys.readouterr().err  # steps are faster than what writes them: 4 may have been left out
  assert 'resuming from step 4 in host RAM' in said or 'resuming from step 2 in host RAM' in said
  assert numbers(tmp_path / 'flipped') == numbers(tmp_path / 'alone')


def test_a_device_that_makes_the_loss_nonfinite_is_named(tmp_path, flips):
  """After code 71 the run must not be started again; after 74 it may."""
  keys = ('replicas.every=99', 'checkpoint.every=99', 'optimizer.max_consecutive_nonfinite=1')
  flips(2, lambda x: x * np.nan)
  with pytest.raises(ReplicaError, match=r'the copy of params/embedding/table .*cpu:3 .* equal at step 0'):
    train(tiny.decoder(*KEYS, *keys), tmp_path)
