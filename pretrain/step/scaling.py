"""Delayed scaling as state beside the parameters: histories of the largest sizes of operands."""

import jax

from models.precision import AMAX, PrecisionConfig, first_history, largest_of, pushed
from models.specs import Tree
from pretrain.step.train_step import NOTHING, Track, Tracks


def scaling_tracks(cfg: PrecisionConfig, specs: Tree) -> Tracks:
  """What `precision.recipe` keeps in `TrainState.extra`: nothing, or with `amax_history` the entry 'amax'.

  Its gradient in a step is the amax of each operand in it (`quantized_matmul`); that of a batch is the largest of its
  microbatches', which all have the scales of the steps before. Every device holds all of it.
  """
  if not cfg.amax_history:
    return NOTHING
  first = lambda params: first_history(cfg, specs)
  update = lambda history, seen, params, step: jax.tree.map(pushed, history, seen[AMAX])
  place = lambda params, everywhere: jax.tree.map(lambda _: everywhere, jax.eval_shape(first, None))
  read = lambda history: jax.tree.map(largest_of, history)
  return {AMAX: Track(first, update, place, read, jax.numpy.maximum)}
