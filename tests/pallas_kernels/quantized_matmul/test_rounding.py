"""Stochastic rounding: unbiased, the same numbers for a seed everywhere, in any tile and on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pallas_kernels.errors import KernelError
from pallas_kernels.quantized_matmul import reference
from pallas_kernels.quantized_matmul.formats import E2M1, E4M3, E5M2, INT8, Operand
from pallas_kernels.quantized_matmul.rounding import Noise, bits, bits_of, mix, rounded, row_hashes

SEEDS, ROWS, WIDTH = 2048, 4, 32


def noise(seed=0, rows=ROWS) -> Noise:
  return Noise(jnp.uint32(seed), jnp.arange(rows, dtype=jnp.uint32))


def numbers(element) -> np.ndarray:
  x = np.random.default_rng(0).normal(0, 0.4, (ROWS, WIDTH)) * element.largest / 2
  x[0] = np.linspace(-1, 1, WIDTH) * 2.0 ** (element.smallest_exponent + 1)  # where numbers are subnormal
  return x.astype(np.float32)


def fmix32(x: int) -> int:
  """MurmurHash3's finalizer in Python's integers."""
  for factor, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
    x = (x ^ x >> shift) * factor & 0xFFFFFFFF
  return x ^ x >> 16


def test_random_bits_are_the_hash_of_seed_row_and_column():
  found = np.asarray(bits_of(noise(7), WIDTH))
  for row, column in ((0, 0), (3, 31), (2, 17)):
    of_row = fmix32(row * 0x9E3779B1 & 0xFFFFFFFF ^ 7)
    assert found[row, column] == fmix32(of_row ^ column * 0x85EBCA77 & 0xFFFFFFFF)
  assert len(np.unique(found)) == found.size
  first, second = noise(7).of(0), noise(7).of(1)
  assert (np.asarray(bits_of(first, WIDTH)) != np.asarray(bits_of(second, WIDTH))).all()


def test_the_hash_is_a_bijection_with_even_bits():
  found = np.asarray(mix(jnp.arange(2**16, dtype=jnp.uint32)))
  assert len(np.unique(found)) == 2**16
  shares = [((found >> bit) & 1).mean() for bit in range(32)]
  assert max(abs(share - 0.5) for share in shares) < 4 * 0.5 / 2**8


@pytest.mark.parametrize('element', [INT8, E4M3, E5M2, E2M1], ids=lambda element: element.name)
def test_rounding_is_unbiased(element):
  """The mean over seeds is within four standard errors of each number; all are within one spacing of it."""
  x = jnp.asarray(numbers(element))
  draw = jax.jit(jax.vmap(lambda seed: rounded(x, element, bits_of(noise()._replace(seed=seed), WIDTH))))
  found = np.asarray(draw(mix(jnp.arange(SEEDS, dtype=jnp.uint32))), np.float64)
  low, high, exact = found.min(0), found.max(0), np.asarray(x, np.float64)
  assert ((low <= exact) & (exact <= high)).all()
  assert max(len(np.unique(found[:, i, j])) for i in range(ROWS) for j in range(WIDTH)) == 2
  share = np.where(high > low, (exact - low) / np.where(high > low, high - low, 1), 0)
  sigma = np.sqrt(share * (1 - share) / SEEDS) * (high - low)
  error = np.abs(found.mean(0) - exact)
  assert (error <= 4 * sigma + 2.0**-20 * np.abs(exact)).all()
  again = np.asarray(draw(mix(jnp.arange(SEEDS, dtype=jnp.uint32))), np.float64)
  np.testing.assert_array_equal(found, again)


def test_values_of_the_element_are_never_moved():
  x = jnp.asarray([[-448.0, -0.0, 2.0**-9, 1.125, 448.0]])
  for seed in range(20):
    np.testing.assert_array_equal(np.asarray(rounded(x, E4M3, bits_of(noise(seed, 1), 5))), np.asarray(x))


@pytest.mark.parametrize('tile', [(1, 32), (4, 8), pytest.param((2, 16), marks=pytest.mark.slow)])
def test_a_tile_is_rounded_as_in_the_whole_matrix(tile):
  x, own = jnp.asarray(numbers(E2M1)), noise(5)
  whole = np.asarray(rounded(x, E2M1, bits_of(own, WIDTH)))
  for i in range(0, ROWS, tile[0]):
    for j in range(0, WIDTH, tile[1]):
      rows, columns = slice(i, i + tile[0]), slice(j, j + tile[1])
      random = bits(row_hashes(own)[rows, None], jnp.arange(j, j + tile[1], dtype=jnp.uint32))
      np.testing.assert_array_equal(np.asarray(rounded(x[rows, columns], E2M1, random)), whole[rows, columns])


@pytest.mark.parametrize('format', ['int8', 'fp8_e5m2', 'mxfp4', 'nvfp4'])
def test_a_mesh_rounds_as_one_device(format):
  x, operand = (
    jnp.asarray(np.random.default_rng(1).normal(size=(16, 128)), jnp.float32),
    Operand(format, rounding='stochastic'),
  )
  run = jax.jit(lambda x, own: reference.quantize(x, (1,), operand, own))
  alone = run(x, noise(3, 16))
  mesh = jax.make_mesh((4, 2), ('a', 'b'), axis_types=(AxisType.Auto,) * 2)
  place = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))
  spread = run(place(x, 'a', 'b'), Noise(jnp.uint32(3), place(noise(3, 16).rows, 'a')))
  for one, other in zip(alone, spread, strict=True):
    np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
  other = run(x, noise(4, 16))
  assert (np.asarray(other.values) != np.asarray(alone.values)).any()


@pytest.mark.parametrize('format', ['int8', 'mxfp8', 'mxfp4', 'nvfp4'])
def test_quantized_numbers_have_the_mean_of_the_numbers(format):
  """None saturates, as the largest of a block may when they are rounded to the nearest."""
  x, operand = (
    jnp.asarray(np.random.default_rng(2).normal(size=(4, 64)), jnp.float32),
    Operand(format, rounding='stochastic'),
  )
  draw = jax.jit(jax.vmap(lambda seed: reference.quantize(x, (1,), operand, noise()._replace(seed=seed))))
  values, scale = draw(jnp.arange(SEEDS, dtype=jnp.uint32))
  found, exact = np.asarray(values, np.float64) * np.asarray(scale, np.float64), np.asarray(x, np.float64)
  sigma = found.std(0) / np.sqrt(SEEDS)
  assert (np.abs(found.mean(0) - exact) <= 4.5 * sigma + 1e-6 * np.abs(exact)).all()


def test_random_rounding_needs_a_seed():
  with pytest.raises(KernelError, match="rounds stochastically and has no seed; pass `seed`, or rounding='nearest'"):
    reference.quantize(jnp.ones((2, 8)), (1,), Operand('int8', rounding='stochastic'))
