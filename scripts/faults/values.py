"""Faults in the numbers of a run: gradients that are not finite, a loss that jumps, a bit that flips on one device."""

import dataclasses
import random
import shutil

from faults.case import Case, Line, count, verdict
from pretrain.hosts import skipping
from pretrain.records.metrics import read_metrics

SPIKE, BAD = 100.0, 34  # the batch that is bad, from 0
EACH = {'checkpoint.every': 1, 'checkpoint.keep': 40}


def f9(options, alone) -> Line:
  """a gradient is NaN, a loss is 100 times too high: no update; or the run goes back and leaves the examples out"""
  tries = [not_applied_nan, not_applied_spike, gone_back, *([gone_back_in_three] if options.full else [])]
  wrong = [difference for attempt in tries if (difference := attempt(options))]
  text = 'parameters and moments bit-equal; losses equal those of a run that left the examples out from the start'
  return Line(len(tries), len(tries) - len(wrong), wrong[0] if wrong else text)


def not_applied_nan(options) -> str:
  return not_applied(Case('f9_nan', options, steps=36, inject=poisoned('NaN'), keys=EACH), 'skipped')


def not_applied_spike(options) -> str:
  keys = EACH | {'spikes.name': "'skip'", 'spikes.window': 16}
  return not_applied(Case('f9_spike', options, steps=36, inject=poisoned(SPIKE), keys=keys), 'spikes')


def not_applied(case: Case, count: str) -> str:
  """'' if one update was left out and changed nothing except counters."""
  if code := case.run():
    return f'{case.name}: exit code {code}'
  if (rows := read_metrics(case.workdir))[-1][count] != 1:
    return f'{case.name}: {count} is {rows[-1][count]}'
  before, after, later = (case.leaves(step) for step in (BAD, BAD + 1, BAD + 2))
  arrays = [key for key in before if key.startswith('params/') or '/mu/' in key or '/nu/' in key]
  moved = [key for key in arrays if before[key] != after[key]]
  stuck = [key for key in arrays if after[key] == later[key]]
  return f'{case.name}: moved {moved[:1]}, stuck {stuck[:1]} of {len(arrays)}' if moved or stuck or not arrays else ''


def gone_back(options, hosts: int = 1) -> str:
  """'' if the losses equal those of a run that left the same examples out from the start."""
  keys = {'spikes.name': "'rewind'", 'spikes.window': 16, 'spikes.steps': 10}
  case, told = (
    Case(f'f9_{name}{hosts}', options, hosts=hosts, steps=60, inject=poisoned(SPIKE), keys=keys)
    for name in ('rewind', 'told')
  )
  if code := case.run():
    return f'{case.name}: exit code {code}'
  told.workdir.mkdir()
  shutil.copy(case.workdir / skipping.FILE, told.workdir)
  if code := told.run():
    return f'{told.name}: exit code {code}'
  found = [(i['cause'], i['action'], i['step_resumed']) for i in case.incidents()]
  if found != [('spike', 'rewind', 20)] or skipping.read_skips(case.workdir) != [(20 * 12, (BAD + 1) * 12)]:
    return f'{case.name}: {found}, left out {skipping.read_skips(case.workdir)}'
  return case.differs(told) or ('it skipped nothing' if told.incidents() else '')


def gone_back_in_three(options) -> str:
  return gone_back(options, hosts=3)


def poisoned(factor: float | str) -> dict:
  return {'poison': {str(BAD): factor}, 'batch_size': 12}


def f16(options, alone) -> Line:
  """one bit of a parameter flips on one replica: found, the device named, resumed from an earlier step"""
  return flipped_run(options, alone, count(options, 1, 50))


def flipped_run(options, alone, flips: int, hosts: int = 3) -> Line:
  """Flips bits on a device of the middle process (six devices in all); the next check, every 5 steps, finds each."""
  every, host, draw = 5, hosts // 2, random.Random(f'{options.seed} F16 {options.part}')
  steps = 20 * flips + 20
  plan = [
    [20 * i + draw.randrange(11, 24), draw.randrange(100), draw.randrange(6 // hosts), draw.randrange(2**20),
     draw.randrange(32)] for i in range(flips)
  ]  # fmt: skip
  case = Case(f'f16_{hosts}', options, hosts=hosts, steps=steps, inject={'flips': plan, 'host': host},
              keys={'mesh.data': 6, 'replicas.every': every})  # fmt: skip
  line = verdict(case, alone(hosts, steps), case.run(), flips)
  found = [i for i in case.incidents() if i['cause'] == 'corruption']
  late = max((i['step_reached'] - at for i, (at, *_) in zip(found, plan, strict=False)), default=0)
  # JAX numbers the devices of a process from 2048 times its own number.
  devices = [f'device cpu:{2048 * host + device} (process {host})' for _, _, device, _, _ in plan]
  named = [i for i, device in zip(found, devices, strict=False) if device in i['reason']]
  if len(named) != flips or late > every + 1:
    return Line(flips, 0, f'{len(found)} found, {len(named)} named, up to {late} steps later')
  said = [f'found up to {late} steps later, the device named'] if line.whole else []
  return dataclasses.replace(line, worst='; '.join(filter(None, [line.worst, *said])))
