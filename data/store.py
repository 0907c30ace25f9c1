"""The token store: documents' ids end to end, where each document ends, and what they were made of.

A directory: `tokens` and `offsets` (zarr3, sharded, crc32c on every chunk), `tokenizer.model`, `manifest.json`. It is
written under another name and renamed, so a store is whole or absent.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import shutil
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from data.errors import DataError
from data.vocabulary import Tokenizer

VERSION = 1
SHARD, CHUNK = 1 << 24, 1 << 16  # tokens in a file, tokens in a checksummed unit
CACHE_BYTES = 1 << 28


def _spec(path: pathlib.Path, dtype: str, shard: int, chunk: int) -> dict[str, Any]:
  inner = [{'name': 'bytes'}, {'name': 'zstd', 'configuration': {'level': 1}}, {'name': 'crc32c'}]
  sharding = {'chunk_shape': [chunk], 'codecs': inner, 'index_codecs': [{'name': 'bytes'}, {'name': 'crc32c'}]}
  metadata = {
    'shape': [0],
    'data_type': dtype,
    'chunk_grid': {'name': 'regular', 'configuration': {'chunk_shape': [shard]}},
    'codecs': [{'name': 'sharding_indexed', 'configuration': sharding}],
  }
  return {'driver': 'zarr3', 'kvstore': f'file://{path}/', 'metadata': metadata}


def _write_array(path: pathlib.Path, parts: Iterable[np.ndarray], dtype: str, shard: int, chunk: int) -> int:
  """Writes the parts end to end, one shard in memory at a time; returns the number of values."""
  array = ts.open(_spec(path, dtype, shard, chunk), create=True, open=True, dtype=dtype).result()
  done, held, pending = 0, 0, []

  def flush(size: int) -> None:
    nonlocal array, done, held, pending
    values = np.concatenate(pending) if pending else np.zeros(0, dtype)
    array = array.resize(exclusive_max=[done + size], expand_only=True).result()
    array[done : done + size].write(values[:size].astype(dtype)).result()
    done, pending = done + size, [values[size:]]
    held = len(values) - size

  for part in parts:
    pending.append(part)
    held += len(part)
    while held >= shard:
      flush(shard)
  if held:
    flush(held)
  return done


class StoreWriter:
  """Collects documents, then makes the store appear at `path`. Use as a context manager: an error leaves nothing."""

  def __init__(self, path: pathlib.Path, tokenizer: Tokenizer, provenance: dict[str, Any]):
    self.path, self._temporary = path, path.with_name(path.name + '.partial')
    if path.exists():
      raise DataError(f'{path} exists; nothing was overwritten. Choose another --output, or remove it.')
    shutil.rmtree(self._temporary, ignore_errors=True)
    self._temporary.mkdir(parents=True)
    self._tokenizer, self._provenance = tokenizer, provenance
    self._lengths: list[np.ndarray] = []
    self._sha = hashlib.sha256()

  def write(self, batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
    """Batches of (ids of several documents end to end, the documents' lengths)."""
    dtype = 'uint16' if self._tokenizer.vocabulary.pieces <= 1 << 16 else 'uint32'

    def tokens():
      for ids, lengths in batches:
        self._lengths.append(lengths)
        self._sha.update(np.ascontiguousarray(ids, dtype))
        yield ids

    count = _write_array(self._temporary / 'tokens', tokens(), dtype, SHARD, CHUNK)
    ends = np.cumsum(np.concatenate([np.zeros(1, np.int64), *self._lengths]), dtype=np.int64)
    if not count:
      shutil.rmtree(self._temporary)
      raise DataError(
        f'{self._provenance.get("inputs", "the input")} holds no text; nothing was written. Check the files.'
      )
    _write_array(self._temporary / 'offsets', [ends], 'int64', SHARD, CHUNK)
    manifest = {
      'version': VERSION, 'tokens': count, 'documents': len(ends) - 1, 'tokens_sha256': self._sha.hexdigest(),
      'pieces': self._tokenizer.vocabulary.pieces, 'tokenizer_sha256': self._tokenizer.fingerprint,
      'offsets_sha256': hashlib.sha256(ends.tobytes()).hexdigest(), 'provenance': self._provenance,
    }  # fmt: skip
    (self._temporary / 'tokenizer.model').write_bytes(self._tokenizer.model)
    (self._temporary / 'manifest.json').write_text(json.dumps(manifest, indent=1) + '\n')
    self._temporary.rename(self.path)


@dataclasses.dataclass(frozen=True)
class Store:
  """An open store. `offsets` int64[documents + 1]: document d is tokens offsets[d] .. offsets[d + 1], EOS last."""

  path: pathlib.Path
  manifest: dict[str, Any]
  offsets: np.ndarray
  tokenizer_model: bytes

  @functools.cached_property
  def _tokens(self):
    context = ts.Context({'cache_pool': {'total_bytes_limit': CACHE_BYTES}})
    spec = {'driver': 'zarr3', 'kvstore': f'file://{self.path.resolve()}/tokens/', 'recheck_cached_data': 'open'}
    return ts.open(spec, read=True, context=context).result()

  def __getstate__(self):  # an open array does not travel to a worker process
    return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

  def __setstate__(self, state):
    self.__dict__.update(state)

  @property
  def num_tokens(self) -> int:
    return self.manifest['tokens']

  @property
  def num_documents(self) -> int:
    return self.manifest['documents']

  @property
  def fingerprint(self) -> str:
    """sha256 over ids and document ends: equal where the data is."""
    return hashlib.sha256((self.manifest['tokens_sha256'] + self.manifest['offsets_sha256']).encode()).hexdigest()

  def tokenizer(self, sentinels: int) -> Tokenizer:
    return Tokenizer(self.tokenizer_model, sentinels)

  def read(self, pieces: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """int32 ids of each (start, length), all read at once. Raises DataError where a checksum does not hold."""
    futures = [self._tokens[start : start + length].read() for start, length in pieces]
    try:
      return [future.result().astype(np.int32) for future in futures]
    except ValueError as error:
      detail = str(error).split('[')[0].strip()
      raise DataError(
        f'{self.path}/tokens: {detail}. Nothing was changed; restore the store from a copy, or prepare it again.',
        code='DATA-CORRUPT',
      ) from error


def open_store(path: str | pathlib.Path) -> Store:
  """Opens a store. Raises DataError where there is none, or where its parts do not belong together."""
  path = pathlib.Path(path)
  try:
    manifest = json.loads((path / 'manifest.json').read_text())
    model = (path / 'tokenizer.model').read_bytes()
  except FileNotFoundError as error:
    fix = f'make one with: pretrain data prepare --input=TEXT --output={path}'
    raise DataError(f'no token store at {path} ({pathlib.Path(error.filename).name} is missing); {fix}.') from error
  except ValueError as error:
    raise DataError(
      f'{path}/manifest.json is not JSON ({error}); prepare the store again.', code='DATA-CORRUPT'
    ) from error
  if manifest.get('version') != VERSION:
    raise DataError(
      f'{path} has format version {manifest.get("version")}, this program reads {VERSION}; prepare it again.'
    )
  found = hashlib.sha256(model).hexdigest()
  if found != manifest['tokenizer_sha256']:
    raise DataError(
      f'{path}/tokenizer.model has sha256 {found[:12]}…, the store was made with {manifest["tokenizer_sha256"][:12]}…; '
      'put the right model back, or prepare the store again.'
    )
  spec = {'driver': 'zarr3', 'kvstore': f'file://{path.resolve()}/offsets/'}
  try:
    offsets = ts.open(spec, read=True).result().read().result()
  except ValueError as error:
    raise DataError(
      f'{path}/offsets cannot be read: {str(error)[:200]}; prepare the store again.', code='DATA-CORRUPT'
    ) from error
  if hashlib.sha256(offsets.tobytes()).hexdigest() != manifest['offsets_sha256']:
    raise DataError(f'{path}/offsets is not what its manifest says; prepare the store again.', code='DATA-CORRUPT')
  return Store(path, manifest, offsets, model)
