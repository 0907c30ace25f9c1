"""The parts of models against the papers: a plain decoder in float64, published numbers, and what does not fit."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.build import KernelsConfig
from models.decode.cached import teacher_forced
from models.families.decoder import DecoderMlpConfig
from models.families.parts import check_parts
from models.layers.mlp import ACTIVATIONS
from models.layers.norm import LayerNormConfig, RmsNormConfig
from models.layers.positions.biases import alibi_slopes
from models.partition import shardings
from pretrain.devices.mesh import MeshConfig, make_mesh
from pretrain.step.loss import LossConfig, make_loss
from tests.models import plain
from tests.models.small import ALIBI, ENCODER, LEARNED, LLAMA, T5, T5_1_0, batch, model_and_params, shaken

ROTARY = dataclasses.replace(
  LLAMA,
  qk_norm='heads',
  bias='all',
  norm=LayerNormConfig(bias=False),
  mlp=DecoderMlpConfig(hidden=48, activation='gelu_tanh'),
)
UNGATED = dataclasses.replace(ALIBI, mlp=DecoderMlpConfig(hidden=48, activation='relu', gated=False), kv_heads=None)


@pytest.mark.parametrize(
  'cfg', [LLAMA, ROTARY, ALIBI, UNGATED, LEARNED], ids=['llama', 'rotary', 'alibi', 'ungated', 'learned']
)
def test_a_decoder_equals_a_plain_one_written_from_the_papers(cfg):
  """Softmax with float32 logits within 1e-4 of an implementation that shares no line."""
  model, params = model_and_params(cfg)
  params, data = shaken(params), batch(((9,),), 9)
  found = model.logits(params, model.apply(params, data)[0])[0]
  wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  np.testing.assert_allclose(found, plain.logits(cfg, wide, data['decoder_input_tokens'][0]), atol=1e-4)


def small_heads(params):
  """`params` whose query and key heads have a mean square near 1e-2: an epsilon of that size halves them."""
  shrink = lambda path, x: x * 0.1 if path[-1].key.removesuffix('_bias') in ('query', 'key') else x
  return jax.tree_util.tree_map_with_path(shrink, params)


@pytest.mark.parametrize('norm', [RmsNormConfig(eps=1e-2), LayerNormConfig(eps=1e-2)], ids=['rmsnorm', 'layernorm'])
@pytest.mark.parametrize('how', ['one device', 'sharded', 'cached'])
def test_query_and_key_norms_use_the_epsilon_of_the_model(norm, how):
  """They are RMS norms with `model.norm.eps`; the oracle is the formula in float64."""
  cfg = dataclasses.replace(ROTARY, norm=norm)
  mesh = make_mesh(MeshConfig(fsdp=2, tensor=2)) if how == 'sharded' else None
  model, params = model_and_params(cfg, mesh=mesh)
  params, data = small_heads(shaken(params)), batch(((9,), (9,), (9,), (9,)), 9)
  wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  if how == 'cached':
    found = teacher_forced(model, params, data, jnp.asarray(data['decoder_input_tokens']), at_once=4)
  else:
    params = params if mesh is None else jax.device_put(params, shardings(model.specs, mesh))
    found = jax.jit(lambda p: model.logits(p, model.apply(p, data)[0]))(params)
  for row, tokens in enumerate(data['decoder_input_tokens']):
    np.testing.assert_allclose(found[row], plain.logits(cfg, wide, tokens), atol=1e-4)
  default = plain.logits(dataclasses.replace(cfg, norm=dataclasses.replace(norm, eps=1e-6)), wide, tokens)
  assert np.abs(found[-1] - default).max() > 1e-2, 'the epsilon must matter here'


@pytest.mark.parametrize('cfg', [T5_1_0, LLAMA, ENCODER], ids=['encoder_decoder', 'decoder', 'encoder'])
def test_the_epsilon_reaches_every_attention_of_every_family(cfg):
  """Queries and keys of each self- and cross-attention are x w / sqrt(mean((x w)^2) + eps) * scale."""
  plain_heads = {'positions': 'alibi', 'bias': 'none', 'qk_norm': 'heads', 'norm': RmsNormConfig(eps=1e-2)}
  model, params = model_and_params(cfg, **plain_heads)
  params = small_heads(shaken(params))
  module, x = model.bind(params), jax.random.normal(jax.random.key(0), (1, 5, cfg.embed))
  found = 0
  for stack in ('encoder', 'decoder'):
    for name, own in params.get(stack, {'blocks': {}})['blocks'].items():
      if not name.endswith('_attention'):
        continue
      attention = getattr(jax.tree.map(lambda a: a[0], getattr(module, stack).blocks), name)
      queries, (keys, _) = attention.queries(x, jnp.arange(5)[None]), attention.keys_values(x, jnp.arange(5)[None])
      for side, got in (('query', queries), ('key', keys)):
        weight, scale = np.float64(own[side][0]), np.float64(own[f'{side}_norm']['scale'][0])
        y = np.einsum('ble,ehd->bhld', np.float64(x), weight)
        np.testing.assert_allclose(got, y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-2) * scale, atol=1e-5)
        found += 1
  assert found == (6 if cfg is T5_1_0 else 2)


@pytest.mark.parametrize('cfg', [T5_1_0, ALIBI, LEARNED], ids=['t5_1_0', 'alibi', 'learned'])
def test_the_loss_equals_the_loss_of_the_logits(cfg):
  """Caps and tied heads reach `linear_cross_entropy` as they reach `Model.logits`."""
  model, params = model_and_params(cfg)
  data = batch(((9,),), 9)
  data |= {'decoder_target_tokens': data['decoder_input_tokens'], 'decoder_loss_weights': np.ones((1, 9), np.float32)}

  @jax.jit
  def both(params):
    with jax.numpy_dtype_promotion('standard'):
      loss, _ = make_loss(LossConfig(), model, KernelsConfig())(params, data, None, jnp.float32(9))
    logits = model.logits(params, model.apply(params, data)[0])
    return loss, jnp.take_along_axis(jax.nn.log_softmax(logits), data['decoder_target_tokens'][..., None], -1)

  loss, chosen = both(params)
  assert float(loss) == pytest.approx(-float(np.mean(chosen)), rel=1e-5)


def test_the_two_gelus_are_two_functions():
  """Hendrycks and Gimpel 2016, arXiv:1606.08415, §2: x Phi(x), and its tanh form."""
  assert float(ACTIVATIONS['gelu_exact'](1.0)) == pytest.approx(0.8413447, abs=1e-6)
  assert float(ACTIVATIONS['gelu_tanh'](1.0)) == pytest.approx(0.8411920, abs=1e-6)


def test_alibi_slopes_equal_those_of_press_et_al():
  np.testing.assert_allclose(alibi_slopes(8), 2.0 ** -np.arange(1, 9), rtol=1e-6)
  between = 2.0 ** -np.array([1, 2, 3, 4, 5, 6, 7, 8, 0.5, 1.5, 2.5, 3.5])
  np.testing.assert_allclose(alibi_slopes(12), between, rtol=1e-6)


def test_initial_weights_have_the_std_of_gpt2():
  """0.02, and 0.02 / sqrt(2 * layers) into the residual stream: Radford et al. 2019, §2.3; biases are 0."""
  cfg = dataclasses.replace(LEARNED, embed=128, init_std=0.02, embedding_init_std=0.02, scale_residual_init=True)
  _, params = model_and_params(cfg)
  blocks = params['decoder']['blocks']
  for part, names in {'self_attention': ('query', 'key', 'value'), 'mlp': ('up',)}.items():
    for name in names:
      assert blocks[part][name].std() == pytest.approx(0.02, rel=0.05), name
      assert (blocks[part][name + '_bias'] == 0).all()
  for part, name in (('self_attention', 'out'), ('mlp', 'down')):
    assert blocks[part][name].std() == pytest.approx(0.02 / np.sqrt(2 * cfg.layers), rel=0.05), name
  assert params['embedding']['table'].std() == pytest.approx(0.02, rel=0.05)
  assert params['embedding']['positions'].std() == pytest.approx(0.02, rel=0.1)


def test_query_norms_remove_the_folded_scale_from_the_query_init():
  """T5's 1/sqrt(head_dim) would be divided away; the scores are scaled instead."""
  _, normed = model_and_params(T5_1_0)
  _, folded = model_and_params(T5)
  std = lambda params: params['encoder']['blocks']['self_attention']['query'].std()
  assert std(normed) == pytest.approx(1 / np.sqrt(32), rel=0.08)
  assert std(folded) == pytest.approx(1 / np.sqrt(32 * 8), rel=0.08)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'max_positions': 8}, "model.max_positions=8 with model.positions='rotary'; it belongs to 'learned', remove it."),
    (
      {'positions': 'alibi', 'rope_theta': 5e5},
      "model.rope_theta=500000.0 with model.positions='alibi'; it belongs to 'rotary', remove it.",
    ),
    (
      {'relative_buckets': 16},
      "model.relative_buckets=16 with model.positions='rotary'; it belongs to 'relative' or 'disentangled', remove it.",
    ),
    (
      {'positions': 'learned'},
      "model.positions='learned' needs model.max_positions; set it to the longest row or more.",
    ),
    (
      {'head': 'tied', 'head_init_scale': 0.3},
      "model.head_init_scale=0.3 with model.head='tied', which is the embedding's table; remove it, or set "
      'model.embedding_init_std.',
    ),
  ],
)
def test_a_key_without_effect_is_refused(changes, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    check_parts(dataclasses.replace(LLAMA, **changes))
