"""Multi-token prediction: what the depths behind a decoder read, which predict tokens further ahead.

Source: DeepSeek-AI 2024, arXiv:2412.19437, §2.2. Depth k reads h^(k-1) of position i and the embedding of token i + k:
h^k = TRM_k(M_k [N(h^(k-1)_i); N(Emb(t_(i+k)))]), from which the model's own head predicts token i + k + 1.
"""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from models.layers.linear import Projections, linear
from models.layers.norm import NormConfig, make_norm
from models.partition import constrain
from models.specs import weight

LOSS = 'mtp_loss'  # the name of the losses in aux and metrics


class Entry(nnx.Module):
  """M [N(h); N(e)] of two arrays [batch, length, embed]; each has a norm of the model's kind of its own (eq. 21)."""

  def __init__(self, embed: int, norm: NormConfig, projections: Projections):
    self.hidden_norm, self.token_norm = make_norm(embed, norm), make_norm(embed, norm)
    self.kernel = weight((2 * embed, embed), ('embed', 'mlp'), projections.init('embed'))  # axes as in Rotation

  def __call__(self, hidden: Array, tokens: Array) -> Array:
    both = jnp.concatenate([self.hidden_norm(hidden), self.token_norm(tokens)], -1)
    return constrain(linear(both, self.kernel), 'batch', 'length', 'embed')


def ahead(x: Array, by: int) -> Array:
  """`x[batch, length, ...]` of the position `by` places later, 0 behind the end of a row.

  >>> ahead(jnp.array([[3, 4, 5, 6]]), 2).tolist()
  [[5, 6, 0, 0]]
  """
  return jnp.pad(x[:, by:], [(0, 0), (0, by)] + [(0, 0)] * (x.ndim - 2))
