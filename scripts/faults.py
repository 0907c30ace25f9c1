"""Breaks real runs in every way that it knows, on this machine, and shows that none of them lost anything.

python scripts/faults.py [F1 F3 …] [--full] [--seed 0] [--workdir DIR]

One line for each fault: how often it was tried, how often the run went on by itself to the losses of a run left alone,
bit for bit, and the worst case. Exit code 1 where one did not. The model is tiny: restarts are what is measured.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from faults_child import INJECT

from pretrain import step_folders, supervise
from pretrain.goodput import write_goodput
from pretrain.metrics import read_metrics
from pretrain.supervise import Policy, Supervisor
from pretrain.timeline import read_timeline

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = ROOT / 'configs/decoder/bench.gin'
TINY = {
  'model.embed': 32, 'model.heads': 4, 'model.head_dim': 8, 'model.mlp.hidden': 64, 'model.vocab_size': 512,
  'model.layers': 2, 'data.batch_size': 12, 'data.targets_length': 32, 'train.log_every': 1, 'evaluation.every': 0,
  'checkpoint.every': 10,
}  # fmt: skip
EXACT = ('loss', 'grad_norm', 'batch_checksum')
WAIT_SECONDS = 300.0


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
    self.over, self.outcomes = threading.Event(), []

  def command(self) -> list[str]:
    devices = {'mesh.data': 6} if self.hosts > 1 else {}
    keys = TINY | devices | {'train.steps': self.steps} | self.keys
    flags = [f'--gin_file={CONFIG}', f'--workdir={self.workdir}', *(f'--gin.{k}={v}' for k, v in keys.items())]
    return [sys.executable, str(ROOT / 'scripts/faults_child.py'), 'train', *flags]

  def run(self, fault: Callable[['Case'], None] | None = None, policy: Policy | None = None, fits=None) -> int:
    """Supervises the run while `fault` breaks it from a thread; returns its exit code."""
    os.environ[INJECT] = json.dumps({'notes': str(self.notes), **self.inject})
    thread = threading.Thread(target=fault, args=(self,), daemon=True) if fault else None
    with (self.options.workdir / f'{self.name}.log').open('a') as log:
      run = Supervisor(self.hosts, self.command(), self.workdir, policy or Policy(max_restarts=10_000),
                       fits or (lambda n: True), log)  # fmt: skip
      if thread:
        thread.start()
      code = run.run()
    self.over.set()
    if thread:
      thread.join()
    return code

  def pid(self, host: int = 0) -> int:
    return int((self.notes / f'pid{host}').read_text())

  def phase(self, host: int = 0) -> str:
    path = self.notes / f'phase{host}'
    return path.read_text() if path.exists() else ''

  def saving(self) -> bool:
    """The process, not the one before it, has begun a step that has no manifest yet."""
    marked = any((self.workdir / 'checkpoints').glob('*.saving'))
    return marked and self.phase() in ('save', 'step', 'data', 'close')

  def step(self) -> int:
    lines = [line for line in read_timeline(self.workdir)[-5:] if 'began' in line]
    return lines[-1]['step'] if lines else 0

  def logged(self) -> int:
    """The last step in the metrics: as it is now, where the timeline is up to a second old."""
    path = self.workdir / 'metrics.jsonl'
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith(b'\n')]
    return json.loads(whole[-1])['step'] if whole else 0

  def wait_for(self, condition: Callable[[], bool]) -> bool:
    """Whether it came about before the run was over."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not self.over.is_set() and time.monotonic() < deadline:
      if condition():
        return True
      time.sleep(0.002)
    return False

  def send(self, number: int, host: int = 0) -> None:
    with contextlib.suppress(ProcessLookupError):
      os.kill(self.pid(host), number)

  def incidents(self) -> list[dict]:
    path = self.workdir / supervise.INCIDENTS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

  def differs(self, reference: 'Case', rtol: float = 0.0) -> str:
    """'' where all steps are there once, with the numbers of `reference`; else the first difference."""
    own, other = read_metrics(self.workdir), read_metrics(reference.workdir)
    if [row['step'] for row in own] != [row['step'] for row in other]:
      return f'steps {[row["step"] for row in own][-3:]} of {len(own)}'
    for a, b in zip(own, other, strict=True):
      for key in EXACT:
        if abs(a[key] - b[key]) > (0 if key == 'batch_checksum' else rtol * abs(b[key])):
          return f'{key} {a[key]!r} for {b[key]!r} at step {a["step"]}'
    return ''


@dataclasses.dataclass(frozen=True)
class Line:
  tried: int
  survived: int
  worst: str

  @property
  def whole(self) -> bool:
    return self.tried == self.survived


def references(options) -> Callable[[int, int], Case]:
  """(hosts, steps) -> a run that was left alone; each is made once."""
  made: dict[tuple[int, int], Case] = {}

  def get(hosts: int, steps: int) -> Case:
    if (hosts, steps) not in made:
      made[hosts, steps] = case = Case(f'alone_{hosts}_{steps}', options, hosts, steps)
      if code := case.run():
        raise SystemExit(f'the run that was left alone ended with {code}; see {case.workdir}.log')
    return made[hosts, steps]

  return get


def verdict(case: Case, reference: Case, code: int, tried: int, rtol: float = 0.0) -> Line:
  """All of a run's faults are survived, or none: one resume that is wrong spoils what follows."""
  difference = case.differs(reference, rtol) if code == 0 else f'exit code {code}'
  return Line(tried, 0 if difference else tried, difference or recoveries(case))


def recoveries(case: Case) -> str:
  """How long it took from a failure to the first step after it."""
  found = [i for i in case.incidents() if i['seconds_lost'] is not None]
  times = sorted(i['seconds_down'] for i in found)
  if not times:
    return 'no incident'
  p95 = times[min(int(0.95 * len(times)), len(times) - 1)]
  redone = max(max((i['step_reached'] or 0) - i['step_resumed'], 0) for i in found)
  return f'recovered in {times[-1]:.1f} s (p95 {p95:.1f} s), {redone} steps made again'


def f1(options, alone) -> Line:
  """kill -9 of one process, at moments of all phases"""
  kills, steps = (200, 2000) if options.full else (6, 120)
  draw, hit = random.Random(options.seed), collections.Counter()
  case = Case('f1', options, steps=steps)

  def fault(case: Case) -> None:
    for i in range(kills):
      wanted = PHASES[i % len(PHASES)]
      share = min(steps - 5, (i + 1) * steps // kills)
      before = case.pid() if i else None
      fresh = lambda before=before: (case.notes / 'pid0').exists() and case.pid() != before
      if not case.wait_for(fresh) or not case.wait_for(lambda w=wanted, s=share: in_phase(case, w, s)):
        return
      time.sleep(draw.random() * (1.0 if wanted == 'start' else 0.05))
      hit['save' if case.saving() else case.phase()] += 1
      case.send(signal.SIGKILL)
    case.outcomes.append(kills)

  code = case.run(fault)
  line = verdict(case, alone(1, steps), code, sum(hit.values()))
  return dataclasses.replace(line, worst=f'{line.worst}; in {dict(sorted(hit.items()))}')


PHASES = ('start', 'step', 'restore', 'save', 'compile', 'data')


def in_phase(case: Case, wanted: str, share: int) -> bool:
  """Whether the process does `wanted`; what comes once in a start is waited for, the rest also for step `share`."""
  if wanted == 'save':
    return case.saving()
  if wanted in ('step', 'data'):
    return case.phase() == wanted and case.logged() >= min(share, case.logged() + 1)
  return case.phase() == wanted or (case.phase() == 'step' and case.logged() >= share)


def f2(options, alone) -> Line:
  """kill -9 within a second of the beginning of a save"""
  kills, steps = (100, 1200) if options.full else (4, 120)
  draw, case = random.Random(options.seed + 1), Case('f2', options, steps=steps)
  done = [0]

  def fault(case: Case) -> None:
    last = None
    while done[0] < kills:
      fresh = lambda last=last: (case.notes / 'pid0').exists() and case.pid() != last
      if not case.wait_for(fresh) or not case.wait_for(case.saving):
        return
      last = case.pid()
      time.sleep(draw.choice((0.0, 0.0, 0.01, 0.05, draw.random())))
      done[0] += 1
      case.send(signal.SIGKILL)

  code = case.run(fault)
  line = verdict(case, alone(1, steps), code, done[0])
  left = [p.name for p in (case.workdir / 'checkpoints').iterdir() if step_folders.kind_of(p) != 'finished']
  return dataclasses.replace(line, survived=0, worst=f'left behind: {left}') if left else line


def f3(options, alone) -> Line:
  """of three processes one is killed, the coordinator is killed, one is stopped"""
  rounds = 10 if options.full else 1
  plan = [(host, number) for host, number in ((2, signal.SIGKILL), (0, signal.SIGKILL)) for _ in range(rounds)]
  plan += [(1, signal.SIGSTOP)] * (rounds if options.full else 0)
  steps = 60 * len(plan)
  case = Case('f3', options, hosts=3, steps=steps)

  def fault(case: Case) -> None:
    for i, (host, number) in enumerate(plan):
      if not case.wait_for(lambda i=i: case.logged() >= 25 + 60 * i and case.phase() in ('step', 'data')):
        return
      case.send(number, host)
      case.outcomes.append(host)
      case.wait_for(lambda i=i: len(case.incidents()) > i)

  code = case.run(fault)
  return verdict(case, alone(3, steps), code, len(case.outcomes))


def f4(options, alone) -> Line:
  """a host stays away: the run goes on with fewer processes"""
  tried = survived = 0
  worst = ''
  for away, least in ((2, 2), (1, 1)) if options.full else ((2, 2),):
    case = Case(f'f4_{least}', options, hosts=3, steps=60)
    begin = case.run(stop_at(30))
    case.inject = {'away': away}
    fits = lambda n, least=least: n == least
    code = case.run(policy=Policy(min_hosts=least), fits=fits) if begin == 75 else begin
    line = verdict(case, alone(3, 60), code, 1, rtol=1e-5)
    tried, survived = tried + 1, survived + line.survived
    worst = worst or line.worst
  return Line(tried, survived, worst)


def stop_at(step: int, host: int = 0) -> Callable[[Case], None]:
  """A fault: SIGTERM to one process at a step."""

  def fault(case: Case) -> None:
    if case.wait_for(lambda: case.logged() >= step):
      case.send(signal.SIGTERM, host)

  return fault


def f5(options, alone) -> Line:
  """a file of a checkpoint is damaged in every way: no run loads it"""
  trials = 500 if options.full else 40
  program = [sys.executable, str(pathlib.Path(__file__).with_name('faults_files.py'))]
  flags = [f'--trials={trials}', f'--seed={options.seed}', f'--workdir={options.workdir / "f5"}']
  done = subprocess.run([*program, *flags], env=os.environ | {'PYTHONPATH': str(ROOT)}, capture_output=True, text=True,
                        check=False)  # fmt: skip
  found = re.search(r'^F5 all +(\d+) tried, (\d+) loaded; (.*)$', done.stdout, re.MULTILINE)
  if not found:
    return Line(trials, 0, (done.stderr.strip().splitlines() or ['it said nothing'])[-1])
  return Line(int(found[1]), int(found[1]) - int(found[2]), found[3])


def f7(options, alone) -> Line:
  """SIGTERM to one process; to one of three; while it compiles: saved, code 75, resumed"""
  tried, survived, worst = 0, 0, ''
  in_compile = lambda case: case.wait_for(lambda: case.phase() == 'compile') and case.send(signal.SIGTERM)
  plan = [(1, stop_at(25)), (3, stop_at(25, 1)), (1, in_compile)] * (5 if options.full else 1)
  slowest = 0.0
  for i, (hosts, fault) in enumerate(plan):
    case = Case(f'f7_{i}', options, hosts=hosts, steps=60)
    start = []
    timed = lambda case, fault=fault, start=start: (fault(case), start.append(time.monotonic()))
    code = case.run(timed)
    slowest = max(slowest, time.monotonic() - start[0])
    saved = step_folders.finished(case.workdir / 'checkpoints')
    reached = read_metrics(case.workdir)[-1]['step'] if read_metrics(case.workdir) else 0
    good = code == 75 and max(saved, default=0) == reached
    difference = '' if good else f'code {code}, step {reached}, saved {saved}'
    difference = difference or (f'code {c}' if (c := case.run()) else case.differs(alone(hosts, 60)))
    tried, survived, worst = tried + 1, survived + (not difference), worst or difference
  return Line(tried, survived, worst or f'{slowest:.1f} s from the signal to the end')


def f10(options, alone) -> Line:
  """a process sleeps for ever: waiting for data, in a step, one of three"""
  tried, survived, worst = 0, 0, ''
  plan = [(1, 'data', 0), (3, 'data', 2), (3, 'step', 1)] * (3 if options.full else 1)
  for i, (hosts, where, host) in enumerate(plan if options.full else plan[:2]):
    inject_ = {'sleep': where, 'host': host, 'at': 25}
    keys = {'watchdog.step': 20.0, 'watchdog.data': 20.0}
    case = Case(f'f10_{i}', options, hosts=hosts, steps=60, inject=inject_, keys=keys)
    line = verdict(case, alone(hosts, 60), case.run(), 1)
    causes = [(incident['cause'], incident['host']) for incident in case.incidents()]
    named = causes == [('hang', host)] or (where == 'step' and [c for c, _ in causes] == ['hang'])
    stacks = any('sleep' in p.read_text() or 'once' in p.read_text() for p in case.workdir.glob('hang_*.txt'))
    good = line.whole and named and stacks
    tried, survived = tried + 1, survived + good
    worst = worst if good else f'{where}: {causes}, {line.worst}'
    slowest = line.worst
  return Line(tried, survived, worst or slowest)


def f11(options, alone) -> Line:
  """a data worker is killed; and none is left when the run is"""
  case = Case('f11', options, steps=60, keys={'data.workers': 2})
  left: list[int] = []

  def fault(case: Case) -> None:
    if case.wait_for(lambda: case.logged() >= 25 and len(children(case.pid())) >= 2):
      os.kill(children(case.pid())[-1], signal.SIGKILL)
    if case.wait_for(lambda: len(case.incidents()) > 0 and case.logged() >= 35 and len(children(case.pid())) >= 2):
      left.extend(children(case.pid()))
      case.send(signal.SIGKILL)

  line = verdict(case, alone(1, 60), case.run(fault), 2)
  time.sleep(2)
  orphans = [pid for pid in left if pathlib.Path(f'/proc/{pid}').exists()]
  return dataclasses.replace(line, survived=0, worst=f'orphans {orphans}') if orphans or not left else line


def children(pid: int) -> list[int]:
  found = subprocess.run(['ps', '-o', 'pid=', '--ppid', str(pid)], capture_output=True, text=True, check=False)
  return [int(word) for word in found.stdout.split()]


def f19(options, alone) -> Line:
  """goodput of the runs above: all seconds are counted, within 2%"""
  worst, tried, good = 0.0, 0, 0
  for workdir in sorted(options.workdir.glob('f[0-9]*')):
    if not (workdir / 'timeline.jsonl').exists():
      continue
    lines, found = read_timeline(workdir), write_goodput(workdir)
    wall = max(line['t'] for line in lines) - min(line['began'] for line in lines if 'began' in line)
    off = abs(sum(found['seconds'].values()) / wall - 1)
    worst, tried, good = max(worst, off), tried + 1, good + (off <= 0.02)
  return Line(tried, good, f'{worst:.2%} off')


FAULTS = {f.__name__.upper(): f for f in (f1, f2, f3, f4, f5, f7, f10, f11, f19)}


def main() -> int:
  flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  flags.add_argument('faults', nargs='*', choices=[*FAULTS, []], help='default: all')
  flags.add_argument('--full', action='store_true', help='as often as the bars want')
  flags.add_argument('--seed', type=int, default=0)
  flags.add_argument('--workdir', type=pathlib.Path, default=pathlib.Path('runs/faults'))
  options = flags.parse_args()
  options.workdir.mkdir(parents=True, exist_ok=True)
  supervise.SAME_STEP = 50  # here failures come again and again
  alone, whole, start = references(options), True, time.monotonic()
  for name in options.faults or FAULTS:
    line = FAULTS[name](options, alone)
    whole = whole and line.whole
    print(f'{name:<4} {FAULTS[name].__doc__}: tried {line.tried}, survived {line.survived}; {line.worst}', flush=True)
  print(f'{"all survived" if whole else "NOT all survived"} in {time.monotonic() - start:.0f} s')
  return 0 if whole else 1


if __name__ == '__main__':
  sys.exit(main())
