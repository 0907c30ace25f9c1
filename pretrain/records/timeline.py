"""What a process was doing, second by second: lines of RUN/timeline.jsonl, from which goodput is counted.

A line is complete in itself and is appended in one write, so that kill -9 loses at most what came after the last one:
{"t": when it was written, "began": start of the process, "phase": its activity now, "step": steps completed,
"examples": used by them, "resumed": the step it began from, "seconds": {activity: seconds since the line before}}.
`t` and `began` are seconds since 1970. Lines of the supervisor have an event: {"t": …, "started": …, "event": "exit",
"failed": …, "code": …, "host": …, "hosts": …}.
"""

import collections
import contextlib
import json
import os
import pathlib
import statistics
import threading
import time
from collections.abc import Iterator
from typing import Any, Literal

from pretrain.workdirs.folder import Folder, as_folder

FILE = 'timeline.jsonl'
Activity = Literal['init', 'compile', 'restore', 'data', 'step', 'save', 'eval', 'close', 'done']
SECONDS_BETWEEN_LINES = 1.0
SHARE_BETWEEN_LINES = 1e-3  # of the age of the process: a month makes 20,000 lines
STEPS_OF_MEDIAN = 101


class Timeline:
  """The present activity of this process, and its record on disk once `open` was called. Threads may share it.

  `began`: when, in seconds since 1970, a process began anew that has survived others; None: when it was started.
  """

  def __init__(self, began: float | None = None):
    self.began = process_start() if began is None else began
    self._origin = time.time() - time.monotonic()
    self._mark = self._written = self._entered = self.began - self._origin
    self._lock, self._path = threading.Lock(), None
    self._seconds: dict[str, float] = collections.defaultdict(float)
    self._steps: collections.deque[float] = collections.deque(maxlen=STEPS_OF_MEDIAN)
    self.activity: Activity = 'init'
    self.step, self.resumed, self.examples, self.serial = 0, None, 0, 0

  def open(self, workdir: pathlib.Path, resumed: int, examples: int = 0) -> None:
    """From here on lines are written to `workdir`; the state of step `resumed` is there."""
    self._path, self.step, self.resumed, self.examples = workdir / FILE, resumed, resumed, examples
    end_line(self._path)
    self.flush()

  def enter(self, activity: Activity) -> None:
    """The process does `activity` now, and makes progress: to enter the same activity again restarts its time."""
    with self._lock:
      self._account()
      if self.activity == 'step':
        self._steps.append(self._mark - self._entered)
      self.activity, self.serial, self._entered = activity, self.serial + 1, self._mark

  @contextlib.contextmanager
  def during(self, activity: Activity) -> Iterator[None]:
    """Inside the block the process does `activity`; its record is on disk before and after it."""
    before = self.activity
    self.enter(activity)
    self.flush()
    try:
      yield
    finally:
      self.enter(before)
      self.flush()

  def moved(self, activity: Activity, seconds: float) -> None:
    """`seconds` of the present activity were spent on `activity`, which was too short to be entered."""
    with self._lock:
      self._account()
      self._seconds[self.activity] -= seconds
      self._seconds[activity] += seconds

  def completed(self, step: int, examples: int = 0) -> None:
    """`step` is done, and `examples` are used. The first step of a process is written at once."""
    first = self.step == self.resumed
    self.step, self.examples = step, examples
    if first or self.due():
      self.flush()

  def median_step(self) -> float | None:
    """Median seconds of the last steps; None before there are five."""
    with self._lock:
      return statistics.median(self._steps) if len(self._steps) >= 5 else None

  def due(self) -> bool:
    now = time.monotonic()
    age = now + self._origin - self.began
    return now - self._written >= max(SECONDS_BETWEEN_LINES, SHARE_BETWEEN_LINES * age)

  def flush(self, **moved: float) -> None:
    """Writes what has passed since the last line; `moved` is added to the seconds of activities."""
    with self._lock:
      self._account()
      if self._path is not None:
        for activity, seconds in moved.items():
          self._seconds[activity] += seconds
        append(self._path, self._line())
        self._seconds.clear()
        self._written = self._mark

  def _account(self) -> None:
    now = time.monotonic()
    self._seconds[self.activity] += now - self._mark
    self._mark = now

  def _line(self) -> dict[str, Any]:
    seconds = {activity: round(s, 6) for activity, s in self._seconds.items() if s}
    now = round(self._mark + self._origin, 6)
    state = {'phase': self.activity, 'step': self.step, 'examples': self.examples, 'resumed': self.resumed}
    return {'t': now, 'began': round(self.began, 6), **state, 'seconds': seconds}


def process_start() -> float:
  """When this process was started, in seconds since 1970; on systems other than Linux, now."""
  try:
    ticks = int(pathlib.Path('/proc/self/stat').read_text().rpartition(')')[2].split()[19])
    return time.time() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf('SC_CLK_TCK'))
  except (OSError, AttributeError):
    return time.time()


def append(path: pathlib.Path, line: dict[str, Any]) -> None:
  """Appends one line in one write; other processes may append to the same file."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open('ab', buffering=0) as file:
    file.write(json.dumps(line).encode() + b'\n')


def end_line(path: pathlib.Path) -> None:
  """Ends a last line that a dying machine cut off, so that the next one is whole."""
  if path.exists() and (data := path.read_bytes()) and not data.endswith(b'\n'):
    with path.open('ab') as file:
      file.write(b'\n')


def read_timeline(workdir: str | os.PathLike[str] | Folder) -> list[dict[str, Any]]:
  """The lines of a run in their order; a line that was cut off is left out. No file: no lines."""
  path = as_folder(workdir) / FILE
  return list(parse(path.read_bytes())) if path.exists() else []


def parse(data: bytes) -> Iterator[dict[str, Any]]:
  for line in data.splitlines():
    try:
      found = json.loads(line)
    except ValueError:
      continue
    if isinstance(found, dict) and 't' in found:
      yield found
