"""FLOPs of a training step, computed from the parameter descriptions alone."""

import math
from collections.abc import Mapping

from models.build import ModelConfig, build
from models.families.encoder import EncoderConfig
from models.families.encoder_decoder import EncoderDecoderConfig
from models.specs import ParamSpec, Tree, is_matrix, is_spec

FORWARD_AND_BACKWARD = 3  # the backward pass costs two products for each one of the forward pass


def _matrix_parameters(tree: Tree, per_token: int = 1) -> int:
  """How many parameters every token is multiplied with: no norms, no biases (the caller leaves out lookups), and of
  experts `per_token`. A router's `experts` are its outputs, and stand last."""
  if is_spec(tree):
    parts = [per_token if axis == 'experts' else n for n, axis in zip(tree.shape[:-1], tree.axes[:-1], strict=True)]
    return math.prod(parts) * tree.shape[-1] if is_matrix(tree) else 0
  return sum(_matrix_parameters(branch, per_token) for branch in tree.values())


def _cross_keys_values(decoder: Tree) -> int:
  """The number of the decoder's parameters that are multiplied with encoder tokens."""
  cross: dict[str, ParamSpec] = decoder['blocks']['cross_attention']
  return math.prod(cross['key'].shape) + math.prod(cross['value'].shape)


def _keys(cfg: ModelConfig, layers: int, length: int, *, causal: bool) -> int:
  """How many keys of its own row a query reads in all layers of a stack."""
  windows = cfg.windows or (None,)
  wide = [length if w is None else min(length, cfg.sinks + (w if causal else 2 * w - 1)) for w in windows]
  return layers // len(windows) * sum(wide)


def _head(cfg: ModelConfig) -> int:
  """Parameters that make logits, tied or not."""
  if cfg.head == 'binary':
    return cfg.embed
  tied = isinstance(cfg, EncoderConfig) and cfg.head != 'untied'
  return (cfg.width if tied else cfg.embed) * cfg.vocab_size


def flops_per_position(cfg: ModelConfig, *, inputs_length: int, targets_length: int) -> dict[str, int]:
  """FLOPs at one position of each side (encoder, decoder) of a row of these lengths, forward and backward.

  Products with parameters, and the position's own queries against all keys, whether these are padding or not, or
  against as many as a window has (those after a causal query count like those before it without a window); two FLOPs
  for each multiply-add, nothing recomputed. Only the experts that a token is routed to are counted.
  Positions of one side cost the same, padding or not.
  """
  specs = build(cfg).specs
  head = _head(cfg) + sum(
    _matrix_parameters(specs.get(name, {})) for name in ('head_transform', 'embedding_projection')
  )
  of = lambda stack: _matrix_parameters(specs[stack], cfg.experts_per_token)
  attention = 4 * cfg.heads * cfg.head_dim  # scores and mixing: two products of 2 * heads * head_dim for each pair
  cost = lambda parameters, pairs: FORWARD_AND_BACKWARD * (2 * parameters + attention * pairs)
  if isinstance(cfg, EncoderDecoderConfig):
    cross = _cross_keys_values(specs['decoder'])
    encoder, decoder = of('encoder') + cross, of('decoder') - cross + head
    return {
      'encoder': cost(encoder, _keys(cfg, cfg.encoder_layers, inputs_length, causal=False)),
      'decoder': cost(
        decoder, _keys(cfg, cfg.decoder_layers, targets_length, causal=True) + cfg.decoder_layers * inputs_length
      ),
    }
  stack = 'encoder' if isinstance(cfg, EncoderConfig) else 'decoder'
  pairs = _keys(cfg, cfg.layers, targets_length, causal=stack == 'decoder')
  if cfg.positions == 'disentangled':  # scores of positions: one product for twice as many columns as keys
    pairs += len(cfg.position_scores) * cfg.layers * targets_length
  return {stack: cost(of(stack) + head, pairs)}


def flops_by_side(cfg: ModelConfig, *, inputs_length: int, targets_length: int) -> dict[str, int]:
  """FLOPs of one row at the positions of each side; their sum is `flops_per_step`."""
  each = flops_per_position(cfg, inputs_length=inputs_length, targets_length=targets_length)
  lengths = (
    {'encoder': inputs_length, 'decoder': targets_length} if len(each) > 1 else dict.fromkeys(each, targets_length)
  )
  return {side: flops * lengths[side] for side, flops in each.items()}


def flops_per_step(cfg: ModelConfig, *, inputs_length: int, targets_length: int) -> float:
  """FLOPs of one row, forward and backward: two for each multiply-add, attention over all pairs, nothing recomputed."""
  return float(sum(flops_by_side(cfg, inputs_length=inputs_length, targets_length=targets_length).values()))


def padding_flops(cfg: ModelConfig, used: Mapping[str, float], *, inputs_length: int, targets_length: int) -> float:
  """The share of a step's FLOPs spent at positions that are padding; `used` is the share of each side that is not."""
  sides = flops_by_side(cfg, inputs_length=inputs_length, targets_length=targets_length)
  total = sum(sides.values())
  return sum((1 - used[side]) * (flops / total) for side, flops in sides.items())


def flops_per_token(cfg: ModelConfig, *, inputs_length: int, targets_length: int) -> dict[str, float]:
  """Training FLOPs for each token of a full row (`per token`), for each target, and for the row."""
  row = flops_per_step(cfg, inputs_length=inputs_length, targets_length=targets_length)
  return {'per token': row / (inputs_length + targets_length), 'per target': row / targets_length, 'per row': row}
