"""The product and its gradients against numpy: exact integers, dequantized products, straight-through gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pallas_kernels.errors import KernelError
from pallas_kernels.quantized_matmul import reference
from pallas_kernels.quantized_matmul.api import quantized_matmul
from pallas_kernels.quantized_matmul.formats import Operand, Recipe
from pallas_kernels.quantized_matmul.rounding import Noise

BATCH, LENGTH, INPUTS, OUTPUTS = 4, 32, 64, 96
NAMES = ('reference', 'xla')  # the kernel: test_tpu_kernel.py
each = pytest.mark.parametrize('implementation', NAMES)
OPERANDS = {
  'int8': Operand('int8'),
  'int8 tensor': Operand('int8', scale='tensor'),
  'int8 block': Operand('int8', scale='block', block=16),
  'int4': Operand('int4'),
  'e4m3': Operand('fp8_e4m3', scale='tensor'),
  'e5m2': Operand('fp8_e5m2'),
  'mxfp8': Operand('mxfp8'),
  'mxfp4': Operand('mxfp4'),
  'nvfp4': Operand('nvfp4'),
}
RECIPES = {name: Recipe(forward=(o, o), dgrad=(o, o), wgrad=(o, o)) for name, o in OPERANDS.items()}


@functools.cache
def arrays(dtype=jnp.float32):
  rng = np.random.default_rng(0)
  spread = 2.0 ** rng.uniform(-2, 2, (INPUTS,))
  x = rng.normal(size=(BATCH, LENGTH, INPUTS)) * spread
  w, g = rng.normal(size=(INPUTS, OUTPUTS)) / 8, rng.normal(size=(BATCH, LENGTH, OUTPUTS)) / 64
  return tuple(jnp.asarray(a, jnp.float32).astype(dtype) for a in (x, w, g))


@functools.cache
def products(recipe: Recipe, implementation: str, seed: int | None = None, dtype=jnp.float32):
  """(x w, gradient of x, gradient of w) as float64."""
  x, w, g = arrays(dtype)
  options = {'implementation': implementation, 'seed': None if seed is None else jnp.uint32(seed)}

  @jax.jit
  def run(x, w, g):
    out, back = jax.vjp(lambda x, w: quantized_matmul(x, w, recipe, **options), x, w)
    return out, *back(g)

  return tuple(np.asarray(a, np.float64) for a in run(x, w, g))


quantize = jax.jit(reference.quantize, static_argnums=(1, 2))


def dequantized(x: jax.Array, axes: tuple[int, ...], operand: Operand, noise=None) -> np.ndarray:
  values, scale = quantize(x, axes, operand, noise)
  return np.asarray(values, np.float64) * np.asarray(scale, np.float64)


@functools.cache
def straight_through(recipe: Recipe) -> tuple[np.ndarray, ...]:
  """x w of rounded operands in float64, and its gradients, which ignore rounding.

  d(g . x w)/dx = g w^T, and d/dw = x^T g: each operand is quantized for the sum that it is in.
  """
  x, w, g = arrays()
  (fx, fw), (dg, dw), (wx, wg) = recipe.forward, recipe.dgrad, recipe.wgrad
  return (
    np.einsum('btk,kn->btn', dequantized(x, (2,), fx), dequantized(w, (0,), fw)),
    np.einsum('btn,kn->btk', dequantized(g, (2,), dg), dequantized(w, (1,), dw)),
    np.einsum('btk,btn->kn', dequantized(x, (0, 1), wx), dequantized(g, (0, 1), wg)),
  )


def distance(a: np.ndarray, b: np.ndarray) -> float:
  return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@each
@pytest.mark.parametrize('name', OPERANDS)
def test_products_are_those_of_the_dequantized_operands(name, implementation):
  """In float32: the sums alone round. fp8 is to be within 2e-3; every format is within 1e-5."""
  for found, expected in zip(products(RECIPES[name], implementation), straight_through(RECIPES[name]), strict=True):
    assert distance(found, expected) < 1e-5


@pytest.mark.parametrize(('name', 'least', 'most'), [
  ('int8', 2e-3, 2e-2), ('e4m3', 1e-2, 6e-2), ('e5m2', 3e-2, 0.11), ('mxfp8', 1e-2, 6e-2), ('nvfp4', 0.05, 0.2),
  ('mxfp4', 0.08, 0.25), ('int4', 0.08, 0.3),
])  # fmt: skip
def test_a_format_costs_as_much_accuracy_as_it_has_bits(name, least, most):
  x, w, g = (np.asarray(a, np.float64) for a in arrays())
  exact = np.einsum('btk,kn->btn', x, w), np.einsum('btn,kn->btk', g, w), np.einsum('btk,btn->kn', x, g)
  for found, expected in zip(products(RECIPES[name], 'reference'), exact, strict=True):
    assert least < distance(found, expected) < most


@each
@pytest.mark.parametrize('format', ['int8', 'int4'])
def test_integer_accumulators_are_exact(format, implementation):
  """Equal to numpy's int64 sums of the codes, times scales in float32."""
  operand = Operand(format)
  recipe, (x, w, _) = RECIPES[format], arrays()
  (x_codes, x_scale), (w_codes, w_scale) = quantize(x, (2,), operand), quantize(w, (0,), operand)
  sums = np.einsum('btk,kn->btn', np.asarray(x_codes).astype(np.int64), np.asarray(w_codes).astype(np.int64))
  assert np.abs(sums).max() < 2**24, 'exact in float32'
  expected = sums.astype(np.float32) * np.asarray(x_scale) * np.asarray(w_scale)
  np.testing.assert_array_equal(products(recipe, implementation)[0], expected.astype(np.float64))


@each
def test_long_sums_of_integers_do_not_overflow(implementation, monkeypatch):
  """All codes 127, with accumulators that hold 100 of their products: each part of the sum is short enough."""
  monkeypatch.setattr(reference, 'EXACT_SUM', 100 * 127**2)
  int8 = Operand('int8')
  recipe, x, g = Recipe(wgrad=(int8, int8)), jnp.ones((12, 40, 8)), jnp.full((12, 40, 6), 2.0)
  run = jax.jit(jax.grad(lambda w: (quantized_matmul(x, w, recipe, implementation=implementation) * g).sum()))
  assert str(jax.make_jaxpr(run)(jnp.ones((8, 6)))).count('scan') == 1
  np.testing.assert_allclose(np.asarray(run(jnp.ones((8, 6)))), 960.0, rtol=1e-6)


@each
def test_products_without_a_pair_are_not_quantized(implementation):
  x, w, g = (np.asarray(a, np.float64) for a in arrays())
  out, dx, dw = products(Recipe(forward=RECIPES['int4'].forward), implementation)
  assert distance(dx, np.einsum('btn,kn->btk', g, w)) < 1e-6
  assert distance(dw, np.einsum('btk,btn->kn', x, g)) < 1e-6
  assert distance(out, np.einsum('btk,kn->btn', x, w)) > 0.05


@each
@pytest.mark.parametrize('format', ['int8', 'nvfp4'])
def test_gradients_are_rounded_at_random_without_bias(format, implementation):
  """Each gradient differs with the seed; the mean over 256 seeds is near that of exact operands where only g rounds."""
  operand, random = Operand(format), Operand(format, rounding='stochastic')
  recipe = Recipe(dgrad=(random, operand), wgrad=(operand, random))
  x, w, g = arrays()
  run = jax.jit(
    jax.vmap(
      lambda seed: jax.vjp(lambda x, w: quantized_matmul(x, w, recipe, seed=seed, implementation=implementation), x, w)[
        1
      ](g)
    )
  )
  dx, dw = (np.asarray(a, np.float64) for a in run(jnp.arange(256, dtype=jnp.uint32)))
  means = (
    np.einsum('btn,kn->btk', np.asarray(g, np.float64), dequantized(w, (1,), operand)),
    np.einsum('btk,btn->kn', dequantized(x, (0, 1), operand), np.asarray(g, np.float64)),
  )
  for found, mean in zip((dx, dw), means, strict=True):
    assert (found[0] != found[1]).any()
    one = distance(found[0], mean)
    assert distance(found.mean(0), mean) < 1.3 * one / 16, 'errors of independent seeds average out'


def test_random_bits_are_those_of_the_operand():
  """The gradient of x has the random bits of operand 2, of w of operand 5: fixed numbers, so that runs repeat."""
  operand = Operand('int8', rounding='stochastic')
  recipe = Recipe(dgrad=(operand, Operand('int8')), wgrad=(Operand('int8'), operand))
  x, w, g = arrays()
  own = Noise(jnp.uint32(9), jnp.arange(BATCH * LENGTH, dtype=jnp.uint32).reshape(BATCH, LENGTH))
  _, dx, dw = products(recipe, 'xla', 9)
  expected = np.einsum('btn,kn->btk', dequantized(g, (2,), operand, own.of(2)), dequantized(w, (1,), Operand('int8')))
  assert distance(dx, expected) < 1e-6
  expected = np.einsum(
    'btk,btn->kn', dequantized(x, (0, 1), Operand('int8')), dequantized(g, (0, 1), operand, own.of(5))
  )
  assert distance(dw, expected) < 1e-6


@pytest.mark.parametrize('name', ['int8', 'e4m3', 'mxfp8', 'nvfp4'])
def test_implementations_agree_in_bfloat16(name):
  first, second = (products(RECIPES[name], own, dtype=jnp.bfloat16) for own in ('reference', 'xla'))
  for one, other in zip(first, second, strict=True):
    np.testing.assert_allclose(one, other, rtol=2**-7, atol=1e-6 * np.abs(other).max())
    assert np.mean(one != other) < 0.01, 'they differ where a sum lies between two numbers of bfloat16'


@each
@pytest.mark.parametrize('name', ['int8', 'int8 block', 'e4m3', 'mxfp8', 'nvfp4'])
@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_seen_in_all_results_that_need_it(name, implementation, bad):
  x, w, g = arrays()
  run = functools.partial(_both, RECIPES[name], implementation)
  out, dx, dw = (np.asarray(a) for a in run(x.at[1, 2, 3].set(bad), w, g))
  assert not np.isfinite(out[1, 2]).any()
  assert not np.isfinite(dw[3]).any()
  assert np.isfinite(dx).all()
  out, dx, dw = (np.asarray(a) for a in run(x, w, g.at[1, 2, 3].set(bad)))
  assert np.isfinite(out).all()
  assert not np.isfinite(dx[1, 2]).any()
  assert not np.isfinite(dw[:, 3]).any()


@functools.partial(jax.jit, static_argnums=(0, 1))
def _both(recipe, implementation, x, w, g):
  out, back = jax.vjp(lambda x, w: quantized_matmul(x, w, recipe, implementation=implementation), x, w)
  return out, *back(g)


@each
@pytest.mark.parametrize('name', ['int8', 'e4m3', 'nvfp4'])
def test_zeros_and_tiny_numbers_give_zeros_and_no_nan(name, implementation):
  _, w, g = arrays()
  for size in (0.0, 1e-38, 1e-30):
    out, dx, dw = _both(RECIPES[name], implementation, jnp.full((1, LENGTH, INPUTS), size), w, g[:1])
    assert all(np.isfinite(np.asarray(a)).all() for a in (out, dx, dw))
    assert np.abs(np.asarray(out)).max() <= size * 100


@pytest.mark.parametrize(
  'name', ['int8', *(pytest.param(x, marks=pytest.mark.slow) for x in ('e4m3', 'mxfp8', 'nvfp4'))]
)
@pytest.mark.parametrize('place', [pytest.param(x, marks=pytest.mark.slow) for x in ('fsdp', 'tensor')] + ['both'])
def test_a_mesh_computes_what_one_device_does(name, place):
  """Tokens on `fsdp`, features of w on `tensor`, in both dims of w in turn. Integers are equal to the last bit."""
  own = RECIPES[name].forward[0]
  random = Operand(own.format, scale=own.scale, rounding='stochastic')
  recipe = Recipe(forward=(own, own), dgrad=(random, own), wgrad=(own, random))
  shapes = {'fsdp': (8, 1), 'tensor': (1, 8), 'both': (4, 2)}
  mesh = jax.make_mesh(shapes[place], ('fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 2)
  x, w, g = (jnp.concatenate([a, a]) if a.ndim == 3 else a for a in arrays())
  x, g = x * jnp.arange(1, 9)[:, None, None].astype(jnp.float32), g

  def run(x, w, g):
    out, back = jax.vjp(lambda x, w: quantized_matmul(x, w, recipe, seed=jnp.uint32(3)), x, w)
    return out, *back(g)

  alone = jax.jit(run)(x, w, g)
  put = lambda a, *axes: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*axes)))
  for w_axes, x_axes, g_axes in (
    (('fsdp', 'tensor'), ('fsdp',), ('fsdp', None, 'tensor')),
    (('tensor', 'fsdp'), ('fsdp', None, 'tensor'), ('fsdp',)),
  ):
    for one, other in zip(alone, jax.jit(run)(put(x, *x_axes), put(w, *w_axes), put(g, *g_axes)), strict=True):
      if name == 'int8':
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
      assert distance(np.asarray(other, np.float64), np.asarray(one, np.float64)) < 1e-6


@pytest.mark.parametrize(('make', 'message'), [
  (lambda x, w: quantized_matmul(x, w[:-1], RECIPES['int8']), 'quantized_matmul got x(4, 32, 64), w(63, 96); pass x'),
  (lambda x, w: quantized_matmul(x, w[None], RECIPES['int8']), 'w(1, 64, 96); pass x[*tokens, inputs] and w[inputs,'),
  (lambda x, w: quantized_matmul(x, w, RECIPES['int8'], axes=(2, 1)), 'w(64, 96), axes=(2, 1); pass x[*tokens, input'),
  (lambda x, w: quantized_matmul(x, w, RECIPES['int8'], axes=(0,)), 'got x(4, 32, 64), w(64, 96); pass x[*tokens, inp'),
  (
    lambda x, w: quantized_matmul(x, w, RECIPES['int8'], implementation='cuda'),
    "kernels.quantized_matmul='cuda' is not one of 'auto', 'reference', 'xla'",
  ),
  (
    lambda x, w: quantized_matmul(x, w, Recipe(weights=Operand('int4'))),
    'quantizes both operands, and this recipe has weights in int4 alone; round them with reference.quantize, and',
  ),
])  # fmt: skip
def test_what_does_not_fit_is_refused(make, message):
  with pytest.raises(KernelError) as caught:
    make(*arrays()[:2])
  assert message in str(caught.value)
