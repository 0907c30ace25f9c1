"""A thread that ends the process if it makes no progress, with the stacks of all threads: nothing waits for ever."""

import dataclasses
import faulthandler
import math
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable
from typing import Annotated

from pretrain.hosts import coordination
from pretrain.records.timeline import Timeline

EXIT_CODE = 70
TICK_SECONDS = 0.25
GRACE_SECONDS = 5.0  # processes that wait for another one give it this much longer to end by itself


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
  """The longest time in seconds that an activity may take without progress; 0 = no limit.

  `step` = None means 10 times the median step, at least 60 s. The first step compiles, and has the limit of `compile`.
  """

  init: Annotated[float, '>= 0'] = 1800.0
  restore: Annotated[float, '>= 0'] = 3600.0
  compile: Annotated[float, '>= 0'] = 3600.0
  data: Annotated[float, '>= 0'] = 1800.0
  step: Annotated[float, '>= 0'] | None = None
  save: Annotated[float, '>= 0'] = 1800.0
  eval: Annotated[float, '>= 0'] = 3600.0
  close: Annotated[float, '>= 0'] = 1800.0


def limit_of(cfg: WatchdogConfig, activity: str, median_step: float | None) -> float:
  """Seconds that `activity` may take; 0 = no limit.

  >>> cfg = WatchdogConfig()
  >>> limit_of(cfg, 'step', 0.5), limit_of(cfg, 'step', 30.0), limit_of(cfg, 'step', None), limit_of(cfg, 'data', 0.5)
  (60.0, 300.0, 3600.0, 1800.0)
  """
  if activity == 'step' and cfg.step is None:
    return cfg.compile if median_step is None else max(60.0, 10 * median_step)
  return getattr(cfg, activity, 0.0)  # 'done' has none


class Watchdog:
  """Inside the block, an activity of `timeline` that takes longer than its limit ends the process with code 70.

  It also writes the timeline while the main thread does not. Time in which the whole process stood still (a stopped or
  sleeping machine) does not count: only time that this thread has measured counts.
  """

  def __init__(
    self, timeline: Timeline, cfg: WatchdogConfig, workdir: pathlib.Path, upload: Callable[[pathlib.Path], str] = str
  ):
    """`upload` brings a file that was written in `workdir` to where the run is kept; returns its name there."""
    self._timeline, self._cfg, self._workdir, self._upload = timeline, cfg, workdir, upload
    self._stop = threading.Event()
    self._thread = threading.Thread(target=self._watch, name='watchdog', daemon=True)
    self._stuck, self._serial = 0.0, -1

  def __enter__(self):
    self._thread.start()
    return self

  def __exit__(self, kind, error, trace):
    self._stop.set()
    self._thread.join()

  def _watch(self) -> None:
    last = time.monotonic()
    while not self._stop.wait(TICK_SECONDS):
      now = time.monotonic()
      self.tick(min(now - last, 4 * TICK_SECONDS))
      last = now

  def tick(self, seconds: float) -> None:
    """`seconds` have passed."""
    timeline = self._timeline
    if timeline.due():
      timeline.flush()
    if timeline.serial != self._serial:
      self._stuck, self._serial = 0.0, timeline.serial
      return
    self._stuck += seconds
    if self._stuck >= coordination.SECONDS_BEFORE_TELLING:
      coordination.tell(timeline.activity, timeline.step, timeline.serial)
    limit = limit_of(self._cfg, timeline.activity, timeline.median_step())
    if limit and self._stuck > limit and self._stuck > self._longest_of_others():
      self._expire(limit)

  def _longest_of_others(self) -> float:
    """The longest limit of what other processes do: a process that waits in a step for them ends after them."""
    if self._timeline.activity != 'step':
      return 0.0
    activities = [activity for activity, _ in coordination.doing().values() if activity != 'step']
    limits = [limit_of(self._cfg, activity, None) or math.inf for activity in activities]
    return max(limits, default=0.0) + (GRACE_SECONDS if limits else 0.0)

  def _expire(self, limit: float) -> None:
    """Writes all stacks to RUN/hang_<step>_p<host>.txt, prints a line, and ends the process."""
    timeline = self._timeline
    path = self._workdir / f'hang_{timeline.step}_p{coordination.host()}.txt'
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('w') as file:
      faulthandler.dump_traceback(file, all_threads=True)
    place = self._upload(path)
    median = timeline.median_step()
    usual = f' (median step {median:.2g} s)' if median is not None else ''
    print(
      f'HANG: process {coordination.host()} in phase {timeline.activity} '
      f'for {self._stuck:.0f} s since step {timeline.step}, '
      f'watchdog.{timeline.activity} allows {limit:.0f} s{usual}{coordination.others()}; stacks in {place}. '
      'Saved steps are intact; the same command resumes.',
      file=sys.stderr,
      flush=True,
    )
    faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
    timeline.flush(**{timeline.activity: -self._stuck, 'hang': self._stuck})
    os._exit(EXIT_CODE)
