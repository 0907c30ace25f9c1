"""Delayed scaling against its formula in numpy, and its histories in a model: layers, meshes, microbatches, remat."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from models.build import build
from models.precision import AMAX, RECIPES, PrecisionConfig, first_history, largest_of, pushed
from models.specs import initialize
from pallas_kernels.errors import KernelError
from pallas_kernels.quantized_matmul.api import quantized_matmul
from pretrain.step.scaling import scaling_tracks
from pretrain.step.train_step import accumulate
from tests.models.quantized import SMALL, loss_of, params, placed
from tests.models.small import DEBERTA, batch

E4M3, E5M2 = (ml_dtypes.float8_e4m3fn, 448.0), (ml_dtypes.float8_e5m2, 57344.0)
DELAYED = RECIPES['fp8_delayed']


def rounded(x, history, scale, fmt):
  """(the numbers that fp8 holds for x, the new scale). Source: Transformer Engine, DelayedScaling: the scale is
  fp8_max / max(history), the old one where that is 0; larger numbers saturate."""
  dtype, largest = fmt
  amax = np.float32(max(history))
  scale = np.float32(largest) / amax if amax > 0 else scale
  codes = np.clip(x * scale, -largest, largest).astype(dtype)
  return codes.astype(np.float64) / np.float64(scale), scale


@pytest.mark.parametrize('implementation', ['xla', pytest.param('reference', marks=pytest.mark.slow)])
def test_products_and_histories_equal_the_formula(implementation):
  """Six steps with numbers of quickly changing size: the scale of a step follows from the three before it."""
  rng, length = np.random.default_rng(0), 3
  names, formats = ('x', 'w', 'g'), (E4M3, E4M3, E5M2)
  past, scales = {name: [0.0] * length for name in names}, dict.fromkeys(names, np.float32(1))
  history = jnp.zeros((3, length))

  @jax.jit
  def step(history, x, w, g):
    run = lambda x, w, amax: quantized_matmul(x, w, DELAYED, amax=amax, implementation=implementation)
    out, back = jax.vjp(run, x, w, largest_of(history))
    dx, dw, now = back(g)
    return out, dx, dw, pushed(history, now)

  for size in (1.0, 30.0, 0.01, 0.5, 0.02, 900.0):
    own = {
      'x': rng.normal(size=(2, 8, 16)) * size,
      'w': rng.normal(size=(16, 24)),
      'g': rng.normal(size=(2, 8, 24)) / size,
    }
    own = {name: np.float32(x) for name, x in own.items()}
    *found, history = step(history, *own.values())
    q = {}
    for name, fmt in zip(names, formats, strict=True):
      q[name], scales[name] = rounded(own[name], past[name], scales[name], fmt)
      past[name] = [np.abs(own[name]).max(), *past[name][:-1]]
    expected = q['x'] @ q['w'], q['g'] @ q['w'].T, np.einsum('blx,blg->xg', q['x'], q['g'])
    for a, b in zip(found, expected, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
    np.testing.assert_array_equal(history, [past[name] for name in names])


@pytest.mark.parametrize('bad', [np.nan, np.inf])
def test_what_is_not_finite_shows_and_does_not_enter_a_history(bad):
  x, w, g = jnp.ones((1, 4, 8)).at[0, 1, 2].set(bad), jnp.ones((8, 8)), jnp.ones((1, 4, 8))
  history = jnp.full((3, 2), 2.0)

  @jax.jit
  def run(*given):
    out, back = jax.vjp(lambda x, w, amax: quantized_matmul(x, w, DELAYED, amax=amax), *given)
    return out, *back(g)

  out, _, dw, now = run(x, w, largest_of(history))
  assert np.isnan(out).any()
  assert np.isnan(dw).any(), 'an infinity must not saturate to the largest number'
  np.testing.assert_array_equal(pushed(history, now), [[2, 2], [1, 2], [1, 2]])


def test_a_kernel_with_its_own_scales_is_refused():
  x = jnp.ones((1, 8, 8))
  with pytest.raises(KernelError, match="quantized_matmul='interpret' has no delayed scaling; use 'auto', 'xla' or"):
    quantized_matmul(x, x[0], DELAYED, amax=jnp.ones(3), implementation='interpret')


def delayed(**changes) -> PrecisionConfig:
  return PrecisionConfig(recipe='fp8_delayed', amax_history=2, **changes)


WHOLE = delayed()


def seen(precision=WHOLE, cfg=SMALL, parts=1, axes=None):
  """(loss, gradients, the amax of each operand) of all rows, when the amax of all operands was 3 before."""
  model, own, data = placed(cfg, precision, axes)
  amax = jax.tree.map(lambda x: largest_of(x + 3), first_history(precision, model.specs))

  def loss(own, data, key, weight, read):
    return loss_of(model, own, data, read=read) / weight, ({}, {})

  run = jax.jit(accumulate(loss, parts, scaling_tracks(precision, model.specs)))
  with jax.numpy_dtype_promotion('standard'):
    (value, _), (grads, felt) = run(own, data, None, jnp.float32(200), {AMAX: amax})
  return float(value), grads, felt[AMAX]


@functools.cache
def whole():
  return seen()


def test_every_layer_observes_its_own_operands():
  """Sizes of weights are known; query, key and value have the same input, as have up and gate."""
  _, _, felt = whole()
  own, weights = felt['decoder']['blocks'], params()['decoder']['blocks']
  for layer, name in (('mlp', 'up'), ('mlp', 'down'), ('self_attention', 'out'), ('self_attention', 'query')):
    largest = np.abs(np.asarray(weights[layer][name])).reshape(SMALL.layers, -1).max(1)
    np.testing.assert_array_equal(own[layer][name][:, 1], largest)
  np.testing.assert_array_equal(own['mlp']['up'][:, 0], own['mlp']['gate'][:, 0])
  np.testing.assert_array_equal(own['self_attention']['query'][:, 0], own['self_attention']['key'][:, 0])
  assert (np.asarray(own['mlp']['up'][:, 0]) != np.asarray(own['mlp']['down'][:, 0])).all()
  assert all((np.asarray(x) > 0).all() for x in jax.tree.leaves(felt))


def test_a_weight_that_is_used_twice_has_the_size_that_it_has():
  """Keys and queries of disentangled attention also multiply the table of distances: sizes of the two are not added."""
  model = build(DEBERTA, precision=WHOLE)
  own, data = initialize(model.specs, jax.random.key(0)), batch()
  amax = jax.tree.map(lambda x: largest_of(x + 3), first_history(WHOLE, model.specs))
  run = lambda amax: model.apply(own, data, None, {AMAX: amax})[0].sum()
  felt = jax.jit(jax.grad(run))(amax)['encoder']['blocks']['self_attention']
  for name in ('query', 'key', 'value'):
    weights = np.abs(np.asarray(own['encoder']['blocks']['self_attention'][name]))
    np.testing.assert_array_equal(felt[name][:, 1], weights.reshape(DEBERTA.layers, -1).max(1))
  np.testing.assert_array_equal(felt['query'][:, 0], felt['value'][:, 0])


same = functools.partial(np.testing.assert_allclose, rtol=0.02)


@pytest.mark.slow
def test_microbatches_observe_what_the_batch_does():
  """Scales come from earlier steps, so that each example is rounded as in the whole batch."""
  value, grads, felt = seen(parts=2)
  expected, expected_grads, expected_felt = whole()
  assert value == pytest.approx(expected, rel=1e-5)
  jax.tree.map(same, felt, expected_felt)
  norms = jax.tree.map(lambda a, b: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)), grads, expected_grads)
  assert np.max(jax.tree.leaves(norms)) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize('axes', ['fsdp', 'tensor'])
def test_meshes_and_remat_observe_the_same(axes):
  value, _, felt = seen(cfg=dataclasses.replace(SMALL, remat='dots' if axes == 'fsdp' else 'full'), axes=axes)
  assert value == pytest.approx(whole()[0], rel=2e-4)
  jax.tree.map(same, felt, whole()[2])


@pytest.mark.slow
def test_edges_and_other_recipes_observe_nothing():
  _, _, felt = seen(delayed(overrides={'mlp': 'fp8'}, last_layers=1))
  own = felt['decoder']['blocks']
  assert (np.asarray(own['self_attention']['query'])[:, 0] > 0).tolist() == [True, False]
  assert not np.asarray(own['mlp']['up']).any()
