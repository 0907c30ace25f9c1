"""Runs with moments in the host's memory: the same losses and files as without; a run may turn it on and off."""

import jax
import numpy as np
import pytest

from pretrain.checkpoints import manifest
from pretrain.cli.main import main
from pretrain.config import bindings
from pretrain.devices.mesh import MeshConfig, make_mesh
from pretrain.errors import ConfigError
from pretrain.experiment import program
from pretrain.replicas import digest
from pretrain.replicas.compare import Replicas
from pretrain.run.train import train
from pretrain.snapshots.layout import Copies, Layout, assemble
from pretrain.testing import logged_losses
from tests.pretrain import tiny

ON = "optimizer.offload=['moments']"
KEPT_AWAY = "model.remat='save_qkv_proj'", "model.remat_offload=['query']"
KEYS = (
  'mesh.data=2', 'mesh.fsdp=2', 'checkpoint.every=2', 'checkpoint.keep=9', 'replicas.every=1', 'snapshot.every=1',
  "spikes.name='skip'", "averaging.name='ema'",
)  # fmt: skip


def leaves_of(workdir, step: int) -> dict[str, str]:
  """The digest of each array of a saved step."""
  return {name: leaf.digest for name, leaf in manifest.read(workdir / f'checkpoints/{step}').leaves.items()}


@pytest.mark.slow
def test_a_run_may_turn_it_on_and_off_and_saves_the_same_bits(tmp_path, capsys):
  train(tiny.decoder(*KEYS, 'train.steps=6'), tmp_path / 'plain')
  train(tiny.decoder(*KEYS, 'train.steps=2', ON), tmp_path / 'switched')
  train(tiny.decoder(*KEYS, 'train.steps=4'), tmp_path / 'switched')
  train(tiny.decoder(*KEYS, 'train.steps=6', ON, 'mesh.data=4', 'mesh.fsdp=1'), tmp_path / 'switched')
  for step in (2, 4):
    assert leaves_of(tmp_path / 'switched', step) == leaves_of(tmp_path / 'plain', step), step
  plain, switched = (dict(logged_losses(tmp_path / name)) for name in ('plain', 'switched'))
  assert [switched[step] for step in range(1, 5)] == [plain[step] for step in range(1, 5)]
  np.testing.assert_allclose(switched[6], plain[6], rtol=1e-5)  # on another mesh
  capsys.readouterr()
  assert main(['checkpoints', 'verify', f'--workdir={tmp_path / "switched"}']) == 0


@pytest.fixture(scope='module')
def away():
  """An array of the host's memory on four devices, two copies of each half."""
  mesh = make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('fsdp'), memory_kind='pinned_host')
  return mesh, jax.device_put(np.arange(24, dtype=np.float32).reshape(6, 4), place)


def test_a_digest_is_that_of_an_array_on_the_device(away):
  mesh, x = away
  assert digest.text(digest.sums(x)) == digest.text(digest.sums(np.asarray(x)))
  shape = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
  replicas = Replicas({'mu': shape, 'nu': shape}, mesh)
  replicas.check(np.asarray(replicas.digests({'mu': x, 'nu': x})), 3, 2)


def test_a_snapshot_brings_it_back_to_the_hosts_memory(away):
  _, x = away
  abstract = {'mu': jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)}
  layout = Layout(abstract)
  pieces = {(p.leaf, p.index): np.asarray(copy).reshape(-1) for p, copy in Copies(layout, 0).begin({'mu': x})}
  restored = assemble(abstract, layout, 0, lambda p: pieces[p.leaf, p.index].view(np.uint8))['mu']
  assert restored.sharding == x.sharding
  np.testing.assert_array_equal(restored, x)


@pytest.mark.parametrize(
  ('overrides', 'key'),
  [([ON], r"optimizer\.offload=\['moments'\]"), (KEPT_AWAY, r"model\.remat_offload=\['query'\]")],
)
def test_a_platform_without_this_memory_is_refused(monkeypatch, overrides, key):
  monkeypatch.setattr(program, 'HOST', 'tape')
  with pytest.raises(ConfigError, match=rf'{key} needs tape memory, and cpu has .* remove it'):
    program.build_program(tiny.decoder(*overrides))


@pytest.mark.parametrize(
  ('overrides', 'message'),
  [
    (("optimizer.offload=['gradients']",), r"optimizer\.offload\[0\]='gradients' is not one of 'moments'"),
    (
      ("optimizer.name='adafactor'", ON),
      r"optimizer\.offload has 'moments', and optimizer\.name='adafactor' with optimizer\.momentum=0\.0 has none of a "
      "parameter's size; remove it",
    ),
  ],
)
def test_what_cannot_move_is_refused(overrides, message):
  with pytest.raises(ConfigError, match=message):
    tiny.decoder(*overrides)


def test_a_config_without_it_is_written_as_before():
  assert 'offload' not in bindings.render(tiny.decoder())
  assert "optimizer.offload = ('moments',)\n" in bindings.render(tiny.decoder(ON))
