"""Devices -> Mesh, and a host's batch -> global arrays. Only this module chooses the devices of a run."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pretrain.devices.platform import has_accelerator, set_threads, threads
from pretrain.errors import ConfigError

AXES = ('replica', 'data', 'fsdp', 'sequence', 'tensor', 'expert', 'stage')
BATCH_AXES = ('replica', 'data', 'fsdp', 'expert')
MOST_SIMULATED = 512  # with 20,000, training had not started after 40 s


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Sizes of the mesh axes; their product is the number of devices. One axis may be -1: all remaining devices.

  `replica` crosses slices (slow network), `data` copies parameters, `fsdp` shards them, `tensor` splits heads,
  MLP and vocabulary, `sequence` splits lengths, `expert` splits experts, and rows as `data` does, `stage` splits
  layers.
  """

  replica: int = 1
  data: int = 1
  fsdp: int = 1
  sequence: int = 1
  tensor: int = 1
  expert: int = 1
  stage: int = 1


def prepare_platform(cfg: MeshConfig, num_hosts: int = 1) -> None:
  """JAX runs on simulated CPU devices, as many as the mesh needs, if the machine has no accelerator.

  Call before anything starts a JAX backend.
  """
  jax.config.update('jax_threefry_partitionable', True)  # in any environment: see `train_step.PRNG`
  if 'JAX_PLATFORMS' not in os.environ and not has_accelerator():
    jax.config.update('jax_platforms', 'cpu')
  simulated_elsewhere = 'xla_force_host_platform_device_count' in os.environ.get('XLA_FLAGS', '')
  if num_hosts == 1:  # sums then have the same order under `pretrain run` as under `pretrain train`: no sockets
    jax.config.update('jax_cpu_collectives_implementation', None)
  if jax.config.jax_platforms == 'cpu' and not simulated_elsewhere:
    devices = math.prod(max(n, 1) for n in dataclasses.astuple(cfg))
    if devices > MOST_SIMULATED:
      raise ConfigError(
        f'mesh.* makes {devices} devices; a CPU simulates at most {MOST_SIMULATED}. Use smaller mesh.* values.'
      )
    if devices % num_hosts:
      raise ConfigError(
        f'mesh.* makes {devices} devices, not a multiple of {num_hosts} hosts; change --hosts or mesh.*.'
      )
    jax.config.update('jax_num_cpu_devices', devices // num_hosts)
    set_threads(devices // num_hosts)


def shares_evenly(cfg: MeshConfig, batch_size: int, num_hosts: int) -> bool:
  """Whether the devices and each batch divide into equal parts for `num_hosts` processes."""
  devices = math.prod(max(n, 1) for n in dataclasses.astuple(cfg))
  return devices % num_hosts == 0 and batch_size % num_hosts == 0


def axis_sizes(cfg: MeshConfig, num_devices: int) -> dict[str, int]:
  """The size of each mesh axis, -1 resolved; raises ConfigError when they do not fit the devices."""
  sizes = dataclasses.asdict(cfg)
  free = [axis for axis, n in sizes.items() if n == -1]
  if bad := [f'mesh.{axis}={n}' for axis, n in sizes.items() if n == 0 or n < -1]:
    raise ConfigError(f'{bad[0]} is not a size; give a number of devices >= 1, or -1 for all remaining devices.')
  if len(free) > 1:
    raise ConfigError(f'mesh.{free[0]} and mesh.{free[1]} are both -1; only one axis can take the remaining devices.')
  fixed = math.prod(n for n in sizes.values() if n != -1)
  if num_devices % fixed or (not free and fixed > num_devices):
    raise ConfigError(
      f'mesh.* needs {fixed} devices, {num_devices} are present; change mesh.{free[0] if free else "data"}.'
    )
  return sizes | {axis: num_devices // fixed for axis in free}


def make_mesh(cfg: MeshConfig, devices=None) -> Mesh:
  """The mesh over all axes of `AXES`. Extra simulated CPU devices stay idle; extra accelerators are an error."""
  devices = jax.devices() if devices is None else devices
  simulated = devices[0].platform == 'cpu'
  product = math.prod(dataclasses.astuple(cfg))
  if simulated and 0 < product <= len(devices):
    devices = devices[:product]
  if simulated:
    _check_threads(sum(device.process_index == jax.process_index() for device in devices))
  sizes = axis_sizes(cfg, len(devices))
  if math.prod(sizes.values()) != len(devices):
    raise ConfigError(f'mesh.* uses {product} of {len(devices)} devices; set one axis to -1 to use them all.')
  return _arranged(sizes, devices)


def check_memory(mesh: Mesh, kind: str, key: str) -> None:
  """Raises ConfigError where the devices of `mesh` have no memory of this kind, which `key` needs."""
  device = mesh.devices.flat[0]
  if kind not in (kinds := [memory.kind for memory in device.addressable_memories()]):
    raise ConfigError(f'{key} needs {kind} memory, and {device.device_kind} has {", ".join(kinds)} only; remove it.')


def _arranged(sizes: Mapping[str, int], devices) -> Mesh:
  """The mesh of these sizes, each axis on sides of the torus of its own where there is a way."""
  shape = tuple(sizes.values())
  # make_mesh defaults to Explicit axes; our sharding is by constraints, which need Auto.
  types = (AxisType.Auto,) * len(AXES)
  if len(slices := {getattr(d, 'slice_index', 0) for d in devices if d.platform == 'tpu'}) > 1:
    return Mesh(arrange(shape, devices, len(slices)), AXES, axis_types=types)
  try:
    return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
  except NotImplementedError:  # two axes share a side, at half of its links each
    return Mesh(arrange(shape, devices), AXES, axis_types=types)


def arrange(shape: Sequence[int], devices: Sequence[Any], slices: int = 1) -> np.ndarray:
  """Devices in the shape of a mesh; axes may share a side of a torus. Only `replica`, the first, crosses slices, so
  that only its collectives use the slow network.

  Raises ConfigError where it cannot.
  """
  if slices == 1:
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  if shape[0] % slices:
    raise ConfigError(
      f'the devices are on {slices} slices and mesh.replica={shape[0]}; set mesh.replica to a multiple of '
      f'{slices}: its axis crosses slices.'
    )
  inside, across = [shape[0] // slices, *shape[1:]], [slices, *(1 for _ in shape[1:])]
  return mesh_utils.create_hybrid_device_mesh(inside, across, devices, allow_split_physical_axes=True)


def _check_threads(devices: int) -> None:
  number = threads(jax.local_device_count())
  if devices > 1 and number <= devices:
    raise ConfigError(
      f'mesh.* uses {devices} simulated devices and XLA has {number} threads: too few, its results would be wrong '
      f'(pretrain/devices/platform.py). Set NPROC={2 * devices} before JAX starts.'
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: Mesh) -> int:
  return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def own_shards(mesh: Mesh, process: int) -> list[int]:
  """Which of the `batch_shards` equal parts of a batch are on the devices of a process, in ascending order.

  They may lie apart: a mesh follows the links of a torus, of which a host has a corner.
  """
  axes = [AXES.index(axis) for axis in BATCH_AXES]
  parts = np.moveaxis(mesh.devices, axes, range(len(axes))).reshape(batch_shards(mesh), -1)
  return [n for n, devices in enumerate(parts) if any(device.process_index == process for device in devices)]


def host_rows(mesh: Mesh, batch_size: int, process: int | None = None) -> slice | tuple[slice, ...]:
  """The rows of a global batch that a process feeds, by default this one: a slice, or several where they lie apart."""
  own, size = own_shards(mesh, jax.process_index() if process is None else process), batch_size // batch_shards(mesh)
  starts = [n for n in own if n - 1 not in own]
  stops = [n + 1 for n in own if n + 1 not in own]
  found = tuple(slice(size * a, size * b) for a, b in zip(starts, stops, strict=True))
  return found[0] if len(found) == 1 else found


def to_global(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """This process's rows of each field (`host_rows`) -> arrays sharded over the batch axes of the mesh."""
  sharding = batch_sharding(mesh)
  if jax.process_count() == 1:
    return jax.device_put(dict(batch), sharding)
  own = own_shards(mesh, jax.process_index())
  return {name: _assembled(x, own, batch_shards(mesh), sharding) for name, x in batch.items()}


def _assembled(x: np.ndarray, own: Sequence[int], number: int, sharding: NamedSharding) -> jax.Array:
  """The global array of which `x` has the parts `own`, of `number` equal ones."""
  size = len(x) // len(own)

  def part(index: tuple[slice, ...]) -> np.ndarray:
    first = size * own.index((index[0].start or 0) // size)
    return x[first : first + size]

  return jax.make_array_from_callback((size * number, *x.shape[1:]), sharding, part)
