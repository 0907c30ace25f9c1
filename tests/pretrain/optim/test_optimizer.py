"""Optimizer rules follow axes: what decays, and how updates scale with their parameters, layer by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.specs import Normal, ParamSpec
from pretrain.optim.adafactor import Adafactor
from pretrain.optim.muon import Muon
from pretrain.optim.optimizer import AdamW, decays, make_optimizer, scale_by_parameter


def spec(shape, axes):
  return ParamSpec(shape, jnp.float32, axes, Normal())


def test_matrices_decay_and_scales_and_bias_tables_do_not():
  assert decays(spec((4, 8), ('embed', 'mlp')))
  assert decays(spec((2, 4, 8), ('layers', 'embed', 'mlp')))
  assert not decays(spec((2, 4), ('layers', 'embed')))
  assert not decays(spec((32, 4), ('buckets', 'heads')))


def test_parameter_scale_is_the_rms_of_each_layer():
  specs = {'w': spec((2, 3, 4), ('layers', 'embed', 'mlp'))}
  params = {'w': jnp.stack([jnp.full((3, 4), 2.0), jnp.full((3, 4), 1e-9)])}
  updates, _ = scale_by_parameter(specs).update({'w': jnp.ones((2, 3, 4))}, None, params)
  np.testing.assert_allclose(updates['w'][0], 2.0, rtol=1e-6)
  np.testing.assert_allclose(updates['w'][1], 1e-3, rtol=1e-6, err_msg='a parameter at zero can leave it')


def test_decay_moves_what_decays_alone():
  specs = {'w': spec((4, 8), ('embed', 'mlp')), 'scale': spec((4,), ('embed',))}
  params = {'w': jnp.ones((4, 8)), 'scale': jnp.ones(4)}
  tx = make_optimizer(AdamW(weight_decay=0.5), lambda step: jnp.float32(0.1), specs)
  updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
  np.testing.assert_allclose(updates['w'], -0.05, rtol=1e-6)
  np.testing.assert_array_equal(updates['scale'], 0.0)


@pytest.mark.parametrize('cfg', [Adafactor(min_dim_size_to_factor=1), Muon(clip_norm=0.0)], ids=['adafactor', 'muon'])
def test_each_expert_is_updated_as_if_it_were_alone(cfg):
  """Five experts of very different sizes, stacked, against a parameter for each."""
  rng = np.random.default_rng(0)
  draw = lambda: {'up': jnp.float32(rng.normal(size=(5, 16, 24)) * 10.0 ** np.arange(-2, 3)[:, None, None])}
  stacked, params, grads = {'up': spec((5, 16, 24), ('experts', 'embed', 'mlp'))}, draw(), draw()
  alone = {str(i): spec((16, 24), ('embed', 'mlp')) for i in range(5)}
  apart = lambda tree: {str(i): tree['up'][i] for i in range(5)}

  def update(specs, grads, params):
    tx = make_optimizer(cfg, lambda step: 1.0, specs)
    return jax.jit(lambda: tx.update(grads, tx.init(params), params)[0])()

  together, each = update(stacked, grads, params), update(alone, apart(grads), apart(params))
  for i in range(5):
    near = 5e-3 if isinstance(cfg, Muon) else 1e-5  # Muon's products are in bf16
    np.testing.assert_allclose(together['up'][i], each[str(i)], rtol=1e-5, atol=near * np.abs(each[str(i)]).max())
