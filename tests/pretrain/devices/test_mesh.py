"""Mesh sizes, the rows of hosts, and the errors for sizes that do not fit."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from data.batches.batches import ranges
from pretrain.devices.chips import parse
from pretrain.devices.mesh import (
  AXES,
  MeshConfig,
  arrange,
  axis_sizes,
  batch_sharding,
  batch_shards,
  check_memory,
  host_rows,
  make_mesh,
  own_shards,
  prepare_platform,
  to_global,
)
from pretrain.errors import ConfigError
from pretrain.planner.torus import places


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


def test_a_host_of_several_places_its_rows(monkeypatch):
  """As the only one of two: it has all parts. Batches of shorter rows have more rows."""
  mesh = make_mesh(MeshConfig(data=2, tensor=2, expert=2))
  rows = np.arange(24, dtype=np.int32).reshape(12, 2)
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  placed = to_global({'x': rows}, mesh)['x']
  assert placed.sharding == batch_sharding(mesh)
  np.testing.assert_array_equal(jax.device_get(placed), rows)


def of_hosts(topology: str, slices: int, **sizes: int):
  """A mesh over devices that are not there, four chips of 2 x 2 on each host."""
  of = parse(topology, slices)
  host = lambda d: (d.slice_index, *(at // side for at, side in zip(d.coords, (2, 2, 1), strict=True)))
  devices = places(of)
  numbers = {at: n for n, at in enumerate(dict.fromkeys(map(host, devices)))}
  devices = [dataclasses.replace(d, process_index=numbers[host(d)]) for d in devices]
  shape = dict.fromkeys(AXES, 1) | sizes
  return types.SimpleNamespace(devices=arrange(tuple(shape.values()), devices, slices), shape=shape), len(numbers)


@pytest.mark.parametrize(
  ('topology', 'slices', 'sizes'),
  [
    ('v5p:4x4x4', 1, {'fsdp': 64}), ('v5p:2x2x2', 2, {'replica': 2, 'fsdp': 8}), ('v5e:4x4', 1, {'data': 4, 'fsdp': 4}),
    ('v5p:4x4x4', 2, {'replica': 2, 'fsdp': 16, 'tensor': 4}),
  ],
)  # fmt: skip
def test_each_row_of_a_batch_is_fed_by_the_hosts_that_have_its_devices(topology, slices, sizes):
  """A host has a corner of the torus, so its rows lie apart; together the hosts have every row."""
  mesh, hosts = of_hosts(topology, slices, **sizes)
  batch_size = 2 * batch_shards(mesh)
  taken = [host_rows(mesh, batch_size, process) for process in range(hosts)]
  own = [[row for part in ranges(rows) for row in range(part.start, part.stop)] for rows in taken]
  assert sorted({row for rows in own for row in rows}) == list(range(batch_size))
  assert all(rows == sorted(rows) and len(rows) == 2 * len(own_shards(mesh, n)) for n, rows in enumerate(own))
  assert topology != 'v5p:4x4x4' or any(not isinstance(rows, slice) for rows in taken)


def test_neighbouring_rows_of_a_host_are_one_slice():
  mesh, _ = of_hosts('v5p:4x4x4', 1, fsdp=64)
  assert own_shards(mesh, 0) == [0, 4, 16, 20]
  assert host_rows(mesh, 128, 0) == (slice(0, 2), slice(8, 10), slice(32, 34), slice(40, 42))
  mesh, _ = of_hosts('v5e:2x4', 1, fsdp=8)
  assert [host_rows(mesh, 16, n) for n in range(2)] == [slice(0, 8), slice(8, 16)]


def test_replicas_are_slices_and_the_ring_of_fsdp_follows_the_torus():
  """fsdp=4 on a ring of four chips: neighbours are one hop apart, and partners in the other slice at the same place."""
  mesh, _ = of_hosts('v5p:4x4x4', 2, replica=2, fsdp=4, tensor=16)
  grid = mesh.devices.reshape(2, 4, 16)
  assert [{d.slice_index for d in part.flat} for part in grid] == [{0}, {1}]
  for one, other in zip(grid[0].flat, grid[1].flat, strict=True):
    assert one.coords == other.coords
  for ring in grid.transpose(0, 2, 1).reshape(-1, 4):
    steps = [np.subtract(b.coords, a.coords) % 4 for a, b in zip(ring, np.roll(ring, -1), strict=True)]
    assert {tuple(sorted(step.tolist())) for step in steps} <= {(0, 0, 1), (0, 0, 3)}


def test_too_few_threads_are_refused(monkeypatch):
  monkeypatch.setenv('NPROC', '8')
  with pytest.raises(
    ConfigError, match=r'mesh.\* uses 8 simulated devices and XLA has 8 threads.* Set NPROC=16 before'
  ):
    make_mesh(MeshConfig(fsdp=8))
  make_mesh(MeshConfig(fsdp=4))
  make_mesh(MeshConfig())
