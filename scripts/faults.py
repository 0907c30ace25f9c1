"""Breaks real runs in many ways, on this machine, and shows that none of them loses anything.

python scripts/faults.py [F1 F3 …] [--full] [--times N] [--jobs N] [--go_on] [--seed 0] [--workdir DIR]

Prints one line for each fault: how often it was tried, how often the run recovered by itself with the losses of an
uninterrupted run, bit for bit (or refused to run, if that is right), and the worst case. Exit code 1 if one did not.
The model is tiny, because restarts are what is measured. Each fault is a process; with --full the long faults are
several processes, each with a part of the trials. `jobs` of them run in parallel, except MTTR, which measures time.
--go_on keeps the results of an earlier, interrupted start. Ctrl-C and SIGTERM end all processes and free their memory.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import NoReturn

from faults.case import PYTHONPATH, Line, dying_with_this, joined, references
from faults.data import f12, f13, f14
from faults.disk import f8
from faults.kills import f1, f2, f3, f7, mttr
from faults.refusals import f6, f15, f17
from faults.runs import f4, f5, f10, f11, f19
from faults.safety import f18
from faults.snapshots import f20, f21
from faults.stores.runs import f22, f23, f24, f25, f26, f27, f28, f29, f30
from faults.values import f9, f16

from pretrain.devices.platform import cores
from pretrain.fleet import supervise
from pretrain.snapshots.slots import MEMORY

BESIDE = (f1, f2, f3, f4, f5, f6, f7, f8, f9, f10, f11, f12, f13, f14, f15, f16, f17, f18, f20, f21,
          f22, f23, f24, f25, f26, f27, f28, f29, f30)  # fmt: skip
AFTERWARDS = (f19, mttr)  # f19 uses all runs above; mttr runs alone
FAULTS = {f.__name__.upper(): f for f in (*BESIDE, *AFTERWARDS)}
PARTS = {
  'F1': 4, 'F2': 4, 'F3': 3, 'F4': 2, 'F5': 3, 'F7': 2, 'F10': 3, 'F11': 2, 'F16': 4, 'F22': 4, 'F27': 2,  # with --full
}  # fmt: skip
LONGEST_FIRST = ('F3', 'F10', 'F7', 'F1', 'F4', 'F2', 'F5')


@dataclasses.dataclass(frozen=True)
class Job:
  """A fault, or with --full a part of its trials, as a separate process."""

  name: str
  part: int
  parts: int

  def timed(self, options: argparse.Namespace) -> tuple[Line, float]:
    """(the result, the seconds it took)."""
    start = time.monotonic()
    return self.run(options), time.monotonic() - start

  def run(self, options: argparse.Namespace) -> Line:
    """Runs the job and returns its result; with --go_on, the good result of an earlier start."""
    kept = options.results / f'{self.name}_{self.part}_{self.parts}.json'
    if options.go_on and kept.exists() and (line := read(kept)).whole:
      return line
    kept.unlink(missing_ok=True)
    # In its own process group, so that Ctrl-C in a terminal does not reach it, where it would stop its runs.
    command = dying_with_this([sys.executable, __file__, *self.flags(options, kept)])
    with kept.with_suffix('.log').open('w') as log:
      process = subprocess.Popen(
        command, stdout=log, stderr=log, process_group=0, env=os.environ | {'PYTHONPATH': PYTHONPATH}
      )
      options.running.append(process)
      process.wait()
    if not kept.exists():
      said = kept.with_suffix('.log').read_text().strip().splitlines() or ['nothing']
      return Line(1, 0, f'it ended without a result: {said[-1]}')
    return read(kept)

  def flags(self, options: argparse.Namespace, result: pathlib.Path) -> list[str]:
    workdir = options.workdir / f'{self.name.lower()}_{self.part}'
    shutil.rmtree(workdir, ignore_errors=True)
    return [
      self.name, f'--part={self.part}', f'--parts={self.parts}', f'--result={result}', f'--workdir={workdir}',
      f'--alone={options.alone}', f'--memory={options.memory}', f'--results={options.results}',
      f'--seed={options.seed}', f'--times={options.times}',
      *(['--full'] if options.full else []),
    ]  # fmt: skip


def read(path: pathlib.Path) -> Line:
  return Line(**json.loads(path.read_text()))


def jobs_of(name: str, options: argparse.Namespace) -> list[Job]:
  parts = PARTS.get(name, 1) if options.full else 1
  parts = min(parts, options.times or parts)
  return [Job(name, part, parts) for part in range(parts)]


def run_all(names: Sequence[str], options: argparse.Namespace) -> bool:
  """Whether all faults were survived; prints each line as soon as it and the lines before it are known."""
  rank = lambda name: LONGEST_FIRST.index(name) if name in LONGEST_FIRST else len(LONGEST_FIRST)
  whole, beside = True, [name for name in names if FAULTS[name] in BESIDE]
  pool = concurrent.futures.ThreadPoolExecutor(options.jobs)  # no `with`: it would wait for all, even after Ctrl-C
  try:
    order = [job for name in sorted(beside, key=rank) for job in jobs_of(name, options)]
    ending = {job: pool.submit(job.timed, options) for job in order}
    for name in beside:
      whole &= tell(name, [ending[job].result() for job in jobs_of(name, options)])
  finally:
    pool.shutdown(wait=False, cancel_futures=True)
  for name in names:
    if name not in beside:
      whole &= tell(name, [Job(name, 0, 1).timed(options)])
  return whole


def tell(name: str, found: Sequence[tuple[Line, float]]) -> bool:
  line, seconds = joined([line for line, _ in found]), sum(seconds for _, seconds in found)
  print(f'{name:<4} {FAULTS[name].__doc__}: {line} ({seconds:.0f} s)', flush=True)
  return line.whole


def end_now(options: argparse.Namespace) -> NoReturn:
  """Ends all processes, then removes their snapshots from host RAM."""
  for process in options.running:
    process.kill()
    process.wait()
  time.sleep(0.5)  # their children die with them, a moment later
  shutil.rmtree(options.memory, ignore_errors=True)
  os._exit(130)


def parse() -> argparse.Namespace:
  flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  flags.add_argument('faults', nargs='*', choices=[*FAULTS, []], help='default: all; MTTR only with --full')
  flags.add_argument('--full', action='store_true', help='as many trials as the acceptance bars require')
  flags.add_argument('--times', type=int, default=0, help='try each fault this often instead')
  flags.add_argument('--jobs', type=int, default=cores(), help='how many run in parallel; default: one per core')
  flags.add_argument('--go_on', action='store_true', help='keep the results of an earlier start')
  flags.add_argument('--seed', type=int, default=0)
  flags.add_argument('--workdir', type=pathlib.Path, default=pathlib.Path('runs/faults'))
  for name, kind in (('part', int), ('parts', int), *((name, pathlib.Path) for name in ('result', 'alone', 'memory'))):
    flags.add_argument(f'--{name}', type=kind, help=argparse.SUPPRESS)
  flags.add_argument('--results', type=pathlib.Path, help=argparse.SUPPRESS)
  return flags.parse_args()


def main() -> int:
  options, start = parse(), time.monotonic()
  if options.result is not None:  # one job
    options.workdir.mkdir(parents=True, exist_ok=True)
    supervise.SAME_STEP = 50  # here failures repeat by design
    line = FAULTS[options.faults[0]](options, references(options))
    options.result.write_text(json.dumps(dataclasses.asdict(line)))
    return 0
  options.workdir = options.workdir.resolve()
  options.alone, options.results = options.workdir / 'alone', options.workdir / 'results'
  if not options.go_on:
    shutil.rmtree(options.alone, ignore_errors=True)
    shutil.rmtree(options.results, ignore_errors=True)
  options.results.mkdir(parents=True, exist_ok=True)
  options.running = []
  signal.signal(signal.SIGTERM, signal.default_int_handler)
  with tempfile.TemporaryDirectory(prefix='pretrain_faults_', dir=MEMORY, ignore_cleanup_errors=True) as memory:
    options.memory = pathlib.Path(memory)
    try:
      whole = run_all(options.faults or [name for name in FAULTS if options.full or name != 'MTTR'], options)
    except KeyboardInterrupt:
      end_now(options)
  print(f'{"all survived" if whole else "NOT all survived"} in {time.monotonic() - start:.0f} s')
  return 0 if whole else 1


if __name__ == '__main__':
  sys.exit(main())
