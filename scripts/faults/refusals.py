"""Mistakes that must be refused, in one sentence and with nothing changed: F6, F15, F17; and helpers for such trials.

A trial is a call of `pretrain`. It checks the exit code, words of the output, and that no file of the run or store
changed. Trials that need no process of their own run in this one.
"""

import contextlib
import dataclasses
import hashlib
import io
import os
import pathlib
import shutil
import socket
import sys
import time
from collections.abc import Callable, Sequence

from faults.case import CONFIG, TINY, Line, call

WIDE = 2**26  # width of an MLP: 24 GiB for a matrix and its moments, more than a test machine has
FAST = {'train.steps': 130, 'checkpoint.keep_every': 10}


@dataclasses.dataclass(frozen=True)
class Trial:
  """`act` must end with `code` and print all of `words`; nothing in `kept` may change."""

  name: str
  act: Callable[[], tuple[int, str]]
  code: int
  words: Sequence[str]
  kept: pathlib.Path | None = None

  def problem(self) -> str:
    """'' if the trial behaved as required, otherwise what went wrong."""
    before = contents(self.kept)
    try:
      code, said = self.act()
    except Exception as error:  # a user would see a traceback; the other trials continue
      return f'{self.name}: it raised {error!r}'
    changed = [name for name, now in contents(self.kept).items() if before.get(name) != now]
    missing = [word for word in self.words if word not in said]
    line = (said.strip().splitlines() or ['nothing'])[-1][:300]
    if code != self.code or missing or 'Traceback' in said:
      return f'{self.name}: code {code} for {self.code}, without {missing}: {line}'
    gone = sorted(before.keys() - contents(self.kept).keys())
    return f'{self.name}: {[*changed, *gone][0]} was changed' if changed or gone else ''


def contents(folder: pathlib.Path | None) -> dict[str, str]:
  """A hash of every file, except the timeline, which records when a process began."""
  paths = [] if folder is None else [p for p in sorted(folder.rglob('*')) if p.is_file()]
  return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in paths if p.name != 'timeline.jsonl'}


def line_of(trials: Sequence[Trial]) -> Line:
  problems, slowest = [], 0.0
  for trial in trials:
    start = time.monotonic()
    problems += filter(None, [trial.problem()])
    slowest = max(slowest, time.monotonic() - start)
  return Line(len(trials), len(trials) - len(problems), problems[0] if problems else f'{slowest:.1f} s at most')


def pretrain(*argv: str) -> tuple[int, str]:
  """(exit code, output) of a command that runs in this process, where the number of devices cannot change."""
  os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=1'
  from pretrain.cli.main import main

  said = io.StringIO()
  with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
    code = main([*argv])
  return code, said.getvalue()


def training(workdir: pathlib.Path, *flags: str, **keys) -> tuple[int, str]:
  """Runs `pretrain train` with the tiny model; keys have __ for the dot."""
  found = TINY | FAST | {key.replace('__', '.'): value for key, value in keys.items()}
  return pretrain('train', f'--gin_file={CONFIG}', f'--workdir={workdir}',
                  *(f'--gin.{k}={v}' for k, v in found.items()), *flags)  # fmt: skip


def copied(run: pathlib.Path, name: str, options) -> pathlib.Path:
  path = options.workdir / name
  shutil.rmtree(path, ignore_errors=True)
  return pathlib.Path(shutil.copytree(run, path, symlinks=True))


def flip(path: pathlib.Path) -> None:
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 4
  path.write_bytes(data)


def arrays_of(step: pathlib.Path) -> pathlib.Path:
  return max(step.glob('state/ocdbt.process_0/d/*'), key=lambda path: path.stat().st_size)


def f6(options, alone) -> Line:
  """all checkpoints are damaged or missing: code 66, nothing overwritten, no start at step 0"""
  run = alone(1, 120).workdir

  def broken(name: str, damage: Callable[[pathlib.Path], None], words: Sequence[str]) -> Trial:
    path = copied(run, f'f6_{name}', options)
    for step in sorted((path / 'checkpoints').iterdir()):
      damage(step)
    return Trial(name, lambda: training(path), 66, [*words, 'Not starting from step 0'], path)

  return line_of([
    broken('flipped', lambda step: flip(arrays_of(step)), ['none intact', 'has sha256']),
    broken('no_manifest', lambda step: (step / 'MANIFEST.json').unlink(), ['none intact', 'is missing']),
    broken('put_aside', lambda step: step.rename(f'{step}.corrupt'), ['none intact', 'quarantined']),
    broken('gone', shutil.rmtree, ['no checkpoint in', 'metrics.jsonl reaches step 120']),
  ])  # fmt: skip


def f15(options, alone) -> Line:
  """the model differs from the checkpoint: shape, dtype, missing, extra: refused before memory is allocated"""
  run = alone(1, 120).workdir

  def told(name: str, words: Sequence[str], **keys) -> Trial:
    """A run whose config.gin was changed too, so that only its arrays differ from the model."""
    path = copied(run, f'f15_{name}', options)
    text = (path / 'config.gin').read_text()
    for key, value in keys.items():
      dotted = key.replace('__', '.')
      kept = [line for line in text.splitlines() if not line.startswith(f'{dotted} =')]
      if dotted.endswith('.name'):  # the keys of another choice
        kept = [line for line in kept if not line.startswith(dotted.removesuffix('name'))]
      text = '\n'.join([*kept, f'{dotted} = {value}']) + '\n'
    (path / 'config.gin').write_text(text)
    return Trial(name, lambda: training(path, **keys), 66, ['CKPT-MISMATCH', *words, 'Nothing was changed'], path)

  return line_of([
    told('shape', [f'{WIDE}, 32] in the model', '(first of '], model__mlp__hidden=WIDE),
    told('extra', ['absent in step 120', '(first of '], averaging__name="'ema'"),
    told('missing', [' in step 120', 'absent in the model'], optimizer__name="'adafactor'"),
    Trial('dtype', lambda: dtype_mismatch(run), 66, ['CKPT-MISMATCH', 'float32[', 'bfloat16[', '(first of '], run),
  ])  # fmt: skip


def dtype_mismatch(run: pathlib.Path) -> tuple[int, str]:
  """Restores with another dtype, which no config key can produce; Orbax alone would cast silently."""
  import jax
  import jax.numpy as jnp

  from pretrain.checkpoints.checkpoints import Checkpoints
  from pretrain.checkpoints.config import CheckpointConfig
  from pretrain.config import bindings
  from pretrain.errors import CheckpointError
  from pretrain.experiment.experiment import Experiment
  from pretrain.experiment.program import build_program

  abstract = build_program(bindings.load(Experiment, [str(run / 'config.gin')], [])).abstract
  narrow = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding)
  try:
    with contextlib.closing(Checkpoints(run, CheckpointConfig(), read_only=True)) as checkpoints:
      checkpoints.restore_params(jax.tree.map(narrow, abstract.params), 120)
  except CheckpointError as error:
    return error.exit_code, str(error)
  return 0, 'it was read'


def f17(options, alone) -> Line:
  """the coordinator cannot be reached, its port is taken, a peer never starts: reported in time, with the address"""
  with socket.socket() as taken:
    taken.bind(('127.0.0.1', 0))
    taken.listen()
    busy = taken.getsockname()[1]
    with socket.socket() as probe:
      probe.bind(('127.0.0.1', 0))
      free = probe.getsockname()[1]
    seconds = lambda start: time.monotonic() - start

    def process(host: int, address: str) -> tuple[int, str]:
      env = {'PRETRAIN_COORDINATOR': address, 'PRETRAIN_NUM_HOSTS': '2', 'PRETRAIN_HOST': str(host)}
      start = time.monotonic()
      keys = TINY | {'mesh.data': 2, 'watchdog.init': 3}
      flags = [f'--gin_file={CONFIG}', f'--workdir={options.workdir}/f17', *(f'--gin.{k}={v}' for k, v in keys.items())]
      done = call([sys.executable, '-m', 'pretrain', 'train', *flags], XLA_FLAGS='', **env)
      late = ' too late' if seconds(start) > 40 else ''  # 3 s, and a start of Python on a busy machine
      return done.returncode, done.stdout + done.stderr + late

    given = lambda host, address, code, *words: Trial(
      f'process {host} at {address}', lambda: process(host, address), code, [*words, address]
    )
    return line_of([
      given(1, f'127.0.0.1:{free}', 70, 'has not reached the coordinator', 'within 3 s'),
      given(0, f'127.0.0.1:{free}', 70, 'has not connected to the others', 'within 3 s'),
      given(0, f'127.0.0.1:{busy}', 64, 'Address already in use', 'use another port'),
      given(1, f'127.0.0.1:{busy}', 70, 'has not connected to the others', 'within 3 s'),
      given(0, f'0.0.0.0:{free}', 64, 'to every network'),
      given(1, 'nowhere', 64, 'is not an address'),
    ])  # fmt: skip
