"""What libtpu says about the TPU chips of this host: how busy they are, and whether they are throttled.

`libtpu.sdk.tpumonitoring`, of the wheel itself: `list_supported_metrics()` lists names, `get_metric(name).data()` is a
list of text, one for each chip. Sources: its own `help()` and `description()` (libtpu 0.0.42.1), and
docs.cloud.google.com/tpu/docs/tpu-monitoring-library. Nothing here has run on a TPU yet.
"""

import functools
import importlib
import threading
from collections.abc import Sequence
from typing import Any

MODULE = 'libtpu.sdk.tpumonitoring'
DUTY, THROTTLING = 'duty_cycle_pct', 'tpu_throttle_score'


class Monitor:
  """Readings of the chips of this host. They are made in a thread: a service that does not answer delays no step."""

  def __init__(self, source: Any):
    """`source` has the functions of `libtpu.sdk.tpumonitoring`."""
    self._source, self._found, self._thread = source, dict[str, float](), threading.Thread()

  def latest(self) -> dict[str, float]:
    """What the last reading found, once; then the next reading begins.

    `duty_cycle_pct`: of the time, in percent, of the least busy chip. `tpu_throttle_score`: of the chip that is
    throttled most, from 0 (none) to 10 (by 100%). Absent where libtpu does not say it, or has not answered yet.
    """
    if self._thread.is_alive():
      return {}
    found, self._found = self._found, {}
    self._thread = threading.Thread(target=self._read, name='monitoring', daemon=True)
    self._thread.start()
    return found

  def _read(self) -> None:
    try:
      names = set(self._source.list_supported_metrics())
      chips = {name: self._source.get_metric(name).data() for name in (DUTY, THROTTLING) if name in names}
      self._found = numbers_of(chips.get(DUTY, ()), chips.get(THROTTLING, ()))
    except (RuntimeError, ValueError):  # of a service that is not there, or of text of another kind: nothing is said
      return


def numbers_of(duty: Sequence[str], throttling: Sequence[str]) -> dict[str, float]:
  """
  >>> numbers_of(['97.25', '20.00'], ['0-0', '1-3'])
  {'duty_cycle_pct': 20.0, 'tpu_throttle_score': 3.0}
  """
  busy, scores = map(float, duty), (float(score.rpartition('-')[2]) for score in throttling)
  found = {DUTY: min(busy, default=None), THROTTLING: max(scores, default=None)}
  return {name: value for name, value in found.items() if value is not None}


def readings(devices: Sequence[Any]) -> dict[str, float]:
  """`Monitor.latest` of these devices of this process; nothing unless they are TPUs and this libtpu can say it."""
  if not devices or devices[0].platform != 'tpu':
    return {}
  monitor = _monitor()
  return monitor.latest() if monitor else {}


@functools.cache
def _monitor() -> Monitor | None:
  try:
    return Monitor(importlib.import_module(MODULE))
  except ImportError:  # libtpu before 0.0.17, or that of another maker
    return None
