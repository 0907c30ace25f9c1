"""Mesh sizes, the rows of hosts, and the errors for sizes that do not fit."""

import jax
import numpy as np
import pytest

from pretrain.devices.mesh import (
  AXES,
  MeshConfig,
  axis_sizes,
  batch_sharding,
  check_memory,
  host_rows,
  make_mesh,
  prepare_platform,
  to_global,
)
from pretrain.errors import ConfigError


def test_a_memory_that_a_device_lacks_is_named_with_those_that_it_has():
  mesh = make_mesh(MeshConfig())
  check_memory(mesh, 'pinned_host', 'model.remat_offload')
  with pytest.raises(ConfigError, match=r'model\.remat_offload needs tape memory, and cpu has device, .* only; remove'):
    check_memory(mesh, 'tape', 'model.remat_offload')


def test_every_mesh_has_all_axes():
  mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
  assert tuple(mesh.axis_names) == AXES
  assert (mesh.shape['fsdp'], mesh.shape['tensor'], mesh.shape['data']) == (4, 2, 1)


def test_one_axis_takes_the_remaining_devices():
  assert axis_sizes(MeshConfig(data=-1, tensor=2), 8)['data'] == 4


@pytest.mark.parametrize(
  ('cfg', 'message'),
  [
    (MeshConfig(data=-1, fsdp=-1), 'mesh.data and mesh.fsdp are both -1'),
    (MeshConfig(data=3), r'mesh.\* needs 3 devices, 8 are present'),
    (MeshConfig(tensor=0), 'mesh.tensor=0 is not a size'),
    (MeshConfig(data=16), r'mesh.\* needs 16 devices, 8 are present'),
  ],
)
def test_sizes_that_do_not_fit_are_refused(cfg, message):
  with pytest.raises(ConfigError, match=message):
    axis_sizes(cfg, 8)


def test_a_cpu_simulates_a_limited_number_of_devices(monkeypatch):
  monkeypatch.delenv('XLA_FLAGS')
  with pytest.raises(ConfigError, match=r'mesh.\* makes 20000 devices; a CPU simulates at most 512'):
    prepare_platform(MeshConfig(data=20_000))


def test_a_batch_is_sharded_over_the_batch_axes_in_order():
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  batch = {'x': np.arange(8, dtype=np.int32).reshape(4, 2)}
  placed = to_global(batch, mesh)['x']
  assert placed.sharding == batch_sharding(mesh)
  np.testing.assert_array_equal(jax.device_get(placed), batch['x'])
  assert host_rows(mesh, 4) == slice(0, 4)


def test_too_few_threads_are_refused(monkeypatch):
  monkeypatch.setenv('NPROC', '8')
  with pytest.raises(
    ConfigError, match=r'mesh.\* uses 8 simulated devices and XLA has 8 threads.* Set NPROC=16 before'
  ):
    make_mesh(MeshConfig(fsdp=8))
  make_mesh(MeshConfig(fsdp=4))
  make_mesh(MeshConfig())
