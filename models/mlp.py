"""Gated feed-forward layer."""

import dataclasses
from typing import Annotated, Literal

import jax
from flax import nnx
from jax import Array
from jaxtyping import Float

from models.dropout import dropout
from models.linear import linear
from models.partition import constrain
from models.specs import Normal, weight

ACTIVATIONS = {'gelu': jax.nn.gelu, 'silu': jax.nn.silu}
HIDDEN_SITE = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlpConfig:
  """`activation` of the gate: gelu (tanh form) in T5 v1.1 and UL2, silu (SwiGLU) in Llama."""

  hidden: Annotated[int, '>= 1']
  activation: Literal['gelu', 'silu'] = 'gelu'


class Mlp(nnx.Module):
  """Gated feed-forward (Shazeer 2020, arXiv:2002.05202): the gate decides how much of `up` passes."""

  def __init__(self, embed: int, cfg: MlpConfig, rate: float):
    self.gate = weight((embed, cfg.hidden), ('embed', 'mlp'), Normal(fan_in=('embed',)))
    self.up = weight((embed, cfg.hidden), ('embed', 'mlp'), Normal(fan_in=('embed',)))
    self.down = weight((cfg.hidden, embed), ('mlp', 'embed'), Normal(fan_in=('mlp',)))
    self.activation, self.rate = cfg.activation, rate

  def __call__(self, x: Float[Array, 'batch length embed'], keys: Array | None) -> Float[Array, 'batch length embed']:
    hidden = ACTIVATIONS[self.activation](linear(x, self.gate)) * linear(x, self.up)
    hidden = constrain(dropout(hidden, self.rate, keys, HIDDEN_SITE), 'batch', 'length', 'mlp')
    return linear(hidden, self.down)
