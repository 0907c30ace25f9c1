"""A decoder-only model with rotary positions, shared keys (GQA) and SwiGLU; causal, or with a visible prefix."""

import dataclasses
from typing import Annotated, Literal

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
  vocab_size: Annotated[int, '>= 1']
  embed: Annotated[int, '>= 1']
  layers: Annotated[int, '>= 1']
  heads: Annotated[int, '>= 1']
  head_dim: Annotated[int, '>= 1']
  mlp: DecoderMlpConfig
  kv_heads: Annotated[int, '>= 1'] | None = None
  rope_theta: Annotated[float, '> 0'] = 10_000.0
  embedding_init_std: Annotated[float, '>= 0'] = 1.0
  head_init_scale: Annotated[float, '>= 0'] = 1.0
  dropout: Annotated[float, '[0, 1)'] = 0.0
  dtype: Literal['float32', 'bfloat16'] = 'float32'
  remat: Remat = 'none'


def check_decoder(cfg: DecoderConfig) -> None:
  """Raises ValueError for sizes that do not fit each other."""
  if cfg.heads % (cfg.kv_heads or 1):
    raise ValueError(
      f'model.kv_heads={cfg.kv_heads} does not divide model.heads={cfg.heads}; each serves equally many.'
    )
  if cfg.head_dim % 2:
    raise ValueError(f'model.head_dim={cfg.head_dim} is odd; rotary positions turn pairs, use {cfg.head_dim + 1}.')


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
