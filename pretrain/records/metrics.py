"""The numbers of a run: `metrics.jsonl` (the record), TensorBoard events (a copy), one progress line (for people).

`metrics.jsonl` holds one JSON object per logged step, in order, each step once however often the run was killed.
Every value reads back as the very float that was written. JSON has no NaN or infinity: they are written as the
strings "NaN", "Infinity" and "-Infinity", which Python's `float` (and `read_metrics`) takes back.
"""

import json
import math
import os
import pathlib
import time
from collections.abc import Mapping

from pretrain.errors import ConfigError
from pretrain.records.names import one_line
from pretrain.records.progress import make_display
from pretrain.workdirs.folder import Folder, as_folder

FILE = 'metrics.jsonl'


class Metrics:
  """Writes the numbers of one run; only the process with `write=True` touches files and the terminal.

  Opening it at `resume_step` removes every later step: they will be written again.
  """

  def __init__(self, workdir: str | os.PathLike[str], *, resume_step: int, total_steps: int, write: bool = True):
    self._writes = write
    if write:
      workdir = pathlib.Path(workdir)
      workdir.mkdir(parents=True, exist_ok=True)
      self._rows = JsonRows(workdir / FILE, resume_step)
      self._events = Events(workdir / 'tensorboard', resume_step)
      self._display = make_display(total_steps)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Records `values` of a training step; steps must grow."""
    if self._writes:
      self._record(step, values)
      self._display.show(step, values)

  def eval(self, step: int, values: Mapping[str, float]) -> None:
    """Records an evaluation (keys `eval/<set>/<name>`) in the row of its step, and prints the losses."""
    if self._writes:
      self._record(step, values)
      losses = [f'{key.removesuffix("/loss")} {value:.4f}' for key, value in values.items() if key.endswith('/loss')]
      self._display.print(f'step {step}  {"  ".join(losses)}')

  def add(self, values: Mapping[str, float]) -> None:
    """Records `values` in the last row: facts about an earlier step that arrived late. Dropped if there is no row."""
    if self._writes and self._rows.last_step >= 0:
      self._record(self._rows.last_step, values)

  def warn(self, text: str) -> None:
    """Shows a warning."""
    if self._writes:
      self._display.warn(text)

  def close(self) -> None:
    if self._writes:
      self._rows.close()
      self._events.close()
      self._display.close()

  def _record(self, step: int, values: Mapping[str, float]) -> None:
    self._rows.write(step, values)
    self._events.write(step, values)


def encode(row: Mapping[str, float]) -> bytes:
  """One line of JSON; floats as their shortest exact decimal, non-finite ones as strings.

  >>> encode({'step': 3, 'loss': 0.1, 'grad_norm': float('-inf')})
  b'{"step": 3, "loss": 0.1, "grad_norm": "-Infinity"}\\n'
  """
  plain = {k: v if math.isfinite(v) else json.dumps(v) for k, v in row.items()}
  return json.dumps(plain, allow_nan=False).encode() + b'\n'


def decode(line: bytes) -> dict[str, float]:
  """The row that `encode` wrote; `step` is an int. Raises ValueError for a line that was cut off."""
  row = json.loads(line)
  if not line.endswith(b'\n') or not isinstance(row, dict) or 'step' not in row:
    raise ValueError(f'not a row of {FILE}')
  return {k: float(v) if isinstance(v, str) else v for k, v in row.items()}


def read_metrics(workdir: str | os.PathLike[str] | Folder) -> list[dict[str, float]]:
  """The rows of a run, in order; a last line that is being written is left out. No file: no rows."""
  path = as_folder(workdir) / FILE
  return scan(path, math.inf)[0] if path.exists() else []


def scan(path: Folder, last_step: float) -> tuple[list[dict[str, float]], list[int]]:
  """(rows up to `last_step`, [0 and the byte at which each of them ends]).

  Raises ConfigError for a damaged line that is not the last: only a person should delete the rows after it.
  """
  rows, ends = [], [0]
  lines = path.read_bytes().splitlines(keepends=True)
  for number, line in enumerate(lines, 1):
    try:
      row = decode(line)
    except ValueError as error:
      if number < len(lines):
        raise ConfigError(f'{path}:{number}: not a row of metrics; nothing was changed. Remove the line.') from error
      break
    if row['step'] > last_step:
      break
    rows.append(row)
    ends.append(ends[-1] + len(line))
  return rows, ends


class JsonRows:
  """Appends rows to metrics.jsonl. `write` returns when the operating system has the row: kill -9 cannot lose it."""

  def __init__(self, path: pathlib.Path, resume_step: int):
    path.touch()
    untear(path)
    rows, ends = scan(path, resume_step)
    os.truncate(path, ends[-1])  # one system call: a kill leaves either the old file or the new one
    self._last = rows[-1] if rows else {'step': -1}
    self._start = ends[-2] if rows else 0
    self._file = path.open('r+b')
    self._file.seek(ends[-1])

  @property
  def last_step(self) -> int:
    """The step of the last row; -1 if there is none."""
    return self._last['step']

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Appends a row, or adds `values` to the last one where it has the same step."""
    if step < self._last['step']:
      raise ValueError(f'step {step} after step {self._last["step"]}')
    if step == self._last['step']:
      self._last |= values
      self._file.seek(self._start)
    else:
      self._last = {'step': step, **values}
      self._start = self._file.tell()
    self._file.write(encode(self._last))
    self._file.flush()
    self._file.truncate()  # a value may be shorter than the one it replaces; a kill before this leaves no row

  def close(self) -> None:
    self._file.close()


def untear(path: pathlib.Path) -> None:
  """Restores a last row that was cut off while an evaluation was being added to it: its whole values stay.

  Training values are on disk before a checkpoint is begun, so every other torn row belongs to a step that is removed.
  """
  lines = path.read_bytes().splitlines(keepends=True)
  if not lines or is_row(lines[-1]):
    return
  head = lines[-1].removesuffix(b'}')
  if head == lines[-1]:  # cut inside a value, which may look whole: 1 of 12
    head = head.rpartition(b',')[0]
  while head and not is_row(head + b'}\n'):
    head = head.rpartition(b',')[0]
  if head:
    temporary = path.with_suffix('.tmp')
    temporary.write_bytes(b''.join(lines[:-1]) + head + b'}\n')
    temporary.replace(path)


def is_row(line: bytes) -> bool:
  try:
    decode(line)
  except ValueError:
    return False
  return True


class Events:
  """TensorBoard's copy, under the same names. It hides steps after `resume_step` that an earlier start wrote."""

  def __init__(self, folder: pathlib.Path, resume_step: int):
    self._folder, self._purge_step, self._writer = folder, resume_step + 1, None

  def write(self, step: int, values: Mapping[str, float]) -> None:
    if self._writer is None:
      from tensorboardX import SummaryWriter  # takes half a second: not before the config is checked

      # The library names a file by the second and the host: a restart within a second would write over it.
      suffix = f'.{time.time_ns()}.{os.getpid()}'
      self._writer = SummaryWriter(str(self._folder), purge_step=self._purge_step, filename_suffix=suffix)
    from tensorboardX.proto.summary_pb2 import Summary

    for name, value in values.items():
      # Not `add_scalar`: it puts _ in place of most characters, and two sources could become one.
      scalar = Summary.Value(tag=one_line(name), simple_value=float(value))
      self._writer.file_writer.add_summary(Summary(value=[scalar]), step)

  def close(self) -> None:
    if self._writer is not None:
      self._writer.close()
