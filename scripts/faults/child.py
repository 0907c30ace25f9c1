"""`pretrain` as scripts/faults.py starts it: it reports what it is doing, and fails as it is told to."""

import errno
import json
import os
import pathlib
import resource
import sys
import time
import types

from faults.poison import inject_flips, inject_losses

INJECT = 'PRETRAIN_FAULTS'  # the faults to inject, as JSON


def child(argv: list[str]) -> int:
  """Runs `pretrain ARGV`, writes what it is doing to files that faults.py reads, and injects the given faults."""
  spec = json.loads(os.environ[INJECT])
  host, notes = int(os.environ.get('PRETRAIN_HOST', 0)), pathlib.Path(spec['notes'])
  notes.mkdir(parents=True, exist_ok=True)
  note(notes, f'activity{host}', 'start')
  note(notes, f'pid{host}', str(os.getpid()))
  sys.modules['boto3'] = None  # otherwise TensorBoard's writer imports it (0.7 s)
  if host == spec.get('away'):
    return 1
  import pretrain.records.timeline as timeline
  from pretrain.cli import main
  from pretrain.fleet import launch
  from pretrain.run import train

  enter = timeline.Timeline.enter
  timeline.Timeline.enter = lambda self, activity: (note(notes, f'activity{host}', activity), enter(self, activity))[1]
  if spec.get('host', host) == host:
    inject(spec, notes)
    inject_flips(spec, notes)
  inject_losses(spec)
  if 'slow_save' in spec:
    tell_saves(notes, spec['slow_save'])
  if not spec.get('report'):
    train.write_report = lambda workdir: None  # saves a second or two per run
  if 'fail_save' in spec:
    fail_saves(spec['fail_save'], spec['at'])
  if 'heartbeat' in spec:
    launch.HEARTBEAT_SECONDS = spec['heartbeat']
  return main.main(argv)


def note(notes: pathlib.Path, name: str, text: str) -> None:
  (notes / f'.{name}').write_text(text)
  (notes / f'.{name}').replace(notes / name)


def inject(spec: dict, notes: pathlib.Path) -> None:
  """Makes this process sleep once, before step `at`: while it waits for data, or in the step."""
  if spec.get('sleep') is None:
    return
  from pretrain.run import loop, step_numbers

  done, loader, log, seen = notes / 'done', loop.loader, step_numbers.log, [0]

  def once(step: int) -> None:
    if step == spec['at'] and not done.exists():
      done.touch()
      time.sleep(10_000)

  def slow_loader(*args):
    for i, element in enumerate(loader(*args)):
      if spec['sleep'] == 'data':
        once(i)
      yield element

  def slow_log(run, step, *rest):
    seen[0] += 1
    once(seen[0])
    return log(run, step, *rest)

  loop.loader = slow_loader
  if spec['sleep'] == 'step':
    step_numbers.log = slow_log


def tell_saves(notes: pathlib.Path, seconds: float) -> None:
  """Reports each part of a save, and makes it `seconds` longer, like a slow disk."""
  from pretrain.checkpoints import manifest, step_folders
  from pretrain.checkpoints.orbax_files import Files

  saves = [0]
  note(notes, 'saving', '')

  def slow(owner, name: str, part: str) -> None:
    do = getattr(owner, name)

    def slowly(*args, **kwargs):
      saves[0] += part == 'files'
      note(notes, 'saving', f'{saves[0]} {part}')
      time.sleep(seconds)
      return do(*args, **kwargs)

    setattr(owner, name, slowly)

  slow(Files, 'wait', 'files')  # Orbax writes the files meanwhile
  slow(manifest, 'hash_files', 'hash')
  slow(manifest, 'encode', 'manifest')  # its temporary file is open
  slow(step_folders, 'end', 'rename')  # the step exists, but is still marked as being written
  slow(step_folders, 'remove', 'retain')


def fail_saves(kind: str, at: int) -> None:
  """Makes save number `at` fail: in the kernel (EFBIG: files are limited to 100 kB), or by an error from fsync."""
  from pretrain.checkpoints import manifest
  from pretrain.checkpoints.orbax_files import Files

  saves, fsync, begin = [0], os.fsync, Files.begin

  def begun(self, *args):
    saves[0] += 1
    if kind == 'EFBIG':
      limit = 100_000 if saves[0] == at else resource.RLIM_INFINITY
      resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    return begin(self, *args)

  def failing(number: int) -> None:
    if saves[0] == at and kind != 'EFBIG':
      raise OSError(getattr(errno, kind), os.strerror(getattr(errno, kind)))
    fsync(number)

  Files.begin, manifest.os = begun, types.SimpleNamespace(**vars(os) | {'fsync': failing})


if __name__ == '__main__':
  sys.exit(child(sys.argv[1:]))
