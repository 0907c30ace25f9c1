"""What each process tells the coordinator with a row, and what follows for all. No process waits for another one here.

In a step all processes wait for the slowest in a collective, so the times of whole steps are equal. What a process does
by itself (reads data, runs Python) differs, and so does the memory of its devices.
"""

import contextlib
import json
import statistics
from collections.abc import Mapping

import jax
from jax._src import distributed  # no public name has the client

FOLDER = 'pretrain/pace'
OWN = 'own_seconds'
LOWEST = frozenset({'duty_cycle_pct'})  # of all processes, the lowest is shown; of other numbers the highest


def tell(seconds: float, devices: Mapping[str, float]) -> None:
  """Tells the others how long this process's own work took per step, and what its devices say; replaces the last."""
  state = distributed.global_state
  if state.client is not None and state.num_processes > 1:
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the coordinator has ended, and this process soon will
      text = json.dumps({OWN: seconds, **devices})
      state.client.key_value_set(f'{FOLDER}/{state.process_id}', text, allow_overwrite=True)


def told() -> dict[int, dict[str, float]]:
  """process -> what it told last; nothing where there is one process."""
  state = distributed.global_state
  if state.client is None or state.num_processes == 1:
    return {}
  try:
    found = state.client.key_value_dir_get(FOLDER)
  except jax.errors.JaxRuntimeError:
    return {}
  return {int(key.rpartition('/')[2]): json.loads(value) for key, value in found}


def of_all(devices: Mapping[str, float]) -> dict[str, float]:
  """The numbers of the devices of all processes, and the slowest process once each has told its time.

  `devices` are the numbers of this process, which are newer than what it told.
  """
  found = told()
  slowest = {}
  if found and len(found) == distributed.global_state.num_processes:
    slowest = compared({process: numbers.pop(OWN) for process, numbers in found.items()})
  return extremes([dict(devices), *found.values()]) | slowest


def extremes(numbers: list[dict[str, float]]) -> dict[str, float]:
  """
  >>> extremes([{'hbm_mib': 3.0}, {'hbm_mib': 5.0, 'duty_cycle_pct': 9.0, 'own_seconds': 1.0}, {'duty_cycle_pct': 8.0}])
  {'hbm_mib': 5.0, 'duty_cycle_pct': 8.0}
  """
  names = dict.fromkeys(name for own in numbers for name in own if name != OWN)
  found = {name: [own[name] for own in numbers if name in own] for name in names}
  return {name: (min if name in LOWEST else max)(values) for name, values in found.items()}


def compared(seconds: dict[int, float]) -> dict[str, float]:
  """The process with most seconds, and how many times the median that is (of an even number, the lower one).

  >>> compared({0: 0.25, 1: 0.5, 2: 0.125})
  {'slowest_host': 1, 'slowest_ratio': 2.0}
  """
  host = max(seconds, key=lambda host: seconds[host])
  median = statistics.median_low(seconds.values())
  return {'slowest_host': host, 'slowest_ratio': seconds[host] / median} if median else {}
