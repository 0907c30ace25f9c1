"""An encoder with BERT's parts equals an independent implementation of BERT."""

import jax
import numpy as np
from scipy.special import erf

from tests.models.small import BERT, alone, batch, model_and_params, shaken


def layer_norm(x, own):
  centred = x - x.mean(-1, keepdims=True)
  return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12) * own['scale'] + own['bias']


def attention(x, own):
  """Attention over one segment: x[length, embed] -> [length, embed]."""
  q, k, v = (
    np.einsum('le,ehd->hld', x, own[name]) + own[f'{name}_bias'][:, None] for name in ('query', 'key', 'value')
  )
  scores = np.exp(np.einsum('hqd,hkd->hqk', q, k) / np.sqrt(q.shape[-1]))
  mixed = np.einsum('hqk,hkd->qhd', scores / scores.sum(-1, keepdims=True), v)
  return np.einsum('qhd,hde->qe', mixed, own['out']) + own['out_bias']


def mlp(x, own):
  hidden = x @ own['up'] + own['up_bias']
  return hidden * 0.5 * (1 + erf(hidden / np.sqrt(2))) @ own['down'] + own['down_bias']


def test_an_encoder_with_berts_parts_computes_berts_forward_pass():
  """Devlin et al. 2019, §3, and google-research/bert modeling.py: norms after additions, and after the embedding."""
  model, params = model_and_params(BERT)
  params = shaken(params)
  data = alone(batch(), 0, 2)
  got, _ = model.apply(params, data)
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  table = p['embedding']['table']
  tokens, positions = data['encoder_input_tokens'][0], data['encoder_positions'][0]
  x = layer_norm(table[tokens] + p['embedding']['positions'][positions], p['embedding_norm'])
  for layer in range(BERT.layers):
    block = jax.tree.map(lambda a, i=layer: a[i], p['encoder']['blocks'])
    x = layer_norm(x + attention(x, block['self_attention']), block['self_norm'])
    x = layer_norm(x + mlp(x, block['mlp']), block['mlp_norm'])
  np.testing.assert_allclose(got[0], x, atol=2e-5)
  np.testing.assert_allclose(model.logits(params, got)[0], x @ table.T, atol=2e-3)
