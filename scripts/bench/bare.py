"""The reference of the step benchmark: configs/decoder/bench.gin as one short file of plain JAX.

As a program it trains on random batches: python scripts/bench/bare.py STEPS [ROWS]
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

VOCAB, EMBED, LAYERS, HEADS, HEAD_DIM, HIDDEN, LENGTH, BATCH = 8192, 256, 4, 4, 64, 1024, 512, 8


def init(key):
  def draw(i, *shape, fan_in):
    return jax.random.normal(jax.random.fold_in(key, i), shape) * fan_in**-0.5

  return {
    'embed': draw(0, VOCAB, EMBED, fan_in=1),
    'head': draw(1, EMBED, VOCAB, fan_in=EMBED),
    'norm': jnp.ones(EMBED),
    'layers': {
      'norm1': jnp.ones((LAYERS, EMBED)),
      'norm2': jnp.ones((LAYERS, EMBED)),
      'q': draw(2, LAYERS, EMBED, HEADS, HEAD_DIM, fan_in=EMBED),
      'k': draw(3, LAYERS, EMBED, HEADS, HEAD_DIM, fan_in=EMBED),
      'v': draw(4, LAYERS, EMBED, HEADS, HEAD_DIM, fan_in=EMBED),
      'out': draw(5, LAYERS, HEADS, HEAD_DIM, EMBED, fan_in=EMBED),
      'gate': draw(6, LAYERS, EMBED, HIDDEN, fan_in=EMBED),
      'up': draw(7, LAYERS, EMBED, HIDDEN, fan_in=EMBED),
      'down': draw(8, LAYERS, HIDDEN, EMBED, fan_in=HIDDEN),
    },
  }


def norm(x, scale):
  return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6) * scale


def rope(x, positions):
  frequency = 10000.0 ** (-jnp.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
  angle = positions[:, :, None, None] * frequency
  a, b = jnp.split(x, 2, -1)
  return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], -1)


def attend(q, k, v, mask):
  scores = jnp.einsum('btnd,bsnd->bnts', q * HEAD_DIM**-0.5, k)
  weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), -1)
  return jnp.einsum('bnts,bsnd->btnd', weights, v)


def loss(params, batch):
  segment, position = batch['segment'], batch['position']
  mask = (segment[:, :, None] == segment[:, None]) & (position[:, :, None] >= position[:, None])

  def block(x, p):
    h = norm(x, p['norm1'])
    q, k, v = (jnp.einsum('btd,dnh->btnh', h, p[n]) for n in 'qkv')
    x = x + jnp.einsum('btnh,nhd->btd', attend(rope(q, position), rope(k, position), v, mask[:, None]), p['out'])
    h = norm(x, p['norm2'])
    return x + (jax.nn.silu(h @ p['gate']) * (h @ p['up'])) @ p['down'], None

  x, _ = jax.lax.scan(block, params['embed'][batch['input']], params['layers'])
  logits = norm(x, params['norm']) @ params['head']
  return optax.softmax_cross_entropy_with_integer_labels(logits, batch['target']).mean()


def make_step():
  """(state, jitted step): AdamW with the gradient clipped by its global norm, state donated."""
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, b1=0.9, b2=0.98, weight_decay=0.01))
  params = jax.jit(init)(jax.random.key(0))

  def step(state, batch):
    params, opt_state = state
    value, grads = jax.value_and_grad(loss)(params, batch)
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), value

  return (params, jax.jit(tx.init)(params)), jax.jit(step, donate_argnums=0)


def make_batch(seed=0, rows=BATCH):
  tokens = np.random.default_rng(seed).integers(3, VOCAB, (rows, LENGTH), np.int32)
  position = np.tile(np.arange(LENGTH, dtype=np.int32), (rows, 1))
  shifted = np.pad(tokens[:, :-1], ((0, 0), (1, 0)))
  return {'input': shifted, 'target': tokens, 'position': position, 'segment': np.ones_like(tokens)}


if __name__ == '__main__':
  steps, rows = int(sys.argv[1]), int(sys.argv[2]) if sys.argv[2:] else BATCH
  state, step = make_step()
  for i in range(steps):
    state, value = step(state, make_batch(i, rows))
    print(i + 1, float(value), time.time(), flush=True)
