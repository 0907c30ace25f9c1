"""Checkpoints compared with what was written (`pretrain checkpoints verify`) and with each other (`… diff`).

Arrays are read in groups, so neither needs memory for more than a few.
"""

import contextlib
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import jax
import numpy as np

from pretrain.checkpoints import manifest, step_folders
from pretrain.checkpoints.checkpoints import Checkpoints
from pretrain.checkpoints.config import CheckpointConfig
from pretrain.checkpoints.wording import first_of
from pretrain.errors import CheckpointError
from pretrain.replicas import digest
from pretrain.tools.describe import table
from pretrain.tools.weights import Step
from pretrain.workdirs.folder import Folder

GROUP_BYTES = 2**28  # read at a time


def verify(workdir: Folder, steps: Collection[int], tell: Callable[[str], None]) -> list[int]:
  """The damaged steps among `steps`, or among all if it is empty; calls `tell` with a line for each step."""
  directory = workdir.resolve() / 'checkpoints'
  there = step_folders.folders(directory)
  if not there or not set(steps) <= there.keys():
    raise CheckpointError('CKPT-NONE', f'no such checkpoint in {directory}; it has {_list(there)}. Check the path.')
  damaged = []
  with contextlib.closing(Checkpoints(workdir, CheckpointConfig(), read_only=True)) as checkpoints:
    for step in steps or there:
      word, text = _verdict(checkpoints, there[step])
      damaged += [step] if word == 'DAMAGED' else []
      tell(f'step {step}  {word:<10}  {text}')
  for name in step_folders.quarantined(directory):
    tell(f'{name}  was set aside by a run that found it damaged')
  return damaged


def _list(steps: Collection[int]) -> str:
  return ', '.join(map(str, steps)) or 'none'


def _verdict(checkpoints: Checkpoints, folder: pathlib.Path) -> tuple[str, str]:
  step = int(folder.name)
  kind = step_folders.kind_of(folder)
  if kind == 'unverified':
    return 'unverified', f'written before there was {manifest.FILE}: nothing to compare it with'
  if kind == 'unfinished' and step_folders.is_marked(folder.parent, step):
    return 'unfinished', 'it is being written, or was cut off; the next start of the run removes it'
  if reason := checkpoints.damage(step):
    return 'DAMAGED', reason
  written = manifest.read(folder)
  try:
    wrong = list(_wrong_leaves(checkpoints, step, written.leaves))
  except CheckpointError as error:
    return 'DAMAGED', str(error)
  size = f'{len(written.files)} files, {written.size / 2**20:.1f} MiB, {len(written.leaves)} arrays'
  return ('DAMAGED', first_of(wrong)) if wrong else ('whole', size)


def _wrong_leaves(checkpoints: Checkpoints, step: int, written: Mapping[str, manifest.Leaf]) -> Iterator[str]:
  shapes = checkpoints.shapes(step)
  for key in sorted(shapes.keys() ^ written.keys()):
    yield f'{key} is {"not in the files" if key in written else f"not in {manifest.FILE}"}'
  for group in _groups({key: x for key, x in shapes.items() if key in written}):
    for key, x in checkpoints.arrays(step, group).items():
      leaf = manifest.Leaf(tuple(x.shape), str(x.dtype), digest.text(digest.sums(x)))
      if leaf != written[key]:
        yield f'the values of {key} differ from those that were saved'


def _groups(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[list[str]]:
  """The paths, in groups of about GROUP_BYTES."""
  group, size = [], 0
  for key, x in shapes.items():
    group.append(key)
    size += x.size * x.dtype.itemsize
    if size >= GROUP_BYTES:
      yield group
      group, size = [], 0
  if group:
    yield group


def diff(first: Step, second: Step) -> str:
  """A table of the arrays that differ (shape, largest absolute difference), then the number of those that do not."""
  with contextlib.ExitStack() as stack:
    a, b = (
      stack.enter_context(contextlib.closing(Checkpoints(step.workdir, CheckpointConfig(), read_only=True)))
      for step in (first, second)
    )
    left, right = a.shapes(first.number), b.shapes(second.number)
    same = [key for key in left if left[key] == right.get(key)]
    equal, lines = _equal_by_digest(first, second, same), _unlike(left, right)
    for group in _groups({key: left[key] for key in same if key not in equal}):
      pairs = zip(*(c.arrays(s.number, group).items() for c, s in ((a, first), (b, second))), strict=True)
      lines += [_line(key, x, y) for (key, x), (_, y) in pairs if np.asarray(x).tobytes() != np.asarray(y).tobytes()]
  count = len(left.keys() | right.keys()) - len(lines)
  head = table(lines, ('array', 'shape', 'max |a - b|')) + '\n' if lines else ''
  return f'{head}{count} of {count + len(lines)} arrays are equal to the bit'


def _unlike(left: Mapping[str, jax.ShapeDtypeStruct], right) -> list[tuple[str, str, str]]:
  keys = [key for key in dict.fromkeys([*left, *right]) if left.get(key) != right.get(key)]
  show = lambda x: 'absent' if x is None else f'{x.dtype}{list(x.shape)}'
  return [(key, f'{show(left.get(key))} / {show(right.get(key))}', '-') for key in keys]


def _equal_by_digest(first: Step, second: Step, keys: Sequence[str]) -> set[str]:
  """The arrays that need not be read, because both manifests have the same digest."""
  try:
    a, b = (manifest.read(s.workdir.resolve() / 'checkpoints' / str(s.number)).leaves for s in (first, second))
  except ValueError:
    return set()
  return {key for key in keys if a[key].digest == b[key].digest}


def _line(key: str, x: jax.Array, y: jax.Array) -> tuple[str, str, str]:
  apart = np.abs(np.asarray(x).astype(np.float64) - np.asarray(y).astype(np.float64))
  return key, f'{x.dtype}{list(x.shape)}', f'{apart.max():.4g}'
