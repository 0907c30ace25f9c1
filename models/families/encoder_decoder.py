"""T5 and UL2: an encoder and a decoder, by default v1.1's with relative biases, RMS norms and gated MLPs."""

import dataclasses
from typing import Annotated, Literal

import jax.numpy as jnp
from flax import nnx
from jax import Array

from models.families.parts import (
  Parts,
  attention_config,
  check_no_encoder_parts,
  check_parts,
  make_bias,
  make_embedding,
  make_head,
  make_stack,
  placed,
)
from models.layers.attention import Visibility
from models.layers.dropout import example_keys, fold
from models.layers.rows import Cross
from models.layers.values import Aux, joined, of_stack

ENCODER_KEYS, DECODER_KEYS = 1, 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig(Parts):
  """Depths of a T5 model; other keys: models/families/parts.py."""

  name: Literal['encoder_decoder'] = 'encoder_decoder'
  encoder_layers: Annotated[int, '>= 1']
  decoder_layers: Annotated[int, '>= 1']


def check_encoder_decoder(cfg: EncoderDecoderConfig) -> None:
  """Raises ValueError for values that do not fit each other."""
  if cfg.parallel != 'none':
    raise ValueError(
      f"model.parallel='{cfg.parallel}' with model.name='encoder_decoder'; cross-attention reads the output of "
      "self-attention, use model.parallel='none'."
    )
  check_no_encoder_parts(cfg)
  check_parts(cfg)


class EncoderDecoder(nnx.Module):
  """Source: Raffel et al. 2020, arXiv:1910.10683; v1.1: T5X examples/t5/network.py."""

  def __init__(self, cfg: EncoderDecoderConfig, implementation: str):
    self.attention = attention_config(cfg, implementation, kv_heads=cfg.heads, t5_scale=True)
    self.embedding = make_embedding(cfg)
    self.encoder = make_stack(cfg, self.attention, cfg.encoder_layers, cross=False, before_head=False)
    self.encoder_bias = make_bias(cfg, cfg.encoder_layers, bidirectional=True)
    self.decoder = make_stack(cfg, self.attention, cfg.decoder_layers, cross=True)
    self.decoder_bias = make_bias(cfg, cfg.decoder_layers, bidirectional=False)
    self.head = make_head(cfg)
    self.cfg = cfg

  def encode(self, batch, keys: Array | None, *, decoding: bool = False) -> tuple[Array, Aux]:
    """(encoder output [batch, inputs_length, embed], means over the encoder's layers); `decoding` as for a `Stack`."""
    segments = batch['encoder_segment_ids']
    see = Visibility(causal=False, q_segment_ids=segments, kv_segment_ids=segments, **self.encoder_bias())
    keys = fold(keys, ENCODER_KEYS)
    x = self.embedding(batch['encoder_input_tokens'], batch['encoder_positions'], jnp.dtype(self.cfg.dtype), keys)
    return self.encoder(x, batch['encoder_positions'], see, keys=keys, decoding=decoding)

  def __call__(self, batch, key: Array | None) -> tuple[Array, dict]:
    """Decoder output [batch, targets_length, embed], before the head."""
    keys = example_keys(key, batch['example_index'])
    memory, of_encoder = self.encode(batch, keys)
    segments, keys = batch['decoder_segment_ids'], fold(keys, DECODER_KEYS)
    see = Visibility(
      causal=True, q_segment_ids=segments, kv_segment_ids=segments,
      **placed(batch, self.cfg.sinks), **self.decoder_bias(),
    )  # fmt: skip
    across = Visibility(causal=False, q_segment_ids=segments, kv_segment_ids=batch['encoder_segment_ids'])
    x = self.embedding(batch['decoder_input_tokens'], batch['decoder_positions'], jnp.dtype(self.cfg.dtype), keys)
    x, of_decoder = self.decoder(x, batch['decoder_positions'], see, Cross(see=across, memory=memory), keys)
    share = self.cfg.encoder_layers / (self.cfg.encoder_layers + self.cfg.decoder_layers)
    return x, joined(of_stack(of_encoder, 'encoder'), of_stack(of_decoder, 'decoder'), share)
