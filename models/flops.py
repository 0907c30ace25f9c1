"""FLOPs of a training step, computed from the parameter descriptions alone."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

from models.build import ModelConfig, build
from models.families.encoder import EncoderConfig
from models.families.encoder_decoder import EncoderDecoderConfig
from models.layers.low_rank import NONE, LoraConfig, Path, pairs
from models.specs import ParamSpec, Tree, is_matrix, is_spec

BESIDE = ('head_transform', 'embedding_projection')  # beside the stacks and the head
FORWARD_AND_BACKWARD = 3  # the backward pass costs two products for each one of the forward pass


def _matrix_parameters(tree: Tree, per_token: int = 1) -> int:
  """How many parameters every token is multiplied with: no norms, no biases (the caller leaves out lookups), and of
  experts `per_token`. A router's `experts` are its outputs, and stand last."""
  if is_spec(tree):
    parts = [per_token if axis == 'experts' else n for n, axis in zip(tree.shape[:-1], tree.axes[:-1], strict=True)]
    return math.prod(parts) * tree.shape[-1] if is_matrix(tree) else 0
  return sum(_matrix_parameters(branch, per_token) for branch in tree.values())


@dataclasses.dataclass(frozen=True)
class _Products:
  """How many parameters each token of a side is multiplied with: of weights, and of the A and the B of adapters."""

  weights: int
  a: int = 0
  b: int = 0

  def __add__(self, other: '_Products') -> '_Products':
    return _Products(self.weights + other.weights, self.a + other.a, self.b + other.b)

  def __sub__(self, other: '_Products') -> '_Products':
    return _Products(self.weights - other.weights, self.a - other.a, self.b - other.b)

  def flops(self, *, frozen: bool, reaches: bool) -> int:
    """Forward and backward. `frozen` weights have no gradient; `reaches`: there are trained parameters before these
    products, so that the gradient of their input is computed."""
    if not frozen:
      return 2 * FORWARD_AND_BACKWARD * self.weights
    return 2 * ((1 + reaches) * self.weights + (2 + reaches) * self.a + FORWARD_AND_BACKWARD * self.b)


def _adapters(specs: Tree, wanted: Callable[[Path], bool]) -> _Products:
  """The adapters of the weights whose path is `wanted`."""
  size = lambda spec: math.prod(spec.shape)
  found = [_Products(0, size(a), size(b)) for path, (a, b) in pairs(specs).items() if wanted(path)]
  return functools.reduce(_Products.__add__, found, _Products(0))


def _cross_keys_values(specs: Tree) -> dict[str, _Products]:
  """The decoder's products with encoder tokens: 'key' and 'value'."""
  cross: dict[str, ParamSpec] = specs['decoder']['blocks']['cross_attention']
  own = {name: lambda path, name=name: path[-2:] == ('cross_attention', name) for name in ('key', 'value')}
  return {name: _Products(math.prod(cross[name].shape)) + _adapters(specs, own[name]) for name in own}


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


def flops_per_position(
  cfg: ModelConfig, *, inputs_length: int, targets_length: int, lora: LoraConfig = NONE
) -> dict[str, int]:
  """FLOPs at one position of each side (encoder, decoder) of a row of these lengths, forward and backward.

  Products with parameters, and the position's own queries against all keys, whether these are padding or not, or
  against as many as a window has (those after a causal query count like those before it without a window); two FLOPs
  for each multiply-add, nothing recomputed. Only the experts that a token is routed to are counted.
  Positions of one side cost the same, padding or not.

  With a `lora.rank`, weights are frozen: they have a forward product and the gradient of their input, but none of their
  own. An encoder without adapters has the forward pass alone. Each layer of a stack with adapters counts alike.
  """
  specs = build(cfg, lora=lora).specs
  frozen = bool(lora.rank)
  head = _Products(_head(cfg) + sum(map(_matrix_parameters, [specs.get(n, {}) for n in BESIDE])))
  entry = _matrix_parameters(specs['embedding'].get('rotation', {}))
  of = lambda stack: (
    _Products(_matrix_parameters(specs[stack], cfg.experts_per_token) + entry)
    + _adapters(specs, lambda path: path[0] == stack)
  )
  product = 2 * cfg.heads * cfg.head_dim  # scores of a pair, and the same for mixing
  if not isinstance(cfg, EncoderDecoderConfig):
    stack = 'encoder' if isinstance(cfg, EncoderConfig) else 'decoder'
    between = _keys(cfg, cfg.layers, targets_length, causal=stack == 'decoder')
    if cfg.positions == 'disentangled':  # scores of positions: one product for twice as many columns as keys
      between += len(cfg.position_scores) * cfg.layers * targets_length
    depths = getattr(cfg, 'mtp_depth', 0)  # each has a block, an entry and the logits of the same head
    deeper = {name: branch for name, branch in specs.items() if name.startswith('mtp_')}
    ahead = _Products(depths * _head(cfg) + _matrix_parameters(deeper, cfg.experts_per_token))
    last = dataclasses.replace(cfg, windows=cfg.windows[-1:])
    between += depths * _keys(last, 1, targets_length, causal=True)
    parameters = (of(stack) + head + ahead).flops(frozen=frozen, reaches=True)
    return {stack: parameters + FORWARD_AND_BACKWARD * 2 * product * between}
  encoder, cross = of('encoder'), _cross_keys_values(specs)
  decoder = of('decoder') + head - cross['key'] - cross['value']
  reaches = not frozen or encoder.a > 0  # whether gradients flow into the encoder
  passes = FORWARD_AND_BACKWARD if reaches else 1
  read = encoder.flops(frozen=frozen, reaches=reaches)
  read += sum(own.flops(frozen=frozen, reaches=reaches) for own in cross.values())
  # Keys and values that nothing trained has made have no gradient.
  across = sum(2 + (reaches or own.a > 0) for own in cross.values())
  own_pairs = _keys(cfg, cfg.decoder_layers, targets_length, causal=True)
  between = 2 * FORWARD_AND_BACKWARD * own_pairs + across * cfg.decoder_layers * inputs_length
  return {
    'encoder': read + passes * 2 * product * _keys(cfg, cfg.encoder_layers, inputs_length, causal=False),
    'decoder': decoder.flops(frozen=frozen, reaches=True) + product * between,
  }


def flops_by_side(
  cfg: ModelConfig, *, inputs_length: int, targets_length: int, lora: LoraConfig = NONE
) -> dict[str, int]:
  """FLOPs of one row at the positions of each side; their sum is `flops_per_step`."""
  each = flops_per_position(cfg, inputs_length=inputs_length, targets_length=targets_length, lora=lora)
  lengths = (
    {'encoder': inputs_length, 'decoder': targets_length} if len(each) > 1 else dict.fromkeys(each, targets_length)
  )
  return {side: flops * lengths[side] for side, flops in each.items()}


def flops_per_step(cfg: ModelConfig, *, inputs_length: int, targets_length: int, lora: LoraConfig = NONE) -> float:
  """FLOPs of one row, forward and backward: two for each multiply-add, attention over all pairs, nothing recomputed."""
  sides = flops_by_side(cfg, inputs_length=inputs_length, targets_length=targets_length, lora=lora)
  return float(sum(sides.values()))


def padding_flops(
  cfg: ModelConfig, used: Mapping[str, float], *, inputs_length: int, targets_length: int, lora: LoraConfig = NONE
) -> float:
  """The share of a step's FLOPs spent at positions that are padding; `used` is the share of each side that is not."""
  sides = flops_by_side(cfg, inputs_length=inputs_length, targets_length=targets_length, lora=lora)
  total = sum(sides.values())
  return sum((1 - used[side]) * (flops / total) for side, flops in sides.items())


def flops_per_token(
  cfg: ModelConfig, *, inputs_length: int, targets_length: int, lora: LoraConfig = NONE
) -> dict[str, float]:
  """Training FLOPs for each token of a full row (`per token`), for each target, and for the row."""
  row = flops_per_step(cfg, inputs_length=inputs_length, targets_length=targets_length, lora=lora)
  return {'per token': row / (inputs_length + targets_length), 'per target': row / targets_length, 'per row': row}
