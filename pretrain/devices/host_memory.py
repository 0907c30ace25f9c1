"""One array of the host's memory at a time on the device, inside of a compiled function."""

from collections.abc import Callable, Iterable
from typing import Any

import jax

from models.host_memory import is_away, on_device


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
