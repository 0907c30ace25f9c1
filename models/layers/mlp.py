"""Feed-forward layer, gated or not."""

import dataclasses
import functools
from typing import Annotated, Literal

import jax
from flax import nnx
from jax import Array
from jaxtyping import Float

from models.layers.dropout import dropout
from models.layers.linear import Projections, linear
from models.layers.remat import named
from models.layers.values import Aux
from models.partition import constrain
from models.specs import weight

Activation = Literal['gelu_tanh', 'gelu_exact', 'silu', 'relu']
ACTIVATIONS = {
  'gelu_tanh': functools.partial(jax.nn.gelu, approximate=True),
  'gelu_exact': functools.partial(jax.nn.gelu, approximate=False),
  'silu': jax.nn.silu,
  'relu': jax.nn.relu,
}
HIDDEN_SITE = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlpConfig:
  """`activation` is applied to the gate, or to the hidden layer where `gated` is False.

  T5 v1.1 and UL2-style models: gated gelu_tanh; Llama: gated silu (SwiGLU); T5 1.0: relu, not gated; GPT-2: gelu_tanh,
  not gated; BERT: gelu_exact (the erf form), not gated.
  """

  hidden: Annotated[int, '>= 1']
  activation: Activation = 'gelu_tanh'
  gated: bool = True


class Mlp(nnx.Module):
  """down(activation(gate x) * up x), or down(activation(up x)). Source: Shazeer 2020, arXiv:2002.05202."""

  def __init__(self, embed: int, cfg: MlpConfig, projections: Projections, rate: float):
    matrix = lambda: weight((embed, cfg.hidden), ('embed', 'mlp'), projections.init('embed'))
    bias = lambda: projections.make_bias((cfg.hidden,), ('mlp',), 'mlp')
    self.up, self.up_bias = matrix(), bias()
    self.gate, self.gate_bias = (matrix(), bias()) if cfg.gated else (None, None)
    self.down = weight((cfg.hidden, embed), ('mlp', 'embed'), projections.init_residual('mlp'))
    self.down_bias = projections.make_bias((embed,), ('embed',), 'mlp')
    self.activation, self.rate = cfg.activation, rate

  def __call__(
    self,
    x: Float[Array, 'batch length embed'],
    keys: Array | None,
    segments: Array | None = None,
    *,
    decoding: bool = False,
  ) -> tuple[Float[Array, 'batch length embed'], Aux]:
    """(the same shape, no values beside it). An MLP has no use for `segments` and `decoding`, which experts read."""
    activate, up = ACTIVATIONS[self.activation], named(linear(x, self.up, self.up_bias), 'up')
    gate = None if self.gate is None else named(linear(x, self.gate, self.gate_bias), 'gate')
    hidden = activate(up) if gate is None else activate(gate) * up
    hidden = constrain(dropout(hidden, self.rate, keys, HIDDEN_SITE), 'batch', 'length', 'mlp')
    return named(linear(hidden, self.down, self.down_bias), 'down'), {}
