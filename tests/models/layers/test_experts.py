"""Experts against a loop over all of them, finite differences, meshes, and what their router tells the loss."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.build import KernelsConfig
from models.flops import flops_per_position
from models.layers.attention import Visibility
from models.layers.experts import MATRIX_AXES, Experts, ExpertsConfig
from models.layers.linear import Projections
from models.layers.mlp import MlpConfig
from models.partition import on, shardings
from models.specs import as_function, initialize, param_specs
from pretrain.devices.mesh import MeshConfig, make_mesh
from pretrain.step.loss import LossConfig, make_loss
from pretrain.step.train_step import accumulate
from tests.models.small import EXPERTS, ROUTED_T5, batch, model_and_params, shaken

EMBED, NUMBER, PER_TOKEN = 6, 5, 2
GATED = MlpConfig(hidden=8, activation='silu')
UNGATED = MlpConfig(hidden=8, activation='relu', gated=False)
X = np.random.default_rng(0).normal(size=(4, 3, EMBED)).astype(np.float32)
SEGMENTS = np.array([[1, 1, 0], [1, 2, 2], [1, 1, 1], [0, 0, 0]])


@functools.cache
def made(mlp: MlpConfig, rate: float = 0.0):
  module = Experts(EMBED, mlp, ExpertsConfig(number=NUMBER, per_token=PER_TOKEN), Projections(), rate)
  return as_function(module), initialize(param_specs(module), jax.random.key(0))


def loop(p: dict, mlp: MlpConfig, x: np.ndarray) -> np.ndarray:
  """Mixtral's equations in float64, one token and one expert at a time."""
  activate = {'silu': lambda y: y / (1 + np.exp(-y)), 'relu': lambda y: np.maximum(y, 0)}[mlp.activation]
  out = np.zeros_like(x)
  for place in np.ndindex(x.shape[:2]):
    logits = x[place] @ p['router']
    chosen = np.argsort(-logits)[:PER_TOKEN]
    weights = np.exp(logits[chosen]) / np.exp(logits[chosen]).sum()
    for weight, i in zip(weights, chosen, strict=True):
      up = x[place] @ p['up'][i]
      hidden = activate(x[place] @ p['gate'][i]) * up if mlp.gated else activate(up)
      out[place] += weight * (hidden @ p['down'][i])
  return out


def values(p: dict, x: np.ndarray, segments: np.ndarray) -> tuple[float, float]:
  """(Switch's balance over all choices, ST-MoE's z) in float64."""
  logits = x[segments > 0] @ p['router']
  probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  chosen = np.argsort(-logits)[:, :PER_TOKEN]
  load = np.bincount(chosen.ravel(), minlength=NUMBER) / chosen.size
  return NUMBER * load @ probabilities.mean(0), (np.log(np.exp(logits).sum(-1)) ** 2).mean()


@pytest.mark.parametrize('mlp', [GATED, UNGATED], ids=['gated', 'ungated'])
def test_experts_equal_a_loop_over_tokens_and_experts(mlp):
  bind, params = made(mlp)
  wide = jax.tree.map(np.float64, params)
  found, aux = jax.jit(lambda p: bind(p)(X, None, SEGMENTS))(params)
  np.testing.assert_allclose(found, loop(wide, mlp, np.float64(X)), atol=1e-6)
  np.testing.assert_allclose(
    [aux['load_balance'].value(), aux['router_z']], values(wide, np.float64(X), SEGMENTS), rtol=1e-5
  )


@pytest.mark.parametrize('mlp', [GATED, UNGATED], ids=['gated', 'ungated'])
def test_gradients_of_experts_and_router_equal_finite_differences(mlp):
  """Central differences of the loop in float64, along a random direction of each matrix; the router's also by entry."""
  bind, params = made(mlp)
  wide, rng, h = jax.tree.map(np.float64, params), np.random.default_rng(1), 1e-6

  def loss(p):
    y, aux = bind(p)(X, None, SEGMENTS)
    return jnp.sin(y).sum() + 3 * aux['load_balance'].value() + 2 * aux['router_z']

  def oracle(p):
    balance, z = values(p, np.float64(X), SEGMENTS)
    return np.sin(loop(p, mlp, np.float64(X))).sum() + 3 * balance + 2 * z

  gradients = jax.jit(jax.grad(loss))(params)
  directions = [(name, rng.normal(size=w.shape)) for name, w in wide.items()]
  for i, j in np.ndindex(2, NUMBER):
    directions.append(('router', np.zeros((EMBED, NUMBER))))
    directions[-1][1][i, j] = 1
  for name, along in directions:
    change = lambda sign, name=name, along=along: oracle(wide | {name: wide[name] + sign * h * along})
    expected = (change(1) - change(-1)) / (2 * h)
    assert float((gradients[name] * along).sum()) == pytest.approx(expected, rel=1e-3, abs=1e-4), name


@pytest.mark.parametrize('rate', [0.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_a_mesh_changes_neither_values_nor_gradients(rate):
  """Tokens and hidden features are divided; `expert` is in test_routing.py."""
  cfg = ExpertsConfig(number=4, per_token=2)
  module = Experts(EMBED, GATED, cfg, Projections(), rate)
  bind, specs, mesh = as_function(module), param_specs(module), make_mesh(MeshConfig(fsdp=2, tensor=2))
  params = initialize(specs, jax.random.key(0))
  keys = jax.random.split(jax.random.key(1), 4) if rate else None

  def loss(p, mesh):
    with on(mesh):
      y, aux = bind(p)(X, keys, SEGMENTS)
    return jnp.sin(y).sum() + aux['load_balance'].value() + aux['router_z'], y

  run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
  placed = jax.device_put(params, shardings(specs, mesh))
  for one, other in zip(jax.tree.leaves(run(placed, mesh)), jax.tree.leaves(run(params, None)), strict=True):
    np.testing.assert_allclose(one, other, rtol=0, atol=2e-6 * max(1, np.abs(other).max()))


@pytest.mark.slow
def test_dropout_belongs_to_the_hidden_features_of_an_example():
  """As in an MLP: one mask for all tokens of an example, whatever experts they go to."""
  (bind, params), (plain, _) = made(GATED, 0.5), made(GATED)
  keys = jax.random.split(jax.random.key(1), 4)
  one = jnp.broadcast_to(X[:1], X.shape)
  dropped = bind(params)(one, keys)[0]
  assert np.abs(dropped - plain(params)(one, None)[0]).max() > 1e-2
  assert np.abs(dropped[0] - dropped[1]).max() > 1e-2, 'examples have masks of their own'
  np.testing.assert_allclose(bind(params)(one[::-1], keys[::-1])[0], dropped[::-1], atol=1e-6)


@pytest.mark.slow
def test_aux_is_the_mean_over_layers():
  """Of four blocks run one by one; two are scanned in a group, for their windows."""
  model, params = model_and_params(dataclasses.replace(EXPERTS, layers=4, windows=(4, None)))
  params, data = shaken(params), batch()
  segments, positions = data['decoder_segment_ids'], data['decoder_positions']

  def one_by_one(params):
    module, found = model.bind(params), []
    x = module.embedding(data['decoder_input_tokens'], positions, jnp.float32, None)
    for layer in range(4):
      see = Visibility(causal=True, q_segment_ids=segments, kv_segment_ids=segments, window=None if layer % 2 else 4)
      block = jax.tree.map(lambda a, i=layer: a[i], module.decoder.blocks)
      x, _, aux = block(x, positions, see, None, None, jnp.uint32(layer), None)
      found.append(aux)
    return found

  layers, whole = jax.jit(one_by_one)(params), jax.jit(model.apply)(params, data)[1]
  assert set(whole) == {'load_balance', 'router_z', 'expert_load/decoder', 'router_entropy/decoder'}
  for aux in layers:  # Fedus et al. 2022, §2.2, eq. 4
    own = aux['load_balance']
    aux['load_balance'] = EXPERTS.experts * np.sum(np.asarray(own.load) * np.asarray(own.probability))
  for name in ('load_balance', 'router_z'):
    each = [float(aux[name]) for aux in layers]
    assert float(whole[name]) == pytest.approx(np.mean(each), rel=1e-5)
    assert np.ptp(each) > 1e-3, 'layers must differ'
  for name, shape in (('expert_load', (4, EXPERTS.experts)), ('router_entropy', (4,))):
    of_layers = whole[f'{name}/decoder'].values
    assert of_layers.shape == shape
    np.testing.assert_allclose(of_layers, [aux[name].values for aux in layers], rtol=1e-5)


@pytest.mark.slow
def test_aux_of_an_encoder_decoder_is_the_mean_over_layers_of_both():
  """Where a router is zero, its z is (ln experts)^2: two layers of five are the encoder's."""
  model, params = model_and_params(ROUTED_T5)
  run = jax.jit(lambda p: model.apply(p, batch())[1]['router_z'])
  zero = np.log(ROUTED_T5.experts) ** 2

  def without(stack):
    quiet = lambda path, x: 0 * x if path[0].key in stack and path[-1].key == 'router' else x
    return float(run(jax.tree_util.tree_map_with_path(quiet, params)))

  assert without(('encoder', 'decoder')) == pytest.approx(zero, rel=1e-5)
  of_encoder = without(('decoder',)) - 3 / 5 * zero
  assert of_encoder > 2 / 5 * zero * 1.05
  own = jax.jit(lambda p: model.bind(p).encode(batch(), None)[1]['router_z'])(params)
  assert of_encoder == pytest.approx(2 / 5 * float(own), rel=1e-5)


def with_targets(data):
  weights = (data['decoder_segment_ids'] > 0).astype(np.float32)
  return data | {'decoder_target_tokens': data['decoder_input_tokens'], 'decoder_loss_weights': weights}


@pytest.mark.slow
def test_accumulation_weighs_aux_by_targets():
  """Two microbatches with 12 and 5 targets: the value and the gradient are the means of theirs, weighed so."""
  model, params = model_and_params(EXPERTS)
  loss = make_loss(LossConfig(load_balance=0.5, router_z=0.25), model, KernelsConfig())
  data = with_targets(batch(((5, 7), (3, 2))))
  part = lambda i: {name: x[i : i + 1] for name, x in data.items()}
  with jax.numpy_dtype_promotion('standard'):
    run = lambda n: jax.jit(accumulate(loss, n))
    (value, (metrics, seen)), gradients = run(2)(params, data, None, jnp.float32(17), {})
    singles = [run(1)(params, part(i), None, jnp.float32(w), {}) for i, w in ((0, 12), (1, 5))]
  mean = lambda *x: sum(a * w for a, w in zip(x, (12 / 17, 5 / 17), strict=True))
  expected = jax.tree.map(mean, *singles)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6), ((value, (metrics, seen)), gradients), expected
  )
  plain = metrics['loss'] + 0.5 * metrics['load_balance'] + 0.25 * metrics['router_z']
  assert float(value) == pytest.approx(float(plain), rel=1e-6)
  assert 1 <= float(metrics['load_balance']) < EXPERTS.experts
  assert abs(float(singles[0][0][1][0]['load_balance'] - singles[1][0][1][0]['load_balance'])) > 1e-3


@pytest.mark.slow
def test_a_batch_of_twice_the_same_rows_is_one_microbatch_of_them():
  model, params = model_and_params(EXPERTS)
  loss = make_loss(LossConfig(load_balance=0.5, router_z=0.25), model, KernelsConfig())
  data = {name: np.repeat(x, 2, 0) for name, x in with_targets(batch(((5, 7), (3, 2)))).items()}
  with jax.numpy_dtype_promotion('standard'):
    whole, parts = (jax.jit(accumulate(loss, n))(params, data, None, jnp.float32(34), {}) for n in (1, 2))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6), parts, whole)


def test_flops_count_the_experts_of_a_token_and_the_router():
  of = lambda **changes: sum(
    flops_per_position(dataclasses.replace(EXPERTS, **changes), inputs_length=0, targets_length=64).values()
  )
  layers, embed, hidden = EXPERTS.layers, EXPERTS.embed, EXPERTS.mlp.hidden
  mlp, router = 3 * embed * hidden, embed * EXPERTS.experts
  assert of() - of(experts=None) == 6 * layers * (mlp * (EXPERTS.experts_per_token - 1) + router)
  assert of(experts=2 * EXPERTS.experts) - of() == 6 * layers * router
  assert of(experts_per_token=3) - of() == 6 * layers * mlp


def test_every_matrix_of_experts_has_axes_on_a_device():
  assert set(made(GATED)[1]) - {'router'} == set(MATRIX_AXES) - {'dropped'}


@pytest.mark.slow
def test_rematerialised_dots_keep_the_products_of_experts():
  """Of gate, up and down, forward and two products backward each: 9; `full` computes the forward ones again."""
  data = batch()

  def of(remat):
    model, params = model_and_params(EXPERTS, remat=remat)
    run = jax.grad(lambda p: jnp.square(model.apply(p, data)[0]).sum())
    products = str(jax.make_jaxpr(run)(params)).count('ragged_dot_general[')
    return products, jax.jit(run)(params)

  (kept, gradients), (again, _), (none, expected) = of('dots'), of('full'), of('none')
  assert (kept, again, none) == (9, 12, 9)
  close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())
  jax.tree.map(close, gradients, expected)


@pytest.mark.slow
def test_rematerialised_dots_keep_the_products_of_all_experts_at_once():
  """With a capacity: three forward in the scan over layers, and under `full` again in its backward pass."""
  data = batch()

  def of(remat):
    model, params = model_and_params(EXPERTS, remat=remat, expert_capacity=1.0)
    run = jax.grad(lambda p: jnp.square(model.apply(p, data)[0]).sum())
    return str(jax.make_jaxpr(run)(params)).count('name=product_of_experts')

  assert (of('dots'), of('full')) == (3, 6)
