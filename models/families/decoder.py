"""A decoder-only model, causal or with a visible prefix; by default Llama's: rotary positions, shared keys, SwiGLU."""

import dataclasses
from typing import Annotated, Literal

import jax.numpy as jnp
from flax import nnx
from jax import Array

from models.families.ahead import LOSS, Entry, ahead
from models.families.parts import (
  Parts,
  Positions,
  attention_config,
  check_no_encoder_parts,
  check_parts,
  make_bias,
  make_embedding,
  make_frequencies,
  make_head,
  make_stack,
  placed,
)
from models.layers.attention import Visibility
from models.layers.dropout import example_keys, fold
from models.layers.linear import Projections
from models.layers.mlp import Activation, MlpConfig
from models.layers.positions.rotary import Angles
from models.layers.values import Aux, Prediction, joined, of_stack
from models.rendered import IF_SET


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderMlpConfig(MlpConfig):
  activation: Activation = 'silu'


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig(Parts):
  """`kv_heads=None` gives each head its own keys. `mtp_depth` is how many tokens beyond the next one training also
  predicts, each by a block of its own behind the last layer (models/families/ahead.py); `loss.mtp` weighs them.
  Evaluation, generation and export leave these blocks out. Other keys: models/families/parts.py.
  """

  name: Literal['decoder'] = 'decoder'
  layers: Annotated[int, '>= 1']
  mlp: DecoderMlpConfig
  kv_heads: Annotated[int, '>= 1'] | None = None
  positions: Positions = 'rotary'
  mtp_depth: Annotated[int, '>= 0'] = dataclasses.field(default=0, metadata=IF_SET)


def check_decoder(cfg: DecoderConfig) -> None:
  """Raises ValueError for sizes that do not fit each other."""
  if cfg.heads % (cfg.kv_heads or 1):
    raise ValueError(
      f'model.kv_heads={cfg.kv_heads} does not divide model.heads={cfg.heads}; each serves equally many.'
    )
  if cfg.mtp_depth and cfg.positions == 'relative' and cfg.relative_layers == 'each':
    raise ValueError(
      f"model.mtp_depth={cfg.mtp_depth} with model.relative_layers='each': the blocks behind the last layer have no "
      "biases of their own; use model.relative_layers='shared', or other positions."
    )
  check_no_encoder_parts(cfg)
  check_parts(cfg)


class Decoder(nnx.Module):
  """Source: Touvron et al. 2023, arXiv:2302.13971; prefix attention: Raffel et al. 2020, §3.2.1."""

  def __init__(self, cfg: DecoderConfig, implementation: str):
    self.attention = attention_config(cfg, implementation, kv_heads=cfg.kv_heads or cfg.heads, t5_scale=False)
    self.embedding = make_embedding(cfg)
    self.decoder = make_stack(cfg, self.attention, cfg.layers, cross=False)
    self.decoder_bias = make_bias(cfg, cfg.layers, bidirectional=False)
    self.frequencies = make_frequencies(cfg)
    self.head = make_head(cfg)
    of_depth = dataclasses.replace(cfg, windows=cfg.windows[-1:])  # the window of the last layer
    for k in range(1, cfg.mtp_depth + 1):
      setattr(self, f'mtp_{k}_entry', Entry(cfg.embed, cfg.norm, Projections(std=cfg.init_std)))
      setattr(self, f'mtp_{k}', make_stack(of_depth, self.attention, 1, cross=False))
    self.cfg = cfg

  def __call__(self, batch, key: Array | None) -> tuple[Array, dict]:
    """Hidden states [batch, length, embed], before the head."""
    keys = example_keys(key, batch['example_index'])
    x, positions, see = self.enter(batch, keys)
    rotations = self.rotations(positions, batch['decoder_segment_ids'], key)
    hidden, aux = self.decoder(x, rotations, see, keys=keys)
    aux, deeper, found = of_stack(aux, 'decoder'), hidden, []
    for k in range(1, self.cfg.mtp_depth + 1):
      own, of_depth = self._predict(k, deeper, x, batch, rotations, see, keys)
      layers, deeper, found = self.cfg.layers + k, own.hidden, [*found, own]
      aux = joined(aux, of_depth, (layers - 1) / layers)
    return hidden, aux | ({LOSS: tuple(found)} if found else {})

  def _predict(
    self, k: int, hidden: Array, x: Array, batch, rotations: Array | Angles, see: Visibility, keys: Array | None
  ) -> tuple[Prediction, Aux]:
    """Depth k behind `hidden`, the last one's; `x` are the vectors of the tokens.

    Positions whose segment ends before token i + k are padding here: nothing reads them, and their weight is 0.
    """
    segments = batch['decoder_segment_ids']
    there = ahead(segments, k) == segments
    own = jnp.where(there, segments, 0)
    see = dataclasses.replace(see, q_segment_ids=own, kv_segment_ids=own)
    entered = getattr(self, f'mtp_{k}_entry')(hidden, ahead(x, k))
    stack = getattr(self, f'mtp_{k}')
    hidden, aux = stack(entered, rotations, see, keys=fold(keys, self.cfg.layers + k))  # a stack folds 0 to layers
    weights = jnp.where(there, ahead(batch['decoder_loss_weights'], k), 0.0)
    return Prediction(hidden, ahead(batch['decoder_target_tokens'], k), weights), of_stack(aux, f'mtp_{k}')

  def enter(self, batch, keys: Array | None) -> tuple[Array, Array, Visibility]:
    """What the first block reads of packed rows: vectors of the tokens, their positions, which keys each one sees."""
    segments, positions = batch['decoder_segment_ids'], batch['decoder_positions']
    prefix = {}
    if 'decoder_prefix_end' in batch:  # causal objectives have no prefix field
      prefix = {'q_positions': positions, 'kv_positions': positions, 'prefix_end': batch['decoder_prefix_end']}
    see = Visibility(
      causal=True, q_segment_ids=segments, kv_segment_ids=segments,
      **placed(batch, self.cfg.sinks) | prefix, **self.decoder_bias(),
    )  # fmt: skip
    x = self.embedding(batch['decoder_input_tokens'], positions, jnp.dtype(self.cfg.dtype), keys)
    return x, positions, see

  def rotations(self, positions: Array, segments: Array, key: Array | None, more: int = 0) -> Array | Angles:
    """What rotates positions of packed rows; each document will have `more` tokens behind those that are there."""
    if self.frequencies is None:
      return positions
    if key is None:
      return self.frequencies.of_documents(positions, segments, more)
    return self.frequencies.of_step(positions.shape[1], key)

  def rotations_of_length(self, positions: Array, length: Array | int) -> Array | Angles:
    """What rotates positions of rows that will have `length` tokens."""
    return positions if self.frequencies is None else self.frequencies.of_length(positions, length)
