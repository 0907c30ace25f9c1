"""What a layer gives beside activations: for the loss, metrics and state."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ByLayer:
  """A value that each layer has for itself: f32[layers], in one layer a scalar. Experts have f32[layers, experts]."""

  values: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Balance:
  """Two means over tokens, f32[..., experts]: the share of choices that each expert gets, and its mean probability."""

  load: Array
  probability: Array

  def value(self) -> Array:
    """Experts times the sum of the products: no mean over tokens, so parts of a batch are joined before it is made."""
    return self.load.shape[-1] * (self.load * self.probability).sum(-1)


# A scalar is averaged over layers.
Aux = dict[str, Array | ByLayer | Balance]


def resolved(aux: Aux) -> Aux:
  """Each `Balance` as its value."""
  return {name: x.value() if isinstance(x, Balance) else x for name, x in aux.items()}


def averaged(aux: Aux) -> Aux:
  """Means over the leading dim, `layers`, but for each `ByLayer`."""
  return {name: x if isinstance(x, ByLayer) else jnp.mean(x) for name, x in aux.items()}


def of_stack(aux: Aux, stack: str) -> Aux:
  """Each `ByLayer` under NAME/`stack`, the name of its layers in the model."""
  return {f'{name}/{stack}' if isinstance(x, ByLayer) else name: x for name, x in aux.items()}
