"""`pretrain data verify`: reads every byte of a store and checks every hash in its manifest."""

import hashlib
from collections.abc import Iterator

import numpy as np

from data.errors import DataError
from data.stores import arrays
from data.stores.arrays import CHUNK, little
from data.stores.store import Store, open_store

STEP = 64 * CHUNK


def verify(path: str) -> Iterator[str]:
  """Yields one line per damaged part: which file, which documents. Raises DataError if the store cannot be opened."""
  store = open_store(path)
  yield from _failure(lambda: store.tokenizer(0))
  for shard in range(len(store.shards)):
    offsets: list[np.ndarray] = []
    yield from _failure(lambda shard=shard, offsets=offsets: offsets.append(store.offsets_of(shard)))
    yield from _tokens(store, shard, offsets[0] if offsets else None)
    for name in store.column_names:
      yield from _failure(lambda name=name, shard=shard: store.column(name, shard))


def _failure(check) -> Iterator[str]:
  try:
    check()
  except DataError as error:
    yield error.message


def _tokens(store: Store, shard: int, offsets: np.ndarray | None) -> Iterator[str]:
  """One line per damaged part of a shard's tokens. Documents are named if `offsets` could be read."""
  tokens, digest, damaged = store.shards[shard].tokens, hashlib.sha256(), False
  for first in range(tokens.start, tokens.stop, STEP):
    places = range(first, min(first + STEP, tokens.stop))
    try:
      digest.update(little(values := store.tokens(places), str(values.dtype)))
    except DataError:
      damaged = True
      yield from _chunks(store, shard, places, offsets)
  if not damaged and digest.hexdigest() != store.manifest['shards'][shard]['tokens_sha256']:
    documents = store.shards[shard].documents
    yield f'tokens of documents {documents.start} to {documents.stop - 1} (shard {shard}) do not match manifest.json'


def _chunks(store: Store, shard: int, places: range, offsets: np.ndarray | None) -> Iterator[str]:
  """One line per chunk at these positions that cannot be read."""
  for number in range(places.start // CHUNK, -(-places.stop // CHUNK)):
    first, last = max(number * CHUNK, places.start), min((number + 1) * CHUNK, places.stop) - 1
    try:
      store.tokens(range(first, last + 1))
    except DataError as error:
      where = f'tokens/c/{first // arrays.FILE}: tokens {first} to {last}'
      if offsets is not None:
        documents = offsets.searchsorted([first, last], 'right') - 1 + store.shards[shard].documents.start
        where += f', of documents {documents[0]} to {documents[1]}'
      yield f'{where}: {error.message}'
