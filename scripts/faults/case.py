"""One run that is broken while it trains, and the result: the building block of all faults of scripts/faults.py."""

import argparse
import collections
import contextlib
import dataclasses
import fcntl
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from faults.child import INJECT
from pretrain.checkpoints import manifest
from pretrain.fleet import supervise
from pretrain.fleet.launch import DIE_WITH_PARENT
from pretrain.fleet.supervise import Policy, Supervisor
from pretrain.records.metrics import decode, is_row, read_metrics
from pretrain.records.timeline import read_timeline

ROOT = pathlib.Path(__file__).resolve().parents[2]
PYTHONPATH = os.pathsep.join(map(str, (ROOT, ROOT / 'scripts')))
CONFIG = ROOT / 'configs/decoder/bench.gin'
TINY = {
  'model.embed': 32, 'model.heads': 4, 'model.head_dim': 8, 'model.mlp.hidden': 64, 'model.vocab_size': 512,
  'model.layers': 2, 'data.batch_size': 12, 'data.targets_length': 32, 'train.log_every': 1, 'evaluation.every': 0,
  'checkpoint.every': 10,
}  # fmt: skip
EXACT = ('loss', 'grad_norm', 'batch_checksum')
WAIT_SECONDS = 300.0
SAVING = 'saving'  # a note of the child: '<number of the save in this process> <part of the save>'


def dying_with_this(command: Sequence[str]) -> list[str]:
  """`command`, which the kernel ends if this process dies."""
  return [sys.executable, '-I', '-S', '-c', DIE_WITH_PARENT, str(os.getpid()), *command]


def call(command: Sequence[str], **env: str) -> subprocess.CompletedProcess[str]:
  """Runs `command`; returns its exit code and output."""
  return subprocess.run(dying_with_this(command), env=os.environ | {'PYTHONPATH': PYTHONPATH} | env, check=False,
                        capture_output=True, text=True)  # fmt: skip


@dataclasses.dataclass
class Case:
  """One run with faults in it."""

  name: str
  options: argparse.Namespace
  hosts: int = 1
  steps: int = 60
  inject: dict = dataclasses.field(default_factory=dict)
  keys: dict = dataclasses.field(default_factory=dict)

  def __post_init__(self):
    self.workdir = self.options.workdir / self.name
    self.notes = self.options.workdir / f'{self.name}.notes'
    for folder in (self.workdir, self.notes):
      shutil.rmtree(folder, ignore_errors=True)
    (self.options.workdir / f'{self.name}.log').unlink(missing_ok=True)
    self.over, self.trouble = threading.Event(), ''

  def command(self) -> list[str]:
    devices = {'mesh.data': 6} if self.hosts > 1 else {}
    keys = TINY | devices | {'train.steps': self.steps} | self.keys
    flags = [f'--gin_file={CONFIG}', f'--workdir={self.workdir}', *(f'--gin.{k}={v}' for k, v in keys.items())]
    return [sys.executable, '-m', 'faults.child', 'train', *flags]

  def run(self, fault: Callable[['Case'], None] | None = None, policy: Policy | None = None, fits=None) -> int:
    """Supervises the run while `fault` breaks it from a thread; returns its exit code."""
    os.environ['PYTHONPATH'] = PYTHONPATH
    os.environ[INJECT] = json.dumps({'notes': str(self.notes), **self.inject})
    self.over.clear()
    thread = threading.Thread(target=self._break, args=(fault,), daemon=True) if fault else None
    with (self.options.workdir / f'{self.name}.log').open('a') as log, contextlib.redirect_stderr(log):
      run = Supervisor(self.hosts, self.command(), self.workdir, policy or Policy(max_restarts=10_000),
                       fits or (lambda n: True), log)  # fmt: skip
      if thread:
        thread.start()
      code = run.run()
    self.over.set()
    if thread:
      thread.join()
    return code

  def _break(self, fault: Callable[['Case'], None]) -> None:
    try:
      fault(self)
    except Exception as error:  # otherwise it would look as if the run had been broken
      self.trouble = f'the fault itself failed: {error!r}'

  def pid(self, host: int = 0) -> int:
    return int(self.note(f'pid{host}') or 0)

  def activity(self, host: int = 0) -> str:
    return self.note(f'activity{host}')

  def note(self, name: str) -> str:
    path = self.notes / name
    return path.read_text() if path.exists() else ''

  def saving(self) -> bool:
    """Whether the current process has started a save that has no manifest yet."""
    marked = any((self.workdir / 'checkpoints').glob('*.saving'))
    return marked and self.activity() in ('save', 'step', 'data', 'close')

  def step(self) -> int:
    lines = [line for line in read_timeline(self.workdir)[-5:] if 'began' in line]
    return lines[-1]['step'] if lines else 0

  def logged(self) -> int:
    """The last step in the metrics, which are up to date; the timeline may be a second old."""
    path = self.workdir / 'metrics.jsonl'
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    # While values are added to a row, the end of its old text may follow it.
    whole = (line for line in reversed(lines) if is_row(line))
    return int(decode(next(whole, b'{"step": 0}\n'))['step'])

  def wait_for(self, condition: Callable[[], bool]) -> bool:
    """Whether `condition` became true before the run ended."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not self.over.is_set() and time.monotonic() < deadline:
      if condition():
        return True
      time.sleep(0.002)
    return False

  def another(self, before: int) -> bool:
    """Waits for a process with another pid than `before`; whether there is one."""
    return self.wait_for(lambda: self.pid() not in (0, before))

  def send(self, number: int, host: int = 0) -> None:
    with contextlib.suppress(ProcessLookupError):
      os.kill(self.pid(host), number)

  def incidents(self) -> list[dict]:
    path = self.workdir / supervise.INCIDENTS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

  def made_again(self) -> int:
    """The largest number of steps that a restart computed again."""
    furthest = most = 0
    for incident in self.incidents():
      furthest = max(furthest, incident['step_reached'] or 0)
      if incident['step_resumed'] is not None:
        most = max(most, furthest - incident['step_resumed'])
    return most

  def leaves(self, step: int) -> dict[str, str]:
    """The digest of each array of a saved step."""
    written = manifest.read(self.workdir / 'checkpoints' / str(step))
    return {key: leaf.digest for key, leaf in written.leaves.items()}

  def differs(self, reference: 'Case', rtol: float = 0.0) -> str:
    """'' if every step exists once, with the numbers and the final arrays of `reference`; otherwise the first
    difference."""
    own, other = read_metrics(self.workdir), read_metrics(reference.workdir)[: self.steps]
    if [row['step'] for row in own] != [row['step'] for row in other]:
      return f'steps {[row["step"] for row in own][-3:]} of {len(own)}'
    for a, b in zip(own, other, strict=True):
      for key in EXACT:
        if abs(a[key] - b[key]) > (0 if key == 'batch_checksum' else rtol * abs(b[key])):
          return f'{key} {a[key]!r} for {b[key]!r} at step {a["step"]}'
    return '' if rtol else self.differs_at(self.steps, reference)

  def apart(self, reference: 'Case') -> float:
    """The largest relative difference of a loss."""
    pairs = zip(read_metrics(self.workdir), read_metrics(reference.workdir), strict=False)
    found = [abs(a['loss'] / b['loss'] - 1) for a, b in pairs]
    return math.inf if any(map(math.isnan, found)) else max(found, default=0.0)

  def differs_at(self, step: int, reference: 'Case') -> str:
    """'' if the arrays of a saved step equal those of `reference`, bit for bit."""
    own, other = self.leaves(step), reference.leaves(step)
    wrong = [key for key in sorted(own.keys() | other.keys()) if own.get(key) != other.get(key)]
    return f'{wrong[0]} of step {step} is another array (first of {len(wrong)})' if wrong else ''


@dataclasses.dataclass(frozen=True)
class Line:
  """The result of a fault. `worst` is the first failure, or a remark; `times` are seconds of recoveries, `hit` counts
  what was hit."""

  tried: int
  survived: int
  worst: str = ''
  times: Sequence[float] = ()
  hit: Mapping[str, int] = dataclasses.field(default_factory=dict)

  @property
  def whole(self) -> bool:
    return self.tried == self.survived > 0

  def __str__(self) -> str:
    parts = [self.worst] if self.worst else []
    if self.times:
      parts.append(f'recovered in {median(self.times):.1f} s (p95 {p95(self.times):.1f} s)')
    if self.hit:
      parts.append('in ' + ', '.join(f'{key} {count}' for key, count in sorted(self.hit.items())))
    return f'tried {self.tried}, survived {self.survived}; {"; ".join(parts)}'


def joined(lines: Sequence[Line]) -> Line:
  """One line from the parts of a fault that ran in parallel; failures come first."""
  hit = sum((collections.Counter(line.hit) for line in lines), collections.Counter())
  bad = [line.worst for line in lines if not line.whole]
  worst = next(filter(None, [*bad, *(line.worst for line in lines)]), '')
  times = [second for line in lines for second in line.times]
  return Line(sum(line.tried for line in lines), sum(line.survived for line in lines), worst, times, dict(hit))


def median(times: Sequence[float]) -> float:
  return sorted(times)[len(times) // 2]


def p95(times: Sequence[float]) -> float:
  return sorted(times)[min(int(0.95 * len(times)), len(times) - 1)]


def count(options: argparse.Namespace, quick: int, full: int) -> int:
  """The number of trials in this part of a fault."""
  total = options.times or (full if options.full else quick)
  return (total + options.parts - 1 - options.part) // options.parts


def references(options: argparse.Namespace) -> Callable[[int, int], Case]:
  """(hosts, steps) -> an uninterrupted run with at least that many steps; each is run once and shared.

  A run for up to 120 steps has exactly 120, because refusals name the last step.
  """

  def get(hosts: int, steps: int) -> Case:
    longest = 120 if steps <= 120 else max(steps, 800 if options.full and hosts == 1 else 0)
    shared = argparse.Namespace(**vars(options) | {'workdir': options.alone})
    options.alone.mkdir(parents=True, exist_ok=True)
    name = f'alone_{hosts}_{longest}'
    with (options.alone / f'{name}.lock').open('w') as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      done = options.alone / f'{name}.done'
      case = Known(name, shared, hosts, longest, keys={'checkpoint.keep_every': 10})
      if not done.exists():
        shutil.rmtree(case.workdir, ignore_errors=True)
        if code := case.run(policy=Policy(max_restarts=0)):
          raise SystemExit(f'the uninterrupted run ended with {code}; see {case.workdir}.log')
        done.touch()
    return case

  return get


class Known(Case):
  """A run that may exist already."""

  def __post_init__(self):
    self.workdir = self.options.workdir / self.name
    self.notes = self.options.workdir / f'{self.name}.notes'
    self.over, self.trouble = threading.Event(), ''


def verdict(case: Case, reference: Case, code: int, tried: int, rtol: float = 0.0) -> Line:
  """Counts all faults of a run as survived, or none: one wrong resume spoils everything after it, and a fault that
  ended no process was not tried. `tried` is the number of planned faults."""
  difference = untried(case, tried) or case.differs(reference, rtol) if code == 0 else f'exit code {code}'
  return Line(
    tried, 0 if difference else tried, difference and f'{difference}; see {case.workdir}.log', recoveries(case)
  )


def untried(case: Case, meant: int) -> str:
  """'' if each fault ended a process, and none cost more steps than lie between two saves (one may be under way)."""
  if case.trouble or (found := len(case.incidents())) < meant:
    return case.trouble or f'{found} failures of {meant} that were planned'
  lost, every = case.made_again(), (TINY | case.keys)['checkpoint.every']
  return f'{lost} steps were computed again, saved every {every}' if lost > 2 * every else ''


def recoveries(case: Case) -> list[float]:
  """Seconds from each failure to the first step after it."""
  return [i['seconds_down'] for i in case.incidents() if i['seconds_lost'] is not None]


def stop_at(step: int, host: int = 0) -> Callable[[Case], None]:
  """A fault: SIGTERM to one process at a step."""

  def fault(case: Case) -> None:
    if case.wait_for(lambda: case.logged() >= step):
      case.send(signal.SIGTERM, host)

  return fault
