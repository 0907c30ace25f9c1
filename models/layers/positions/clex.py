"""CLEX: rotary frequencies as the solution of an ordinary differential equation in the length that a model reads."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from models.layers.positions.rotary import Angles, Clex, Rope, frequencies
from models.specs import Normal, Zeros, weight

SITES = 2**31, 2**31 + 1  # above every example index, which keys of dropout fold in
ACTIVATIONS = {'silu': jax.nn.silu, 'tanh': jnp.tanh}


class LearnedFrequencies(nnx.Module):
  """Frequencies exp(z(t)) of the scale t, which is 1 for rows as long as those of the first training.

  dz/dt = act((z + log n(t)) up) down + d/dt log n(t), z(1) = log of the plain frequencies. n(t) are the frequencies of
  NTK-aware scaling by 2t - 1: those of theta * (2t - 1)^(dims / (dims - 2)). What is solved for is y = z - log n(t), by
  Runge-Kutta steps of order 4 in float32. It is 0 with `down` = 0, as drawn; scale 1 has exactly the plain frequencies.

  Source: Chen et al. 2024, arXiv:2310.16450, §3; DAMO-NLP-SG/CLEX clex_layer.py, whose z + log n(t), whole scales in
  training and positions these are. It solves with 100 steps per unit of t.
  """

  def __init__(self, rope: Rope, cfg: Clex):
    half, hidden = rope.dims // 2, cfg.width * rope.dims
    self.up = weight((half, hidden), ('head_dim', 'rank'), Normal(3**-0.5, ('rank',)))
    self.down = weight((hidden, half), ('rank', 'head_dim'), Zeros())
    self.rope, self.cfg = rope, cfg

  def table(self) -> Array:
    """f32[max_factor, dims / 2]: row t - 1 has the frequencies of scale t."""
    cfg, plain = self.cfg, frequencies(self.rope)[0]
    exponent = -2.0 * jnp.arange(len(plain), dtype=jnp.float32) / (self.rope.dims - 2)
    grown = lambda t: exponent * jnp.log(2.0 * t - 1.0)  # log of n(t) / n(1)
    up, down, act = self.up[...], self.down[...], ACTIVATIONS[cfg.activation]
    slope = lambda t, y: act((y + 2.0 * (jnp.log(plain) + grown(t))) @ up) @ down
    size = 1.0 / cfg.steps

    def step(y: Array, n: Array) -> tuple[Array, Array]:
      t = 1.0 + n * size
      a = slope(t, y)
      b = slope(t + size / 2, y + size / 2 * a)
      c = slope(t + size / 2, y + size / 2 * b)
      d = slope(t + size, y + size * c)
      y = y + size / 6 * (a + 2 * b + 2 * c + d)
      return y, y

    numbers = jnp.arange((cfg.max_factor - 1) * cfg.steps, dtype=jnp.float32)
    solved = jax.lax.scan(step, jnp.zeros_like(plain), numbers)[1][cfg.steps - 1 :: cfg.steps]
    scales = jnp.arange(2, cfg.max_factor + 1, dtype=jnp.float32)[:, None]
    return jnp.concatenate([plain[None], plain * jnp.exp(grown(scales) + solved)])

  def angles(self, positions: Array, scale: Array) -> Angles:
    """Those of `positions[batch or 1, length]` at whole scales of the same shape, or of one that broadcasts to it."""
    hot = jax.nn.one_hot(scale - 1, self.cfg.max_factor, dtype=jnp.float32)  # a gather's gradient is a slow scatter
    frequency = jnp.einsum('blt,td->bld', hot, self.table(), precision='highest')
    return Angles(positions.astype(jnp.float32)[..., None] * frequency)

  def of_length(self, positions: Array, length: Array | int) -> Angles:
    """Angles at the smallest scale that reads `length` tokens, which broadcasts to `positions[batch, length]`."""
    scale = jnp.clip(-(-jnp.asarray(length, jnp.int32) // self.cfg.original_max_positions), 1, self.cfg.max_factor)
    return self.angles(positions, jnp.broadcast_to(scale, positions.shape))

  def of_documents(self, positions: Array, segments: Array, more: int = 0) -> Angles:
    """Angles of each document at the scale of its own length and `more` tokens: packing does not change them."""
    return self.of_length(positions, _lengths(positions, segments) + more)

  def of_step(self, length: int, key: Array) -> Angles:
    """Angles of a training step: at one scale t for all rows, from 1 to `max_factor`, of `length` positions.

    They are drawn from t * length positions, of which the first and the last are in. Rows longer than
    `original_max_positions` have positions closer together.
    """
    most, (of_scale, of_positions) = self.cfg.max_factor, (jax.random.fold_in(key, n) for n in SITES)
    scale = jax.random.randint(of_scale, (), 1, most + 1)
    positions = _sorted_sample(length, scale * length, most * length, of_positions)
    positions = positions / max(1, length // self.cfg.original_max_positions)
    return self.angles(positions[None], jnp.broadcast_to(scale, (1, length)))


def _lengths(positions: Array, segments: Array) -> Array:
  """int32[batch, length]: how many tokens the document of each token has; segments are contiguous."""
  ends = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (0, 1)), constant_values=True)
  last = jnp.where(ends, positions + 1, 0)
  # From the right: the first end that is met is the document's own.
  met = lambda near, far: jnp.where(near > 0, near, far)
  return jax.lax.associative_scan(lambda a, b: met(b, a), last, reverse=True, axis=1)


def _sorted_sample(number: int, total: Array, most: int, key: Array) -> Array:
  """int32[number] different numbers in order, of 0 … total - 1 with both ends; the others are equally likely."""
  inner = jnp.arange(1, most - 1)
  drawn = jnp.where(inner < total - 1, jax.random.uniform(key, (most - 2,)), -1.0)
  chosen = jnp.sort(inner[jax.lax.top_k(drawn, number - 2)[1]])
  return jnp.concatenate([jnp.zeros(1, chosen.dtype), chosen, (total - 1)[None].astype(chosen.dtype)])
