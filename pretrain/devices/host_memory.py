"""Arrays in the memory of the host, inside of compiled functions: what computes with them brings them to the device."""

from collections.abc import Callable, Iterable
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


def in_turn(function: Callable[..., Any], *arguments: Iterable[Any]) -> list[Any]:
  """[function(array, …)] over `arguments`, arrays first. One of the host's memory comes to the device when the result
  before it is there, so that one at a time is on the device; XLA by itself would bring all at once.
  """
  found, before = [], ()
  for x, *rest in zip(*arguments, strict=True):
    if is_away(x):
      x, _ = jax.lax.optimization_barrier((x, before))
      before = result = function(on_device(x), *rest)
    else:
      result = function(x, *rest)
    found.append(result)
  return found
