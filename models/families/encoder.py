"""An encoder-only model for masked language modelling: every token sees the whole of its segment."""

import dataclasses
from typing import Annotated, Literal

import jax.numpy as jnp
from flax import nnx
from jax import Array

from models.families.parts import (
  Parts,
  Positions,
  attention_config,
  check_parts,
  dropout_of,
  make_bias,
  make_embedding,
  make_head,
  make_stack,
)
from models.layers.attention import Visibility
from models.layers.dropout import dropout, example_keys
from models.layers.embedding import EMBEDDING_SITE, EmbeddingProjection, HeadTransform
from models.layers.linear import Projections
from models.layers.mlp import Activation
from models.layers.norm import make_norm
from models.layers.values import of_stack


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig(Parts):
  """`embedding_norm` normalises embeddings, as BERT does; other keys: models/families/parts.py.

  `head_transform` puts N(activation(dense(x))) before the head (BERT, RoBERTa, ELECTRA's generator). There is no pooler
  and there are no token types: an embedding of type 0 can be added to that of every position. `embedding_size` is the
  width of embeddings where it is not `embed`: they are normalised at it, then projected (ELECTRA). A tied head has that
  width too, so it needs a transform. With `head='binary'` (ELECTRA's discriminator) the transform has no norm.
  """

  name: Literal['encoder'] = 'encoder'
  layers: Annotated[int, '>= 1']
  positions: Positions = 'rotary'
  embedding_norm: bool = False
  embedding_size: Annotated[int, '>= 1'] | None = None
  head_transform: Activation | None = None

  @property
  def width(self) -> int:
    """Features of an embedding."""
    return self.embedding_size or self.embed


def check_encoder(cfg: EncoderConfig) -> None:
  """Raises ValueError for values that do not fit each other."""
  check_parts(cfg)
  if cfg.embedding_size == cfg.embed:
    raise ValueError(f'model.embedding_size={cfg.embedding_size} is model.embed; remove it, nothing is projected then.')
  if cfg.embedding_size and cfg.embedding_rotation:
    raise ValueError(
      f'model.embedding_rotation=True with model.embedding_size={cfg.embedding_size}, whose projection is learned '
      'already; remove one.'
    )
  if cfg.embedding_size and cfg.head in ('tied', 'tied_scaled') and cfg.head_transform is None:
    raise ValueError(
      f"model.head='{cfg.head}' with model.embedding_size={cfg.embedding_size} and model.embed={cfg.embed}: the table "
      "does not fit the last layer; set model.head_transform, or model.head='untied'."
    )


def make_head_transform(cfg: EncoderConfig, projections: Projections) -> HeadTransform | None:
  if cfg.head_transform is None:
    return None
  size = cfg.width if cfg.head in ('tied', 'tied_scaled') else cfg.embed
  norm = None if cfg.head == 'binary' else cfg.norm
  return HeadTransform(cfg.embed, size, cfg.head_transform, norm, projections)


class Encoder(nnx.Module):
  """Source: Devlin et al. 2019, arXiv:1810.04805, §3; google-research/bert modeling.py."""

  def __init__(self, cfg: EncoderConfig, implementation: str):
    attention = attention_config(cfg, implementation, kv_heads=cfg.heads, t5_scale=False)
    # Dropout comes after the norm.
    self.embedding = make_embedding(dataclasses.replace(cfg, dropout=0.0, embed=cfg.width))
    self.embedding_norm = make_norm(cfg.width, cfg.norm) if cfg.embedding_norm else None
    projections = Projections(std=cfg.init_std, bias=cfg.bias)
    self.embedding_projection = EmbeddingProjection(cfg.width, cfg.embed, projections) if cfg.embedding_size else None
    self.encoder = make_stack(cfg, attention, cfg.layers, cross=False)
    self.encoder_bias = make_bias(cfg, cfg.layers, bidirectional=True)
    self.head_transform, self.head = make_head_transform(cfg, projections), make_head(cfg)
    self.cfg = cfg

  def __call__(self, batch, key: Array | None) -> tuple[Array, dict]:
    """Hidden states [batch, length, embed], before the head."""
    keys = example_keys(key, batch['example_index'])
    segments, positions = batch['encoder_segment_ids'], batch['encoder_positions']
    see = Visibility(causal=False, q_segment_ids=segments, kv_segment_ids=segments, **self.encoder_bias())
    x = self.embedding(batch['encoder_input_tokens'], positions, jnp.dtype(self.cfg.dtype), None)
    x = x if self.embedding_norm is None else self.embedding_norm(x)
    drop = dropout_of(self.cfg)
    x = dropout(x, drop.outer, keys, EMBEDDING_SITE, shared=drop.shared)
    x = x if self.embedding_projection is None else self.embedding_projection(x)
    x, aux = self.encoder(x, positions, see, keys=keys)
    return x if self.head_transform is None else self.head_transform(x), of_stack(aux, 'encoder')
