"""Arrays in the memory of the host, inside of compiled functions: what computes with them brings them to the device."""

import dataclasses
from typing import Any

import jax
from jax import Array

HOST, DEVICE = 'pinned_host', 'device'  # JAX's names of kinds of memory


def is_away(x: Array) -> bool:
  """Whether `x`, an argument of a function that is compiled, lies in the host's memory."""
  return jax.typeof(x).memory_space == jax.memory.Space.Host


def on_device(x: Array) -> Array:
  """`x` in the device's memory."""
  return jax.device_put(x, jax.memory.Space.Device) if is_away(x) else x


def on_host(x: Array) -> Array:
  """`x` in the host's memory."""
  return jax.device_put(x, jax.memory.Space.Host)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FromHost:
  """A parameter in the host's memory whose gradient arises on the device: that of `sink`, an array of its shape there.

  JAX gives the gradient of an array of the host to the host, where nothing may add to it. No value of `sink` is read,
  so it takes no memory in a compiled function.
  """

  values: Array
  sink: Array


def brought(tree: Any) -> Any:
  """`tree` with its arrays of the host's memory on the device.

  Inside of a scan over layers that are on the host, one layer comes at a time: libtpu 0.0.42 lets it come while the
  layer before is computed. Call it inside of what `jax.checkpoint` runs again, or all layers are kept for the gradient.
  """
  one = lambda x: _with_gradient(x.values, x.sink) if isinstance(x, FromHost) else on_device(x)
  return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, FromHost))


@jax.custom_vjp
def _with_gradient(values: Array, sink: Array) -> Array:
  """`values` on the device. Their gradient is given to `sink`, and `values` have none."""
  return on_device(values)


_with_gradient.defvjp(lambda values, sink: (on_device(values), None), lambda _, grad: (None, grad))
