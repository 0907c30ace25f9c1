"""A digest of the bits of an array, the same for any sharding. It shows damage between the state and the disk.

Each value is mixed with its index in the whole array; the sum of the results, modulo 2**32, does not depend on the
order in which devices add. Two such sums with different mixing make 64 bits. The devices that hold the array compute it
before the next step reuses its memory: one pass over the state, no copy to the host.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from models.host_memory import on_device

Sums = tuple[Array, Array]

# MurmurHash3's finalizer (Appleby 2011, MurmurHash3.cpp fmix32), and one found by search (Wellons 2018,
# github.com/skeeto/hash-prospector, lowbias32).
FMIX32, LOWBIAS32 = (0x85EBCA6B, 13, 0xC2B2AE35), (0x7FEB352D, 15, 0x846CA68B)


def digests(tree: Any) -> dict[str, Sums]:
  """The two sums of each array of `tree`, by its path; returns before they are computed."""
  return {key_of(path): sums(x) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def text(found: Sums) -> str:
  """The digest as 16 hexadecimal digits; waits until it is computed."""
  high, low = (int(np.asarray(value)) for value in found)
  return f'{high:08x}{low:08x}'


def key_of(path) -> str:
  """params/decoder/…: the names and indices along a path of a tree."""
  names = (getattr(p, 'key', getattr(p, 'name', getattr(p, 'idx', None))) for p in path)
  return '/'.join(str(name) for name in names)


@jax.jit
def sums(x: Array) -> Sums:
  """Two uint32 sums. Every bit counts, including the sign of zero and the payload of NaN."""
  bits, place = bits_of(on_device(x)), places(x.shape)
  if bits.ndim > place.ndim:  # 64-bit values are two words
    place = 2 * place[..., None] + jnp.arange(2, dtype=jnp.uint32)
  first = mix(bits ^ (place * jnp.uint32(0x9E3779B1)), FMIX32)
  second = mix(bits + place * jnp.uint32(0x27D4EB2F) + jnp.uint32(0x165667B1), LOWBIAS32)
  zero, axes = jnp.uint32(0), tuple(range(first.ndim))  # one reduction: with two, XLA on CPUs stores both operands
  return jax.lax.reduce((first, second), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), axes)


def bits_of(x: Array) -> Array:
  """The bits of each value as uint32; a 64-bit value as two."""
  if x.dtype == jnp.bool_:
    return x.astype(jnp.uint32)
  words = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
  return jax.lax.bitcast_convert_type(x, words).astype(jnp.uint32)


def places(shape: tuple[int, ...]) -> Array:
  """The index of each value in the whole array, row by row, modulo 2**32; iotas, so that each device makes its part."""
  place = jnp.zeros(shape, jnp.uint32)
  for dim, stride in enumerate(np.cumprod((1, *shape[:0:-1]), dtype=np.uint64)[::-1]):
    if shape:
      place += jax.lax.broadcasted_iota(jnp.uint32, shape, dim) * jnp.uint32(int(stride) % 2**32)
  return place


def mix(x: Array, constants: tuple[int, int, int]) -> Array:
  """A bijection of 32 bits in which each bit of x changes about half of all."""
  first, shift, second = constants
  x = (x ^ (x >> 16)) * jnp.uint32(first)
  x = (x ^ (x >> shift)) * jnp.uint32(second)
  return x ^ (x >> 16)


def differing(wanted: Mapping[str, str], tree: Any) -> list[str]:
  """The paths of `tree` whose digests differ from `wanted`."""
  found = digests(tree)
  return [key for key, value in found.items() if text(value) != wanted.get(key)]
