"""An encoder with BERT's parts equals an independent implementation of BERT."""

import jax
import numpy as np
from scipy.special import erf

from models.layers.mlp import MlpConfig
from tests.models.small import BERT, alone, batch, model_and_params, shaken


def layer_norm(x, own):
  centred = x - x.mean(-1, keepdims=True)
  return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12) * own['scale'] + own['bias']


def attention(x, own, slopes=0.0):
  """Attention over one segment: x[length, embed] -> [length, embed]."""
  q, k, v = (
    np.einsum('le,ehd->hld', x, own[name]) + own[f'{name}_bias'][:, None] for name in ('query', 'key', 'value')
  )
  distance = np.abs(np.subtract.outer(np.arange(len(x)), np.arange(len(x))))
  scores = np.exp(np.einsum('hqd,hkd->hqk', q, k) / np.sqrt(q.shape[-1]) - np.reshape(slopes, (-1, 1, 1)) * distance)
  mixed = np.einsum('hqk,hkd->qhd', scores / scores.sum(-1, keepdims=True), v)
  return np.einsum('qhd,hde->qe', mixed, own['out']) + own['out_bias']


def gelu(x):
  return x * 0.5 * (1 + erf(x / np.sqrt(2)))


def mlp(x, own):
  hidden = x @ own['up'] + own['up_bias']
  hidden = gelu(x @ own['gate'] + own['gate_bias']) * hidden if 'gate' in own else gelu(hidden)
  return hidden @ own['down'] + own['down_bias']


def encode(p, embedded, slopes=0.0):
  x = layer_norm(embedded, p['embedding_norm'])
  for layer in range(BERT.layers):
    block = jax.tree.map(lambda a, i=layer: a[i], p['encoder']['blocks'])
    x = layer_norm(x + attention(x, block['self_attention'], slopes), block['self_norm'])
    x = layer_norm(x + mlp(x, block['mlp']), block['mlp_norm'])
  return x


def test_an_encoder_with_mosaicberts_parts_computes_its_forward_pass():
  """Portes et al. 2023, arXiv:2312.17482, §2: BERT with ALiBi on both sides instead of positions, and a gated gelu."""
  gated = MlpConfig(hidden=48, activation='gelu_exact')
  model, params = model_and_params(BERT, positions='alibi', max_positions=None, mlp=gated)
  params, slopes = shaken(params), 2.0 ** -np.array([2, 4, 6, 8])
  data = batch()
  got = jax.jit(model.apply)(params, data)[0][0][data['encoder_segment_ids'][0] == 2]
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  embedded = p['embedding']['table'][alone(data, 0, 2)['encoder_input_tokens'][0]]
  expected = encode(p, embedded, slopes)
  np.testing.assert_allclose(got, expected, atol=2e-5)
  assert np.abs(encode(p, embedded) - expected).max() > 1e-2, 'the mutation: no slopes'


def test_an_encoder_with_berts_parts_computes_berts_forward_pass():
  """Devlin et al. 2019, §3, and google-research/bert modeling.py: norms after additions, and after the embedding."""
  model, params = model_and_params(BERT)
  params = shaken(params)
  data = alone(batch(), 0, 2)
  got, _ = model.apply(params, data)
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  table = p['embedding']['table']
  tokens, positions = data['encoder_input_tokens'][0], data['encoder_positions'][0]
  x = encode(p, table[tokens] + p['embedding']['positions'][positions])
  np.testing.assert_allclose(got[0], x, atol=2e-5)
  np.testing.assert_allclose(model.logits(params, got)[0], x @ table.T, atol=2e-3)
