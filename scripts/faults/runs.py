"""Hosts that do not come back, damaged files, hangs, data workers; where the time went: F4, F5, F10, F11, F19."""

import collections
import dataclasses
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

from faults.case import Case, Line, call, count, joined, stop_at, verdict
from pretrain.fleet.supervise import Policy
from pretrain.records.goodput import write_goodput
from pretrain.records.timeline import read_timeline

AWAY = ((2, 2), (1, 1))  # (the process of three that does not start, how many continue)
MESHES = (
  (1, {'mesh.data': 4}),
  (3, {'mesh.data': 3, 'mesh.fsdp': 2}),
  (2, {'mesh.data': 2}),
)  # processes, of 6 devices

F32_BAR = 1e-6  # of a loss, on another mesh


def f4(options, alone) -> Line:
  """a host does not come back: the run continues with fewer processes; or on another mesh, if told to"""
  lines, furthest = [], 0.0
  for i in range(count(options, 1, 12)):
    case, way = Case(f'f4_{i}', options, hosts=3, steps=40), (i + options.part) % (len(AWAY) + len(MESHES))
    code = case.run(stop_at(12))
    meant = int(way < len(AWAY))  # planned failures: a run that is told to change its mesh has none
    if code == 75:
      code = without_one(case, *AWAY[way]) if meant else elsewhere(case, *MESHES[way - len(AWAY)])
    line = verdict(case, alone(3, 40), code, meant, rtol=1e-5)
    furthest = max(furthest, apart := case.apart(alone(3, 40)))
    worst = line.worst or (f'losses {apart:.1e} apart, bar {F32_BAR}' if apart > F32_BAR else '')
    lines.append(dataclasses.replace(line, tried=1, survived=int(not worst), worst=worst))
  line = joined(lines)
  return dataclasses.replace(line, worst=line.worst or f'losses within {furthest:.1e}')


def without_one(case: Case, away: int, left: int) -> int:
  case.inject = {'away': away}
  return case.run(policy=Policy(min_hosts=left), fits=lambda n: n == left)


def elsewhere(case: Case, hosts: int, mesh: dict) -> int:
  case.hosts, case.keys = hosts, mesh
  return case.run()


def f5(options, alone) -> Line:
  """a file of a checkpoint is damaged in every way: no run loads it"""
  trials = count(options, 30, 500)
  program = [sys.executable, '-m', 'faults.files']
  flags = [f'--trials={trials}', f'--seed={options.seed + options.part}', f'--workdir={options.workdir / "f5"}']
  done = call([*program, *flags])
  found = re.search(r'^F5 all +(\d+) tried, (\d+) loaded; Orbax alone: (.*)$', done.stdout, re.MULTILINE)
  if not found:
    return Line(trials, 0, (done.stderr.strip().splitlines() or ['it said nothing'])[-1])
  tally = {f'Orbax alone: {k}': int(n) for k, n in re.findall(r'([a-z ]+) (\d+)(?:, |$)', found[3])}
  return Line(int(found[1]), int(found[1]) - int(found[2]), hit=tally)


def f10(options, alone) -> Line:
  """a process sleeps for ever: waiting for data, in a step, one of three"""
  ways, tried, survived, worst, times = ((1, 'data', 0), (3, 'step', 1), (3, 'data', 2)), 0, 0, '', []
  for i in range(count(options, 2, 9)):
    hosts, where, host = ways[(i + options.part) % 3]
    inject = {'sleep': where, 'host': host, 'at': 12}
    limit = 15.0 if options.full else 8.0
    keys = {'watchdog.step': limit, 'watchdog.data': limit}
    case = Case(f'f10_{i}', options, hosts=hosts, steps=30, inject=inject, keys=keys)
    line = verdict(case, alone(hosts, 30), case.run(), 1)
    problem = line.worst or misnamed(case, where, host)
    tried, survived, worst = tried + 1, survived + (not problem), worst or (problem and f'{where}: {problem}')
    times += line.times
  return Line(tried, survived, worst, times)


def misnamed(case: Case, where: str, host: int) -> str:
  """'' if one hang was found, its process named (in a step all wait for each other) and its stacks written."""
  causes = [(incident['cause'], incident['host']) for incident in case.incidents()]
  named = causes == [('hang', host)] or (where == 'step' and [c for c, _ in causes] == ['hang'])
  stacks = any('sleep' in p.read_text() or 'once' in p.read_text() for p in case.workdir.glob('hang_*.txt'))
  return '' if named and stacks else f'incidents {causes}, stacks {stacks}'


def f11(options, alone) -> Line:
  """a data worker is killed; no worker outlives a killed run"""
  tried, survived, worst, times = 0, 0, '', []
  for i in range(count(options, 1, 5)):
    case, left = Case(f'f11_{i}', options, steps=40, keys={'data.workers': 2}), list[int]()
    line = verdict(case, alone(1, 40), case.run(lambda case, left=left: kill_workers(case, left)), 2)
    time.sleep(2)
    orphans = [pid for pid in left if pathlib.Path(f'/proc/{pid}').exists()]
    problem = line.worst or (f'orphans {orphans}' if orphans else '' if left else 'no worker was seen')
    tried, survived, worst = tried + 2, survived + 2 * (not problem), worst or problem
    times += line.times
  return Line(tried, survived, worst, times)


def kill_workers(case: Case, left: list[int]) -> None:
  """Kills a worker of the first start, then the second start itself; `left` gets its workers."""
  if case.wait_for(lambda: case.logged() >= 12 and len(children(case.pid())) >= 2):
    os.kill(children(case.pid())[-1], signal.SIGKILL)
  if case.wait_for(lambda: len(case.incidents()) > 0 and case.logged() >= 22 and len(children(case.pid())) >= 2):
    left.extend(children(case.pid()))
    case.send(signal.SIGKILL)


def children(pid: int) -> list[int]:
  found = subprocess.run(['ps', '-o', 'pid=', '--ppid', str(pid)], capture_output=True, text=True, check=False)
  return [int(word) for word in found.stdout.split()]


def f19(options, alone) -> Line:
  """goodput of the runs above: all seconds are counted, within 2%"""
  worst, tried, good, seconds = 0.0, 0, 0, collections.Counter()
  for path in sorted(options.results.parent.glob('**/timeline.jsonl')):
    workdir = path.parent
    lines, found = read_timeline(workdir), write_goodput(workdir)
    if not any('began' in line for line in lines):
      continue
    wall = max(line['t'] for line in lines) - min(line['began'] for line in lines if 'began' in line)
    off = abs(sum(found['seconds'].values()) / wall - 1)
    worst, tried, good = max(worst, off), tried + 1, good + (off <= 0.02)
    seconds.update(found['seconds'])
  shares = ', '.join(f'{k} {v / sum(seconds.values()):.0%}' for k, v in seconds.most_common(4)) if seconds else ''
  return Line(tried, good, f'{worst:.2%} off; of all time {shares}')
