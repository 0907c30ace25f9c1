"""Processes that are killed, stopped, or told to stop: F1, F2, F3, F7, and the time to recover."""

import collections
import dataclasses
import random
import signal
import time

from faults.case import SAVING, Case, Line, count, joined, p95, stop_at, verdict
from pretrain.checkpoints import step_folders
from pretrain.records.metrics import read_metrics

PHASES = ('start', 'step', 'restore', 'save', 'compile', 'data')
# The latest kill, in seconds after a phase began: about the duration of the phase; DELAY for others.
DELAYS, DELAY = {'start': 2.0, 'restore': 0.3, 'compile': 0.5, 'close': 0.5}, 0.05
PARTS = ('files', 'hash', 'manifest', 'rename', 'retain')  # of a save, as the child reports them


def f1(options, alone) -> Line:
  """kill -9 of one process, in every phase"""
  return killed(options, alone, 'f1', count(options, 6, 200))


def killed(options, alone, name: str, kills: int) -> Line:
  """A run of one process that is killed `kills` times."""
  draw, hit, steps = random.Random(options.seed + options.part), collections.Counter(), length(kills)
  case = Case(name, options, steps=steps, inject={'report': True})

  def fault(case: Case) -> None:
    before = 0
    for i in range(kills):
      wanted = 'close' if i == kills - 1 else PHASES[(i + options.part) % len(PHASES)]
      share = min(steps - 5, (i + 1) * steps // kills)
      if not case.another(before) or not case.wait_for(lambda w=wanted, s=share: in_phase(case, w, s)):
        return
      time.sleep(draw.random() * DELAYS.get(wanted, DELAY))
      before = case.pid()
      hit['save' if wanted == 'save' and case.saving() else case.activity()] += 1
      case.send(signal.SIGKILL)

  line = verdict(case, alone(1, steps), case.run(fault), kills)
  return dataclasses.replace(line, hit=dict(hit))


def length(kills: int) -> int:
  """Steps of a run that is killed `kills` times."""
  return max(60, 12 * kills - 12 * kills % 10)


def in_phase(case: Case, wanted: str, share: int) -> bool:
  """Whether the process is in phase `wanted`; phases that repeat count only from step `share` on."""
  if wanted == 'save':
    return case.saving() and case.logged() >= share - 5
  if wanted in ('step', 'data'):
    return case.activity() == wanted and case.logged() >= share
  return case.activity() == wanted or (wanted != 'close' and case.activity() == 'step' and case.logged() >= share)


def f2(options, alone) -> Line:
  """kill -9 inside a save: the first, second or a later save of a process; in each part of it"""
  kills, draw, hit = count(options, 5, 100), random.Random(options.seed + 100 + options.part), collections.Counter()
  plan = [(1 + i % 3, PARTS[(i + i // 15 + options.part) % len(PARTS)]) for i in range(kills)]
  steps = max(60, 30 * kills)  # a kill may wait for up to three saves
  case = Case('f2', options, steps=steps, inject={'slow_save': 0.1}, keys={'checkpoint.keep': 2})

  def fault(case: Case) -> None:
    before = 0
    for nth, part in plan:
      if not case.another(before) or not case.wait_for(lambda n=nth, p=part: in_save(case, n, p)):
        return
      time.sleep(draw.choice((0.0, 0.02, 0.1 * draw.random())))
      number, _, found = case.note(SAVING).partition(' ')
      before = case.pid()
      hit[f'{("first", "second", "later")[min(int(number), 3) - 1]}/{found}'] += 1
      case.send(signal.SIGKILL)

  line = verdict(case, alone(1, steps), case.run(fault), kills)
  left = [p.name for p in (case.workdir / 'checkpoints').iterdir() if step_folders.kind_of(p) != 'finished']
  worst = line.worst or (f'left behind: {left}' if left else '')
  return dataclasses.replace(line, survived=0 if worst else kills, worst=worst, hit=dict(hit))


def in_save(case: Case, nth: int, part: str) -> bool:
  """Whether this part of save number `nth` of the process has begun; `nth` = 3 means the third or a later save."""
  number, _, now = case.note(SAVING).partition(' ')
  return now == part and (int(number) >= 3 if nth == 3 else int(number) == nth)


def f3(options, alone) -> Line:
  """of three processes, one is killed, or the coordinator is killed, or one is stopped for good"""
  ways = ((0, signal.SIGKILL), (1, signal.SIGSTOP), (2, signal.SIGKILL))
  plan = [ways[(i + options.part) % 3] for i in range(count(options, 2, 30))]
  gap, draw = 20, random.Random(options.seed + options.part)
  case = Case('f3', options, hosts=3, steps=gap * (len(plan) + 1), inject={'heartbeat': 10})
  hit = collections.Counter()

  def fault(case: Case) -> None:
    for i, (host, number) in enumerate(plan):
      if not case.wait_for(lambda i=i: case.logged() >= gap * i + 12 and case.activity() in ('step', 'data')):
        return
      time.sleep(draw.random())
      case.send(number, host)
      hit['stopped' if number == signal.SIGSTOP else f'killed {host}'] += 1
      case.wait_for(lambda i=i: len(case.incidents()) > i)

  line = verdict(case, alone(3, case.steps), case.run(fault), len(plan))
  killed_alone = [i['seconds_down'] for i in case.incidents() if i['signal'] == 'SIGKILL' and i['seconds_down']]
  return dataclasses.replace(line, hit=dict(hit), times=killed_alone)


def f7(options, alone) -> Line:
  """SIGTERM to one process; to one of three; while it compiles; while it saves: saved, code 75, resumed"""
  ways = ((3, stop_at(25, 1)), (1, stop_in('compile')), (1, stop_in_save), (1, stop_at(25)))
  tried, survived, worst, slowest = 0, 0, '', 0.0
  for i in range(count(options, 3, 20)):
    hosts, fault = ways[(i + options.part) % len(ways)]
    case = Case(f'f7_{i}', options, hosts=hosts, steps=60)
    difference, seconds = told_to_stop(case, fault, alone)
    tried, survived, worst = tried + 1, survived + (not difference), worst or difference
    slowest = max(slowest, seconds)
  return Line(tried, survived, worst or f'{slowest:.1f} s from the signal to the end')


def stop_in(phase: str):
  return lambda case: case.wait_for(lambda: case.activity() == phase) and case.send(signal.SIGTERM)


def stop_in_save(case: Case) -> None:
  if case.wait_for(case.saving):
    case.send(signal.SIGTERM)


def told_to_stop(case: Case, fault, alone) -> tuple[str, float]:
  """(what went wrong, seconds from the signal to the end)."""
  start: list[float] = []
  code = case.run(lambda case: (fault(case), start.append(time.monotonic())))
  seconds = time.monotonic() - start[0]
  saved, rows = step_folders.finished(case.workdir / 'checkpoints'), read_metrics(case.workdir)
  reached = rows[-1]['step'] if rows else 0
  if code != 75 or max(saved, default=0) != reached:
    return f'code {code}, step {reached}, saved {saved}', seconds
  code = case.run()
  return f'code {code}' if code else case.differs(alone(case.hosts, case.steps)), seconds


def mttr(options, alone) -> Line:
  """seconds from kill -9 to the first new step, with nothing else running: p95 at most 10 s, and 20 s with three"""
  one = killed_in_step(options, alone, 1, count(options, 4, 20), 10.0)
  three = killed_in_step(options, alone, 3, count(options, 3, 10), 20.0)
  return dataclasses.replace(joined([one, three]), times=(), worst=f'one: {one.worst}; three: {three.worst}')


def killed_in_step(options, alone, hosts: int, kills: int, bar: float) -> Line:
  """Kills each process in turn, during steps."""
  case = Case(f'mttr_{hosts}', options, hosts=hosts, steps=20 * (kills + 1))

  def fault(case: Case) -> None:
    for i in range(kills):
      if not case.wait_for(lambda i=i: case.logged() >= 20 * i + 12 and len(case.incidents()) >= i):
        return
      case.send(signal.SIGKILL, (i + 2) % hosts)
      case.wait_for(lambda i=i: len(case.incidents()) > i)

  line = verdict(case, alone(hosts, case.steps), case.run(fault), kills)
  slow = len(line.times) < kills or p95(line.times) > bar
  said = str(line).partition('; ')[2]
  return dataclasses.replace(line, survived=0 if slow else line.survived, worst=f'{said}{f", over {bar:g} s" * slow}')
