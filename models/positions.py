"""Where a token is: T5's relative position buckets (in the attention op) and rotary embedding."""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from models.specs import UniformFanAvg, weight
from pallas_kernels.attention.reference import RelativeBias


class RelativePositionBias(nnx.Module):
  """One learned bias for each (distance bucket, head), shared by all layers of a stack.

  Source: Raffel et al. 2020, arXiv:1910.10683, §2.1; init as T5X's relative_position_biases.py.
  """

  def __init__(self, heads: int, *, bidirectional: bool, buckets: int, max_distance: int):
    self.table = weight((buckets, heads), ('buckets', 'heads'), UniformFanAvg())
    self.bidirectional, self.max_distance = bidirectional, max_distance

  def __call__(self) -> RelativeBias:
    return RelativeBias(self.table[...], bidirectional=self.bidirectional, max_distance=self.max_distance)


def rotary(x: Array, positions: Array, theta: float) -> Array:
  """`x[batch, length, heads, head_dim]` rotated by `positions[batch, length]`, pairs (i, i + head_dim / 2).

  Angles in f32. Source: Su et al. 2021, arXiv:2104.09864; pairing as in Llama's reference code converted by HF.
  """
  half = x.shape[-1] // 2
  frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = positions.astype(jnp.float32)[:, :, None, None] * frequency
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  a, b = jnp.split(x.astype(jnp.float32), 2, -1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
