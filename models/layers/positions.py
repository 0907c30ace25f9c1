"""Positions of tokens in the attention op: T5's relative buckets and ALiBi, which are biases, and DeBERTa's scores."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.layers.attention import RelativeEmbeddings
from models.layers.norm import NormConfig, make_norm
from models.specs import Normal, UniformFanAvg, weight
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
  """-slope * |distance| added to the scores, without parameters; an encoder has it on both sides."""

  def __init__(self, heads: int):
    self.heads = heads

  def __call__(self) -> dict[str, Any]:
    return {'alibi': jnp.asarray(alibi_slopes(self.heads))}


class Disentangled(nnx.Module):
  """An embedding for each bucket of distances, which all layers share; each layer makes keys and queries of them with
  the weights that it has for tokens.

  Half of the buckets are for each side. Source: He et al. 2020, arXiv:2006.03654, §3.1; shared weights, logarithmic
  buckets and the norm: He et al. 2021, arXiv:2111.09543, and microsoft/DeBERTa disentangled_attention.py. There the
  embeddings drop too, with one mask for a batch; here they do not, since masks belong to examples.
  """

  def __init__(
    self, embed: int, *, buckets: int, max_distance: int, scores: tuple[str, ...], norm: NormConfig | None, std: float
  ):
    self.table = weight((buckets, embed), ('buckets', 'embed'), Normal(std))
    self.norm = None if norm is None else make_norm(embed, norm)
    self.max_distance, self.scores = max_distance, scores

  def __call__(self) -> dict[str, Any]:
    table = self.table[...] if self.norm is None else self.norm(self.table[...])
    return {'relative': RelativeEmbeddings(table, scores=self.scores, max_distance=self.max_distance)}


class NoBias(nnx.Module):
  def __call__(self) -> dict[str, Any]:
    return {}
