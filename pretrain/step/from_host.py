"""Parameters some of which lie in the memory of the host: their gradients, and their values after an update.

Neither has a whole parameter on the device: layers come and go one at a time. Without such parameters both functions
are those of JAX and optax.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from models.host_memory import FromHost, is_away, on_device, on_host


def value_and_grad(loss: Callable) -> Callable:
  """`jax.value_and_grad` of `loss(params, batch, key, weight, read)`, which has aux, for `params` and `read`. All
  gradients are on the device.
  """

  def found(params: Any, batch: Any, key: Any, weight: Any, read: Any):
    def of_sinks(sinks, batch, key, weight, read):
      own = jax.tree.map(lambda x, sink: FromHost(x, sink) if is_away(x) else sink, params, sinks)
      return loss(own, batch, key, weight, read)

    sinks = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) if is_away(x) else x, params)
    return jax.value_and_grad(of_sinks, argnums=(0, 4), has_aux=True)(sinks, batch, key, weight, read)

  return found


def apply_updates(params: Any, updates: Any) -> Any:
  """`optax.apply_updates`; a parameter that lies on the host, [layers, …], stays there."""

  def one(x: Array, update: Array) -> Array:
    if not is_away(x):
      return optax.apply_updates(x, update)

    def layer(i: Array, x: Array) -> Array:
      own = optax.apply_updates(on_device(jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False)), update[i])
      return jax.lax.dynamic_update_index_in_dim(x, on_host(own), i, 0)

    return jax.lax.fori_loop(0, x.shape[0], layer, x)  # in place: a scan would have a second copy on the host

  return jax.tree.map(one, params, updates)
