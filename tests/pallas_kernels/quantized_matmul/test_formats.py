"""Codes and scales against the published layouts: ml_dtypes' tables, and the formulas of OCP MX and NVFP4 in numpy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.errors import KernelError
from pallas_kernels.quantized_matmul import reference
from pallas_kernels.quantized_matmul.formats import (
  E2M1,
  E4M3,
  E5M2,
  FORMATS,
  INT4,
  INT8,
  Element,
  Operand,
  Recipe,
  values_of,
)
from pallas_kernels.quantized_matmul.rounding import nearest, rounded

THEIRS = {
  'int8': np.int8, 'int4': ml_dtypes.int4, 'e4m3': ml_dtypes.float8_e4m3fn, 'e5m2': ml_dtypes.float8_e5m2,
  'e2m1': ml_dtypes.float4_e2m1fn,
}  # fmt: skip
ELEMENTS = (INT8, INT4, E4M3, E5M2, E2M1)
by_name = pytest.mark.parametrize('element', ELEMENTS, ids=lambda element: element.name)


def numbers(element: Element) -> np.ndarray:
  """What ml_dtypes reads in each code."""
  codes = np.arange(2**element.bits, dtype=np.uint8)
  if element is INT4:  # the sign of a code is in its fourth bit
    codes = np.where(codes >= 8, codes + 240, codes).astype(np.uint8)
  return codes.view(THEIRS[element.name]).astype(np.float64)


@by_name
def test_every_code_has_its_published_value(element):
  np.testing.assert_array_equal(values_of(element), numbers(element))
  np.testing.assert_array_equal(np.signbit(values_of(element)), np.signbit(numbers(element)))
  assert np.nanmax(np.where(np.isinf(values_of(element)), 0, values_of(element))) == element.largest


def test_e2m1_is_the_table_of_the_specification():
  """OCP MX 1.0, table 5 (E2M1), in the order of the codes."""
  half = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
  assert values_of(E2M1).tolist() == half + [-x for x in half]


def test_every_scale_of_mx_has_its_published_value():
  codes = np.arange(256, dtype=np.uint8)
  found = np.asarray(reference.from_e8m0(jnp.asarray(codes)), np.float64)
  np.testing.assert_array_equal(found, codes.view(ml_dtypes.float8_e8m0fnu).astype(np.float64))
  assert (found[0], found[127], found[254]) == (2.0**-127, 1.0, 2.0**127)
  assert np.isnan(found[255])


@by_name
def test_codes_of_values_are_those_they_came_from(element):
  codes = jnp.arange(2**element.bits, dtype=jnp.uint8)
  values = reference.from_codes(codes, element)
  ours = np.isfinite(np.asarray(values)) & (np.abs(np.asarray(values)) <= element.largest)
  assert ours.sum() == {'int8': 255, 'int4': 15, 'e4m3': 254, 'e5m2': 248, 'e2m1': 16}[element.name]
  back = np.asarray(reference.to_codes(values, element))
  np.testing.assert_array_equal(back[ours], np.asarray(codes)[ours])


@by_name
def test_the_nearest_value_is_ml_dtypes_with_ties_to_even(element):
  """At, between and around all values of the element, in its subnormal range too; beyond the largest it saturates."""
  grid = np.unique(values_of(element)[np.isfinite(values_of(element))])
  middle = (grid[1:] + grid[:-1]) / 2
  rng = np.random.default_rng(0)
  x = np.concatenate([grid, middle, np.nextafter(np.float32(middle), np.float32(9e9)), rng.normal(0, 3, 4000)])
  x = np.concatenate([x, rng.normal(0, element.largest, 4000)]).astype(np.float32)
  inside = np.clip(x, -element.largest, element.largest)
  theirs = np.rint(inside) if element.is_integer else inside.astype(THEIRS[element.name]).astype(np.float32)
  found = np.asarray(jax.jit(rounded, static_argnums=1)(x, element))
  np.testing.assert_array_equal(found, theirs)
  np.testing.assert_array_equal(np.signbit(found), np.signbit(theirs))
  if not element.is_integer:
    np.testing.assert_array_equal(jax.jit(nearest, static_argnums=1)(x, element), theirs)
    assert np.isnan(nearest(jnp.float32(np.nan), element))


encode = jax.jit(reference.encode, static_argnums=(1, 2))
decode = jax.jit(reference.decode, static_argnums=(1, 2))
quantize = jax.jit(reference.quantize, static_argnums=(1, 2))


def matrix(shape=(3, 64), seed=0, spread=4.0) -> np.ndarray:
  rng = np.random.default_rng(seed)
  return (rng.normal(size=shape) * 2.0 ** rng.uniform(-spread, spread, shape)).astype(np.float32)


def encoded(x: np.ndarray, name: str):
  """(codes, scales, whole) by the formulas of the papers, in numpy, with ml_dtypes' rounding. Blocks along the last
  dim."""
  spec = FORMATS[name]
  element, blocks = spec.element, x.reshape(*x.shape[:-1], -1, spec.block)
  theirs, amax = THEIRS[element.name], np.abs(blocks).max(-1, keepdims=True)
  if spec.scales == 'e8m0':
    scale = 2.0 ** (np.floor(np.log2(amax.astype(np.float64))) - np.floor(np.log2(element.largest)))
    codes = np.clip(blocks / scale, -element.largest, element.largest).astype(np.float32).astype(theirs)
    return codes, scale.astype(ml_dtypes.float8_e8m0fnu), 1.0
  up = np.float32(448) / np.abs(x).max()
  scale = (amax * up).astype(ml_dtypes.float8_e4m3fn)
  codes = (blocks * (up * np.float32(6) / scale.astype(np.float32))).clip(-6, 6).astype(theirs)
  return codes, scale, np.abs(x).max() / np.float32(448) / np.float32(6)


@pytest.mark.parametrize('name', ['mxfp8', 'mxfp8_e5m2', 'mxfp4', 'nvfp4'])
def test_blocks_are_stored_in_their_published_layout(name):
  x, operand = matrix(), Operand(name)
  ours, (codes, scales, whole) = encode(jnp.asarray(x), -1, operand), encoded(x, name)
  np.testing.assert_array_equal(np.asarray(ours.codes), codes.view(np.uint8) & (2**operand.element.bits - 1))
  np.testing.assert_array_equal(np.asarray(ours.scales), scales.view(np.uint8))
  assert float(ours.whole) == pytest.approx(whole, rel=2e-7)  # XLA may divide once or twice
  assert ours.codes.shape[-1] == {'nvfp4': 16}.get(name, 32)


@pytest.mark.parametrize('name', ['mxfp8', 'mxfp8_e5m2', 'mxfp4', 'nvfp4'])
@pytest.mark.parametrize('axis', [0, 1])
def test_what_is_stored_is_what_is_multiplied(name, axis):
  x, operand = jnp.asarray(matrix((64, 96))), Operand(name)
  values, scale = quantize(x, (axis,), operand)
  stored = decode(encode(x, axis, operand), axis, operand)
  np.testing.assert_allclose(np.asarray(values * scale), np.asarray(stored), rtol=1e-6, atol=0)
  assert (np.asarray(values.astype(operand.carrier).astype(jnp.float32)) == np.asarray(values)).all()
  steps = {'mxfp8': 2.0**-4, 'mxfp8_e5m2': 2.0**-3, 'mxfp4': 2.0**-2, 'nvfp4': 2.0**-2}[name]
  largest = np.abs(np.asarray(x)).max()
  assert np.abs(np.asarray(stored) - np.asarray(x)).max() < 1.1 * steps * largest


def test_a_number_at_the_limit_of_a_block_saturates():
  """7 of e2m1: the exponent of the block is that of 4, and 6 is the largest value under it."""
  x = jnp.zeros((1, 32)).at[0, 0].set(7.0).at[0, 1].set(-0.26)
  values, _ = reference.quantize(x, (1,), Operand('mxfp4'))
  assert np.asarray(values)[0, :3].tolist() == [6.0, -0.5, 0.0]


@pytest.mark.parametrize(('make', 'message'), [
  (lambda: Operand('fp7'), "quantized_matmul has no format 'fp7'; choose from 'int8', 'int4', 'fp8_e4m3'"),
  (lambda: Operand('nvfp4', block=32), 'nvfp4 has blocks of 16, not 32; remove `block`.'),
  (lambda: Operand('int8', block=32), "got scale='channel' with block=32; a block size belongs to scale='block'."),
  (lambda: Operand('int8', scale='block'), "got scale='block' with block=None; a block size belongs"),
  (lambda: Operand('int8', scale='row'), "has no scale 'row'; choose from 'tensor', 'channel', 'block', 'delayed'."),
  (lambda: Operand('int8', rounding='random'), "has no rounding 'random'; choose from 'nearest', 'stochastic'."),
  (lambda: Operand('int8', scale='block', block=0), 'got blocks of 0 numbers; use at least 1.'),
  (lambda: Operand('mxfp8', scale='tensor'), "mxfp8 has scales of blocks, not scale='tensor'; remove `scale`."),
  (lambda: Operand('nvfp4', scale='delayed'), "nvfp4 has scales of blocks, not scale='delayed'; remove `scale`."),
  (
    lambda: reference.quantize(jnp.ones((2, 40)), (1,), Operand('mxfp8')),
    'sums over 40 numbers, which blocks of 32 (mxfp8) do not divide; pad them, or use another format.',
  ),
])  # fmt: skip
def test_what_does_not_exist_is_refused(make, message):
  with pytest.raises(KernelError) as caught:
    make()
  assert message in str(caught.value)


def test_a_recipe_knows_its_blocks():
  recipe = Recipe(forward=(Operand('nvfp4'), Operand('mxfp8')), wgrad=(Operand('int8'), Operand('int8')))
  assert [recipe.block(name) for name in ('forward', 'dgrad', 'wgrad')] == [32, 1, 1]
  assert recipe.formats == ['int8', 'mxfp8', 'nvfp4']
