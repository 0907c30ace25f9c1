"""A disk that is full, fails, or may not be written: F8."""

import contextlib
import ctypes
import dataclasses
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator

from faults.case import Case, Line, call, joined
from pretrain.checkpoints import step_folders
from pretrain.fleet.supervise import Policy

CLONE_NEWNS = 0x20000  # of unshare(2): mounts that only this process sees


def f8(options, alone) -> Line:
  """the disk is full, fails, is read-only: reported at once, earlier steps stay; with retries or space it continues"""
  lines = [went_on(options, alone, kind) for kind in (('ENOSPC', 'EIO', 'EROFS') if options.full else ('ENOSPC',))]
  lines += [ended(options, alone, kind) for kind in (('EFBIG', 'EIO') if options.full else ('EFBIG',))]
  full = full_disk(options, alone)
  real = f'{"a real disk of 3 MiB among them" if full.tried else "no disk could be mounted"}'
  line = joined([*lines, full, not_writable(options)])
  return dataclasses.replace(line, worst=line.worst or real)


def went_on(options, alone, kind: str) -> Line:
  """The second save fails, and `checkpoint.retries` allows it."""
  keys = {'checkpoint.keep': 99, 'checkpoint.retries': 1}
  case = Case(f'f8_{kind}', options, steps=40, inject={'fail_save': kind, 'at': 2}, keys=keys)
  code = case.run(policy=Policy(max_restarts=0))
  problem = case.differs(alone(1, 40)) if code == 0 else f'exit code {code}'
  return judged(case, problem, [10, 30, 40], 'The next save is its retry.')


def ended(options, alone, kind: str) -> Line:
  """The second save fails, no retry is allowed; then the disk works again, and the same command resumes."""
  keys = {'checkpoint.keep': 99, 'checkpoint.retries': 0}
  case = Case(f'f8_end_{kind}', options, steps=40, inject={'fail_save': kind, 'at': 2}, keys=keys)
  code = case.run(policy=Policy(max_restarts=5))
  first = judged(case, '' if code == 66 else f'exit code {code}', [10], 'Earlier steps are intact.')
  case.inject = {}
  code = case.run()
  return joined([first, went(case, code, alone)])


def went(case: Case, code: int, alone) -> Line:
  problem = case.differs(alone(1, case.steps)) if code == 0 else f'exit code {code}'
  return Line(1, int(not problem), problem and f'{case.name}: {problem}')


def judged(case: Case, problem: str, steps: list[int], *words: str) -> Line:
  """Checks what the run left on the disk, and what it printed."""
  folder, said = case.workdir / 'checkpoints', pathlib.Path(f'{case.workdir}.log').read_text()
  left = [path.name for path in folder.iterdir() if path.is_symlink() or step_folders.kind_of(path) != 'finished']
  there, missing = step_folders.finished(folder), [word for word in ('CKPT-', *words) if word not in said]
  for wrong in (
    left and f'left behind {left}',
    there != steps and f'steps {there}',
    missing and f'not printed: {missing}',
  ):
    problem = problem or wrong or ''
  problem = problem or ('a traceback' if 'Traceback' in said else '')
  return Line(1, int(not problem), problem and f'{case.name}: {problem}')


def full_disk(options, alone) -> Line:
  """A real disk of 3 MiB, if this machine can mount one: it fills, the run ends, gets space, and resumes.

  A save takes 0.7 MiB, so the fifth of six does not fit, and three (two kept, one being written) do.
  """
  keys = {'checkpoint.keep': 99, 'checkpoint.retries': 0}
  case = Case('f8_mounted', options, steps=60, keys=keys)
  with mounted(case.workdir / 'checkpoints', 3) as disk:
    if disk is None:
      return Line(0, 0)
    code = case.run()
    there = step_folders.finished(disk)
    first = judged(case, '' if code == 66 and there else f'exit code {code}', there, 'CKPT-NOSPACE', 'Free space.')
    for step in there[:-1]:
      shutil.rmtree(disk / str(step))
    case.keys['checkpoint.keep'] = 2
    return joined([first, went(case, case.run(), alone)])


@contextlib.contextmanager
def mounted(folder: pathlib.Path, mebibytes: int) -> Iterator[pathlib.Path | None]:
  """A file system in RAM that ends with this process; None if this user may not mount one."""
  folder.mkdir(parents=True)
  commands = (
    ['mount', '--make-rprivate', '/'],
    ['mount', '-t', 'tmpfs', '-o', f'size={mebibytes}m', 'tmpfs', str(folder)],
  )
  own = ctypes.CDLL(None).unshare(CLONE_NEWNS) == 0
  good = own and all(subprocess.run(command, capture_output=True, check=False).returncode == 0 for command in commands)
  try:
    yield folder if good else None
  finally:
    if good:
      subprocess.run(['umount', str(folder)], check=False)


def not_writable(options) -> Line:
  """A folder that not even root may write: refused before anything starts."""
  case = Case('f8_readonly', options)
  case.workdir = pathlib.Path('/proc/self/run')
  done = call([sys.executable, '-m', 'pretrain', *case.command()[3:]])
  good = done.returncode == 64 and 'cannot be written' in done.stderr and 'Traceback' not in done.stderr
  return Line(1, int(good), '' if good else f'read-only: code {done.returncode}: {done.stderr[-200:]}')
