"""Plans of large stores, kept in files: made once (by a run, or ahead by `pretrain data plan`), then read.

A plan is a pure function of a store and a config, so its file is a cache: it may be deleted at any time.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import threading
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from data.errors import DataError
from data.packing.plan import Bins, Cuts, Pieces, Plan, Planner, Stream

VERSION = 2  # raise when the same arguments give other plans
LISTED = (*Pieces._fields[:-1], 'piece_tasks')  # names in a file, where `tasks` are those of rows
LARGE = 2**20  # tokens of a store; smaller ones are planned faster than a file is read


class KeptPlans:
  """A planner (packing/plan.py) that keeps what `planner` makes in `folder`; `what` (JSON) is all it depends on.
  `stream(shard, variant)` is the text that it lays in rows."""

  def __init__(self, planner: Planner, stream: Callable[[int, int], Stream], folder: pathlib.Path, what: Any):
    self.variants, self._planner, self._stream = planner.variants, planner, stream
    name = hashlib.sha256(json.dumps([VERSION, what], sort_keys=True).encode()).hexdigest()[:16]
    self._folder = folder / name

  def plan(self, shard: int, variant: int) -> Plan:
    path = self._folder / f'{variant}-{shard:05}.npz'
    arrays = _read(path)
    if arrays is None:
      plan = self._planner.plan(shard, variant)
      _write(path, _arrays(plan))
      return plan
    if 'cuts' in arrays:
      return Cuts(arrays['tasks'], arrays['cuts'], self._stream(shard, variant))
    return Bins(arrays['tasks'], arrays['firsts'], Pieces(*(arrays.get(name) for name in LISTED)))

  def counts(self, variant: int, count: Callable[[], np.ndarray]) -> np.ndarray:
    """int64[shards, tasks]: the result of `count`, which is called once for each variant."""
    path = self._folder / f'{variant}-counts.npz'
    arrays = _read(path)
    if arrays is None:
      arrays = {'counts': count()}
      _write(path, arrays)
    return arrays['counts']


def _arrays(plan: Plan) -> Mapping[str, np.ndarray]:
  match plan:
    case Cuts(tasks, cuts):
      return {'tasks': tasks, 'cuts': cuts}
    case Bins(tasks, firsts, listed):
      own = {name: values for name, values in zip(LISTED, listed, strict=True) if values is not None}
      return {'tasks': tasks, 'firsts': firsts, **own}
    case _:
      raise TypeError(f'{type(plan).__name__} is no plan that is kept.')


def _read(path: pathlib.Path) -> dict[str, np.ndarray] | None:
  """The arrays of a file; None where there is none. Its checksums are the zip format's."""
  try:
    with np.load(path, allow_pickle=False) as file:
      return {name: file[name] for name in file.files}
  except FileNotFoundError:
    return None
  except OSError as error:
    raise DataError(f'{path} cannot be read ({error.strerror}); check the folder (PRETRAIN_CACHE).') from error
  except (EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
    raise DataError(f'{path} is damaged ({error}); delete it, it will be made again.', 'DATA-CORRUPT') from error


def _write(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
  """The whole file or none: it appears under its name when it is written. Any number of processes may do so at once."""
  temporary = path.with_name(f'{path.name}.{os.getpid()}-{threading.get_ident()}.tmp')
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary.open('wb') as file:
      np.savez(file, **arrays)
    temporary.replace(path)
  except OSError as error:
    raise DataError(
      f'{path} cannot be written ({error.strerror}); free space there, or set PRETRAIN_CACHE to another folder.'
    ) from error
  finally:
    with contextlib.suppress(OSError):
      temporary.unlink()
