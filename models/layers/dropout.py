"""Dropout whose masks belong to examples: the same on any mesh, in any microbatch, in any order."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

Sites = Literal['t5', 'bert', 'none']


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dropout:
  """Where a model drops at `rate`: `sites`, which differ between recipes.

  site                                            t5           bert
  embeddings, after their norm if they have one   yes          yes
  weights of attention                            yes          yes
  outputs of attention and MLP, before the sum    yes          yes
  hidden layer of the MLP                         yes          no
  output of the last layer                        yes          no
  one mask for all tokens of an example           yes          no, each element has its own

  'bert' is also what GPT-2 does. 'none' has no site. Source: T5X examples/t5/network.py; google-research/bert
  modeling.py, embedding_postprocessor, attention_layer and transformer_model.
  """

  rate: float
  sites: Sites = 't5'

  @property
  def inner(self) -> float:
    """The rate inside an MLP and after the last layer."""
    return self.rate if self.sites == 't5' else 0.0

  @property
  def outer(self) -> float:
    """The rate at all other sites."""
    return 0.0 if self.sites == 'none' else self.rate

  @property
  def shared(self) -> bool:
    """Whether the tokens of an example (in attention: its queries) have one mask."""
    return self.sites == 't5'


def example_keys(key: Array | None, example_index: Array) -> Array | None:
  """One key for each example of the batch, from the step's key: key<fry>[batch]."""
  return None if key is None else fold(jnp.broadcast_to(key, example_index.shape), example_index)


def fold(keys: Array | None, data) -> Array | None:
  """Each key folded with `data` (a scalar, or one number for each key)."""
  if keys is None:
    return None
  return jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(jnp.asarray(data, jnp.uint32), keys.shape))


def dropout(x: Array, rate: float, keys: Array | None, site: int, *, shared: bool = True) -> Array:
  """`x[batch, length, ...]` with features dropped, the mask shared along `length` or not; keys=None keeps everything.

  Source: T5X examples/t5/network.py, nn.Dropout(broadcast_dims=(-2,)).
  """
  if keys is None or rate == 0.0:
    return x
  shape = (1, *x.shape[2:]) if shared else x.shape[1:]
  keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, shape))(fold(keys, site))
  return jnp.where(keep, x / (1 - rate), jnp.zeros((), x.dtype))
