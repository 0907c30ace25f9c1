"""What a person sees during a run: one live line in a terminal, else plain lines now and then."""

import datetime
import sys
import time
from collections.abc import Mapping
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from pretrain.records.names import one_line

SECONDS_BETWEEN_PLAIN_LINES = 10.0


class Display(Protocol):
  def show(self, step: int, values: Mapping[str, float]) -> None: ...

  def print(self, text: str) -> None: ...

  def warn(self, text: str) -> None: ...

  def close(self) -> None: ...


def make_display(total_steps: int, stream: TextIO | None = None) -> Display:
  """A live line on `stream` (default: stderr, so that stdout stays free) if it is a terminal, else plain lines."""
  stream = stream or sys.stderr
  kind = LiveLine if stream.isatty() else PlainLines
  return kind(Clock(total_steps), stream)


class Clock:
  """Turns steps into rates, counted from the first step shown: the time before it was spent compiling.

  Steps may be shown later than they were finished, several at once. So the time between two of them is at least
  `step_seconds`, which counts whole steps.
  """

  def __init__(self, total_steps: int):
    self.total = total_steps
    self._first: tuple[int, float] | None = None
    self._last, self._busy = 0, 0.0  # the last step shown; seconds of the steps shown after the first one

  def describe(self, step: int, values: Mapping[str, float]) -> str:
    """For example `loss 4.3210  12.3k tokens/s  2.50 steps/s  ETA 0:03:21`; each part only where it is known."""
    parts = [f'loss {values["loss"]:.4f}'] if 'loss' in values else []
    if 'tokens_per_second' in values:
      parts.append(f'{values["tokens_per_second"] / 1e3:.1f}k tokens/s')
    if rate := self._rate(step, values.get('step_seconds', 0.0)):
      remaining = datetime.timedelta(seconds=round((self.total - step) / rate))
      parts.append(f'{rate:.2f} steps/s  ETA {remaining}')
    return '  '.join(parts)

  def _rate(self, step: int, step_seconds: float) -> float:
    """Steps per second since the first step shown; 0 for that one."""
    now = time.monotonic()
    if self._first is None:
      self._first = step, now
    else:
      self._busy += (step - self._last) * step_seconds
    self._last = step
    first, start = self._first
    return (step - first) / max(now - start, self._busy, 1e-9)


class LiveLine:
  """One rich progress line; other output scrolls above it."""

  def __init__(self, clock: Clock, stream: TextIO):
    text = lambda form: TextColumn(form, markup=False)
    columns = text('step {task.completed}/{task.total}'), BarColumn(24), text('{task.description}')
    self._clock = clock
    self._progress = Progress(*columns, console=Console(file=stream), refresh_per_second=4)
    self._task = self._progress.add_task('starting', total=clock.total)
    self._progress.start()

  def show(self, step: int, values: Mapping[str, float]) -> None:
    self._progress.update(self._task, completed=step, description=self._clock.describe(step, values))

  def print(self, text: str) -> None:
    self._print(text)

  def warn(self, text: str) -> None:
    self._print(text, 'bold yellow')

  def close(self) -> None:
    self._progress.stop()

  def _print(self, text: str, style: str | None = None) -> None:
    """As it stands: names in it are no markup, `:fire:` is no emoji."""
    self._progress.console.print(one_line(text), style=style, markup=False, emoji=False, highlight=False)


class PlainLines:
  """The first and the last step, and in between at most one line in ten seconds."""

  def __init__(self, clock: Clock, stream: TextIO):
    self._clock, self._stream, self._next = clock, stream, 0.0

  def show(self, step: int, values: Mapping[str, float]) -> None:
    now = time.monotonic()
    if now >= self._next or step == self._clock.total:
      self._next = now + SECONDS_BETWEEN_PLAIN_LINES
      self.print(f'step {step}/{self._clock.total}  {self._clock.describe(step, values)}')

  def print(self, text: str) -> None:
    print(one_line(text), file=self._stream, flush=True)

  warn = print

  def close(self) -> None:
    pass


class Counter:
  """How many of `total` things (0: unknown) are done, on one line of stderr in a terminal, else a line now and then."""

  def __init__(self, total: int, what: str, stream: TextIO | None = None):
    self._total, self._what, self._stream = total, what, stream or sys.stderr
    self._start = self._shown = time.monotonic()

  def show(self, done: int) -> None:
    now, live = time.monotonic(), self._stream.isatty()
    if live or done == self._total or now - self._shown >= SECONDS_BETWEEN_PLAIN_LINES:
      self._shown = now
      line = self._line(done, done / max(now - self._start, 1e-9))
      print(f'\r{line}\x1b[K' if live else line, end='' if live else '\n', file=self._stream, flush=True)

  def _line(self, done: int, rate: float) -> str:
    if not self._total:
      return f'{self._what}: {done}  {rate:.2f}/s'
    remaining = datetime.timedelta(seconds=round((self._total - done) / max(rate, 1e-9)))
    return f'{done}/{self._total} {self._what}  {rate:.2f}/s  ETA {remaining}'

  def close(self) -> None:
    if self._stream.isatty():
      print(file=self._stream)
