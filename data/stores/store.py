"""The token store: tokenised text as checksummed arrays on a disk or in an object store.

A store is a folder, at a path or a URL that TensorStore supports (file://, gs://, s3://, …):

  manifest.json        counts, hashes and provenance; written last, so an unfinished store cannot be opened
  tokenizer.model      the SentencePiece model, or tokenizer.json, which the manifest then names ("tokenizer")
  tokens/              uint16 or uint32: the ids of all documents, one after another; each document ends with EOS
  document_offsets/    int64[num_documents + 1]: the position at which each document begins
  scores/NAME/         float32[num_documents]: a score of each document
  tag_lengths/         int32[num_documents]: the number of tokens at the beginning of each document that are tags
  roles/               int8[num_documents]: the role of each turn (an index into messages.ROLES)
  turns_left/          int32[num_documents]: the number of turns that follow in the same conversation

The manifest has the tokenizer's `special_ids`, unless they are T5's (special_ids.py).

In a store of pairs ("pairs": true in the manifest), documents 2k and 2k + 1 are the inputs and the targets of pair k.
In a store of conversations, which has `roles` and `turns_left`, each document is a turn and its tag names the role.

Documents are grouped into shards of at most SHARD_TOKENS tokens; rows are planned one shard at a time (plan.py). The
manifest has a hash of each shard's tokens and offsets. Opening a store reads only the manifest; arrays are read on
demand.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import numpy as np

from data.errors import DataError
from data.ragged import Ragged, join
from data.stores.arrays import (
  RESTORE,
  Appender,
  Array,
  Column,
  Watch,
  delete_files,
  place_of,
  read_file,
  sha256,
  write_file,
)
from data.stores.paths import is_local, looked_in
from data.stores.shards import ShardCutter, parse_shards
from data.stores.special_ids import T5_IDS, SpecialIds
from data.stores.staging import Staging, refuse_existing
from data.stores.vocabulary import Tokenizer

FORMAT = 2
REQUIRED = {
  'num_tokens': int, 'num_documents': int, 'append_eos': bool, 'pairs': bool, 'pieces': int, 'shards': list,
  'tokenizer_sha256': str,
}  # fmt: skip
SHARD_TOKENS = 2**28
TOKENIZERS = 'tokenizer.model', 'tokenizer.json'
TAG_LENGTHS, ROLES, TURNS_LEFT = 'tag_lengths', 'roles', 'turns_left'
Kind = Literal['text', 'pairs', 'conversations']


class StoreWriter:
  """Builds a store beside its path and moves it there when complete: `with StoreWriter(...) as w: w.add(...)`.

  An object store cannot move folders: there the manifest is written last, and without it the store cannot be opened.
  An exception inside the `with` leaves nothing at the path. Raises DataError if something exists at `path`.
  """

  def __init__(
    self,
    path: str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    append_eos: bool = True,
    pairs: bool = False,
    columns: Mapping[str, str] = MappingProxyType({}),
    shard_tokens: int = SHARD_TOKENS,
  ):
    self.path = os.fspath(path)
    refuse_existing(self.path)
    self._staging = Staging(self.path) if is_local(self.path) else None
    self._tokenizer, self._append_eos, self._pairs = tokenizer, append_eos, pairs
    self._dtype = 'uint16' if tokenizer.vocabulary.pieces <= 2**16 else 'uint32'
    self._shards, self._kinds = ShardCutter(self._dtype, shard_tokens), columns
    self.num_tokens = self.num_documents = self._open_tokens = self._num_hashed = 0
    self._finished = False

  def __enter__(self):
    try:
      self._start()
    except BaseException:  # including an interrupt
      self.__exit__(None, None, None)
      raise
    return self

  def _start(self) -> None:
    self._folder = self._staging.make() if self._staging else self.path
    self._tokens = Appender(self._folder, 'tokens', self._dtype)
    self._offsets = Appender(self._folder, 'document_offsets', 'int64')
    self._columns = {name: Column(self._folder, name, kind) for name, kind in self._kinds.items()}
    self._offsets.append(np.zeros(1, np.int64))

  def add(
    self,
    segments: Sequence[Sequence[int]],
    last: Sequence[bool] | None = None,
    columns: Mapping[str, np.ndarray] = MappingProxyType({}),
  ) -> None:
    """Appends ids, given without EOS. A document is all segments up to one marked `last`; by default, each segment.

    `columns` has, for each column, one value per document that ends here. Documents without tokens are left out,
    except in pairs.
    """
    parts = [np.asarray(ids, np.int64) for ids in segments]
    self.add_joined(join(parts, np.int64), np.array([True] * len(segments) if last is None else last, bool), columns)

  def add_joined(self, segments: Ragged, last: np.ndarray, columns: Mapping[str, np.ndarray]) -> None:
    """`add` for segments concatenated in one array; `last` is bool[segments]."""
    closing = np.flatnonzero(last)
    stops = np.cumsum(segments.lengths)[closing]  # the positions in these tokens at which documents end
    sizes = np.diff(stops, prepend=-self._open_tokens)
    self._open_tokens = (
      len(segments.values) - int(stops[-1]) if len(stops) else self._open_tokens + len(segments.values)
    )
    kept = np.logical_or(sizes > 0, self._pairs)
    closes = self._closes(kept, columns)
    end = self._tokenizer.vocabulary.ids.end
    tokens = np.insert(segments.values, stops[kept], end) if self._append_eos else segments.values
    ends = self.num_tokens + np.cumsum(sizes[kept] + self._append_eos)
    self.num_tokens, self.num_documents = (
      int(ends[-1]) if len(ends) else self.num_tokens,
      self.num_documents + len(ends),
    )
    self._tokens.append(tokens)
    self._offsets.append(ends)
    self._shards.add(tokens, ends, closes)
    for name, column in self._columns.items():
      column.append(columns[name][kept])
    self._hash_columns()

  def _closes(self, kept: np.ndarray, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """bool for each of the next documents that is kept: whether a shard may end after it."""
    if TURNS_LEFT in columns:
      return columns[TURNS_LEFT][kept] == 0
    numbers = self.num_documents + np.arange(kept.sum())
    return numbers % 2 == 1 if self._pairs else np.ones(len(numbers), bool)

  def _hash_columns(self) -> None:
    """Adds the columns' hashes to the manifest's entries of the shards completed since the last call."""
    for entry in self._shards.entries[self._num_hashed :]:
      if self._columns:
        entry['columns_sha256'] = {name: own.take_sha256(entry['documents']) for name, own in self._columns.items()}
      self._num_hashed += 1

  def finish(self, **provenance: Any) -> None:
    """Completes the store. `provenance` (JSON) is put in its manifest. Raises DataError if the store would be empty."""
    if not self.num_tokens or self._open_tokens:
      raise DataError(f'{self.path} would not contain a complete document; give text.')
    self._tokens.close()
    self._offsets.close()
    self._shards.close()
    self._hash_columns()
    for column in self._columns.values():
      column.close()
    used = 'numpy', self._tokenizer.library, 'tensorstore'
    manifest = {
      'format': FORMAT,
      'num_tokens': self.num_tokens,
      'num_documents': self.num_documents,
      'append_eos': self._append_eos,
      'pieces': self._tokenizer.vocabulary.pieces,
      'tokenizer_sha256': self._tokenizer.fingerprint,
      **self._tokenizer_keys(),
      'versions': {name: importlib.metadata.version(name) for name in used},
      **({'pairs': True} if self._pairs else {}),
      **({'columns': {name: column.dtype for name, column in self._columns.items()}} if self._columns else {}),
      **provenance,
      'shards': self._shards.entries,
    }
    write_file(self._folder, self._tokenizer.file_name, self._tokenizer.model)
    write_file(self._folder, 'manifest.json', (json.dumps(manifest, indent=1) + '\n').encode())
    if self._staging:
      self._staging.move()
    self._finished = True

  def _tokenizer_keys(self) -> dict[str, Any]:
    """The manifest's keys for a tokenizer unlike T5's: stores with T5's have had none of them."""
    name, ids = self._tokenizer.file_name, self._tokenizer.vocabulary.ids
    own = {'tokenizer': name} if name != TOKENIZERS[0] else {}
    return own if ids == T5_IDS else {**own, 'special_ids': ids.to_json()}

  def __exit__(self, kind, error, trace):
    if self._staging:
      self._staging.remove()
    elif not self._finished:
      columns = [f'{name}/' for name in self._kinds]
      with contextlib.suppress(ValueError):  # report the first error, not a failed clean-up
        delete_files(self.path, ['tokens/', 'document_offsets/', *TOKENIZERS, *columns])


def open_store(path: str | os.PathLike[str]) -> 'Store':
  """The store at a path or URL. Raises DataError if it is missing, damaged or in another format."""
  raw = read_file(path, 'manifest.json')
  if raw is None:
    name, where = os.fspath(path), looked_in(path)
    raise DataError(f'no token store at {name}{where}; make one with: pretrain data prepare --out={name} …')
  try:
    manifest = json.loads(raw)
    found = manifest['format']
  except (ValueError, KeyError, TypeError) as error:
    raise DataError(f'{place_of(path, "manifest.json")} is not a manifest of a token store.', 'DATA-CORRUPT') from error
  if found != FORMAT:
    raise DataError(
      f'{os.fspath(path)} is a token store of format {found}, but this version reads format {FORMAT}. '
      'Nothing was changed; prepare it again with pretrain data prepare.'
    )
  manifest.setdefault('pairs', False)
  _check_manifest(path, manifest)
  return Store(os.fspath(path), manifest)


def _check_manifest(path: str | os.PathLike[str], manifest: dict[str, Any]) -> None:
  """Raises DataError if a key that Store reads is missing or has the wrong type."""
  bad = [key for key, kind in REQUIRED.items() if type(manifest.get(key)) is not kind]
  if bad:
    raise DataError(
      f'{place_of(path, "manifest.json")} has {bad[0]}={manifest.get(bad[0])!r}, expected {REQUIRED[bad[0]].__name__}. '
      f'{RESTORE}', 'DATA-CORRUPT',
    )  # fmt: skip
  try:
    SpecialIds.of(manifest)
  except ValueError as error:
    raise DataError(f'{place_of(path, "manifest.json")}: {error}. {RESTORE}', 'DATA-CORRUPT') from error


class Store:
  """Reads a token store. Picklable; threads may share one. `manifest` is the parsed manifest.json."""

  def __init__(self, path: str, manifest: dict[str, Any]):
    self.path, self.manifest = path, manifest
    self.num_tokens: int = manifest['num_tokens']
    self.num_documents: int = manifest['num_documents']
    self.append_eos: bool = manifest['append_eos']
    self.pairs: bool = manifest['pairs']
    self.shards = parse_shards(place_of(path, 'manifest.json'), manifest['shards'])
    self._tokens, self._offsets = Array(path, 'tokens'), Array(path, 'document_offsets')
    self._columns = {name: Array(path, name) for name in manifest.get('columns', {})}
    self._check_counts()
    self._watch()

  def _watch(self) -> None:
    self._manifest, self._num_checked = Watch(self.path, 'manifest.json'), 0

  def _check_counts(self) -> None:
    """Raises DataError if the manifest's counts differ from the arrays or from its list of shards."""
    said = self.num_tokens, self.num_documents
    listed = sum(len(shard.tokens) for shard in self.shards), sum(len(shard.documents) for shard in self.shards)
    for where, found in ('', (len(self._tokens), len(self._offsets) - 1)), (' in shards', listed):
      if found != said:
        raise DataError(
          f'{self.path} has {found[0]} tokens in {found[1]} documents{where}, but its manifest.json says {said[0]} in '
          f'{said[1]}. {RESTORE}', 'DATA-CORRUPT',
        )  # fmt: skip
    if self.pairs and self.num_documents % 2:
      raise DataError(
        f'{self.path} has {self.num_documents} documents, but its manifest.json says that they are pairs. {RESTORE}',
        'DATA-CORRUPT',
      )

  def __getstate__(self):
    return {k: v for k, v in self.__dict__.items() if k not in ('offsets', '_manifest')}

  def __setstate__(self, state):
    """Raises DataError if the store has changed since: a process that starts later must read the same data."""
    self.__dict__.update(state)
    self._watch()
    self._check_same()

  def _check_same(self) -> None:
    now = open_store(self.path)
    if now.fingerprint != self.fingerprint:
      raise DataError(
        f'{self.path} has changed since the run opened it: {self.num_tokens:,} tokens (fingerprint '
        f'{self.fingerprint[:8]}..) then, {now.num_tokens:,} ({now.fingerprint[:8]}..) now. Write new text to another '
        'store, and restore this one from a copy.', 'DATA-CORRUPT',
      )  # fmt: skip

  def offsets_of(self, shard: int) -> np.ndarray:
    """int64[documents + 1]: where each document of a shard begins in the store, and where the last one ends.

    Read from the store at each call. Raises DataError (DATA-CORRUPT) if they do not match the manifest's hash.
    """
    documents = self.shards[shard].documents
    offsets = self._offsets.whole(range(documents.start, documents.stop + 1))
    self._check_hash('document_offsets', offsets, 'int64', shard, self.manifest['shards'][shard]['offsets_sha256'])
    return offsets

  @functools.cached_property
  def offsets(self) -> np.ndarray:
    """int64[num_documents + 1]: `offsets_of` for all shards, read at first use and kept in memory."""
    parts = [self.offsets_of(i)[:-1] for i in range(len(self.shards))]
    return np.concatenate([*parts, np.array([self.num_tokens])])

  @property
  def kind(self) -> Kind:
    """The kind of unit that the store contains: documents of text, pairs, or conversations."""
    return 'pairs' if self.pairs else 'conversations' if TURNS_LEFT in self._columns else 'text'

  @property
  def column_names(self) -> tuple[str, ...]:
    """The names that `column` accepts."""
    return tuple(self._columns)

  @property
  def score_names(self) -> tuple[str, ...]:
    """The names that `scores` accepts."""
    return tuple(name.removeprefix('scores/') for name in self._columns if name.startswith('scores/'))

  def scores(self, name: str, shard: int) -> np.ndarray:
    """float32[documents]: a score of each document of a shard. Raises DataError if the store has no such score."""
    self.check_score(name)
    return self.column(f'scores/{name}', shard)

  def check_score(self, name: str) -> None:
    """Raises DataError if the store has no such score."""
    if f'scores/{name}' not in self._columns:
      raise DataError(
        f'{self.path} has no score {name!r} (it has: {", ".join(self.score_names) or "none"}); prepare it with '
        f'pretrain data prepare --scores={name} …, or with --score_field={name} if its records have such a field.'
      )

  def tag_lengths(self, shard: int) -> np.ndarray:
    """int32[documents]: the number of tag tokens at the beginning of each document of a shard; 0 without tags."""
    if TAG_LENGTHS not in self._columns:
      return np.zeros(len(self.shards[shard].documents), np.int32)
    return self.column(TAG_LENGTHS, shard)

  def column(self, name: str, shard: int) -> np.ndarray:
    """The values of a column for the documents of a shard, read from the store at each call.

    Raises DataError (DATA-CORRUPT) if they do not match the manifest's hash.
    """
    values = self._columns[name].whole(self.shards[shard].documents)
    wanted = self.manifest['shards'][shard]['columns_sha256'][name]
    self._check_hash(name, values, self.manifest['columns'][name], shard, wanted)
    return values

  def _check_hash(self, name: str, values: np.ndarray, dtype: str, shard: int, wanted: str) -> None:
    if sha256(values, dtype) != wanted:
      documents = self.shards[shard].documents
      raise DataError(
        f'{self.path}: {name} of documents {documents.start} to {documents.stop - 1} (shard {shard}) do not match '
        f'manifest.json. {RESTORE}', 'DATA-CORRUPT',
      )  # fmt: skip

  @property
  def fingerprint(self) -> str:
    """A hash that is equal for stores with the same tokens, documents (or pairs), shards and tokenizer."""
    ids = [self.manifest[key] for key in ('special_ids',) if key in self.manifest]
    contents = [self.manifest['shards'], self.manifest['tokenizer_sha256'], self.pairs, *ids]
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()

  @property
  def special_ids(self) -> SpecialIds:
    return SpecialIds.of(self.manifest)

  @property
  def tokenizer_file(self) -> str:
    return TOKENIZERS[self.manifest.get('tokenizer') == TOKENIZERS[1]]

  def tokenizer(self, sentinels: int) -> Tokenizer:
    """The store's tokenizer, with `sentinels` sentinels. Raises DataError if its file does not match the manifest."""
    model = read_file(self.path, self.tokenizer_file)
    if model is None or hashlib.sha256(model).hexdigest() != self.manifest['tokenizer_sha256']:
      where = place_of(self.path, self.tokenizer_file)
      raise DataError(f'{where} does not match manifest.json. {RESTORE}', 'DATA-CORRUPT')
    return Tokenizer(model, sentinels, self.special_ids)

  def tokens(self, places: range) -> np.ndarray:
    """The tokens at these positions, uint16 or uint32 as stored. Bypasses the cache of `read`: for full scans."""
    return self._tokens.whole(places)

  def read(self, ranges: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """int32 tokens of each (start, length). Recently read chunks are cached (arrays.CACHE_BYTES).

    Raises DataError (DATA-CORRUPT) if a checksum fails, or if the store was replaced by another one since it was
    opened: the chunks of the other store have valid checksums too.
    """
    found, number = self._tokens.read(ranges), self._tokens.num_fetched
    if number != self._num_checked:
      if self._manifest.changed():
        self._check_same()
        self._watch()  # same contents, e.g. restored from a copy
      self._num_checked = number
    return found
