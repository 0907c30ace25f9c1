"""Parts against outliers: rotations of embeddings, norms with a single scale, and the kurtosis of each layer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.build import KernelsConfig, build, check_model
from models.layers.block import excess_kurtosis
from models.layers.embedding import Rotation
from models.layers.norm import RmsNormConfig, make_norm
from models.layers.values import ByLayer
from models.specs import as_function, count, initialize, param_specs
from pretrain.errors import ConfigError
from pretrain.interchange.families import family_for
from pretrain.step.loss import LossConfig, make_loss
from tests.models.small import DEBERTA, LLAMA, SAFE, T5_SAFE, batch, model_and_params, shaken


def test_a_rotation_keeps_lengths_and_angles_at_first():
  module = Rotation(48)
  own = initialize(param_specs(module), jax.random.key(3))
  x = jax.random.normal(jax.random.key(1), (2, 3, 48))
  found = as_function(module)(own)(x)
  inner = lambda x: np.einsum('abe,cde->abcd', x, x)
  np.testing.assert_allclose(inner(found), inner(x), atol=1e-4)
  assert np.abs(found - x).max() > 0.5, 'not the identity'
  signs = [np.linalg.det(initialize(param_specs(module), jax.random.key(i))['kernel']) for i in range(16)]
  assert {round(float(sign)) for sign in signs} == {-1, 1}, 'rotations and reflections, as the Haar measure has them'


def test_a_norm_with_a_single_scale_is_the_paper_s():
  """gamma x / |x| with gamma = scale sqrt(features): arXiv:2506.19697, eq. of SSNorm."""
  module = make_norm(16, RmsNormConfig(scale='single', eps=1e-12))
  specs = param_specs(module)
  assert specs['scale'].shape == ()
  x = np.random.default_rng(0).normal(size=(2, 3, 16)).astype(np.float32)
  found = as_function(module)({'scale': jnp.float32(0.7)})(jnp.asarray(x))
  np.testing.assert_allclose(found, 0.7 * 4 * x / np.linalg.norm(x, axis=-1, keepdims=True), rtol=1e-5)


def test_logits_are_those_of_folded_tables():
  """(E P, W Q) without rotations: the function is the same, so a table and a head can take them in."""
  model, params = model_and_params(SAFE)
  params, data = shaken(params), batch()
  found = model.logits(params, model.apply(params, data)[0])
  embedding, decoder, head = dict(params['embedding']), dict(params['decoder']), dict(params['head'])
  embedding['table'] = embedding['table'] @ embedding.pop('rotation')['kernel']
  head['kernel'] = decoder.pop('finishing')['kernel'] @ head['kernel']
  folded = build(dataclasses.replace(SAFE, embedding_rotation=False))
  own = {**params, 'embedding': embedding, 'decoder': decoder, 'head': head}
  np.testing.assert_allclose(folded.logits(own, folded.apply(own, data)[0]), found, atol=1e-4)
  assert count(model.specs) - count(folded.specs) == 2 * 32**2


def test_an_encoder_decoder_has_one_rotation_for_both_embeddings_and_one_before_the_head():
  specs = build(T5_SAFE).specs
  assert specs['embedding']['rotation']['kernel'].shape == (32, 32)
  assert ('finishing' in specs['encoder'], 'finishing' in specs['decoder']) == (False, True)


def test_kurtosis_equals_its_formula_and_skips_padding():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 5, 400)).astype(np.float32)
  x[0, 1, 7], x[1, 4] = 60.0, 1e4
  segments = np.array([[1, 1, 2, 2, 2], [1, 1, 1, 1, 0]])
  own = x[segments > 0].astype(np.float64)
  own = own - own.mean(-1, keepdims=True)
  expected = ((own**4).mean(-1) / (own**2).mean(-1) ** 2 - 3).mean()
  assert float(excess_kurtosis(jnp.asarray(x), jnp.asarray(segments))) == pytest.approx(expected, rel=1e-4)
  assert expected > 20, 'one feature of one token shows'
  assert abs(float(excess_kurtosis(jnp.asarray(rng.normal(size=(4, 64, 400))), None))) < 0.05


@pytest.mark.parametrize('windows', [pytest.param((4, None), marks=pytest.mark.slow), ()])
def test_every_layer_s_kurtosis_is_a_metric_and_an_observation(windows):
  """That of its own output: layers by hand. Gradients stay as they are."""
  cfg = dataclasses.replace(LLAMA, layers=4, kurtosis=True, windows=windows)
  model, params = model_and_params(cfg)
  data = {k: v for k, v in batch().items() if not k.startswith('encoder')}
  data |= {'decoder_target_tokens': data['decoder_input_tokens']}
  data |= {'decoder_loss_weights': (data['decoder_segment_ids'] > 0).astype(np.float32)}

  def outputs(params):
    module = model.bind(params)
    x, positions, see = module.enter(data, None)
    found = []
    for layer in range(cfg.layers):
      block = jax.tree.map(lambda x, layer=layer: x[layer], module.decoder.blocks)
      own = dataclasses.replace(see, window=windows[layer % 2]) if windows else see
      x, _, _ = block(x, positions, own, None, None, jnp.uint32(layer), None)
      found.append(excess_kurtosis(x, see.q_segment_ids))
    return found

  loss, weight = make_loss(LossConfig(), model, KernelsConfig()), data['decoder_loss_weights'].sum()
  with jax.numpy_dtype_promotion('standard'):
    (_, (metrics, seen)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, data, None, weight)
    expected = jax.jit(outputs)(params)
    silent = make_loss(LossConfig(), build(dataclasses.replace(cfg, kurtosis=False)), KernelsConfig())
    plain_grads = jax.jit(jax.grad(silent, has_aux=True))(params, data, None, weight)[0]
  np.testing.assert_allclose([metrics[f'kurtosis/decoder/{layer}'] for layer in range(4)], expected, rtol=1e-4)
  assert isinstance(seen['kurtosis/decoder'], ByLayer)
  assert np.ptp(expected) > 1e-2
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, plain_grads)


def test_an_export_refuses_what_no_family_has_by_name():
  family_for(dataclasses.replace(LLAMA, kurtosis=True))
  with pytest.raises(ConfigError, match=r'lacks model\.embedding_rotation, model\.norm\.scale\. Nothing was written'):
    family_for(SAFE)


def test_a_rotation_beside_a_projection_is_refused():
  with pytest.raises(ValueError, match=r'embedding_rotation=True with model\.embedding_size=16, whose projection is'):
    check_model(dataclasses.replace(DEBERTA, embedding_rotation=True))
