"""Where the time of a run went, over all its restarts: RUN/goodput.json, counted from RUN/timeline.jsonl.

All seconds add up to the wall time from the start of the first process to the last line. Source of the word: the
share of time that makes new steps (Gemini, arXiv:2312.11805, §3).
"""

import dataclasses
import itertools
import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pretrain.records.timeline import read_timeline

FILE = 'goodput.json'
# What a second can be, in the order of the bar. `lost` are steps that a restart repeated.
KINDS = {
  'productive': 'steps that count',
  'lost': 'steps repeated',
  'data': 'waiting for data',
  'save': 'saving',
  'eval': 'evaluation',
  'init': 'starting',
  'compile': 'compiling',
  'restore': 'restoring',
  'hang': 'hanging',
  'down': 'between processes',
  'close': 'report and exit',
}
CLOCK_TICK = 0.05  # seconds; the resolution of the start time that the kernel reports
REDONE = ('step', 'data', 'eval')  # phases that a restart repeats


@dataclasses.dataclass
class Process:
  """One start of the program: its lines, when it ended, and whether it ended by itself."""

  lines: list[Mapping[str, Any]]
  end: float
  failed: bool
  boundary: float = math.inf  # steps after it were repeated

  @property
  def began(self) -> float:
    return self.lines[0]['began']

  @property
  def resumed(self) -> int:
    return self.lines[0]['resumed']


def goodput(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Seconds of each of KINDS, failures, mean time to recover and between failures; {} where there is no process."""
  found = processes(lines)
  if not found:
    return {}
  seconds = dict.fromkeys(KINDS, 0.0)
  for process in found:
    for kind, spent in spent_in(process):
      seconds[kind] += spent
  for before, after in itertools.pairwise(found):
    seconds['down'] += max(after.began - before.end, 0.0)
  failures = failures_in(lines, found)
  wall = sum(seconds.values())
  recoveries = [r - f for f in failures if (r := recovered(f, found)) is not None]
  return {
    'wall_seconds': round(wall, 3),
    'goodput': round(seconds['productive'] / wall, 4),
    'seconds': {kind: round(spent, 3) for kind, spent in seconds.items()},
    'processes': len(found),
    'failures': len(failures),
    'mttr_seconds': round(sum(recoveries) / len(recoveries), 3) if recoveries else None,
    'mtbf_seconds': round((wall - seconds['down']) / len(failures), 3) if failures else None,
  }


def processes(lines: Iterable[Mapping[str, Any]]) -> list[Process]:
  """The starts of the program that reached a state, in order."""
  groups: dict[float, list[Mapping[str, Any]]] = {}
  exits: dict[float, Mapping[str, Any]] = {}
  for line in lines:
    if 'began' in line:
      groups.setdefault(line['began'], []).append(line)
    elif own := [began for began in groups if began >= line['started'] - CLOCK_TICK and began not in exits]:
      exits[own[-1]] = line
  found = [process_of(own, exits.get(began)) for began, own in groups.items()]
  if found and found[-1].began not in exits:
    found[-1].failed = False  # it may still run
  for i, process in enumerate(found):
    process.boundary = min((later.resumed for later in found[i + 1 :]), default=math.inf)
  return found


def process_of(lines: list[Mapping[str, Any]], exit_: Mapping[str, Any] | None) -> Process:
  """The process that wrote these lines; `exit_` is the line of the supervisor about its end, if there is one."""
  if exit_ is not None:
    return Process(lines, exit_['t'], exit_['failed'])
  return Process(lines, lines[-1]['t'], lines[-1]['phase'] != 'done')


def spent_in(process: Process) -> Iterable[tuple[str, float]]:
  """(kind, seconds) of a process until its end."""
  before, step = process.began, process.resumed
  for line in process.lines:
    length, left = line['t'] - before, min(line['t'], process.end) - before
    for activity, seconds in line['seconds'].items():
      seconds *= max(left, 0.0) / length if length > 0 else 1.0
      yield from split(activity, seconds, step, line['step'], process.boundary)
    before, step = line['t'], line['step']
  if (tail := process.end - before) > 0:  # no line covers it
    yield from split(process.lines[-1]['phase'], tail, step, step, process.boundary)


def split(activity: str, seconds: float, first: int, last: int, boundary: float) -> Iterable[tuple[str, float]]:
  """(kind, seconds) of an activity from step `first` to `last`; time for steps after `boundary` is lost.

  >>> list(split('step', 10.0, 20, 30, 28)), list(split('save', 1.0, 20, 20, 28))
  ([('lost', 2.0), ('productive', 8.0)], [('save', 1.0)])
  """
  if activity not in REDONE:
    yield {'done': 'close'}.get(activity, activity), seconds
    return
  steps = max(last - first, 1)
  lost = seconds * min(max(max(last, first + 1) - boundary, 0), steps) / steps if boundary < math.inf else 0.0
  if activity == 'eval':
    lost = seconds if last > boundary else 0.0
  if lost:
    yield 'lost', lost
  yield 'productive' if activity == 'step' else activity, seconds - lost


def failures_in(lines: Iterable[Mapping[str, Any]], found: Sequence[Process]) -> list[float]:
  """When something failed: exits that the supervisor saw, and processes without a supervisor that stopped early."""
  seen = [line['t'] for line in lines if line.get('event') == 'exit' and line['failed']]
  return sorted({*seen, *(process.end for process in found if process.failed)})


def recovered(failure: float, found: Sequence[Process]) -> float | None:
  """When the first step after a failure was done."""
  times = (
    line['t'] for p in found if p.began >= failure - CLOCK_TICK for line in p.lines if line['step'] > p.resumed
  )  # fmt: skip
  return next(times, None)


def write_goodput(workdir: str | os.PathLike[str]) -> dict[str, Any]:
  """Writes RUN/goodput.json and returns what is in it; {} and no file where there is no timeline."""
  found = goodput(read_timeline(workdir))
  if found:
    path = pathlib.Path(workdir) / FILE
    temporary = path.with_suffix('.tmp')
    temporary.write_text(json.dumps(found, indent=2) + '\n')
    temporary.replace(path)
  return found
