"""Positions of tokens: T5's relative buckets and ALiBi, which are biases in the attention op."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.specs import UniformFanAvg, weight
from pallas_kernels.attention.reference import RelativeBias


class RelativePositionBias(nnx.Module):
  """One learned bias for each (distance bucket, head); `stack` gives each layer of a stack its own.

  Source: Raffel et al. 2020, arXiv:1910.10683, §2.1; init as T5X's relative_position_biases.py; a table for each layer:
  umT5 (Chung et al. 2023, arXiv:2304.09151; `transformers` modeling_umt5.py).
  """

  def __init__(self, heads: int, *, bidirectional: bool, buckets: int, max_distance: int):
    self.table = weight((buckets, heads), ('buckets', 'heads'), UniformFanAvg())
    self.bidirectional, self.max_distance = bidirectional, max_distance

  def __call__(self) -> dict[str, Any]:
    bias = RelativeBias(self.table[...], bidirectional=self.bidirectional, max_distance=self.max_distance)
    return {'relative_bias': bias}


def alibi_slopes(heads: int) -> np.ndarray:
  """float32[heads]: 2^(-8 i / n) for i = 1 … n = heads. Where n is not a power of two: the slopes of the power below,
  then every other slope of the power above.

  Source: Press et al. 2022, arXiv:2108.12409, §3; attention_with_linear_biases get_slopes.

  >>> alibi_slopes(6).tolist()
  [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]
  """
  power = 2 ** (heads.bit_length() - 1)
  slopes = lambda n: 2.0 ** (-8 * np.arange(1, n + 1) / n)
  return np.concatenate([slopes(power), slopes(2 * power)[::2][: heads - power]]).astype(np.float32)


class Alibi(nnx.Module):
  """-scale * slope * |distance| added to the scores, without parameters; an encoder has it on both sides."""

  def __init__(self, heads: int, scale: float = 1.0):
    self.heads, self.scale = heads, scale

  def __call__(self) -> dict[str, Any]:
    return {'alibi': jnp.asarray(alibi_slopes(self.heads) * np.float32(self.scale))}


class NoBias(nnx.Module):
  def __call__(self) -> dict[str, Any]:
    return {}
