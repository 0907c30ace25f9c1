"""RMS normalisation."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from models.specs import Ones, cast, weight


class RmsNorm(nnx.Module):
  """x / rms(x) * scale, statistics in f32. Source: Zhang and Sennrich 2019, arXiv:1910.07467; T5's layer norm."""

  def __init__(self, embed: int, eps: float = 1e-6):
    self.scale = weight((embed,), ('embed',), Ones())
    self.eps = eps

  def __call__(self, x: Array) -> Array:
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), -1, keepdims=True) + self.eps)
    return (x32 * inverse).astype(x.dtype) * cast(self.scale, x)
