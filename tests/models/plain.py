"""A decoder in float64 numpy, one document at a time, written from the papers: the oracle for the models."""

import math

import numpy as np

from models.families.decoder import DecoderConfig

ACTIVATIONS = {
  'relu': lambda x: np.maximum(x, 0),
  'silu': lambda x: x / (1 + np.exp(-x)),
  'gelu_exact': lambda x: x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))) / 2,
  'gelu_tanh': lambda x: x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2,
}


def cap(x, limit):
  return x if limit is None else limit * np.tanh(x / limit)


def norm(cfg: DecoderConfig, p, x):
  if cfg.norm.name == 'rmsnorm':
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.norm.eps) * p['scale']
  y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + cfg.norm.eps) * p['scale']
  return y + p['bias'] if cfg.norm.bias else y


def head_norm(cfg: DecoderConfig, p, x):
  """x_i / sqrt(mean_j x_j^2 + eps) * scale_i, Zhang and Sennrich 2019, equation 4, for one head; eps is the model's."""
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.norm.eps) * p['scale']


def rotate(x, theta):
  """`x[length, head_dim]` as complex numbers, turned by position * theta^(-i / half)."""
  half = x.shape[-1] // 2
  turn = np.exp(1j * np.outer(np.arange(len(x)), theta ** (-np.arange(half) / half)))
  turned = (x[:, :half] + 1j * x[:, half:]) * turn
  return np.concatenate([turned.real, turned.imag], -1)


def slope(head, heads):
  """Press et al.'s, for a power of two."""
  return 2 ** (-8 * (head + 1) / heads)


def attention(cfg: DecoderConfig, p, x):
  out, group = 0, cfg.heads // (cfg.kv_heads or cfg.heads)
  biased = lambda name, y, *at: y + p[f'{name}_bias'][at] if cfg.bias == 'all' else y
  for h in range(cfg.heads):
    q = biased('query', x @ p['query'][:, h], h)
    k, v = (biased(name, x @ p[name][:, h // group], h // group) for name in ('key', 'value'))
    if cfg.qk_norm == 'heads':
      q, k = head_norm(cfg, p['query_norm'], q), head_norm(cfg, p['key_norm'], k)
    if cfg.positions == 'rotary':
      q, k = rotate(q, cfg.rope_theta), rotate(k, cfg.rope_theta)
    scores = cap(q @ k.T / np.sqrt(cfg.head_dim), cfg.attention_softcap)
    back = np.subtract.outer(np.arange(len(x)), np.arange(len(x)))
    if cfg.positions == 'alibi':
      scores = scores - slope(h, cfg.heads) * back
    weights = np.where(back >= 0, np.exp(scores), 0)
    out = out + weights / weights.sum(-1, keepdims=True) @ v @ p['out'][h]
  return out + p['out_bias'] if cfg.bias == 'all' else out


def mlp(cfg: DecoderConfig, p, x):
  activate = ACTIVATIONS[cfg.mlp.activation]
  up, gate, down = (p.get(f'{name}_bias', 0) for name in ('up', 'gate', 'down'))
  hidden = x @ p['up'] + up
  hidden = activate(x @ p['gate'] + gate) * hidden if cfg.mlp.gated else activate(hidden)
  return hidden @ p['down'] + down


def sublayer(cfg: DecoderConfig, f, p, name, x):
  match cfg.norm_placement:
    case 'pre':
      return x + f(norm(cfg, p[f'{name}_norm'], x))
    case 'post':
      return norm(cfg, p[f'{name}_norm'], x + f(x))
    case 'sandwich':
      return x + norm(cfg, p[f'{name}_out_norm'], f(norm(cfg, p[f'{name}_norm'], x)))


def logits(cfg: DecoderConfig, params, tokens):
  """float64[length, vocab] of one document of `tokens`; params is a tree of float64 numpy arrays."""
  x = params['embedding']['table'][tokens]
  if cfg.positions == 'learned':
    x = x + params['embedding']['positions'][: len(tokens)]
  for layer in range(cfg.layers):
    p = take(params['decoder']['blocks'], layer)
    x = sublayer(cfg, lambda y, p=p: attention(cfg, p['self_attention'], y), p, 'self', x)
    x = sublayer(cfg, lambda y, p=p: mlp(cfg, p['mlp'], y), p, 'mlp', x)
  if cfg.norm_placement != 'post':
    x = norm(cfg, params['decoder']['norm'], x)
  if cfg.head == 'untied':
    return cap(x @ params['head']['kernel'], cfg.logit_softcap)
  scale = cfg.embed**-0.5 if cfg.head == 'tied_scaled' else 1
  return cap(scale * x @ params['embedding']['table'].T, cfg.logit_softcap)


def take(tree, layer):
  return {k: take(v, layer) if isinstance(v, dict) else v[layer] for k, v in tree.items()}
