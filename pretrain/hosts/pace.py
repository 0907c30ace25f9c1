"""Which process is the slowest, from what each tells the coordinator. No process waits for another one here.

In a step all processes wait for the slowest in a collective, so the times of whole steps are equal. What a process does
by itself (reads data, runs Python) differs.
"""

import contextlib
import statistics

import jax
from jax._src import distributed  # no public name has the client

FOLDER = 'pretrain/pace'


def tell(seconds: float) -> None:
  """Tells the others how long this process's own work took per step, in place of what it told before."""
  state = distributed.global_state
  if state.client is not None and state.num_processes > 1:
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the coordinator has ended, and this process soon will
      state.client.key_value_set(f'{FOLDER}/{state.process_id}', repr(seconds), allow_overwrite=True)


def slowest() -> dict[str, float]:
  """`slowest_host` and `slowest_ratio` of what the processes told last; nothing until all have."""
  state = distributed.global_state
  if state.client is None or state.num_processes == 1:
    return {}
  try:
    told = state.client.key_value_dir_get(FOLDER)
  except jax.errors.JaxRuntimeError:
    return {}
  seconds = {int(key.rpartition('/')[2]): float(value) for key, value in told}
  return compared(seconds) if len(seconds) == state.num_processes else {}


def compared(seconds: dict[int, float]) -> dict[str, float]:
  """The process with most seconds, and how many times the median that is (of an even number, the lower one).

  >>> compared({0: 0.25, 1: 0.5, 2: 0.125})
  {'slowest_host': 1, 'slowest_ratio': 2.0}
  """
  host = max(seconds, key=lambda host: seconds[host])
  median = statistics.median_low(seconds.values())
  return {'slowest_host': host, 'slowest_ratio': seconds[host] / median} if median else {}
