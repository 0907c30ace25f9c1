"""Muon's matrices are orthogonal, one a layer with heads joined; the rest is Adam's. Lion is its paper's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pretrain.optim.muon import is_hidden_matrix, newton_schulz, orthogonal, scale_by_muon, update_scale
from pretrain.optim.optimizer import AdamW, Lion, Muon, make_optimizer
from tests.pretrain.optim.optimizing import SPECS, draw, spec


def quintic(x: np.ndarray) -> np.ndarray:
  """Five steps of Jordan's polynomial on the singular values, in float64: what Newton-Schulz does to them."""
  u, s, v = np.linalg.svd(np.float64(x), full_matrices=False)
  s = s / np.sqrt(np.sum(s**2))
  for _ in range(5):
    s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
  return u @ np.diag(s) @ v


def test_newton_schulz_is_jordans_polynomial_of_the_singular_values():
  x = np.float32(np.random.default_rng(0).normal(size=(2, 24, 40)))
  got = np.float64(newton_schulz(x))
  np.testing.assert_allclose(got, [quintic(a) for a in x], atol=0.06)
  singular = np.linalg.svd(got, compute_uv=False)
  assert 0.6 < singular.min() < singular.max() < 1.25
  assert not np.asarray(newton_schulz(jnp.zeros((1, 4, 8)))).any()


@pytest.mark.parametrize(
  ('shape', 'axes', 'matrix'),
  [
    ((2, 16, 4, 6), ('layers', 'embed', 'heads', 'head_dim'), (16, 24)),
    pytest.param((2, 4, 12, 32), ('layers', 'heads', 'head_dim', 'embed'), (48, 32), marks=pytest.mark.slow),
    ((2, 3, 16, 40), ('layers', 'experts', 'embed', 'mlp'), (16, 40)),
    pytest.param((40, 16), ('mlp', 'embed'), (40, 16), marks=pytest.mark.slow),
  ],
)
def test_every_layer_is_one_matrix_with_heads_joined(shape, axes, matrix):
  own = spec(shape, axes)
  x = draw({'x': own}, 3)['x']
  got = orthogonal(x, own, None)
  assert (got.shape, got.dtype) == (x.shape, x.dtype)
  wanted = np.stack([quintic(m) for m in np.asarray(x).reshape(-1, *matrix)]).reshape(shape)
  np.testing.assert_allclose(got, wanted, atol=0.06)


def test_hidden_matrices_are_muons_and_the_rest_adams():
  labels = jax.tree.map(is_hidden_matrix, SPECS)
  assert labels == {
    'embedding': False, 'head': False, 'bias': False, 'norm': False,
    'blocks': {'query': True, 'out': True, 'up': True, 'down': True, 'norm': False},
  }  # fmt: skip
  params, grads = draw(SPECS, 0), draw(SPECS, 1)

  def update(cfg):
    tx = make_optimizer(cfg, lambda step: 1.0, SPECS)
    return jax.jit(lambda grads, params: tx.update(grads, tx.init(params), params)[0])(grads, params)

  muon, adam = update(Muon()), update(AdamW(b2=0.95, weight_decay=0.1))
  for name in ('embedding', 'head', 'bias', 'norm'):
    np.testing.assert_allclose(muon[name], adam[name], rtol=1e-6)
  assert np.abs(muon['blocks']['up'] - adam['blocks']['up']).max() > 0.1


def test_momentum_is_nesterovs_and_the_scale_stands_outside():
  own = {'w': spec((16, 24), ('embed', 'mlp'))}
  tx = scale_by_muon(Muon(momentum=0.5), own, None)
  first, second = ({'w': draw(own, seed)['w']} for seed in (1, 2))
  updates, state = tx.update(second, tx.update(first, tx.init(first))[1])
  moment = 0.25 * first['w'] + 0.5 * second['w']
  np.testing.assert_allclose(state.mu['w'], moment, rtol=1e-6)
  wanted = 0.2 * 24**0.5 * quintic(0.5 * moment + 0.5 * second['w'])
  np.testing.assert_allclose(updates['w'], wanted, atol=0.06)
  plain = 0.2 * 24**0.5 * quintic(moment)
  assert np.abs(updates['w'] - plain).max() > 0.1, 'the mutation: momentum without looking ahead'


def test_update_scales_are_those_of_their_authors():
  moonlight, jordan = Muon(), Muon(update_scale='jordan')
  up, down = spec((2, 100, 400), ('layers', 'embed', 'mlp')), spec((2, 400, 100), ('layers', 'mlp', 'embed'))
  query = spec((100, 5, 180), ('embed', 'heads', 'head_dim'))
  assert [update_scale(s, moonlight) for s in (up, down, query)] == [4.0, 4.0, 6.0]
  assert [update_scale(s, jordan) for s in (up, down, query)] == [2.0, 1.0, 3.0]


def test_moonlight_updates_have_the_rms_of_adamw():
  own = {'w': spec((256, 512), ('embed', 'mlp'))}
  tx = scale_by_muon(Muon(), own, None)
  updates, _ = tx.update(draw(own, 1), tx.init(draw(own, 1)))
  assert 0.15 < float(jnp.sqrt(jnp.mean(jnp.square(updates['w'])))) < 0.25


def test_lion_is_algorithm_2():
  own = {'w': spec((4, 8), ('embed', 'mlp'))}
  cfg = Lion(b1=0.9, b2=0.99, weight_decay=0.1, clip_norm=0.0)
  tx = make_optimizer(cfg, lambda step: 0.01, own)
  params, state = draw(own, 0)['w'], tx.init(draw(own, 0))
  wanted, moment = np.float64(params), np.zeros((4, 8))
  for seed in (1, 2, 3):
    grad = np.float64(draw(own, seed)['w'])
    wanted = wanted - 0.01 * (np.sign(0.9 * moment + 0.1 * grad) + 0.1 * wanted)
    moment = 0.99 * moment + 0.01 * grad
    updates, state = tx.update({'w': jnp.float32(grad)}, state, {'w': params})
    params = params + updates['w']
  np.testing.assert_allclose(params, wanted, rtol=1e-5)
