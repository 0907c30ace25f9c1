"""FLOPs of a training step, computed from the parameter descriptions alone."""

import math

from models.build import ModelConfig, build
from models.families.encoder import EncoderConfig
from models.families.encoder_decoder import EncoderDecoderConfig
from models.specs import ParamSpec, Tree, is_matrix, is_spec

FORWARD_AND_BACKWARD = 3  # the backward pass costs two products for each one of the forward pass


def _matrix_parameters(tree: Tree) -> int:
  """How many parameters every token is multiplied with: no norms, no biases (the caller leaves out lookups)."""
  if is_spec(tree):
    return math.prod(tree.shape) if is_matrix(tree) else 0
  return sum(_matrix_parameters(branch) for branch in tree.values())


def _cross_keys_values(decoder: Tree) -> int:
  """The number of the decoder's parameters that are multiplied with encoder tokens."""
  cross: dict[str, ParamSpec] = decoder['blocks']['cross_attention']
  return math.prod(cross['key'].shape) + math.prod(cross['value'].shape)


def flops_per_step(cfg: ModelConfig, *, inputs_length: int, targets_length: int) -> float:
  """FLOPs of one row, forward and backward: two for each multiply-add, attention over all pairs, no recomputation."""
  specs = build(cfg).specs
  head = cfg.embed * cfg.vocab_size  # tied or not
  one_stack = 'encoder' if isinstance(cfg, EncoderConfig) else 'decoder'
  decoder = _matrix_parameters(specs[one_stack])
  attention = 4 * cfg.heads * cfg.head_dim  # scores and mixing: two products of 2 * heads * head_dim for each pair
  if isinstance(cfg, EncoderDecoderConfig):
    cross = _cross_keys_values(specs['decoder'])
    products = (_matrix_parameters(specs['encoder']) + cross) * inputs_length + (
      decoder - cross + head
    ) * targets_length
    pairs = cfg.encoder_layers * inputs_length**2
    pairs += cfg.decoder_layers * (targets_length**2 + inputs_length * targets_length)
  else:
    products, pairs = (decoder + head) * targets_length, cfg.layers * targets_length**2
  return float(FORWARD_AND_BACKWARD * (2 * products + attention * pairs))


def flops_per_token(cfg: ModelConfig, *, inputs_length: int, targets_length: int) -> dict[str, float]:
  """Training FLOPs for each token of a full row (`per token`), for each target, and for the row."""
  row = flops_per_step(cfg, inputs_length=inputs_length, targets_length=targets_length)
  return {'per token': row / (inputs_length + targets_length), 'per target': row / targets_length, 'per row': row}
