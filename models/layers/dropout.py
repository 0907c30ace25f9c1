"""Dropout whose masks belong to examples: the same on any mesh, in any microbatch, in any order."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

# Where a model drops, see models/families/parts.py.
Sites = Literal['t5', 'bert', 'none']


def example_keys(key: Array | None, example_index: Array) -> Array | None:
  """One key for each example of the batch, from the step's key: key<fry>[batch]."""
  return None if key is None else fold(jnp.broadcast_to(key, example_index.shape), example_index)


def fold(keys: Array | None, data) -> Array | None:
  """Each key folded with `data` (a scalar, or one number for each key)."""
  if keys is None:
    return None
  return jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(jnp.asarray(data, jnp.uint32), keys.shape))


def dropout(x: Array, rate: float, keys: Array | None, site: int, sites: Sites = 't5') -> Array:
  """`x[batch, length, ...]` with features dropped; keys=None keeps everything.

  The mask is shared along `length` with T5's sites; with BERT's each position has its own.

  Sources: T5X examples/t5/network.py, nn.Dropout(broadcast_dims=(-2,)); google-research/bert modeling.py, dropout.
  """
  if keys is None or rate == 0.0:
    return x
  shape = (1, *x.shape[2:]) if sites == 't5' else x.shape[1:]
  keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, shape))(fold(keys, site))
  return jnp.where(keep, x / (1 - rate), jnp.zeros((), x.dtype))
