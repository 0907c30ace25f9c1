"""Compares the copies of an array on different devices bit for bit: a difference shows that a device computed wrongly.

Each device digests its own buffers (`digest.sums`), so that a copy that no other device reads is checked too. One
gather gives all digests to all processes, which reach the same result. An array without a second copy is not checked.
Source: Google 2024, arXiv:2312.11805 (Gemini), §3: silent data corruption, an event every week or two.
"""

import collections
import dataclasses
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from pretrain.devices.host_memory import in_turn
from pretrain.devices.mesh import AXES, replicated
from pretrain.errors import ConfigError, ReplicaError
from pretrain.replicas import digest


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplicasConfig:
  """Compare all copies of parameters and optimizer state every `every` steps, at each snapshot and before each save;
  0 = never."""

  every: Annotated[int, '>= 0'] = 0


class Replicas:
  """Compares the copies of the arrays of a state with the structure of `abstract`, on `mesh`.

  Raises ConfigError where no array has a second copy.
  """

  def __init__(self, abstract: Any, mesh: Mesh):
    self._devices = list(mesh.devices.flat)
    leaves = {digest.key_of(path): x for path, x in jax.tree_util.tree_flatten_with_path(abstract)[0]}
    holders = {key: first_holders(x, self._devices) for key, x in leaves.items()}
    own = list(range(len(self._devices)))
    self._keys = [key for key, first in holders.items() if first != own]
    if not self._keys:
      raise ConfigError(
        f'replicas.every compares copies, and on {len(self._devices)} devices with this mesh no array has two; set '
        'mesh.data or mesh.replica to 2 or more, or replicas.every=0.'
      )
    self._first = np.array([holders[key] for key in self._keys]).T  # [device, leaf]
    specs = [leaves[key].sharding.spec for key in self._keys]
    each = jax.shard_map(digests_of, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec(AXES), check_vma=False)
    self._digests = jax.jit(each, out_shardings=replicated(mesh))

  def digests(self, state: Any) -> Array:
    """uint32[device, leaf, 2], in every process; returns before they are computed. Call before `state` is donated."""
    return self._digests(self._copied(state))

  def compile(self, state: Any) -> None:
    """Compiles `digests` into the compilation cache, so that its first call is as quick as the others."""
    self._digests.lower(self._copied(state)).compile()

  def _copied(self, state: Any) -> list[Array]:
    leaves = {digest.key_of(path): x for path, x in jax.tree_util.tree_flatten_with_path(state)[0]}
    return [leaves[key] for key in self._keys]

  def check(self, found: np.ndarray, step: int, before: int) -> None:
    """Raises ReplicaError if a copy differs from the others, in `found` = `digests` of `step`; `before` is the last
    step at which all copies were equal."""
    mates = np.take_along_axis(found, self._first[:, :, None], 0)
    if (found == mates).all():
      return
    bad = [i for i in range(len(self._keys)) if (found[:, i] != mates[:, i]).any()]
    odd = sorted({device for i in bad for device in odd_ones(found[:, i], self._first[:, i])})
    names = ', '.join(f'{d} (process {d.process_index})' for d in (self._devices[i] for i in odd))
    doubt = ' (one of them is wrong)' if is_tie(found[:, bad[0]], self._first[:, bad[0]]) else ''
    more = f' (first of {len(bad)} arrays)' if len(bad) > 1 else ''
    raise ReplicaError(
      f'at step {step} the copy of {self._keys[bad[0]]}{more} on device {names}{doubt} differs from its replicas; '
      f'all were equal at step {before}. No step was saved since then; run the same command to resume. '
      'Replace a device that is named again.'
    )


def digests_of(leaves: list[Array]) -> Array:
  """uint32[1, leaf, 2]: the digests of the shards of this device."""
  return jnp.stack(in_turn(lambda x: jnp.stack(digest.sums(x)), leaves))[None]


def first_holders(x: jax.ShapeDtypeStruct, devices: list[jax.Device]) -> list[int]:
  """For each device, the first device that holds the same part of `x`. If each is its own first, there is no copy."""
  parts = x.sharding.devices_indices_map(x.shape)
  first: dict[tuple, int] = {}
  bounds = (tuple(s.indices(n) for s, n in zip(parts[device], x.shape, strict=True)) for device in devices)
  return [first.setdefault(part, i) for i, part in enumerate(bounds)]


def odd_ones(found: np.ndarray, first: np.ndarray) -> list[int]:
  """The devices whose digest differs from the majority of holders of the same part; both, if two differ.

  >>> same = np.zeros(4, int)
  >>> odd_ones(np.array([[7, 7], [7, 7], [8, 7], [7, 7]]), same), odd_ones(np.array([[7, 7], [8, 7]]), same[:2])
  ([2], [0, 1])
  """
  odd: list[int] = []
  for part in np.unique(first):
    members = np.flatnonzero(first == part)
    votes = collections.Counter(tuple(found[i].tolist()) for i in members)
    most = [value for value, count in votes.items() if count == max(votes.values())]
    odd += [int(i) for i in members if len(most) > 1 or tuple(found[i].tolist()) != most[0]]
  return odd


def is_tie(found: np.ndarray, first: np.ndarray) -> bool:
  """Whether the copies do not show which of them is wrong."""
  odd = set(odd_ones(found, first))
  return any(set(np.flatnonzero(first == part).tolist()) <= odd for part in np.unique(first))
