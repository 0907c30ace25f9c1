"""The token store: a text, once tokenised, as checksummed arrays on a disk or in an object store.

A store is a folder, at a path or URL that TensorStore knows (file://, gs://, s3://, …):

  manifest.json        counts, hashes and where the text came from; written last, so half a store is no store
  tokenizer.model      the SentencePiece model
  tokens/              uint16 or uint32: the documents' ids one after another, each document ending with EOS
  document_offsets/    int64[num_documents + 1]: where each document begins

In a store of pairs ("pairs": true in the manifest) documents 2k and 2k + 1 are the inputs and the targets of pair k.

Documents are counted in shards of at most SHARD_TOKENS tokens: what is planned at a time (data/plan.py). The manifest
has a hash of each shard's tokens and offsets; to open a store reads the manifest, and no array before it is asked for.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np

from data.arrays import RESTORE, Appender, Array, read_file, sha256, url_of, write_file
from data.errors import DataError
from data.shards import ShardCutter, parse_shards
from data.vocabulary import EOS, Tokenizer

FORMAT = 2
REQUIRED = {
  'num_tokens': int, 'num_documents': int, 'append_eos': bool, 'pairs': bool, 'pieces': int, 'shards': list,
  'tokenizer_sha256': str,
}  # fmt: skip
SHARD_TOKENS = 2**28


class StoreWriter:
  """Builds a store next to its place and moves it there when it is whole: `with StoreWriter(...) as w: w.add(...)`.

  On an object store, which cannot move folders, the manifest is written last and there is no store before it. An
  exception inside the `with` leaves nothing at the path. Raises DataError where something is at `path` already.
  """

  def __init__(
    self,
    path: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    append_eos: bool = True,
    pairs: bool = False,
    shard_tokens: int = SHARD_TOKENS,
  ):
    self.path = os.fspath(path).removeprefix('file://').rstrip('/')
    self._local = '://' not in self.path
    self._refuse_existing()
    self._staging = f'{self.path}.partial-{os.getpid()}' if self._local else self.path
    if self._local:
      self._make_staging()
    self._tokenizer, self._append_eos, self._pairs = tokenizer, append_eos, pairs
    dtype = 'uint16' if tokenizer.vocabulary.pieces <= 2**16 else 'uint32'
    self._tokens = Appender(self._staging, 'tokens', dtype)
    self._offsets = Appender(self._staging, 'document_offsets', 'int64')
    self._shards = ShardCutter(dtype, shard_tokens, 2 if pairs else 1)
    self._offsets.append(np.zeros(1, np.int64))
    self.num_tokens = self.num_documents = self._open_tokens = 0

  def _make_staging(self) -> None:
    shutil.rmtree(self._staging, ignore_errors=True)
    try:
      pathlib.Path(self._staging).mkdir(parents=True)
    except OSError as error:
      raise DataError(f'{self.path} cannot be written ({error.strerror}); choose another --out.') from error

  def _refuse_existing(self) -> None:
    exists = os.path.lexists(self.path) if self._local else read_file(self.path, 'manifest.json') is not None
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
    tokens, offsets = np.concatenate([np.zeros(0, np.int64), *parts]), np.array(ends, np.int64)
    self._tokens.append(tokens)
    self._offsets.append(offsets)
    self._shards.add(tokens, offsets)

  def finish(self, **provenance: Any) -> None:
    """Makes the store appear. `provenance` (JSON) goes in its manifest. Raises DataError where it would be empty."""
    if not self.num_tokens or self._open_tokens:
      raise DataError(f'{self.path} would hold no whole document; give text.')
    self._tokens.close()
    self._offsets.close()
    self._shards.close()
    manifest = {
      'format': FORMAT,
      'num_tokens': self.num_tokens,
      'num_documents': self.num_documents,
      'append_eos': self._append_eos,
      'pieces': self._tokenizer.vocabulary.pieces,
      'tokenizer_sha256': self._tokenizer.fingerprint,
      'versions': {name: importlib.metadata.version(name) for name in ('numpy', 'sentencepiece', 'tensorstore')},
      **({'pairs': True} if self._pairs else {}),
      **provenance,
      'shards': self._shards.entries,
    }
    write_file(self._staging, 'tokenizer.model', self._tokenizer.model)
    write_file(self._staging, 'manifest.json', (json.dumps(manifest, indent=1) + '\n').encode())
    if self._local:
      os.rename(self._staging, self.path)

  def __enter__(self):
    return self

  def __exit__(self, kind, error, trace):
    if self._local:
      shutil.rmtree(self._staging, ignore_errors=True)


def open_store(path: str | os.PathLike[str]) -> 'Store':
  """The store at a path or URL. Raises DataError where there is none, or one of another format, or a damaged one."""
  raw = read_file(path, 'manifest.json')
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
      f'{RESTORE}', 'DATA-CORRUPT',
    )  # fmt: skip


class Store:
  """Reads a token store. Picklable; threads may share one. `manifest` is what its file says."""

  def __init__(self, path: str, manifest: dict[str, Any]):
    self.path, self.manifest = path, manifest
    self.num_tokens: int = manifest['num_tokens']
    self.num_documents: int = manifest['num_documents']
    self.append_eos: bool = manifest['append_eos']
    self.pairs: bool = manifest['pairs']
    self.shards = parse_shards(url_of(path, 'manifest.json'), manifest['shards'])
    self._tokens, self._offsets = Array(path, 'tokens'), Array(path, 'document_offsets')
    self._check_counts()

  def _check_counts(self) -> None:
    """Raises DataError where the manifest does not speak of these arrays."""
    said = self.num_tokens, self.num_documents
    listed = sum(len(shard.tokens) for shard in self.shards), sum(len(shard.documents) for shard in self.shards)
    for where, found in ('', (len(self._tokens), len(self._offsets) - 1)), (' in shards', listed):
      if found != said:
        raise DataError(
          f'{self.path} has {found[0]} tokens in {found[1]} documents{where}, its manifest.json says {said[0]} in '
          f'{said[1]}. {RESTORE}', 'DATA-CORRUPT',
        )  # fmt: skip
    if self.pairs and self.num_documents % 2:
      raise DataError(
        f'{self.path} has {self.num_documents} documents, its manifest.json says that they are pairs. {RESTORE}',
        'DATA-CORRUPT',
      )

  def __getstate__(self):
    return {k: v for k, v in self.__dict__.items() if k != 'offsets'}

  def offsets_of(self, shard: int) -> np.ndarray:
    """int64[documents + 1]: where each document of a shard begins in the store, and the last one ends; read anew.

    Raises DataError (DATA-CORRUPT) where they are not those of the manifest.
    """
    documents = self.shards[shard].documents
    offsets = self._offsets.whole(range(documents.start, documents.stop + 1))
    self._check_hash('document_offsets', offsets, 'int64', shard, 'offsets_sha256')
    return offsets

  @functools.cached_property
  def offsets(self) -> np.ndarray:
    """int64[num_documents + 1]: `offsets_of` all shards, read when first asked for and kept."""
    parts = [self.offsets_of(i)[:-1] for i in range(len(self.shards))]
    return np.concatenate([*parts, np.array([self.num_tokens])])

  def _check_hash(self, name: str, values: np.ndarray, dtype: str, shard: int, key: str) -> None:
    if sha256(values, dtype) != self.manifest['shards'][shard][key]:
      documents = self.shards[shard].documents
      raise DataError(
        f'{self.path}: {name} of documents {documents.start} to {documents.stop - 1} (shard {shard}) do not match '
        f'manifest.json. {RESTORE}', 'DATA-CORRUPT',
      )  # fmt: skip

  @property
  def fingerprint(self) -> str:
    """Equal for stores with the same tokens, documents (or pairs), shards and tokenizer."""
    contents = [self.manifest['shards'], self.manifest['tokenizer_sha256'], self.pairs]
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()

  def tokenizer(self, sentinels: int) -> Tokenizer:
    """The tokenizer of the text, with `sentinels` sentinels. Raises DataError where its file is not the manifest's."""
    model = read_file(self.path, 'tokenizer.model')
    if model is None or hashlib.sha256(model).hexdigest() != self.manifest['tokenizer_sha256']:
      raise DataError(f'{url_of(self.path, "tokenizer.model")} is not the file of manifest.json.', 'DATA-CORRUPT')
    return Tokenizer(model, sentinels)

  def read(self, ranges: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """int32 tokens of each (start, length); the store keeps what it read last (arrays.CACHE_BYTES).

    Raises DataError (DATA-CORRUPT) where a checksum fails.
    """
    return self._tokens.read(ranges)
