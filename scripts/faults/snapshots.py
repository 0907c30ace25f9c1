"""Faults of snapshots in host RAM: hosts are lost with their RAM, and bits of the remaining snapshots are flipped."""

import argparse
import contextlib
import pathlib
import random
import re
import shutil
import signal
from collections.abc import Callable, Sequence

from faults.case import Case, Line, count, joined, verdict
from pretrain.snapshots.slots import SnapshotConfig, folder_of


def f20(options: argparse.Namespace, alone: Callable[[int, int], Case]) -> Line:
  """one of three hosts is lost with its RAM, at random steps, before any checkpoint: rebuilt from parity"""
  kills = count(options, 1, 20)
  draw, gap = random.Random(options.seed + options.part), 30  # saved at multiples of 10, like the uninterrupted run
  case = Case('f20', options, hosts=3, steps=gap * (kills + 1), keys=keys_of(options) | {'checkpoint.every': 100_000})

  def fault(case: Case) -> None:
    for i in range(kills):
      host, step = draw.randrange(3), gap * i + draw.randrange(8, gap)
      if not case.wait_for(lambda i=i, s=step: len(case.incidents()) >= i and case.logged() >= s and in_step(case)):
        return
      lose(case, host)

  line = verdict(case, alone(3, case.steps), case.run(fault), kills)
  return checked(line, case, lambda resumed: resumed > 0 and resumed % 5 == 0, 'in host RAM')


def f21(options: argparse.Namespace, alone: Callable[[int, int], Case]) -> Line:
  """one of three hosts is lost with its RAM, and a bit of another's is flipped, or two are lost: resumed from disk"""
  damages = (lose_and_flip, lose_two) if options.full else (lose_and_flip,)
  return joined([from_disk(options, alone, damage) for damage in damages])


def from_disk(options: argparse.Namespace, alone: Callable[[int, int], Case], damage: Callable[[Case], None]) -> Line:
  """A run whose snapshots cannot be rebuilt resumes from its newest checkpoint."""
  case = Case(f'f21_{damage.__name__}', options, hosts=3, steps=60, keys=keys_of(options) | {'snapshot.every': 7})

  def fault(case: Case) -> None:
    if case.wait_for(lambda: case.logged() >= 25 and (case.workdir / 'checkpoints/20/MANIFEST.json').exists()):
      damage(case)

  line = verdict(case, alone(3, 60), case.run(fault), 1)
  return checked(line, case, lambda resumed: resumed > 0 and resumed % 10 == 0, 'on disk')


def lose_two(case: Case) -> None:
  for host in (1, 2):
    lose(case, host)


def lose_and_flip(case: Case) -> None:
  lose(case, 2)
  for path in memory_of(case, 0).glob('slot_*.block'):
    flip(path, random.Random(case.options.seed))


def checked(line: Line, case: Case, right: Callable[[int], bool], words: str) -> Line:
  """`line`, or a failure if the run resumed from a wrong step or place."""
  log = (case.options.workdir / f'{case.name}.log').read_text()
  resumed = [incident['step_resumed'] for incident in case.incidents()]
  said = re.findall(rf'SNAPSHOT: resuming from step (\d+) {words}', log)
  good = resumed and all(map(right, resumed)) and list(map(int, said)) == resumed and not left_over(case)
  if line.whole and not good:
    return Line(line.tried, 0, f'resumed at {resumed}, said {said}, left in host RAM: {left_over(case)}')
  return line


def keys_of(options: argparse.Namespace) -> dict:
  """Keys for snapshots in a folder in RAM that scripts/faults.py removes at the end."""
  return {'snapshot.every': 5, 'snapshot.group': 3, 'snapshot.folder': f"'{options.memory}'"}


def memory_of(case: Case, host: int) -> pathlib.Path:
  return folder_of(SnapshotConfig(folder=str(case.options.memory)), case.workdir, host)


def left_over(case: Case) -> Sequence[str]:
  return [str(folder) for host in range(case.hosts) if (folder := memory_of(case, host)).exists()]


def lose(case: Case, host: int) -> None:
  """Kills the processes of a host and removes its snapshots."""
  case.send(signal.SIGKILL, host)
  shutil.rmtree(memory_of(case, host), ignore_errors=True)


def flip(path: pathlib.Path, draw: random.Random) -> None:
  with contextlib.suppress(FileNotFoundError), path.open('r+b') as file:
    place = draw.randrange(1000)
    file.seek(place)
    byte = file.read(1)[0]
    file.seek(place)
    file.write(bytes([byte ^ 1 << draw.randrange(8)]))


def in_step(case: Case) -> bool:
  return case.activity() in ('step', 'data')
