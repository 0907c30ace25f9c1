"""The digest of an array: equal on every mesh, different for a different array of the same shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pretrain.devices.mesh import MeshConfig, make_mesh
from pretrain.replicas import digest

X = np.random.default_rng(0).standard_normal((8, 4, 6), dtype=np.float32)


def text(x) -> str:
  return digest.text(digest.sums(jnp.asarray(x)))


def by_hand(x: np.ndarray) -> str:
  """The digest computed value by value in Python integers."""
  first = second = 0
  for place, bits in enumerate(np.ravel(x).view(f'uint{8 * x.itemsize}').tolist()):
    first += mixed(bits ^ (place * 0x9E3779B1 % 2**32), 0x85EBCA6B, 13, 0xC2B2AE35)
    second += mixed((bits + place * 0x27D4EB2F + 0x165667B1) % 2**32, 0x7FEB352D, 15, 0x846CA68B)
  return f'{first % 2**32:08x}{second % 2**32:08x}'


def mixed(x: int, a: int, shift: int, b: int) -> int:
  x = (x ^ (x >> 16)) * a % 2**32
  x = (x ^ (x >> shift)) * b % 2**32
  return x ^ (x >> 16)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float8_e4m3fn', 'int32', 'uint8'])
def test_it_equals_the_formula(dtype):
  x = np.asarray(jnp.asarray(X * 50).astype(dtype))
  assert text(x) == by_hand(x)
  assert text(x[0, 0, 0]) == by_hand(x[:1, 0, 0]), 'a scalar'


def test_it_is_the_same_in_every_version():
  assert text(np.arange(6, dtype=np.float32).reshape(2, 3)) == GOLDEN


GOLDEN = '70deab9490802553'


def test_it_needs_no_copy_of_the_array():
  memory = digest.sums.lower(jax.ShapeDtypeStruct((4, 512, 512), jnp.float32)).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 2**16, 'the array has 4 MiB'


@pytest.mark.parametrize('mesh', [{'fsdp': 8}, {'fsdp': 2, 'tensor': 4}, {'tensor': 4}])
def test_it_does_not_depend_on_the_sharding(mesh):
  axes = PartitionSpec(('fsdp', 'tensor')) if mesh == {'fsdp': 8} else PartitionSpec('fsdp', 'tensor')
  placed = jax.device_put(X, NamedSharding(make_mesh(MeshConfig(**mesh)), axes))
  assert not placed.sharding.is_fully_replicated
  assert text(placed) == text(X)


@pytest.mark.parametrize(
  'other',
  [
    X[::-1], X.reshape(-1)[np.random.default_rng(1).permutation(X.size)], -X, np.abs(X), X + np.float32(1e-7),
    np.where(X[3, 2, 1] == X, X[0, 0, 0], X), np.roll(X, 1), X.swapaxes(1, 2),
    np.where((X[0, 0, 0] == X) | (X[5, 1, 2] == X), -X, X),
  ],
)  # fmt: skip
def test_it_depends_on_order_sign_and_value(other):
  assert text(np.ascontiguousarray(other).reshape(X.shape)) != text(X)


def test_every_bit_counts():
  x = np.zeros(4, np.float32)
  seen = {text(x), text(np.where(np.arange(4) == 1, -0.0, x).astype(np.float32))}
  bits = x.view(np.uint32)
  for place in range(4):
    for bit in range(32):
      bits[place] = 1 << bit
      seen.add(text(x))
      bits[place] = 0
  assert len(seen) == 1 + 4 * 32, 'all differ (the sign bit of the second is -0.0)'
