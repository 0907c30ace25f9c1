"""The token store: a text, once tokenised, as checksummed arrays on a disk or in an object store.

A store is a folder, at a path or URL that TensorStore knows (file://, gs://, s3://, …):

  manifest.json        counts, hashes and where the text came from; written last, so half a store is no store
  tokenizer.model      the SentencePiece model
  tokens/              zarr3, uint16 or uint32: the documents' ids one after another, each document ending with EOS
  document_offsets/    zarr3, int64[num_documents + 1]: where each document begins

In a store of pairs ("pairs": true in the manifest) documents 2k and 2k + 1 are the inputs and the targets of pair k.

Arrays are `sharding_indexed`: files of 16 Mi elements, chunks of 64 Ki, each with zstd and crc32c, so that a
flipped bit is an error when it is read.
"""

import collections
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import shutil
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorstore

from data.errors import DataError
from data.vocabulary import EOS, Tokenizer

FORMAT = 1
REQUIRED = {
  'num_tokens': int, 'num_documents': int, 'append_eos': bool, 'pairs': bool, 'pieces': int, 'tokens_sha256': str,
  'offsets_sha256': str, 'tokenizer_sha256': str,
}  # fmt: skip
SHARD, CHUNK = 2**24, 2**16
CACHE_CHUNKS = 1024  # 128 MiB of uint16 tokens
# The pool holds shard indexes; decoded chunks are kept by each Store, where a read costs no call into TensorStore.
_CONTEXT = tensorstore.Context({'cache_pool': {'total_bytes_limit': 2**24}})


def url_of(path: str | os.PathLike[str], name: str = '') -> str:
  """The URL of a store, or of `name` in it: a plain path becomes file://.

  >>> url_of('gs://bucket/store/', 'tokens/')
  'gs://bucket/store/tokens/'
  """
  text = os.fspath(path)
  base = text if '://' in text else 'file://' + os.path.abspath(text)
  return base.rstrip('/') + '/' + name


def _array_spec(path, name: str, dtype: str) -> dict[str, Any]:
  inner = [
    {'name': 'bytes', 'configuration': {'endian': 'little'}},
    {'name': 'zstd', 'configuration': {'level': 1}},
    {'name': 'crc32c'},
  ]
  shards = {'chunk_shape': [CHUNK], 'codecs': inner}
  return {
    'driver': 'zarr3',
    'kvstore': url_of(path, name + '/'),
    'metadata': {
      'shape': [0],
      'data_type': dtype,
      'chunk_grid': {'name': 'regular', 'configuration': {'chunk_shape': [SHARD]}},
      'codecs': [{'name': 'sharding_indexed', 'configuration': shards}],
    },
  }


class _Appender:
  """Writes an array of unknown length shard by shard; holds at most one shard in memory."""

  def __init__(self, path, name: str, dtype: str):
    self._array = tensorstore.open(_array_spec(path, name, dtype), create=True, context=_CONTEXT).result()
    self._pending: list[np.ndarray] = []
    self._num_pending, self.length, self.sha256 = 0, 0, hashlib.sha256()
    self._dtype = np.dtype(dtype)

  def append(self, values: np.ndarray) -> None:
    values = values.astype(self._dtype.newbyteorder('<'))
    self.sha256.update(values.tobytes())
    self._pending.append(values)
    self._num_pending += len(values)
    if self._num_pending >= SHARD:
      self._flush(self._num_pending // SHARD * SHARD)

  def _flush(self, count: int) -> None:
    values = np.concatenate([np.zeros(0, self._dtype), *self._pending])
    array = self._array.resize(exclusive_max=[self.length + count], resize_metadata_only=True).result()
    array[self.length : self.length + count].write(values[:count]).result()
    self.length += count
    self._pending, self._num_pending = [values[count:]], len(values) - count

  def close(self) -> None:
    self._flush(self._num_pending)


@dataclasses.dataclass(frozen=True)
class Shard:
  """Whole documents of a store that are planned together, and the tokens that they have."""

  documents: range
  tokens: range


class StoreWriter:
  """Builds a store next to its place and moves it there when it is whole: `with StoreWriter(...) as w: w.add(...)`.

  On an object store, which cannot move folders, the manifest is written last and there is no store before it. An
  exception inside the `with` leaves nothing at the path. Raises DataError where something is at `path` already.
  """

  def __init__(
    self, path: str | os.PathLike[str], tokenizer: Tokenizer, *, append_eos: bool = True, pairs: bool = False
  ):
    self.path = os.fspath(path).removeprefix('file://').rstrip('/')
    self._local = '://' not in self.path
    self._refuse_existing()
    self._staging = f'{self.path}.partial-{os.getpid()}' if self._local else self.path
    if self._local:
      self._make_staging()
    self._tokenizer, self._append_eos, self._pairs = tokenizer, append_eos, pairs
    dtype = 'uint16' if tokenizer.vocabulary.pieces <= 2**16 else 'uint32'
    self._tokens = _Appender(self._staging, 'tokens', dtype)
    self._offsets = _Appender(self._staging, 'document_offsets', 'int64')
    self._offsets.append(np.zeros(1, np.int64))
    self.num_tokens = self.num_documents = self._open_tokens = 0

  def _make_staging(self) -> None:
    shutil.rmtree(self._staging, ignore_errors=True)
    try:
      pathlib.Path(self._staging).mkdir(parents=True)
    except OSError as error:
      raise DataError(f'{self.path} cannot be written ({error.strerror}); choose another --out.') from error

  def _refuse_existing(self) -> None:
    exists = os.path.lexists(self.path) if self._local else _read_file(self.path, 'manifest.json') is not None
    if exists:
      raise DataError(f'{self.path} already exists. Nothing was changed; choose another --out, or remove it.')

  def add(self, segments: Sequence[Sequence[int]], last: Sequence[bool] | None = None) -> None:
    """Appends ids without EOS. A document is all segments up to one that is `last`; by default each is one.

    Documents without a token are left out, but not of pairs.
    """
    end = np.full(int(self._append_eos), EOS, np.int64)
    parts, ends = [], []
    for ids, is_last in zip(segments, [True] * len(segments) if last is None else last, strict=True):
      parts.append(np.asarray(ids, np.int64))
      self._open_tokens += len(ids)
      if is_last and (self._open_tokens or self._pairs):
        parts.append(end)
        self.num_tokens += self._open_tokens + len(end)
        ends.append(self.num_tokens)
        self._open_tokens = 0
    self.num_documents += len(ends)
    self._tokens.append(np.concatenate([np.zeros(0, np.int64), *parts]))
    self._offsets.append(np.array(ends, np.int64))

  def finish(self, **provenance: Any) -> None:
    """Makes the store appear. `provenance` (JSON) goes in its manifest. Raises DataError where it would be empty."""
    if not self.num_tokens or self._open_tokens:
      raise DataError(f'{self.path} would hold no whole document; give text.')
    self._tokens.close()
    self._offsets.close()
    manifest = {
      'format': FORMAT,
      'num_tokens': self.num_tokens,
      'num_documents': self.num_documents,
      'append_eos': self._append_eos,
      'pieces': self._tokenizer.vocabulary.pieces,
      'tokenizer_sha256': self._tokenizer.fingerprint,
      'tokens_sha256': self._tokens.sha256.hexdigest(),
      'offsets_sha256': self._offsets.sha256.hexdigest(),
      'versions': {name: importlib.metadata.version(name) for name in ('numpy', 'sentencepiece', 'tensorstore')},
      **({'pairs': True} if self._pairs else {}),
      **provenance,
    }
    _write_file(self._staging, 'tokenizer.model', self._tokenizer.model)
    _write_file(self._staging, 'manifest.json', (json.dumps(manifest, indent=1) + '\n').encode())
    if self._local:
      os.rename(self._staging, self.path)

  def __enter__(self):
    return self

  def __exit__(self, kind, error, trace):
    if self._local:
      shutil.rmtree(self._staging, ignore_errors=True)


def _write_file(path, name: str, value: bytes) -> None:
  tensorstore.KvStore.open(url_of(path), context=_CONTEXT).result().write(name, value).result()


def _read_file(path, name: str) -> bytes | None:
  """The contents, or None where there is no such file."""
  try:
    found = tensorstore.KvStore.open(url_of(path), context=_CONTEXT).result().read(name).result()
  except ValueError as error:
    raise DataError(f'{url_of(path, name)} cannot be read: {_first_line(error)}. Check the path or URL.') from error
  return found.value if found.state == 'value' else None


def _first_line(error: Exception) -> str:
  return str(error).splitlines()[0][:300]


def open_store(path: str | os.PathLike[str]) -> 'Store':
  """The store at a path or URL. Raises DataError where there is none, or one of another format, or a damaged one."""
  raw = _read_file(path, 'manifest.json')
  if raw is None:
    raise DataError(
      f'no token store at {os.fspath(path)}; make one with: pretrain data prepare --out={os.fspath(path)} …'
    )
  try:
    manifest = json.loads(raw)
    found = manifest['format']
  except (ValueError, KeyError, TypeError) as error:
    raise DataError(f'{url_of(path, "manifest.json")} is no manifest of a token store.', 'DATA-CORRUPT') from error
  if found != FORMAT:
    raise DataError(
      f'{os.fspath(path)} is a token store of format {found}, this version reads format {FORMAT}. '
      'Nothing was changed; prepare it again with pretrain data prepare.'
    )
  manifest.setdefault('pairs', False)
  _check_manifest(path, manifest)
  return Store(os.fspath(path), manifest)


def _check_manifest(path: str | os.PathLike[str], manifest: dict[str, Any]) -> None:
  """Raises DataError where it lacks what a Store reads of it."""
  bad = [key for key, kind in REQUIRED.items() if type(manifest.get(key)) is not kind]
  if bad:
    raise DataError(
      f'{url_of(path, "manifest.json")} has {bad[0]}={manifest.get(bad[0])!r}, expected {REQUIRED[bad[0]].__name__}. '
      'Nothing was changed; restore the store from a copy, or prepare it again.', 'DATA-CORRUPT',
    )  # fmt: skip


class Store:
  """Reads a token store. Picklable; threads may share one.

  `offsets` is int64[num_documents + 1] in tokens, `manifest` what its file says.
  """

  def __init__(self, path: str, manifest: dict[str, Any]):
    self.path, self.manifest = path, manifest
    self.num_tokens: int = manifest['num_tokens']
    self.num_documents: int = manifest['num_documents']
    self.append_eos: bool = manifest['append_eos']
    self.pairs: bool = manifest['pairs']
    self._reopen()
    self.offsets: np.ndarray = self._checked(lambda: self._open('document_offsets').read().result())
    if hashlib.sha256(self.offsets.astype('<i8').tobytes()).hexdigest() != manifest['offsets_sha256']:
      raise DataError(f'{path}: document_offsets do not match manifest.json; restore the store.', 'DATA-CORRUPT')
    found = (self._array.shape[0], int(self.offsets[-1]), len(self.offsets) - 1)
    if found != (self.num_tokens, self.num_tokens, self.num_documents):
      raise DataError(
        f'{path} has {found[0]} tokens in {found[2]} documents, its manifest.json says {self.num_tokens} in '
        f'{self.num_documents}. Nothing was changed; restore the store from a copy, or prepare it again.',
        'DATA-CORRUPT',
      )
    if self.pairs and self.num_documents % 2:
      raise DataError(
        f'{path} has {self.num_documents} documents, its manifest.json says that they are pairs. Nothing was changed; '
        'restore the store from a copy, or prepare it again.', 'DATA-CORRUPT',
      )  # fmt: skip

  @property
  def shards(self) -> tuple[Shard, ...]:
    return (Shard(range(self.num_documents), range(self.num_tokens)),)

  def offsets_of(self, shard: int) -> np.ndarray:
    return self.offsets

  def _reopen(self) -> None:
    self._array = self._checked(lambda: self._open('tokens'))
    self._chunks: collections.OrderedDict[int, np.ndarray] = collections.OrderedDict()
    self._lock = threading.Lock()

  def __getstate__(self):
    return {k: v for k, v in self.__dict__.items() if k not in ('_array', '_chunks', '_lock')}

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._reopen()

  def _open(self, name: str):
    spec = {
      'driver': 'zarr3', 'kvstore': url_of(self.path, name + '/'), 'recheck_cached_data': 'open',
      'fill_missing_data_reads': False,  # a file that is gone is an error, not zeros
    }  # fmt: skip
    return tensorstore.open(spec, read=True, context=_CONTEXT).result()

  def _checked(self, read):
    """`read()`, its failures as DATA-CORRUPT with the file that TensorStore names."""
    try:
      return read()
    except ValueError as error:
      message = (
        f'{self.path}: {_first_line(error)}. Nothing was changed; restore the store from a copy, or prepare it again.'
      )
      raise DataError(message, 'DATA-CORRUPT') from error

  @property
  def fingerprint(self) -> str:
    """Equal for stores with the same tokens, documents (or pairs) and tokenizer."""
    parts = [self.manifest[k] for k in ('tokens_sha256', 'offsets_sha256', 'tokenizer_sha256')]
    return hashlib.sha256(' '.join(parts + ['pairs'] * self.pairs).encode()).hexdigest()

  def tokenizer(self, sentinels: int) -> Tokenizer:
    """The tokenizer of the text, with `sentinels` sentinels. Raises DataError where its file is not the manifest's."""
    model = _read_file(self.path, 'tokenizer.model')
    if model is None or hashlib.sha256(model).hexdigest() != self.manifest['tokenizer_sha256']:
      raise DataError(f'{url_of(self.path, "tokenizer.model")} is not the file of manifest.json.', 'DATA-CORRUPT')
    return Tokenizer(model, sentinels)

  def read(self, ranges: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """int32 tokens of each (start, length); every chunk that is not at hand is asked for before any is waited for.

    Raises DataError (DATA-CORRUPT) where a checksum fails.
    """
    firsts = [start // CHUNK for start, _ in ranges]
    lasts = [max(start + length - 1, start) // CHUNK for start, length in ranges]
    with self._lock:
      chunks = self._fetch({k for first, last in zip(firsts, lasts, strict=True) for k in range(first, last + 1)})
    return [
      _slice(chunks, first, last, start - first * CHUNK, length)
      for (start, length), first, last in zip(ranges, firsts, lasts, strict=True)
    ]

  def _fetch(self, wanted: set[int]) -> dict[int, np.ndarray]:
    missing = sorted(wanted - self._chunks.keys())
    futures = [self._array[k * CHUNK : min((k + 1) * CHUNK, self.num_tokens)].read() for k in missing]
    for k, future in zip(missing, futures, strict=True):
      self._chunks[k] = self._checked(future.result)
    found = {k: self._chunks[k] for k in wanted}
    for k in wanted:
      self._chunks.move_to_end(k)
    while len(self._chunks) > CACHE_CHUNKS:
      self._chunks.popitem(last=False)
    return found


def _slice(chunks, first: int, last: int, start: int, length: int) -> np.ndarray:
  if first == last:
    return chunks[first][start : start + length].astype(np.int32)
  whole = np.concatenate([chunks[k] for k in range(first, last + 1)])
  return whole[start : start + length].astype(np.int32)
