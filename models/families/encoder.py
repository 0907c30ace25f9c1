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
  make_bias,
  make_embedding,
  make_head,
  make_stack,
)
from models.layers.attention import Visibility
from models.layers.dropout import dropout, example_keys
from models.layers.embedding import EMBEDDING_SITE, BinaryHead, EmbeddingProjection, Head, HeadTransform
from models.layers.linear import Projections
from models.layers.mlp import Activation
from models.layers.norm import make_norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig(Parts):
  """`embedding_norm` normalises embeddings, as BERT does; other keys: models/families/parts.py.

  `head_transform` puts N(activation(dense(x))) before the head (BERT, RoBERTa, ELECTRA's generator). There is no pooler
  and there are no token types: an embedding of type 0 can be added to that of every position. With `embedding_size`
  tables are narrower than layers, and are projected (ELECTRA). `head` 'binary' makes one logit for each token, whether
  it was replaced (ELECTRA's discriminator); its transform has no norm.
  """

  name: Literal['encoder'] = 'encoder'
  layers: Annotated[int, '>= 1']
  positions: Positions = 'rotary'
  head: Literal['untied', 'tied', 'tied_scaled', 'binary'] = 'untied'
  embedding_size: Annotated[int, '>= 1'] | None = None
  embedding_norm: bool = False
  head_transform: Activation | None = None


def check_encoder(cfg: EncoderConfig) -> None:
  """Raises ValueError for values that do not fit each other."""
  check_parts(cfg)
  if cfg.embedding_size is not None and (cfg.head == 'tied_scaled' or (cfg.head == 'tied' and not cfg.head_transform)):
    raise ValueError(
      f"model.embedding_size={cfg.embedding_size} with model.head='{cfg.head}' and model.head_transform="
      f"{cfg.head_transform!r}; the table is the head, so set model.head='tied' and model.head_transform, which makes "
      'hidden states as narrow as the table.'
    )
  if cfg.head == 'binary' and not cfg.head_bias:
    raise ValueError("model.head='binary' with model.head_bias=False; that head has a bias, set model.head_bias=True.")


class Encoder(nnx.Module):
  """Source: Devlin et al. 2019, arXiv:1810.04805, §3; google-research/bert modeling.py."""

  def __init__(self, cfg: EncoderConfig, implementation: str):
    attention = attention_config(cfg, implementation, kv_heads=cfg.heads, t5_scale=False)
    width = cfg.embedding_size or cfg.embed
    narrow = dataclasses.replace(cfg, dropout=0.0, embed=width)  # dropout comes after the norm
    self.embedding = make_embedding(narrow)
    self.embedding_norm = make_norm(width, cfg.norm) if cfg.embedding_norm else None
    self.encoder = make_stack(cfg, attention, cfg.layers, cross=False)
    self.encoder_bias = make_bias(cfg, cfg.layers, bidirectional=True)
    projections = Projections(std=cfg.init_std, bias=cfg.bias)
    project = cfg.embedding_size is not None
    self.embedding_projection = EmbeddingProjection(width, cfg.embed, projections) if project else None
    self.head_transform, self.head = _make_transform(cfg, projections), _make_head(cfg, projections)
    self.cfg = cfg

  def __call__(self, batch, key: Array | None) -> tuple[Array, dict]:
    """Hidden states [batch, length, embed], before the head."""
    keys = example_keys(key, batch['example_index'])
    segments, positions = batch['encoder_segment_ids'], batch['encoder_positions']
    see = Visibility(causal=False, q_segment_ids=segments, kv_segment_ids=segments, **self.encoder_bias())
    x = self.embedding(batch['encoder_input_tokens'], positions, jnp.dtype(self.cfg.dtype), None)
    x = x if self.embedding_norm is None else self.embedding_norm(x)
    x = dropout(x, self.cfg.dropout, keys, EMBEDDING_SITE, self.cfg.dropout_sites)
    x = x if self.embedding_projection is None else self.embedding_projection(x)
    x, aux = self.encoder(x, positions, see, keys=keys)
    return x if self.head_transform is None else self.head_transform(x), aux


def _make_transform(cfg: EncoderConfig, projections: Projections) -> HeadTransform | None:
  if cfg.head_transform is None:
    return None
  width = cfg.embed if cfg.head != 'tied' else cfg.embedding_size or cfg.embed
  return HeadTransform(cfg.embed, width, cfg.head_transform, None if cfg.head == 'binary' else cfg.norm, projections)


def _make_head(cfg: EncoderConfig, projections: Projections) -> Head | BinaryHead | None:
  return BinaryHead(cfg.embed, projections) if cfg.head == 'binary' else make_head(cfg)
