"""`MANIFEST.json` of a checkpoint: the hash of every file, the digest of every array. It is written last: the commit.

Its first line is the sha256 of all that follows, so any changed byte is detected. It is JSON, not pickle. Names that
lead out of the step's folder, and symbolic links, are refused.
"""

import concurrent.futures
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pretrain.workdirs.folder import Folder
from pretrain.workdirs.store_path import StorePath

FILE = 'MANIFEST.json'
FORMAT = 1
HASH_THREADS = 4  # sha256 of one file uses one core; Orbax starts another file every 2 GB
PACKAGES = ('jax', 'jaxlib', 'orbax-checkpoint', 'tensorstore')
HEAD = re.compile(rb'\{"sha256": "([0-9a-f]{64})",\n')


@dataclasses.dataclass(frozen=True)
class File:
  size: int
  sha256: str


@dataclasses.dataclass(frozen=True)
class Leaf:
  """An array of the state; `digest` is computed by `pretrain.replicas.digest` and is the same on every mesh."""

  shape: tuple[int, ...]
  dtype: str
  digest: str


@dataclasses.dataclass(frozen=True)
class Manifest:
  """`files` by their path in the step's folder, `leaves` by their path in the state; `scores`: its evaluation."""

  step: int
  files: Mapping[str, File]
  leaves: Mapping[str, Leaf]
  scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
  versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

  @property
  def size(self) -> int:
    return sum(file.size for file in self.files.values())


def versions() -> dict[str, str]:
  """The versions that wrote a checkpoint, to find out later why it cannot be read."""
  return {'python': platform.python_version()} | {name: importlib.metadata.version(name) for name in PACKAGES}


def encode(manifest: Manifest) -> bytes:
  fields = {'format': FORMAT} | dataclasses.asdict(manifest)
  body = json.dumps(fields, indent=1, sort_keys=True, allow_nan=False).encode()[2:] + b'\n'  # without its '{\n'
  return b'{"sha256": "' + hashlib.sha256(body).hexdigest().encode() + b'",\n' + body


def decode(data: bytes) -> Manifest:
  """The manifest that `encode` wrote. Raises ValueError for a changed byte, or a newer format."""
  head = HEAD.match(data)
  if head is None or hashlib.sha256(data[head.end() :]).hexdigest().encode() != head[1]:
    raise ValueError(f'{FILE} ({len(data)} bytes) has changed since it was written')
  found = json.loads(data)
  if found['format'] != FORMAT:
    raise ValueError(f'{FILE} has format {found["format"]}, this program reads {FORMAT}')
  files = {name: File(**entry) for name, entry in found['files'].items()}
  leaves = {name: Leaf(tuple(x['shape']), x['dtype'], x['digest']) for name, x in found['leaves'].items()}
  if bad := [name for name in files if pathlib.PurePosixPath(name).is_absolute() or '..' in name.split('/')]:
    raise ValueError(f'{FILE} names {bad[0]}, which is not in its folder')
  return Manifest(found['step'], files, leaves, found['scores'], found['versions'])


def read(folder: Folder) -> Manifest:
  """The manifest of a step's folder. Raises ValueError if it is missing, damaged, or belongs to another step."""
  if folder.is_symlink():
    raise ValueError('its folder is a symbolic link')
  if (folder / FILE).is_symlink():
    raise ValueError(f'{FILE} is a symbolic link')
  try:
    manifest = decode((folder / FILE).read_bytes())
  except FileNotFoundError as error:
    raise ValueError(f'{FILE} is missing') from error
  except OSError as error:
    raise ValueError(f'{FILE} cannot be read ({error.strerror})') from error
  if str(manifest.step) != folder.name:
    raise ValueError(f'{FILE} belongs to step {manifest.step}')
  return manifest


def write(folder: Folder, manifest: Manifest) -> None:
  """The commit: after it, the step exists. The files it lists must already be on the disk (`hash_files`).

  In a store the manifest is written only if there is none. Raises FileExistsError for that of another writer.
  """
  if isinstance(folder, StorePath):
    (folder / FILE).create(encode(manifest))
    return
  temporary = folder / (FILE + '.tmp')
  with temporary.open('wb') as file:
    file.write(encode(manifest))
    file.flush()
    os.fsync(file.fileno())
  temporary.replace(folder / FILE)
  sync_folder(folder)
  sync_folder(folder.parent)


def sync_folder(folder: Folder) -> None:
  if isinstance(folder, StorePath):  # it has what it has answered
    return
  number = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(number)
  finally:
    os.close(number)


def names_in(folder: Folder) -> list[str]:
  """The files of a step, without manifests."""
  if isinstance(folder, StorePath):
    return [name for name in folder.names() if not name.rpartition('/')[2].startswith(FILE)]
  paths = (path for path in folder.rglob('*') if path.is_file() and not path.name.startswith(FILE))
  return sorted(path.relative_to(folder).as_posix() for path in paths)


def hash_files(folder: Folder, names: Sequence[str]) -> dict[str, File]:
  """Size and sha256 of each file, after fsync of the file and its folder, which Orbax does not do.

  From a store each object is read back: its hash is that of what the store holds.
  """
  with concurrent.futures.ThreadPoolExecutor(HASH_THREADS) as pool:
    found = dict(zip(names, pool.map(lambda name: hash_file(folder / name, sync=True), names), strict=True))
  if isinstance(folder, pathlib.Path):
    for parent in {(folder / name).parent for name in names}:
      sync_folder(parent)
  return found


def hash_file(path: Folder, *, sync: bool = False) -> File:
  if isinstance(path, StorePath):
    data = path.read_bytes()
    return File(len(data), hashlib.sha256(data).hexdigest())
  with path.open('rb') as file:
    if sync:
      os.fsync(file.fileno())
    return File(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, 'sha256').hexdigest())


def damage(folder: Folder, manifest: Manifest, names: Sequence[str]) -> list[str]:
  """A sentence for each of `names` that has changed; every file is read completely."""
  with concurrent.futures.ThreadPoolExecutor(HASH_THREADS) as pool:
    found = pool.map(lambda name: _damage(folder / name, name, manifest.files[name]), names)
  return [sentence for sentence in found if sentence]


def _damage(path: Folder, name: str, wanted: File) -> str:
  if isinstance(path, pathlib.Path) and any(part.is_symlink() for part in (path, *path.parents[: name.count('/')])):
    return f'{name} is a symbolic link, or lies behind one'
  try:
    found = hash_file(path) if isinstance(path, StorePath) else None
    if (size := found.size if found else path.stat().st_size) != wanted.size:
      return f'{name} has {size} bytes, {wanted.size} in {FILE}'
    found = found or hash_file(path)
  except FileNotFoundError:
    return f'{name} ({wanted.size} bytes) is missing'
  except OSError as error:
    return f'{name} cannot be read ({error.strerror})'
  if found != wanted:
    return f'{name} ({wanted.size} bytes) has sha256 {found.sha256[:8]}.., {wanted.sha256[:8]}.. in {FILE}'
  return ''


def part_of(folder: Folder, process: int) -> Folder:
  """The file in which a process other than the first leaves its hashes, until the first has joined all parts."""
  return folder / f'{FILE}.{process}'


def write_part(folder: Folder, process: int, files: Mapping[str, File]) -> None:
  entries: dict[str, Any] = {name: dataclasses.asdict(file) for name, file in files.items()}
  part_of(folder, process).write_text(json.dumps(entries))


def take_part(folder: Folder, process: int) -> dict[str, File]:
  path = part_of(folder, process)
  entries = json.loads(path.read_text())
  path.unlink()
  return {name: File(**entry) for name, entry in entries.items()}
