"""The one matrix product of the models: the only place for quantization (models/product.py) and low-rank adapters."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jax import Array

from models.layers.low_rank import LowRank
from models.product import product, product_of_heads
from models.specs import Normal, Zeros, cast, weight

Bias = Literal['none', 'qkv', 'attention', 'mlp', 'all']
BiasOf = Literal['qkv', 'out', 'mlp', 'head']
BIASED: dict[Bias, tuple[BiasOf, ...]] = {
  'none': (), 'qkv': ('qkv',), 'attention': ('qkv', 'out'), 'mlp': ('mlp',), 'all': ('qkv', 'out', 'mlp', 'head'),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Projections:
  """What the matrices of a stack have in common.

  `std` None draws each at 1/sqrt(fan-in) (T5X examples/t5/layers.py); a number draws all at that std (0.02 in GPT-2 and
  BERT). `residual` multiplies the std of the matrices that write to the residual stream: 1/sqrt(number of additions to
  it) in GPT-2 (Radford et al. 2019, §2.3). `bias` adds a vector, drawn as zeros, to every product ('all'), to those
  that make queries, keys and values ('qkv', Qwen2), to these and attention's output ('attention', `attention_bias` of
  Llama and Qwen3), or to those of MLPs ('mlp').
  """

  std: float | None = None
  residual: float = 1.0
  bias: Bias = 'none'

  def init(self, *fan_in: str, scale: float = 1.0) -> Normal:
    return Normal(scale, fan_in) if self.std is None else Normal(scale * self.std)

  def init_residual(self, *fan_in: str) -> Normal:
    return self.init(*fan_in, scale=self.residual)

  def make_bias(self, shape: tuple[int, ...], axes: tuple[str, ...], of: BiasOf) -> nnx.Param | None:
    return weight(shape, axes, Zeros()) if of in BIASED[self.bias] else None


def linear(x: Array, w: nnx.Param | LowRank, bias: nnx.Param | None = None, contract: int = 1) -> Array:
  """`x[..., *c]` times `w[*c, ...]`, contracting `contract` dims, plus `bias`, in x's dtype."""
  out = w.product(x) if isinstance(w, LowRank) else product(x, w, contract)
  return out if bias is None else out + cast(bias, x)


def from_heads(x: Array, w: nnx.Param | LowRank, bias: nnx.Param | None, *, in_order: bool) -> Array:
  """`x[batch, heads, length, head_dim]` times `w[heads, head_dim, embed]`, plus `bias`: [batch, length, embed].

  `in_order`: x is in memory in this order, and is not copied to another.
  """
  if isinstance(w, LowRank) or not in_order:
    return linear(jnp.swapaxes(x, 1, 2), w, bias, contract=2)
  out = product_of_heads(x, w)
  return out if bias is None else out + cast(bias, x)
