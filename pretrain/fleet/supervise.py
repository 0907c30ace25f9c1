"""`pretrain run -- train …`: restarts processes that fail, until the run is done or needs a person."""

import collections
import dataclasses
import datetime
import math
import pathlib
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from pretrain.fleet.launch import (
  COORDINATOR,
  CORRUPTED,
  PREEMPTED,
  REWOUND,
  SERVED,
  USER_CODES,
  ForwardedSignals,
  Group,
  Outcome,
)
from pretrain.fleet.surviving import MEMBERS, Coordinator, announce
from pretrain.hosts.lease import kept
from pretrain.hosts.ownership import owned
from pretrain.hosts.skipping import add_skip, leave_out, read_skips
from pretrain.records.goodput import CLOCK_TICK, processes, spent_in, write_goodput
from pretrain.records.metrics import read_metrics
from pretrain.records.timeline import FILE, append, end_line, parse, read_timeline
from pretrain.workdirs.folder import Folder
from pretrain.workdirs.run_files import run_files

INCIDENTS, SURVIVAL = 'incidents.jsonl', 'survival'
SAME_STEP = 3  # failures without a new step, after which the run ends
AWAY = 2  # failures of one host before its first step, after which the run continues without it
FIRST_DELAY, LONGEST_DELAY = 0.25, 60.0  # seconds; doubled at each failure without a new step
LOG_LINES = 400
CAUSES = {
  64: 'config', 65: 'data', 66: 'checkpoint', 70: 'hang', 71: 'non-finite', 72: 'spike', 74: 'corruption', 1: 'crash',
  137: 'killed',
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
  """`min_hosts`: the smallest number of processes to continue with if one does not come back; None = all are needed.
  `skip_poisoned`: if the same step fails repeatedly, its examples are left out. `survive`: seconds within which the
  surviving processes must have a state again after another one died; None = all processes are restarted."""

  max_restarts: int = 100
  min_hosts: int | None = None
  skip_poisoned: bool = False
  survive: float | None = None


class Supervisor:
  """Runs `command` in `hosts` processes and restarts it. `fits(n)`: whether n processes can share the batch."""

  def __init__(
    self, hosts: int, command: Sequence[str], workdir: Folder, policy: Policy,
    fits: Callable[[int], bool] = lambda n: True, stream: TextIO | None = None, batch_size: int = 0,
  ):  # fmt: skip
    self._hosts, self._command, self._policy, self._fits = hosts, command, policy, fits
    self._files = run_files(workdir)
    self._workdir = self._files.folder
    self._log, self._batch_size = Log(stream or sys.stdout), batch_size
    self._incident: dict[str, Any] | None = None  # an incident from which the run has not recovered yet
    self._group: Group | None = None
    self._told: Group | None = None  # the group that was told to end
    self._coordinators: list[Coordinator] = []  # used with `survive`; processes are connected to the last one
    self._lived_on, self._until = False, math.inf  # the time by which survivors must have a state again
    self._asked = threading.Event()  # this process was told to end
    self._restarts, self._furthest = 0, 0

  def run(self) -> int:
    """The exit code of the run: 0, 75 if it was told to stop, otherwise the code of the process that failed.

    Owns the workdir until the end. Raises ConfigError where another run owns it.
    """
    with self._files.named(), owned(self._files.place) as self._lock, kept(self._files, self._lock):
      self._tail = Tail(self._workdir / FILE)
      return self._run()

  def _run(self) -> int:
    history: list[Failure] = []
    with ForwardedSignals(self._stop):
      while True:
        outcome = self._attempt()
        if outcome.code in (0, PREEMPTED) or self._asked.is_set():
          return self._end(outcome)
        history = self._follow(history, outcome)
        action = self._decide(outcome, history)
        self._report(outcome, action, history)
        self._lived_on = action.startswith(SURVIVAL)
        if not self._lived_on:
          self._group.end()
        if action in ('stop', 'give up'):
          return self._end(outcome)
        self._restarts += 1
        if self._asked.wait(0.0 if self._lived_on else delay(len(history))):
          self._group.end()
          return self._end(dataclasses.replace(outcome, code=PREEMPTED))

  def _attempt(self) -> Outcome:
    started = time.time()
    self._tail.forget(started - CLOCK_TICK)
    self._log.forget()
    self._group = self._start()
    if self._asked.is_set() and (self._lived_on or self._told is not self._group):  # while they were started
      self._group.signal(signal.SIGTERM)
    outcome = self._group.wait(self._watch, self._may_be_survived)
    failed = outcome.code not in (0, PREEMPTED) and not self._asked.is_set()
    if self._is_ours(outcome):
      line = {
        't': round(outcome.time, 6),
        'started': round(started, 6),
        'event': 'exit',
        'failed': failed,
        'code': outcome.code,
      }
      append(self._workdir / FILE, line | {'host': outcome.host, 'hosts': self._hosts})
    return outcome

  def _start(self) -> Group:
    """The processes of the run: new ones, or the survivors with replacements."""
    if self._policy.survive is None:
      return Group(self._hosts, self._command, self._log, lock=self._lock)
    if not self._lived_on:
      self._close()
    self._coordinators.append(Coordinator(self._hosts))
    address, path = self._coordinators[-1].address, (self._workdir / MEMBERS).resolve()
    env = {COORDINATOR: address, SERVED: str(path)}
    if not self._lived_on:
      self._until = math.inf
      return Group(self._hosts, self._command, self._log, env, self._lock)
    self._until = time.monotonic() + self._policy.survive
    announce(path, self._coordinators[-2].address, address, self._hosts, self._group.regroup(self._hosts, env))
    return self._group

  def _close(self, but: int = 0) -> None:
    """Ends all coordinators except the last `but`; no process is connected to them."""
    while len(self._coordinators) > but:
      self._coordinators.pop(0).close()

  def _may_be_survived(self, outcome: Outcome) -> bool:
    """Whether the others may survive: the error is not one that all processes share, and the run had a state."""
    agreed = (*USER_CODES, REWOUND, CORRUPTED)
    had_state = self._policy.survive is not None and self._tail.reached is not None
    return had_state and outcome.code not in agreed and not self._asked.is_set()

  def _follow(self, history: Sequence['Failure'], outcome: Outcome) -> list['Failure']:
    """The failures in a row without a new step; empty after a rewind, after which all steps count as new."""
    if outcome.code == REWOUND:
      self._furthest = 0
      return []
    reached, tail = self._tail.reached or 0, self._tail
    earlier = [] if reached > self._furthest else history
    self._furthest = max(reached, self._furthest)
    return [*earlier, Failure(outcome.host, tail.reached is not None and tail.reached > tail.resumed)]

  def _decide(self, outcome: Outcome, history: list['Failure']) -> str:
    """The action after a failure; removes a host that does not come back."""
    if outcome.code in USER_CODES or self._restarts >= self._policy.max_restarts:
      return 'stop'
    if outcome.code == REWOUND:
      return 'rewind'
    first = [failure.host for failure in history[-AWAY:] if not failure.stepped]
    if len(first) == AWAY and len(set(first)) == 1 and (fewer := self._fewer()):
      self._hosts = fewer
      history.clear()
      return f'restart with {fewer} hosts'
    if len(history) < SAME_STEP:
      return self._survival() if self._group.living() else 'restart'
    return self._skip(history) if self._policy.skip_poisoned and self._tail.reached is not None else 'give up'

  def _survival(self) -> str:
    """The action of survivors: continue alone if the policy and the batch allow it, otherwise with new processes."""
    living = len(self._group.living())
    if (self._policy.min_hosts or self._hosts) > living or not self._fits(living):
      return SURVIVAL
    self._hosts = living
    return f'{SURVIVAL} with {living} hosts'

  def _skip(self, history: list['Failure']) -> str:
    """Leaves out the examples of the next two steps: while one step runs, the batch of the next is being loaded."""
    first = self._failed_at()
    end = first + 2 * self._batch_size
    add_skip(self._workdir, first, end)
    history.clear()
    return f'restart without examples {first}..{end - 1}'

  def _failed_at(self) -> int:
    """The first example of the step that was not completed, after any examples that are left out there.

    A killed process may not have written its last steps to the timeline; their metrics rows are written.
    """
    rows, skips = read_metrics(self._workdir), read_skips(self._workdir)
    more = max(rows[-1]['step'] - self._tail.reached, 0) if rows else 0
    first = leave_out(skips, {'examples': self._tail.examples})['examples']
    for _ in range(more):
      first = leave_out(skips, {'examples': first + self._batch_size})['examples']
    return first

  def _fewer(self) -> int | None:
    """The largest smaller number of processes that the policy and the batch allow."""
    least = self._policy.min_hosts or self._hosts
    return next((n for n in range(self._hosts - 1, least - 1, -1) if self._fits(n)), None)

  def _report(self, outcome: Outcome, action: str, history: Sequence['Failure']) -> None:
    """Prints what happened. The incident is written when the run has recovered, or at once if it will not."""
    cause, reached, ours = self._log.cause or cause_of(outcome.code), self._tail.reached, self._is_ours(outcome)
    cause = 'not survived in time' if time.monotonic() > self._until and reached is None else cause
    log = self._log.keep(self._workdir / 'logs', outcome.time) if ours else None
    where = 'before its first step' if reached is None else f'at step {reached}'
    then = self._sentence(outcome, action, len(history), log)
    print(f'RUN: process {outcome.host} ended ({cause}, code {outcome.code}) {where}; {then}.', file=sys.stderr)
    self._finish_incident(None)
    if ours:
      self._incident = {
        'time': timestamp(outcome.time), 'host': outcome.host, 'hosts': self._hosts, 'cause': cause,
        'exit_code': outcome.code, 'signal': signal_name(outcome.code), 'step_reached': reached, 'action': action,
        'reason': self._log.reason(outcome.host), 'log': str(log), 't': outcome.time,
      }  # fmt: skip
    if action in ('stop', 'give up'):
      self._finish_incident(None)

  def _sentence(self, outcome: Outcome, action: str, failures: int, log: pathlib.Path | None) -> str:
    """The action, in words."""
    if action == 'give up':
      return f'gave up after {failures} failures without a new step. Saved steps are intact; see {log}'
    if action == 'stop':
      return 'not restarted: it would fail the same way' if outcome.code in USER_CODES else 'no restarts left'
    return f'{action} {self._restarts + 1} of {self._policy.max_restarts}'

  def _is_ours(self, outcome: Outcome) -> bool:
    """Whether files may be written: a workdir that was refused belongs to another run."""
    return self._tail.reached is not None or outcome.code not in (*USER_CODES, PREEMPTED, 0)

  def _watch(self) -> None:
    self._tail.read()
    if self._tail.reached is not None:
      self._close(but=1)
    elif time.monotonic() > self._until:
      self._group.signal(signal.SIGKILL)
    if self._tail.first_step is not None:
      self._finish_incident(self._tail.first_step)

  def _finish_incident(self, recovered: float | None) -> None:
    """Writes the open incident; `recovered` is the time of the first step after it, None if there was none."""
    if self._incident is None:
      return
    incident, self._incident = self._incident, None
    failed = incident.pop('t')
    resumed = self._tail.resumed if recovered else None
    down = lost = None
    if recovered is not None:
      down = round(recovered - failed, 3)
      lost = round(down + redone_before(failed, read_timeline(self._workdir)), 3)
    after = {'step_resumed': resumed, 'seconds_down': down, 'seconds_lost': lost}
    append(self._workdir / INCIDENTS, incident | after)

  def _end(self, outcome: Outcome) -> int:
    self._finish_incident(None)  # an incident that no step followed
    if self._is_ours(outcome):
      write_goodput(self._workdir)
    self._close()
    told = self._asked.is_set() and outcome.code == 128 + signal.SIGTERM
    return PREEMPTED if told else outcome.code

  def _stop(self, number: int) -> None:
    """The first signal (SIGTERM or Ctrl-C) asks all processes to save and exit; the second one kills them."""
    if self._group is not None:
      self._group.signal(signal.SIGKILL if self._asked.is_set() else signal.SIGTERM)
      self._told = self._group
    self._asked.set()


@dataclasses.dataclass(frozen=True)
class Failure:
  """The process that ended first, and whether any step was completed since the start."""

  host: int
  stepped: bool


def delay(failures: int) -> float:
  """Seconds before the next start.

  >>> [delay(n) for n in (0, 1, 2, 3, 20)]
  [0.25, 0.25, 0.5, 1.0, 60.0]
  """
  return min(FIRST_DELAY * 2.0 ** max(failures - 1, 0), LONGEST_DELAY)


def redone_before(failed: float, lines: Sequence[dict[str, Any]]) -> float:
  """Seconds of the steps before the failure at that time that must be computed again."""
  found = [process for process in processes(lines) if abs(process.end - failed) < 1e-3]
  return sum(spent for process in found for kind, spent in spent_in(process) if kind == 'lost')


def cause_of(code: int) -> str:
  """The cause of an exit code, for an incident."""
  return CAUSES.get(code) or (signal_name(code) or f'exit code {code}')


def signal_name(code: int) -> str | None:
  """The signal that ended a process.

  >>> signal_name(137), signal_name(70)
  ('SIGKILL', None)
  """
  try:
    return signal.Signals(code - 128).name if code > 128 else None
  except ValueError:
    return None


def timestamp(seconds: float) -> str:
  return datetime.datetime.fromtimestamp(seconds, datetime.UTC).isoformat(timespec='milliseconds')


class Tail:
  """Follows the timeline for lines of the current processes."""

  def __init__(self, path: pathlib.Path):
    self._path, self._offset = path, 0
    if path.exists():
      end_line(path)
      self._offset = path.stat().st_size
    self.forget(-math.inf)

  def forget(self, since: float) -> None:
    """Ignores lines of processes that began before `since`: their steps are not those of the current processes."""
    self.read_away()
    self._since = since
    self.reached: int | None = None
    self.resumed: int | None = None
    self.first_step: float | None = None
    self.examples = 0

  def read_away(self) -> None:
    if self._path.exists():
      self._offset = self._path.stat().st_size

  def read(self) -> None:
    if not self._path.exists() or self._path.stat().st_size == self._offset:
      return
    with self._path.open('rb') as file:
      file.seek(self._offset)
      data = file.read()
    whole = data[: data.rfind(b'\n') + 1]
    self._offset += len(whole)
    for line in parse(whole):
      if line.get('began', -math.inf) >= self._since:
        self.reached, self.resumed, self.examples = line['step'], line['resumed'], line['examples']
        if self.first_step is None and self.reached > self.resumed:
          self.first_step = line['t']


class Log:
  """Passes lines on, and keeps the last lines of the current processes."""

  def __init__(self, stream: TextIO):
    self._stream = stream
    self.forget()

  def forget(self) -> None:
    self._lines: collections.deque[str] = collections.deque(maxlen=LOG_LINES)

  def write(self, text: str) -> None:
    self._lines.append(text)
    self._stream.write(text)

  def flush(self) -> None:
    self._stream.flush()

  @property
  def cause(self) -> str | None:
    """'out of memory' if the last lines contain it, which no exit code shows."""
    memory = any('RESOURCE_EXHAUSTED' in line or 'MemoryError' in line for line in list(self._lines))
    return 'out of memory' if memory else None

  def reason(self, host: int) -> str | None:
    """The last message with a code that a process printed."""
    said = (re.match(rf'\[{host}\] ([A-Z][A-Z-]+: .+)', line) for line in reversed(list(self._lines)))
    return next((match[1] for match in said if match), None)

  def keep(self, folder: pathlib.Path, time_: float) -> pathlib.Path:
    """Writes the last lines to a file of `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f'{datetime.datetime.fromtimestamp(time_, datetime.UTC):%Y%m%dT%H%M%S}.log'
    path.write_text(''.join(self._lines))
    return path
