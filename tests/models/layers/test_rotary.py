"""Scalings of rotary positions and the distance ceiling, against the formulas of their papers in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.layers.positions.clex import LearnedFrequencies
from models.layers.positions.rotary import Clex, NoScaling, Rope, Truncated, frequencies
from models.specs import as_function, initialize, param_specs
from pallas_kernels import rotation
from pretrain.step.loss import LossConfig, make_loss
from tests.models import plain, small


@pytest.mark.parametrize('turns', [{}, {'kept_turns': 3.0, 'zero_turns': 0.5, 'fixed_turns': 0.3}])
def test_a_truncated_basis_is_that_of_the_paper(turns):
  """arXiv:2308.10882, §3.2: theta_j from b on, rho between a and b, 0 up to a."""
  scaling = Truncated(original_max_positions=100, **turns)
  found, factor = frequencies(Rope(theta=10_000.0, dims=64, scaling=scaling))
  b, a, rho = (2 * np.pi * n / 100 for n in (turns or {'b': 1, 'a': 1 / 8, 'rho': 1 / 16}).values())
  expected = [theta if theta >= b else rho if theta > a else 0.0 for theta in 10_000.0 ** (-np.arange(0, 64, 2) / 64)]
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  assert factor == 1.0
  assert {0.0, rho} < set(expected), 'all three parts must occur'


CLEX = Clex(original_max_positions=8, max_factor=4, width=2)
ROPE = Rope(theta=500.0, dims=8, scaling=CLEX)


def bound(cfg: Clex = CLEX):
  """(the module with random parameters, these in float64)."""
  module = LearnedFrequencies(ROPE, cfg)
  rng = np.random.default_rng(0)
  params = {name: rng.normal(0, 0.3, spec.shape).astype(np.float32) for name, spec in param_specs(module).items()}
  return as_function(module)(params), {name: x.astype(np.float64) for name, x in params.items()}


def integrated(cfg: Clex, params, until: int, steps: int = 400) -> np.ndarray:
  """exp z(until) of the equations in float64: dz/dt = f(z + log n(t)) + n'(t) / n(t), with n' by differences.

  n(t) = (theta * alpha^(d / (d - 2)))^(-2i / d), alpha = 2t - 1.
  """
  d, twice = ROPE.dims, np.arange(0, ROPE.dims, 2)
  act = {'tanh': np.tanh, 'silu': lambda x: x / (1 + np.exp(-x))}[cfg.activation]
  n = lambda t: (ROPE.theta * (2 * t - 1) ** (d / (d - 2))) ** (-twice / d)
  h = 1e-5
  g = lambda z, t: act((z + np.log(n(t))) @ params['up']) @ params['down'] + (n(t + h) - n(t - h)) / (2 * h) / n(t)
  z, size = np.log(ROPE.theta ** (-twice / d)), 1 / steps
  for t in 1 + np.arange((until - 1) * steps) * size:
    middle = z + size / 2 * g(z, t)  # the midpoint rule, of another order than what is tested
    z = z + size * g(middle, t + size / 2)
  return np.exp(z)


@pytest.mark.parametrize('activation', ['silu', 'tanh'])
def test_learned_frequencies_solve_the_equation_of_the_paper(activation):
  cfg = dataclasses.replace(CLEX, activation=activation)
  module, params = bound(cfg)
  table = np.asarray(jax.jit(lambda: module.table())())
  plain_frequencies = frequencies(dataclasses.replace(ROPE, scaling=NoScaling()))[0]
  np.testing.assert_array_equal(table[0], plain_frequencies)
  for t in (2, 3, 4):
    np.testing.assert_allclose(table[t - 1], integrated(cfg, params, t), rtol=2e-5)
    assert np.abs(table[t - 1] / integrated(cfg, params | {'down': 0 * params['down']}, t) - 1).max() > 0.05


def test_drawn_parameters_give_ntk_aware_frequencies():
  """NTK-aware scaling by 2t - 1, of which scale 1 is the plain basis."""
  module = LearnedFrequencies(ROPE, CLEX)
  specs = param_specs(module)
  table = np.asarray(as_function(module)(initialize(specs, jax.random.key(0))).table())
  for t, row in enumerate(table, 1):
    expected = (500.0 * (2 * t - 1) ** (8 / 6)) ** (-np.arange(0, 8, 2) / 8)
    np.testing.assert_allclose(row, expected, rtol=1e-5)


def test_a_scale_is_that_of_the_length_of_each_document():
  """ceil(length / 8), at most 4, though documents share a row."""
  module, _ = bound()
  lengths = [8, 9, 40, 3]
  positions = np.concatenate([np.arange(n) for n in lengths])[None]
  segments = np.repeat([1, 2, 3, 0], lengths)[None]
  radians = jax.jit(lambda *of: module.of_documents(*of).radians)(jnp.asarray(positions), jnp.asarray(segments))
  found = np.asarray(radians)[0]
  scales, table = np.repeat([1, 2, 4, 1], lengths), np.asarray(module.table())
  np.testing.assert_allclose(found, positions[0][:, None] * table[scales - 1], rtol=2e-6)


def test_a_training_step_draws_its_scale_and_positions():
  """As in the reference: t from 1 to max_factor, the positions in order, different, with both ends of t * length."""
  module, _ = bound()
  table, seen, inner = np.asarray(module.table(), np.float64), [], []
  draw = jax.jit(lambda key: module.of_step(6, key).radians)
  for step in range(200):
    radians = np.asarray(draw(jax.random.fold_in(jax.random.key(3), step)), np.float64)[0]
    drawn = {t: np.round(radians[:, 0] / table[t - 1, 0]) for t in range(1, 5)}
    t = next(t for t, at in drawn.items() if np.allclose(radians, np.outer(at, table[t - 1])))
    positions = drawn[t].astype(int)
    assert positions[0] == 0
    assert positions[-1] == 6 * t - 1
    assert (np.diff(positions) > 0).all()
    seen.append(t)
    inner += list(positions[1:-1]) if t == 4 else []
  assert np.bincount(seen, minlength=5)[1:].min() > 25, 'each scale about 50 times'
  assert set(inner) == set(range(1, 23)), 'every position in between'
  again = draw(jax.random.fold_in(jax.random.key(3), 199))
  np.testing.assert_array_equal(again, draw(jax.random.fold_in(jax.random.key(3), 199)))


def test_longer_rows_have_positions_closer_together():
  module, _ = bound()
  radians = jax.jit(lambda length, key: module.of_step(length, key).radians, static_argnums=0)
  last = [np.asarray(radians(length, jax.random.key(0)))[0, -1] for length in (8, 32)]
  np.testing.assert_allclose(last[1] / last[0], (32 - 1) / 4 / (8 - 1), rtol=1e-5)  # this key draws t = 1


@pytest.mark.slow
def test_a_model_learns_its_frequencies():
  """A few steps of gradient descent: the loss falls, both matrices move, a step is repeated bit for bit."""
  model, params = small.model_and_params(small.CLEX)
  loss = make_loss(LossConfig(), model, small.KERNELS)
  data = {name: x for name, x in small.batch().items() if name.startswith(('decoder', 'example'))}
  data |= {'decoder_target_tokens': np.roll(data['decoder_input_tokens'], -1, 1)}
  data['decoder_loss_weights'] = (data['decoder_segment_ids'] > 0).astype(np.float32)

  weight = data['decoder_loss_weights'].sum()

  @jax.jit
  def step(params, key):
    with jax.numpy_dtype_promotion('standard'):
      (value, _), gradients = jax.value_and_grad(loss, has_aux=True)(params, data, key, weight)
    return value, jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)

  def trained():
    found, values = params, []
    for number in range(8):
      value, found = step(found, jax.random.fold_in(jax.random.key(0), number))
      values.append(float(value))
    return values, found

  first = {float(step(params, jax.random.fold_in(jax.random.key(0), number))[0]) for number in range(4)}
  assert len(first) > 1, 'each step draws its scale'
  values, found = trained()
  assert values[-1] < values[0] - 0.5
  assert all(np.abs(found['frequencies'][name] - params['frequencies'][name]).max() > 1e-6 for name in ('up', 'down'))
  assert trained()[0] == values


def lambda_attention(cfg, p, x):
  """arXiv:2308.16137, §4, by loops: distances below the window, and sinks at a distance of at most `sink_distance`."""
  out, half, group = np.zeros((len(x), cfg.embed)), cfg.head_dim // 2, cfg.heads // cfg.kv_heads
  theta = cfg.rope_theta ** (-np.arange(half) / half)
  pairs = lambda y: y[:half] + 1j * y[half:]
  for h in range(cfg.heads):
    q, k, v = x @ p['query'][:, h], x @ p['key'][:, h // group], x @ p['value'][:, h // group]
    for i in range(len(x)):
      near = [(j, i - j) for j in range(i + 1) if i - j < cfg.windows[0]]
      far = [(j, min(i - j, cfg.sink_distance)) for j in range(cfg.sinks) if i - j >= cfg.windows[0]]
      scores = [(pairs(q[i]) * pairs(k[j]).conj() * np.exp(1j * d * theta)).real.sum() for j, d in near + far]
      weights = np.exp(np.array(scores) / np.sqrt(cfg.head_dim))
      values = np.stack([v[j] for j, _ in near + far])
      out[i] += weights / weights.sum() @ values @ p['out'][h]
  return out


@pytest.mark.parametrize('distance', [4, 2])
def test_sinks_have_the_distance_of_the_paper(distance, monkeypatch):
  cfg = dataclasses.replace(small.FAR_SINKS, windows=(4,), sinks=3, sink_distance=distance)
  model, params = small.model_and_params(cfg)
  params, data = small.shaken(params), small.batch(((14,),), 14)
  found = model.logits(params, model.apply(params, data)[0])[0]
  monkeypatch.setattr(plain, 'attention', lambda_attention)
  wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  expected = lambda cfg: plain.logits(cfg, wide, data['decoder_input_tokens'][0])
  np.testing.assert_allclose(found, expected(cfg), atol=1e-4)
  assert np.abs(expected(dataclasses.replace(cfg, sink_distance=50)) - found).max() > 1e-2, 'the distance must show'


def test_the_kernel_rotates_halves_and_their_gradient_in_f32():
  """bf16 in and out, by the formula in float64: no error above that of the last rounding."""
  rng = np.random.default_rng(0)
  x, gradient = (jnp.asarray(rng.normal(size=(2, 3, 256, 128)), jnp.bfloat16) for _ in range(2))
  angle = rng.integers(0, 50, (2, 256, 1)) * 100.0 ** (-np.arange(64) / 64)
  sin, cos = (jnp.asarray(f(angle), jnp.float32) for f in (np.sin, np.cos))
  turned, back = jax.vjp(lambda x, sin=sin, cos=cos: rotation.rotate(x, sin, cos, True), x)
  for got, given, sign in ((turned, x, 1), (back(gradient)[0], gradient, -1)):
    a, b = np.split(np.asarray(given, np.float64), 2, -1)
    sin, cos = sign * np.sin(angle)[:, None], np.cos(angle)[:, None]
    expected = np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=2**-8, atol=2e-5)
  assert rotation.fits((2, 3, 256, 128), 128)
  wrong = [((2, 3, 256, 128), 64), ((2, 3, 200, 128), 128), ((2, 3, 256, 64), 64)]
  assert not any(rotation.fits(*each) for each in wrong)
