"""A host's snapshots: two slots in host RAM, written in turn, so that a kill at any moment leaves one intact.

`slot_0.block` is this host's share of the state, `slot_0.parity` the parity it keeps for its group. Each has a header
(`.json`), which is removed before the bytes are written and written after them. A header has its own sha256 and the
crc32 of the bytes: at 7 GiB/s per core, crc32 is fast enough to run beside training every few steps.
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
from pretrain.workdirs.folder import Folder, as_folder

Kind = Literal['block', 'parity']
SLOTS = (0, 1)
MEMORY = pathlib.Path('/dev/shm')


@dataclasses.dataclass(frozen=True, kw_only=True)
class SnapshotConfig:
  """Every `every` steps the state is copied to host RAM; 0 = never.

  `folder`: a folder in RAM whose files outlive a process (None = /dev/shm); it holds two slots for each host's share.
  `group`: number of hosts that keep parity for each other, so that one may be lost with its RAM; 0 = no parity.
  `timeout`: seconds that hosts wait for each other, in the background; after that the snapshot is left out.
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


def folder_of(cfg: SnapshotConfig, workdir: Folder, host: int) -> pathlib.Path:
  """The folder of this host's snapshots of the run in `workdir`. Raises ConfigError if it cannot be written, or
  belongs to another user."""
  parent = pathlib.Path(cfg.folder) if cfg.folder else MEMORY
  if not parent.is_dir() or not os.access(parent, os.W_OK):
    raise ConfigError(
      f'snapshot.folder={cfg.folder!r}: no folder {parent} that can be written; name one in RAM (a tmpfs), or set '
      'snapshot.every=0.'
    )
  name = hashlib.sha256(os.fsencode(str(as_folder(workdir).resolve()))).hexdigest()[:12]
  folder = parent / f'pretrain-{name}-{host}'
  if folder.is_symlink() or (folder.exists() and folder.stat().st_uid != os.getuid()):
    raise ConfigError(f'{folder} does not belong to this user; remove it, or set snapshot.folder.')
  return folder


def remove_beyond(folder: pathlib.Path, count: int) -> None:
  """Removes the folders of processes number `count` and above, which the run no longer has. `folder`: process 0's."""
  for path in folder.parent.glob(f'{folder.name.rpartition("-")[0]}-*'):
    if int(path.name.rpartition('-')[2]) >= count:
      shutil.rmtree(path, ignore_errors=True)


def remembered(folder: pathlib.Path, now: float) -> str:
  """The snapshots of a run in this host's RAM, as a line; '' if there are none. `folder` is that of process 0."""
  size, made = collections.Counter[int](), dict[int, float]()
  for path in folder.parent.glob(f'{folder.name.rpartition("-")[0]}-*/slot_?.block.json'):
    with contextlib.suppress(OSError, ValueError, TypeError):  # it is being written
      header = read_header(path)
      size[header.step] += header.size
      made[header.step] = max(made.get(header.step, 0.0), path.stat().st_mtime)
  steps = [f'step {step} ({size[step] / 2**20:.1f} MiB, {now - made[step]:.0f} s old)' for step in sorted(size)]
  return f'in host RAM: {", ".join(steps)}' if steps else ''


@dataclasses.dataclass(frozen=True)
class Header:
  """Describes the bytes of a slot. `crcs`: of the block of each host. `identity`: the run, config and mesh."""

  step: int
  size: int
  crc: int
  crcs: list[int]
  identity: dict[str, str]
  position: dict[str, Any]


class Slots:
  """Two slots of `folder`. `identity` is that of this run: snapshots with another identity are not used."""

  def __init__(self, folder: pathlib.Path, identity: Mapping[str, str]):
    self.folder, self._identity = folder, dict(identity)
    self.steps: dict[tuple[int, Kind], int] = {}  # the step of each slot whose bytes are complete
    self._arrays: dict[tuple[int, Kind], np.ndarray] = {}

  def allocate(self, sizes: Mapping[Kind, int]) -> None:
    """Allocates the RAM now, so that no later write fails for lack of it. Raises OSError if there is not enough."""
    self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
      for slot in SLOTS:
        for kind, size in sizes.items():
          self._arrays[slot, kind] = _mapped(self._path(slot, kind), size)
    except OSError:
      self.remove()
      raise

  def array(self, slot: int, kind: Kind) -> np.ndarray:
    """uint8, all bytes of the slot."""
    return self._arrays[slot, kind]

  def holding(self, step: int, kind: Kind) -> np.ndarray | None:
    """The bytes of `step`, if they are complete."""
    held = list(self.steps.items())  # one atomic copy: other threads call this while a slot is opened or closed
    return next((self._arrays[key] for key, its in held if key[1] == kind and its == step), None)

  def slot_of(self, step: int | None) -> int:
    """The slot that holds the block of `step`; the first slot if none does."""
    return next((slot for (slot, kind), held in self.steps.items() if kind == 'block' and held == step), 0)

  def open(self, slot: int) -> None:
    """Marks the bytes of `slot` as incomplete."""
    for kind in ('block', 'parity'):
      self._header(slot, kind).unlink(missing_ok=True)
      self.steps.pop((slot, kind), None)

  def close(self, slot: int, kind: Kind, header: Header) -> None:
    """Marks the bytes of `slot` as complete, also after a kill."""
    write_header(self._header(slot, kind), header)
    self.steps[slot, kind] = header.step

  def find(self) -> tuple[dict[int, tuple[Header, bool]], list[str]]:
    """step -> (header of its block, whether its parity is intact too); and why other slots are not usable."""
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
    """Forgets every other step: later steps may be written with different values."""
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
    """The header if header and bytes are intact; otherwise the reason, '' if the slot is empty."""
    path = self._header(slot, kind)
    if not path.exists():
      return ''
    try:
      header = read_header(path)
      other = [key for key in self._identity if header.identity.get(key) != self._identity[key]]
      if other:
        return f'{path} has another {other[0]} ({header.identity.get(other[0])}, not {self._identity[other[0]]})'
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
  """`size` bytes of a file as an array. They are allocated: writing to a page without RAM ends the process (SIGBUS)."""
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
  """Raises ValueError if the header is damaged."""
  digest, _, text = path.read_text().partition('\n')
  if hashlib.sha256(text.encode()).hexdigest() != digest:
    raise ValueError('its header is damaged')
  return Header(**json.loads(text))
