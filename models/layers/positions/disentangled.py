"""Disentangled attention (DeBERTa): scores of content against relative positions, beside content against content.

Sources: He et al. 2021, arXiv:2006.03654, §3.1, eq. 2-4; buckets, shared projections and the norm of the position
vectors: DeBERTa v2 and v3, He et al. 2023, arXiv:2111.09543, and github.com/microsoft/DeBERTa,
DeBERTa/deberta/disentangled_attention.py and da_utils.py.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from models.layers.norm import NormConfig, make_norm
from models.partition import constrain
from models.specs import Normal, weight

TERMS = 3  # content to content, content to position, position to content; scores are scaled by 1/sqrt(3 head_dim)


@functools.partial(jax.tree_util.register_dataclass, data_fields=['vectors'], meta_fields=['max_distance'])
@dataclasses.dataclass(frozen=True)
class RelativeVectors:
  """A vector for each bucket of `query index - key index`: f32[buckets, embed], shared by all layers."""

  vectors: Array
  max_distance: int


class DisentangledPositions(nnx.Module):
  """The table of position vectors and its norm; calling it gives an argument of `Visibility`."""

  def __init__(self, embed: int, *, buckets: int, max_distance: int, norm: NormConfig, std: float):
    self.table = weight((buckets, embed), ('buckets', 'embed'), Normal(std))
    self.norm, self.max_distance = make_norm(embed, norm), max_distance

  def __call__(self) -> dict[str, Any]:
    return {'relative_vectors': RelativeVectors(self.norm(constrain(self.table[...], None, None)), self.max_distance)}


def buckets_of(distance: np.ndarray, *, buckets: int, max_distance: int) -> np.ndarray:
  """int32: the bucket of each `distance` = query index - key index, which has the sign of the distance.

  Half of the buckets are for each sign. The first quarter of a side's distances have one each; the others grow
  logarithmically up to `max_distance`. Computed in float32, as the source does.

  >>> buckets_of(np.array([-9, -2, 0, 1, 2, 3, 9]), buckets=8, max_distance=12).tolist()
  [1, 2, 4, 5, 6, 7, 7]
  """
  side = buckets // 2
  exact = side // 2
  size = np.maximum(np.abs(distance), exact).astype(np.float32)
  growth = np.log(size / np.float32(exact)) / np.log(np.float32((max_distance - 1) / exact))
  far = np.ceil(growth * np.float32(exact - 1)).astype(np.int32) + exact
  bucket = np.where(np.abs(distance) <= exact, distance, np.sign(distance) * far)
  return np.clip(bucket + side, 0, buckets - 1).astype(np.int32)


def position_scores(q: Array, k: Array, pos_q: Array, pos_k: Array, max_distance: int) -> Array:
  """f32[batch, heads, T, S]: q . pos_k[bucket] + k . pos_q[bucket], without a scale.

  q[batch, T, heads, head_dim], k[batch, S, heads, head_dim], pos_q and pos_k[buckets, heads, head_dim]. Distances are
  differences of indices, which inside a segment of a packed row are differences of positions. Like the scores that it
  is added to, it takes memory for every pair of positions.
  """
  distance = np.arange(q.shape[1])[:, None] - np.arange(k.shape[1])[None]
  bucket = buckets_of(distance, buckets=pos_q.shape[0], max_distance=max_distance)
  product = functools.partial(jnp.einsum, 'bthd,rhd->bhtr', preferred_element_type=jnp.float32)
  of_query = jnp.take_along_axis(product(q, pos_k), bucket[None, None], axis=-1)
  of_key = jnp.take_along_axis(product(k, pos_q), bucket.T[None, None], axis=-1)
  return of_query + of_key.swapaxes(-1, -2)
