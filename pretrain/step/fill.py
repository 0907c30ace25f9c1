"""How much of a step's batch is tokens rather than padding, as metrics of the step: counted over the global batch."""

from collections.abc import Callable

import jax.numpy as jnp

from models.build import ModelConfig
from models.flops import padding_flops
from models.layers.low_rank import NONE, LoraConfig
from pretrain.step.train_step import Batch, Metrics

PREFIX, FLOPS = 'fill/', 'padding_flops'


def make_fill(cfg: ModelConfig, lora: LoraConfig = NONE) -> Callable[[Batch], Metrics]:
  """`fill(batch)`: the share of used positions of each side, `fill/SIDE`, and of the FLOPs at the others.

  A position is used where its segment id is not 0. Keys exist for the sides that the batch has.
  """

  def fill(batch: Batch) -> Metrics:
    ids = {side: batch[f'{side}_segment_ids'] for side in ('encoder', 'decoder') if f'{side}_segment_ids' in batch}
    used = {side: jnp.count_nonzero(own) / own.size for side, own in ids.items()}
    lengths = [own.shape[1] for own in ids.values()]
    inputs_length = lengths[0] if len(lengths) > 1 else 0
    padding = padding_flops(cfg, used, inputs_length=inputs_length, targets_length=lengths[-1], lora=lora)
    return {PREFIX + side: share for side, share in used.items()} | {FLOPS: padding}

  return fill
