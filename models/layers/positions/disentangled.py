"""Disentangled attention (DeBERTa): embeddings of distances, of which each layer makes keys and queries."""

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx
from jax import Array

from models.layers.norm import NormConfig, make_norm
from models.specs import Normal, weight


@functools.partial(jax.tree_util.register_dataclass, data_fields=['table'], meta_fields=['scores', 'max_distance'])
@dataclasses.dataclass(frozen=True)
class RelativeEmbeddings:
  """Embeddings [buckets, embed] of distances, of which each layer makes its `api.PositionScores`."""

  table: Array
  scores: tuple[str, ...]
  max_distance: int


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
