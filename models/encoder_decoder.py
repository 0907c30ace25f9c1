"""T5 v1.1 and UL2: an encoder and a decoder with relative biases, RMS norms and gated MLPs."""

import dataclasses
from typing import Annotated, Literal

import jax.numpy as jnp
from flax import nnx
from jax import Array

from models.attention import AttentionConfig, Visibility
from models.block import Block, Cross, Remat, Stack
from models.dropout import example_keys, fold
from models.embedding import Embedding, Head
from models.mlp import MlpConfig
from models.positions import RelativePositionBias

ENCODER_KEYS, DECODER_KEYS = 1, 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig:
  """Sizes of a T5 v1.1 model. `dtype` is that of activations; parameters, softmax and loss are f32."""

  name: Literal['encoder_decoder'] = 'encoder_decoder'
  vocab_size: Annotated[int, '>= 1']
  embed: Annotated[int, '>= 1']
  encoder_layers: Annotated[int, '>= 1']
  decoder_layers: Annotated[int, '>= 1']
  heads: Annotated[int, '>= 1']
  head_dim: Annotated[int, '>= 1']
  mlp: MlpConfig
  relative_buckets: Annotated[int, '>= 4'] = 32  # the encoder has one near and one far bucket on each side
  relative_max_distance: Annotated[int, '>= 1'] = 128
  embedding_init_std: Annotated[float, '>= 0'] = 1.0
  head_init_scale: Annotated[float, '>= 0'] = 1.0
  dropout: Annotated[float, '[0, 1)'] = 0.0
  dtype: Literal['float32', 'bfloat16'] = 'float32'
  remat: Remat = 'none'


def check_encoder_decoder(cfg: EncoderDecoderConfig) -> None:
  """Raises ValueError where the logarithmic buckets would begin beyond their end."""
  exact = cfg.relative_buckets // 2  # of the decoder, which looks to one side
  if cfg.relative_max_distance <= exact:
    raise ValueError(
      f'model.relative_max_distance={cfg.relative_max_distance} with model.relative_buckets={cfg.relative_buckets}, '
      f'whose first {exact} buckets are single distances; set model.relative_max_distance > {exact}.'
    )


class EncoderDecoder(nnx.Module):
  """Source: Raffel et al. 2020, arXiv:1910.10683; v1.1: T5X examples/t5/network.py."""

  def __init__(self, cfg: EncoderDecoderConfig, implementation: str):
    attention = AttentionConfig(
      heads=cfg.heads, kv_heads=cfg.heads, head_dim=cfg.head_dim, t5_scale=True, rope_theta=None, dropout=cfg.dropout,
      implementation=implementation,
    )  # fmt: skip

    def stack(layers: int, cross: bool) -> Stack:
      block = Block(cfg.embed, attention, cfg.mlp, cross=cross, rate=cfg.dropout)
      return Stack(block, layers, cfg.embed, remat=cfg.remat, rate=cfg.dropout)

    def bias(bidirectional: bool) -> RelativePositionBias:
      buckets, distance = cfg.relative_buckets, cfg.relative_max_distance
      return RelativePositionBias(cfg.heads, bidirectional=bidirectional, buckets=buckets, max_distance=distance)

    self.embedding = Embedding(cfg.vocab_size, cfg.embed, rate=cfg.dropout, std=cfg.embedding_init_std)
    self.encoder, self.encoder_bias = stack(cfg.encoder_layers, cross=False), bias(bidirectional=True)
    self.decoder, self.decoder_bias = stack(cfg.decoder_layers, cross=True), bias(bidirectional=False)
    self.head = Head(cfg.embed, cfg.vocab_size, cfg.head_init_scale)
    self.cfg, self.attention = cfg, attention

  def encode(self, batch, keys: Array | None) -> Array:
    """Encoder output [batch, inputs_length, embed]."""
    segments = batch['encoder_segment_ids']
    see = Visibility(causal=False, q_segment_ids=segments, kv_segment_ids=segments, relative_bias=self.encoder_bias())
    keys = fold(keys, ENCODER_KEYS)
    x = self.embedding(batch['encoder_input_tokens'], jnp.dtype(self.cfg.dtype), keys)
    return self.encoder(x, batch['encoder_positions'], see, keys=keys)

  def __call__(self, batch, key: Array | None) -> tuple[Array, dict]:
    """Decoder output [batch, targets_length, embed], before the head."""
    keys = example_keys(key, batch['example_index'])
    memory = self.encode(batch, keys)
    segments, keys = batch['decoder_segment_ids'], fold(keys, DECODER_KEYS)
    see = Visibility(causal=True, q_segment_ids=segments, kv_segment_ids=segments, relative_bias=self.decoder_bias())
    across = Visibility(causal=False, q_segment_ids=segments, kv_segment_ids=batch['encoder_segment_ids'])
    x = self.embedding(batch['decoder_input_tokens'], jnp.dtype(self.cfg.dtype), keys)
    return self.decoder(x, batch['decoder_positions'], see, Cross(see=across, memory=memory), keys), {}
