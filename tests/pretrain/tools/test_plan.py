"""Compiling for a TPU without one. A missing libtpu fails these tests: `./scripts/setup.sh --dev` installs it."""

import importlib.metadata
import importlib.util
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from data.batches.source import open_data
from pretrain.devices.compilation_cache import cache_dir
from pretrain.errors import ConfigError
from pretrain.experiment.program import build_program
from pretrain.tools.plan import abstract_batch, compile_for, tpu_devices
from tests.pretrain import tiny
from tests.pretrain.evaluation.test_generate import config_of, store_for  # noqa: F401

pytestmark = pytest.mark.aot


@pytest.fixture
def mesh():
  return jax.make_mesh((8,), ('fsdp',), axis_types=(AxisType.Auto,), devices=tpu_devices('v5e:2x4'))


def matrix(mesh, spec, dim=1024):
  return jax.ShapeDtypeStruct((dim, dim), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))


def test_memory_is_counted_per_device(mesh):
  product = jax.jit(jnp.matmul, out_shardings=NamedSharding(mesh, PartitionSpec('fsdp')))
  whole, shard = 1024 * 1024 * 4, 1024 * 1024 * 4 // 8
  memory, compiled = compile_for(product, (matrix(mesh, ('fsdp',)), matrix(mesh, ())))
  assert (memory.arguments, memory.outputs, memory.donated) == (shard + whole, shard, 0)
  assert memory.total >= 2 * shard + whole
  assert 'fusion' in compiled.as_text() or 'convolution' in compiled.as_text()


def test_a_donated_argument_is_counted_once(mesh):
  double = jax.jit(lambda x: x * 2, donate_argnums=0)
  memory, _ = compile_for(double, (matrix(mesh, ('fsdp',)),))
  assert memory.donated == memory.outputs == memory.arguments
  assert memory.total == memory.arguments + memory.temporaries + memory.code


def test_a_program_that_does_not_fit_is_refused(mesh):
  with pytest.raises(ConfigError, match=r'^CONFIG: RESOURCE_EXHAUSTED: .* Use more devices'):
    compile_for(jax.jit(lambda x: x @ x), (matrix(mesh, (), dim=2**16),))


@pytest.mark.parametrize(
  ('objective', 'overrides'),
  [
    ('supervised', ()), ('supervised+encoder', ()), ('prefix_lm', ()), ('instruction', ()),
    ('instruction', ('objective.prefix_attention=False',)),
  ],
)  # fmt: skip
def test_a_planned_batch_has_the_shapes_of_training(store_for, objective, overrides):  # noqa: F811
  cfg = config_of(store_for(objective), objective, *overrides)
  data = open_data(cfg.data, cfg.objective, seed=0, vocab_size=cfg.model.vocab_size, cache_dir=cache_dir())
  shapes = lambda batch: {name: (x.shape, x.dtype) for name, x in batch.items()}
  real = data.batch(0, slice(0, cfg.data.batch_size))
  assert shapes(abstract_batch(cfg, build_program(cfg))) == shapes(real)


def test_a_slice_that_does_not_exist_is_refused():
  with pytest.raises(ConfigError, match=r'^CONFIG: --topology=v9:1 is not a TPU slice; write .* e\.g\. v5e:2x4'):
    tpu_devices('v9:1')


def test_a_torus_is_compiled_for_as_one():
  """A gather over all devices of v5p:4x4x4 runs over three rings at once; without rings libtpu takes another way."""
  from jax.experimental import topologies

  def gathered(devices) -> str:
    mesh = jax.make_mesh((64,), ('fsdp',), axis_types=(AxisType.Auto,), devices=devices)
    whole = jax.jit(lambda x: x * 2, out_shardings=NamedSharding(mesh, PartitionSpec()))
    return whole.lower(matrix(mesh, ('fsdp',), 4096)).compile().as_text()

  torus = tpu_devices('v5p:4x4x4')  # first: it says how libtpu is to be loaded
  flat = topologies.get_topology_desc(platform='tpu', topology_name='v5p:4x4x4').devices
  assert '3DAllGather' in gathered(torus)
  assert '3DAllGather' not in gathered(list(flat))


def test_slices_have_devices_of_their_own():
  found = [device.slice_index for device in tpu_devices('v5p:2x2x1', 2)]
  assert sorted(found) == [0] * 4 + [1] * 4


def test_a_libtpu_that_jax_is_not_made_for_is_named(monkeypatch):
  real = importlib.metadata.version
  monkeypatch.setattr(importlib.metadata, 'version', lambda name: '0.0.1.2' if name == 'libtpu' else real(name))
  with pytest.raises(ConfigError, match=r'needs libtpu 0\.0\.\d+\.\*, which JAX .* libtpu 0\.0\.1\.2 is installed'):
    tpu_devices('v5e:2x4')


def test_a_missing_libtpu_says_how_to_install_it(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ConfigError, match=r'needs libtpu, which is not installed; run ./scripts/setup.sh --dev\.'):
    tpu_devices('v5e:2x4')


@pytest.mark.slow
@pytest.mark.parametrize(
  ('file', 'sizes'),
  [(tiny.UL2, tiny.SMALL), *(pytest.param(file, (), marks=pytest.mark.slow) for file in (tiny.UL2, tiny.ENCODER))],
  ids=['small ul2', 'ul2', 'encoder'],
)
def test_the_train_step_compiles_for_eight_tpus(file, sizes):
  """In a process of its own, as users run it: the mesh of a program is global to a process."""
  flags = [f'--gin_file={file}', *(f'--gin.{key}' for key in sizes), '--topology=v5e:2x4']
  done = subprocess.run(
    [sys.executable, '-m', 'pretrain', 'plan', *flags], cwd=tiny.ROOT, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr[-3000:]
  names = [line.split()[0] for line in done.stdout.splitlines()[1:]]
  assert names == ['arguments', 'outputs', 'donated', 'temporaries', 'code', 'total']
  assert 'Involuntary full rematerialization' not in done.stderr


def test_only_replicas_cross_slices():
  """Two slices of eight chips: along every other axis of the mesh all devices are on one slice."""
  from pretrain.devices.mesh import MeshConfig, make_mesh

  tpu_devices('v5e:2x4')  # sets the environment
  topology = jax.experimental.topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x4', num_slices=2)
  mesh = make_mesh(MeshConfig(replica=4, fsdp=4), topology.devices)
  assert [{device.slice_index for device in row} for row in mesh.devices.reshape(4, -1)] == [{0}, {0}, {1}, {1}]
  with pytest.raises(ConfigError, match=r'the devices are on 2 slices and mesh.replica=1; set mesh.replica to a mult'):
    make_mesh(MeshConfig(fsdp=16), topology.devices)
