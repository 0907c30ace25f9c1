"""Runs with state in the host's memory: the losses and files of runs without; a run may turn it on and off."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from models.decode.writing import greedy
from models.host_memory import HOST
from models.specs import is_spec
from pretrain.checkpoints import manifest
from pretrain.cli.main import main
from pretrain.config import bindings
from pretrain.devices.mesh import MeshConfig, make_mesh
from pretrain.errors import ConfigError
from pretrain.evaluation.writer import ONE_DEVICE, program_for
from pretrain.experiment import program
from pretrain.experiment.rules.offload import check_offload
from pretrain.optim.offload import moves_parameter
from pretrain.replicas import digest
from pretrain.replicas.compare import Replicas
from pretrain.run.train import train
from pretrain.snapshots.layout import Copies, Layout, assemble
from pretrain.testing import logged_losses
from tests.models import small
from tests.pretrain import tiny

ON = "optimizer.offload=['moments']"
LAYERS = "optimizer.offload=['parameters']"
BOTH = "optimizer.offload=['moments', 'parameters']"
FULL = LAYERS, "model.remat='full'"
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


@pytest.mark.slow
@pytest.mark.parametrize(
  ('layout', 'offload'),
  [
    (('mesh.data=2', 'mesh.fsdp=2'), LAYERS),
    (('mesh.fsdp=2', 'mesh.tensor=2', 'train.accumulate=2'), BOTH),
    (('mesh.replica=2', 'mesh.fsdp=2', "optimizer.name='adafactor'"), LAYERS),
    (('mesh.expert=2', 'model.experts=4', 'model.experts_per_token=2', 'optimizer.parameter_scale=True'), BOTH),
    (('mesh.fsdp=2', "optimizer.name='muon'", "model.remat='dots'"), BOTH),
    (
      (
        'mesh.fsdp=2',
        "optimizer.name='lion'",
        "precision.recipe='fp8_delayed'",
        'precision.amax_history=4',
        *KEPT_AWAY,
      ),
      BOTH,
    ),
  ],
)
def test_parameters_on_the_host_are_trained_and_evaluated_as_on_the_device(layout, offload, tmp_path, text_store):
  """To rounding: an update is added to its parameter by an operation of its own. The key is turned on and off."""
  keys = ("model.remat='full'", *layout, 'checkpoint.every=2', 'checkpoint.keep=9', 'evaluation.every=2')
  train(tiny.ul2(text_store, *keys, 'train.steps=4'), tmp_path / 'plain')
  train(tiny.ul2(text_store, *keys, 'train.steps=2', offload), tmp_path / 'switched')
  train(tiny.ul2(text_store, *keys, 'train.steps=3'), tmp_path / 'switched')
  train(tiny.ul2(text_store, *keys, 'train.steps=4', offload), tmp_path / 'switched')
  for name in ('loss', 'eval/license/loss'):
    plain, switched = (of_rows(tmp_path / run, name) for run in ('plain', 'switched'))
    assert {2, 4} <= plain.keys() <= switched.keys()
    np.testing.assert_allclose([switched[step] for step in plain], [*plain.values()], rtol=1e-5)


@pytest.mark.slow
def test_layers_in_groups_come_from_the_host_too(tmp_path):
  """Layers whose windows differ are scanned in groups of several."""
  keys = ("model.remat='full'", 'train.steps=3', 'model.windows=[16, None]', 'model.layers=4')
  for name, more in (('plain', ()), ('away', (BOTH,))):
    train(tiny.decoder(*keys, *more), tmp_path / name)
  plain, away = (dict(logged_losses(tmp_path / name)) for name in ('plain', 'away'))
  np.testing.assert_allclose([*away.values()], [*plain.values()], rtol=1e-5)


def of_rows(workdir, name: str) -> dict[int, float]:
  """A number of the metrics, by step."""
  rows = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
  return {row['step']: float(row[name]) for row in rows if name in row}


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(tmp_path):
  keys = ('mesh.fsdp=4', "model.remat='full'", 'checkpoint.every=2', 'checkpoint.keep=9', BOTH)
  train(tiny.decoder(*keys, 'train.steps=4'), tmp_path / 'whole')
  train(tiny.decoder(*keys, 'train.steps=2'), tmp_path / 'parts')
  train(tiny.decoder(*keys, 'train.steps=4'), tmp_path / 'parts')
  assert leaves_of(tmp_path / 'parts', 4) == leaves_of(tmp_path / 'whole', 4)
  assert dict(logged_losses(tmp_path / 'parts')) == dict(logged_losses(tmp_path / 'whole'))


def test_the_matrices_of_layers_lie_on_the_host():
  """As long as they are trained; a stack of one layer, and commands that read a run, have them on the device."""
  on = jax.devices()[0].default_memory().kind
  places = lambda own: {
    '/'.join(path): leaf.sharding.memory_kind for path, leaf in flatten_dict(dict(own.abstract.params)).items()
  }
  found = places(program.build_program(tiny.decoder(*FULL)))
  away = {path for path, kind in found.items() if kind == HOST}
  assert away == {path for path in found if 'blocks' in path and 'norm' not in path} != set()
  assert {found[path] for path in found.keys() - away} == {on}
  assert set(places(program.build_program(tiny.decoder(*FULL, 'model.layers=1'))).values()) == {on}
  assert set(places(program_for(tiny.decoder(*FULL), ONE_DEVICE)).values()) == {on}


@pytest.mark.parametrize('cfg', [small.LLAMA, small.T5], ids=lambda cfg: cfg.name)
def test_a_text_is_written_from_parameters_on_the_host(cfg):
  """Decoding brings each layer to the device: the tokens are those of the same parameters there."""
  model, params = small.model_and_params(cfg)
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  place = lambda spec: device.with_memory_kind(HOST) if moves_parameter(('parameters',), spec) else device
  away = jax.device_put(params, jax.tree.map(place, model.specs, is_leaf=is_spec))
  assert HOST in {x.sharding.memory_kind for x in jax.tree.leaves(away)}
  write = jax.jit(lambda params: greedy(model, params, small.batch(), 6, **small.IDS))
  np.testing.assert_array_equal(write(away), write(params))


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
  [
    ([ON], r"optimizer\.offload=\['moments'\]"),
    ([LAYERS, "model.remat='full'"], r"optimizer\.offload=\['parameters'\]"),
    (KEPT_AWAY, r"model\.remat_offload=\['query'\]"),
  ],
)
def test_a_platform_without_this_memory_is_refused(monkeypatch, overrides, key):
  monkeypatch.setattr(program, 'HOST', 'tape')
  with pytest.raises(ConfigError, match=rf'{key} needs tape memory, and cpu has .* remove it'):
    program.build_program(tiny.decoder(*overrides))


@pytest.mark.parametrize(
  ('overrides', 'message'),
  [
    (
      ("optimizer.offload=['gradients']",),
      r"optimizer\.offload\[0\]='gradients' is not one of 'moments', 'parameters'",
    ),
    (
      ("optimizer.name='adafactor'", ON),
      r"optimizer\.offload has 'moments', and optimizer\.name='adafactor' with optimizer\.momentum=0\.0 has none of a "
      "parameter's size; remove it",
    ),
    *(
      (keys, rf"optimizer\.offload=\['parameters'\] with {message}, or leave 'parameters' out")
      for keys, message in (
        (
          (LAYERS, "model.remat='none'"),
          r"model\.remat='none', which keeps .*; use model\.remat='full' or another policy",
        ),
        ((*FULL, 'mesh.stage=2'), r'mesh\.stage=2, whose stages .*; use mesh\.stage=1'),
        ((*FULL, 'lora.rank=4'), r'lora\.rank=4, which trains adapters alone.*; use lora\.rank=0'),
        (
          (*FULL, "precision.recipe='int8'", 'precision.first_layers=1'),
          r'precision\.first_layers=1 and precision\.last_layers=0, .*; use 0 of both',
        ),
        ((*FULL, "averaging.name='ema'"), r"averaging\.name='ema', which reads .*; use averaging\.name='none'"),
        (
          (*FULL, 'model.windows=[8, None]'),
          r'model\.windows of 2 layers, which are .*; use fewer windows, which repeat',
        ),
        ((*FULL, "sparsity.name='fixed'"), r"sparsity\.name='fixed', which reads .*; use sparsity\.name='none'"),
      )
    ),
  ],
)
def test_what_cannot_move_is_refused(overrides, message):
  with pytest.raises(ConfigError, match=message):
    tiny.decoder(*overrides)


def test_averages_of_several_steps_are_refused():
  cfg = tiny.decoder(*FULL)
  cfg = dataclasses.replace(cfg, evaluation=dataclasses.replace(cfg.evaluation, lawa_checkpoints=2))
  with pytest.raises(ConfigError, match=r'lawa_checkpoints=2, which adds up .*; use evaluation\.lawa_checkpoints=0'):
    check_offload(cfg, stages=1)


def test_a_config_without_it_is_written_as_before():
  assert 'offload' not in bindings.render(tiny.decoder())
  assert "optimizer.offload = ('moments',)\n" in bindings.render(tiny.decoder(ON))
