"""A host's snapshots: two slots in memory, written in turn, so that a kill at any moment leaves one whole.

`slot_0.block` is this host's share of the state, `slot_0.parity` what it keeps of the others of its group; each has a
header beside it (`.json`), which is removed before and written after it. A header has the sha256 of itself, and the
crc32 of its bytes: at 7 GiB/s a core the one digest that may run beside a step every few steps.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import zlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np

from pretrain.errors import ConfigError

Kind = Literal['block', 'parity']
SLOTS = (0, 1)
MEMORY = pathlib.Path('/dev/shm')


@dataclasses.dataclass(frozen=True, kw_only=True)
class SnapshotConfig:
  """Every `every` steps the state is copied to the memory of its hosts; 0 = never.

  `folder`: where, in files that outlive a process (None = /dev/shm); it holds two slots of a host's share each.
  `group`: hosts that keep parity of each other, so that one of them may be lost with its memory; 0 = none.
  `timeout`: seconds that hosts wait for each other, behind the training; then that snapshot is left out.
  """

  every: Annotated[int, '>= 0'] = 0
  folder: Annotated[str, 'path'] | None = None
  group: Annotated[int, '>= 0'] = 0
  timeout: Annotated[float, '> 0'] = 60.0


def check_snapshot(cfg: SnapshotConfig) -> None:
  """Raises ConfigError for values that exclude each other."""
  if cfg.group == 1:
    raise ConfigError('snapshot.group=1: a host cannot keep parity of itself; set it to 2 or more, or 0 for no parity.')
  for key in ('group', 'folder'):
    if (given := getattr(cfg, key)) and not cfg.every:
      raise ConfigError(f'snapshot.{key}={given!r} with snapshot.every=0: it would never be used; set snapshot.every.')


def folder_of(cfg: SnapshotConfig, workdir: pathlib.Path, host: int) -> pathlib.Path:
  """This host's snapshots of the run in `workdir`. Raises ConfigError where there is no such memory, or it is
  another user's."""
  parent = pathlib.Path(cfg.folder) if cfg.folder else MEMORY
  if not parent.is_dir() or not os.access(parent, os.W_OK):
    raise ConfigError(
      f'snapshot.folder={cfg.folder!r}: no folder {parent} that can be written; name one in memory (a tmpfs), or set '
      'snapshot.every=0.'
    )
  name = hashlib.sha256(os.fsencode(pathlib.Path(workdir).resolve())).hexdigest()[:12]
  folder = parent / f'pretrain-{name}-{host}'
  if folder.is_symlink() or (folder.exists() and folder.stat().st_uid != os.getuid()):
    raise ConfigError(f'{folder} is not a folder of this user; remove it, or set snapshot.folder.')
  return folder


def remove_beyond(folder: pathlib.Path, count: int) -> None:
  """Frees what processes of this run have left on this host that it has no longer: `folder` is that of process 0."""
  for path in folder.parent.glob(f'{folder.name.rpartition("-")[0]}-*'):
    if int(path.name.rpartition('-')[2]) >= count:
      shutil.rmtree(path, ignore_errors=True)


def remembered(folder: pathlib.Path, now: float) -> str:
  """What processes of a run on this host have in memory, in a line; '' = nothing. `folder` is that of process 0."""
  size, made = collections.Counter[int](), dict[int, float]()
  for path in folder.parent.glob(f'{folder.name.rpartition("-")[0]}-*/slot_?.block.json'):
    with contextlib.suppress(OSError, ValueError, TypeError):  # it is being written
      header = read_header(path)
      size[header.step] += header.size
      made[header.step] = max(made.get(header.step, 0.0), path.stat().st_mtime)
  steps = [f'step {step} ({size[step] / 2**20:.1f} MiB, {now - made[step]:.0f} s old)' for step in sorted(size)]
  return f'in memory: {", ".join(steps)}' if steps else ''


@dataclasses.dataclass(frozen=True)
class Header:
  """What is in a slot. `crcs`: of the block of each host of the run. `identity`: of which run, config and mesh."""

  step: int
  size: int
  crc: int
  crcs: list[int]
  identity: dict[str, str]
  position: dict[str, Any]


class Slots:
  """Two slots of `folder`. `identity` is that of this run: what another one has left is not looked at."""

  def __init__(self, folder: pathlib.Path, identity: Mapping[str, str]):
    self.folder, self._identity = folder, dict(identity)
    self.steps: dict[tuple[int, Kind], int] = {}  # what is whole in which slot
    self._arrays: dict[tuple[int, Kind], np.ndarray] = {}

  def allocate(self, sizes: Mapping[Kind, int]) -> None:
    """Takes the memory, so that no write can fail for want of it. Raises OSError where there is not enough."""
    self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
      for slot in SLOTS:
        for kind, size in sizes.items():
          self._arrays[slot, kind] = _mapped(self._path(slot, kind), size)
    except OSError:
      self.remove()
      raise

  def array(self, slot: int, kind: Kind) -> np.ndarray:
    """uint8, all bytes of it."""
    return self._arrays[slot, kind]

  def holding(self, step: int, kind: Kind) -> np.ndarray | None:
    """The bytes of `step`, if they are whole."""
    held = list(self.steps.items())  # at once: others ask while a slot is opened or closed
    return next((self._arrays[key] for key, its in held if key[1] == kind and its == step), None)

  def slot_of(self, step: int | None) -> int:
    """The slot whose block is that of `step`; the first one where there is none."""
    return next((slot for (slot, kind), held in self.steps.items() if kind == 'block' and held == step), 0)

  def open(self, slot: int) -> None:
    """What is in `slot` is whole no longer."""
    for kind in ('block', 'parity'):
      self._header(slot, kind).unlink(missing_ok=True)
      self.steps.pop((slot, kind), None)

  def close(self, slot: int, kind: Kind, header: Header) -> None:
    """What is in `slot` is whole, also after a kill."""
    write_header(self._header(slot, kind), header)
    self.steps[slot, kind] = header.step

  def find(self) -> tuple[dict[int, tuple[Header, bool]], list[str]]:
    """step -> (header of its block, whether its parity is whole too); and why others are not used."""
    found, reasons = {}, []
    for slot in SLOTS:
      header = self._whole(slot, 'block')
      if isinstance(header, Header):
        self.steps[slot, 'block'] = header.step
        found[header.step] = header, self._has_parity(slot, header.step)
      elif header:
        reasons.append(header)
    return found, reasons

  def keep(self, step: int | None) -> None:
    """Forgets every step but that one: what comes later may be another history."""
    for slot in SLOTS:
      if step is None or self.steps.get((slot, 'block')) != step:
        self.open(slot)

  def remove(self) -> None:
    self.steps.clear()
    self._arrays.clear()
    shutil.rmtree(self.folder, ignore_errors=True)

  def _has_parity(self, slot: int, step: int) -> bool:
    header = self._whole(slot, 'parity')
    whole = isinstance(header, Header) and header.step == step
    if whole:
      self.steps[slot, 'parity'] = step
    return whole

  def _whole(self, slot: int, kind: Kind) -> Header | str:
    """The header where everything is as it was written; else why not, '' where there is nothing."""
    path = self._header(slot, kind)
    if not path.exists():
      return ''
    try:
      header = read_header(path)
      other = [key for key in self._identity if header.identity.get(key) != self._identity[key]]
      if other:
        return f'{path} is of another {other[0]} ({header.identity.get(other[0])}, not {self._identity[other[0]]})'
      block = np.memmap(self._path(slot, kind), np.uint8, 'r', shape=(header.size,))
    except (OSError, ValueError, KeyError, TypeError) as error:
      return f'{path}: {error}'
    if (crc := zlib.crc32(block)) != header.crc:
      return f'{self._path(slot, kind)} (step {header.step}) has crc32 {crc:08x}, {header.crc:08x} in its header'
    return header

  def _path(self, slot: int, kind: Kind) -> pathlib.Path:
    return self.folder / f'slot_{slot}.{kind}'

  def _header(self, slot: int, kind: Kind) -> pathlib.Path:
    return self.folder / f'slot_{slot}.{kind}.json'


def _mapped(path: pathlib.Path, size: int) -> np.ndarray:
  """`size` bytes of a file as an array. They are there: a page that memory lacks would end the process (SIGBUS)."""
  with path.open('a+b') as file:
    if os.fstat(file.fileno()).st_size != size:
      file.truncate(0)
      os.posix_fallocate(file.fileno(), 0, size)
  return np.memmap(path, np.uint8, 'r+', shape=(size,))


def write_header(path: pathlib.Path, header: Header) -> None:
  text = json.dumps(dataclasses.asdict(header))
  temporary = path.with_suffix('.tmp')
  temporary.write_text(f'{hashlib.sha256(text.encode()).hexdigest()}\n{text}')
  temporary.replace(path)


def read_header(path: pathlib.Path) -> Header:
  """Raises ValueError where it is not what was written."""
  digest, _, text = path.read_text().partition('\n')
  if hashlib.sha256(text.encode()).hexdigest() != digest:
    raise ValueError('its header is damaged')
  return Header(**json.loads(text))
