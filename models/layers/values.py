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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prediction:
  """Hidden states [batch, length, embed] that the model's head reads too, beside those of the last layer: the tokens
  `labels`, int32[batch, length], are predicted from them, and `weights`, f32[batch, length], are those of their losses.

  In aux, a tuple of these under the name of their loss. The training loss takes them out: it adds the mean of their
  losses times the weight that its config has for the name. Evaluation reads none, so compiled programs make none.
  """

  hidden: Array
  labels: Array
  weights: Array


# A scalar is averaged over layers.
Aux = dict[str, Array | ByLayer | Balance]


def resolved(aux: Aux) -> Aux:
  """Each `Balance` as its value."""
  return {name: x.value() if isinstance(x, Balance) else x for name, x in aux.items()}


def averaged(aux: Aux) -> Aux:
  """Means over the leading dim, `layers`, but for each `ByLayer`."""
  return {name: x if isinstance(x, ByLayer) else jnp.mean(x) for name, x in aux.items()}


def joined(first: Aux, second: Aux, share: float) -> Aux:
  """Means over the layers of two stacks, of which `first` has that share, and all `ByLayer`."""
  both = {name: share * a + (1 - share) * second[name] for name, a in first.items() if name in second}
  return {**both, **{name: x for name, x in (first | second).items() if isinstance(x, ByLayer)}}


def of_stack(aux: Aux, stack: str) -> Aux:
  """Each `ByLayer` under NAME/`stack`, the name of its layers in the model."""
  return {f'{name}/{stack}' if isinstance(x, ByLayer) else name: x for name, x in aux.items()}
