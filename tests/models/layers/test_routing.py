"""Experts on several devices and with a capacity: against a dense loop in float64, and one device; bytes that move."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.layers.experts import Experts, ExpertsConfig
from models.layers.linear import Projections
from models.layers.mlp import MlpConfig
from models.layers.routing.routers import placed, places
from models.partition import on, shardings
from models.specs import as_function, initialize, param_specs
from pretrain.devices.mesh import MeshConfig, make_mesh

EMBED, NUMBER, PER_TOKEN, ROWS, LENGTH = 6, 4, 2, 8, 4
MLP = MlpConfig(hidden=8, activation='silu')
X = np.random.default_rng(0).normal(size=(ROWS, LENGTH, EMBED)).astype(np.float32)
SEGMENTS = np.repeat([[1, 1, 2, 0], [1, 1, 1, 1], [1, 2, 2, 2], [0, 0, 0, 0]], 2, 0)
CAPACITIES = {None: 'dropless', 1.0: 'capacity', 0.5: 'small capacity'}


@functools.cache
def made(capacity: float | None, rate: float = 0.0):
  cfg = ExpertsConfig(number=NUMBER, per_token=PER_TOKEN, capacity=capacity)
  module = Experts(EMBED, MLP, cfg, Projections(), rate)
  specs = param_specs(module)
  return as_function(module), specs, initialize(specs, jax.random.key(0))


def in_turn(chosen: np.ndarray, segments: np.ndarray, number: int, room: int) -> np.ndarray:
  """GShard's algorithm 1, one choice at a time: first choices of all tokens, then second choices."""
  kept = np.zeros(chosen.shape, bool)
  for row in range(len(chosen)):
    count = [0] * number
    for rank in range(chosen.shape[2]):
      for token in range(chosen.shape[1]):
        expert = chosen[row, token, rank]
        if segments[row, token] and count[expert] < room:
          kept[row, token, rank], count[expert] = True, count[expert] + 1
  return kept


def dense(p: dict, x: np.ndarray, capacity: float | None) -> tuple[np.ndarray, float]:
  """(every expert on every token, masked, in float64; the share of the choices of tokens that are dropped)."""
  logits = x @ p['router']
  chosen = np.argsort(-logits)[..., :PER_TOKEN]
  top = np.take_along_axis(logits, chosen, -1)
  weights = np.exp(top) / np.exp(top).sum(-1, keepdims=True)
  kept, tokens = np.ones(chosen.shape, bool), SEGMENTS > 0
  if capacity is not None:
    kept = in_turn(chosen, SEGMENTS, NUMBER, math.ceil(capacity * LENGTH * PER_TOKEN / NUMBER))
  out = np.zeros_like(x)
  for expert in range(NUMBER):
    gate, up = x @ p['gate'][expert], x @ p['up'][expert]
    share = (weights * kept * (chosen == expert)).sum(-1)
    out += share[..., None] * ((gate / (1 + np.exp(-gate)) * up) @ p['down'][expert])
  return out, 1 - kept[tokens].mean()


@pytest.mark.parametrize(('number', 'per_token', 'room'), [(4, 2, 2), (3, 3, 1), (5, 1, 4)])
def test_first_choices_have_places_before_second_ones_and_padding_has_none(number, per_token, room):
  rng = np.random.default_rng(number)
  chosen = np.argsort(rng.random((6, 9, number)))[..., :per_token].astype(np.int32)
  chosen[:2] = chosen[:1, :1]  # rows in which all tokens want the same experts
  segments = rng.integers(0, 3, (6, 9))
  expected = in_turn(chosen, segments, number, room)
  assert 0 < expected.sum() < expected.size
  run = jax.jit(placed, static_argnums=(2, 3))
  np.testing.assert_array_equal(run(jnp.asarray(chosen), jnp.asarray(segments), number, room), expected)


@pytest.mark.parametrize('capacity', [pytest.param(1.0, marks=pytest.mark.slow), 0.5])
def test_a_capacity_equals_a_dense_loop_in_values_and_gradients(capacity):
  """Central differences of the loop in float64, along two random directions of each matrix."""
  bind, _, params = made(capacity)
  wide, rng, h = jax.tree.map(np.float64, params), np.random.default_rng(1), 1e-6
  expected, dropped = dense(wide, np.float64(X), capacity)
  assert dropped > 0.05
  run = lambda p: (lambda y, aux: (jnp.sin(y).sum(), (y, aux)))(*bind(p)(X, None, SEGMENTS))
  (_, (found, aux)), gradients = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
  real = SEGMENTS > 0
  np.testing.assert_allclose(found[real], expected[real], atol=1e-6)
  assert not np.any(found[~real]), 'padding has no place'
  assert float(aux['expert_dropped'].values) == pytest.approx(dropped, rel=1e-5)
  oracle = lambda p: np.sin(dense(p, np.float64(X), capacity)[0]).sum()
  for name, w in wide.items():
    for along in rng.normal(size=(2, *w.shape)):
      change = lambda sign, name=name, along=along: oracle(wide | {name: wide[name] + sign * h * along})
      slope = (change(1) - change(-1)) / (2 * h)
      assert float((gradients[name] * along).sum()) == pytest.approx(slope, rel=1e-3, abs=1e-4), name


def test_values_of_a_router_equal_their_formulas():
  bind, _, params = made(0.5)
  logits = np.float64(X[SEGMENTS > 0]) @ np.float64(params['router'])
  p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  chosen = np.argsort(-logits)[:, :PER_TOKEN]
  aux = jax.jit(lambda p: bind(p)(X, None, SEGMENTS)[1])(params)
  load = np.bincount(chosen.ravel(), minlength=NUMBER) / chosen.size
  np.testing.assert_allclose(aux['expert_load'].values, load, rtol=1e-5)
  assert float(aux['router_entropy'].values) == pytest.approx(-(p * np.log(p)).sum(-1).mean(), rel=1e-5)


def test_decoding_drops_nothing():
  (bind, _, params), (plain, *_) = made(0.5), made(None)
  run = lambda p: (bind(p)(X, None, SEGMENTS, decoding=True), plain(p)(X, None, SEGMENTS)[0])
  (found, aux), expected = jax.jit(run)(params)
  np.testing.assert_array_equal(found, expected)
  assert 'expert_dropped' not in aux


@functools.cache
def gradient(capacity: float | None, axes: tuple[tuple[str, int], ...], rate: float, dtype: str = 'float32'):
  """(the text of the compiled program, its values and gradients) on a mesh; no axes: one device, without a mesh."""
  bind, specs, params = made(capacity, rate)
  mesh = make_mesh(MeshConfig(**dict(axes))) if axes else None
  keys = jax.random.split(jax.random.key(1), ROWS) if rate else None

  def loss(p, x):
    with on(mesh):
      y, aux = bind(p)(x, keys, SEGMENTS)
    y = y.astype(jnp.float32)
    scalars = aux['load_balance'].value() + aux['router_z']
    return jnp.sin(y).sum() + scalars, (y, {name: v.values for name, v in aux.items() if hasattr(v, 'values')})

  placed_params = params if mesh is None else jax.device_put(params, shardings(specs, mesh))
  x = jnp.asarray(X, dtype)
  run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)).lower(placed_params, x).compile()
  return run.as_text(), jax.device_get(run(placed_params, x))


slow = lambda *values: pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
  ('capacity', 'axes'),
  [
    (None, {'expert': 4}),
    (0.5, {'expert': 4}),
    slow(1.0, {'expert': 2, 'sequence': 2}),
    slow(None, {'expert': 2, 'tensor': 2, 'fsdp': 2}),
    slow(None, {'expert': 2, 'sequence': 2, 'data': 2}),
    slow(0.5, {'expert': 2, 'tensor': 2, 'fsdp': 2}),
    slow(0.5, {'sequence': 4, 'expert': 2}),
    slow(0.5, {'data': 2, 'fsdp': 2}),
  ],
)
def test_devices_that_hold_some_of_the_experts_change_neither_values_nor_gradients(capacity, axes):
  """With dropout, whose masks belong to examples that lie on other devices, and with padding."""
  (_, expected), (_, found) = gradient(capacity, (), 0.5), gradient(capacity, tuple(axes.items()), 0.5)
  for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(one, other, rtol=0, atol=2e-6 * max(1, np.abs(other).max()))


@pytest.mark.slow
@pytest.mark.parametrize('capacity', CAPACITIES, ids=CAPACITIES.values())
def test_devices_change_bf16_by_its_rounding(capacity):
  (_, expected), (_, found) = (gradient(capacity, axes, 0.0, 'bfloat16') for axes in ((), (('expert', 4),)))
  for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
    one, other = np.float32(one), np.float32(other)
    np.testing.assert_allclose(one, other, rtol=0, atol=2e-2 * max(1, np.abs(other).max()))


def collectives(text: str) -> dict[str, int]:
  names = re.findall(r' (all-to-all|all-gather|reduce-scatter|collective-permute)(?:-start)?\(', text)
  return {name: names.count(name) for name in sorted(set(names))}


def test_a_capacity_moves_tokens_by_all_to_all():
  """There and back, forward and backward: 4. The router and the masks of dropout are gathered, choices are not."""
  assert collectives(gradient(0.5, (('expert', 4),), 0.5)[0]) == {'all-gather': 2, 'all-to-all': 4}


def test_without_a_capacity_tokens_are_gathered_and_their_sums_scattered():
  """Forward x, choices, weights, masks and the router are gathered and the sum is scattered; backward x and weights
  are scattered, and the gradient of the sum gathered."""
  assert collectives(gradient(None, (('expert', 4),), 0.5)[0]) == {'all-gather': 6, 'reduce-scatter': 3}


def test_places_are_an_equal_share_times_the_capacity():
  assert [places(length, 8, 2, 1.25) for length in (1, 16, 64, 65)] == [1, 5, 20, 21]
