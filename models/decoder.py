"""A decoder-only model with rotary positions, shared keys (GQA) and SwiGLU; causal, or with a visible prefix."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jax import Array

from models.attention import AttentionConfig, Visibility
from models.block import Block, Remat, Stack
from models.dropout import example_keys
from models.embedding import Embedding, Head
from models.mlp import MlpConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderMlpConfig(MlpConfig):
  activation: Literal['gelu', 'silu'] = 'silu'


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
  """Sizes of a Llama-like model; `kv_heads=None` gives each head its own keys."""

  name: Literal['decoder'] = 'decoder'
  vocab_size: int
  embed: int
  layers: int
  heads: int
  head_dim: int
  mlp: DecoderMlpConfig
  kv_heads: int | None = None
  rope_theta: float = 10_000.0
  embedding_init_std: float = 1.0
  head_init_scale: float = 1.0
  dropout: float = 0.0
  dtype: Literal['float32', 'bfloat16'] = 'float32'
  remat: Remat = 'none'


class Decoder(nnx.Module):
  """Source: Touvron et al. 2023, arXiv:2302.13971; prefix attention: Raffel et al. 2020, §3.2.1."""

  def __init__(self, cfg: DecoderConfig, implementation: str):
    self.attention = AttentionConfig(
      heads=cfg.heads, kv_heads=cfg.kv_heads or cfg.heads, head_dim=cfg.head_dim, t5_scale=False,
      rope_theta=cfg.rope_theta, dropout=cfg.dropout, implementation=implementation,
    )  # fmt: skip
    block = Block(cfg.embed, self.attention, cfg.mlp, cross=False, rate=cfg.dropout)
    self.embedding = Embedding(cfg.vocab_size, cfg.embed, rate=cfg.dropout, std=cfg.embedding_init_std)
    self.decoder = Stack(block, cfg.layers, cfg.embed, remat=cfg.remat, rate=cfg.dropout)
    self.head = Head(cfg.embed, cfg.vocab_size, cfg.head_init_scale)
    self.cfg = cfg

  def __call__(self, batch, key: Array | None) -> tuple[Array, dict]:
    """Hidden states [batch, length, embed], before the head."""
    keys = example_keys(key, batch['example_index'])
    segments, positions = batch['decoder_segment_ids'], batch['decoder_positions']
    prefix = {}
    if 'decoder_prefix_end' in batch:  # causal objectives have no prefix field
      prefix = {'q_positions': positions, 'kv_positions': positions, 'prefix_end': batch['decoder_prefix_end']}
    see = Visibility(causal=True, q_segment_ids=segments, kv_segment_ids=segments, **prefix)
    x = self.embedding(batch['decoder_input_tokens'], jnp.dtype(self.cfg.dtype), keys)
    return self.decoder(x, positions, see, keys=keys), {}
