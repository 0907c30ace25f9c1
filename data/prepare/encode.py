"""Segments -> tokens and the other columns that a store keeps for each document: in several processes, in order.

The result depends only on the segments, not on the number of processes: batches are cut by size and kept in order.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool

import numpy as np

from data.errors import DataError
from data.prepare.messages import empty_error
from data.prepare.scores import SCORED, Score, score
from data.prepare.text import Segment
from data.ragged import Ragged, join
from data.stores.store import ROLES, TAG_LENGTHS, TURNS_LEFT
from data.stores.vocabulary import Tokenizer

BATCH_BYTES = 2**20


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What a store keeps for each document in addition to its tokens: computed `scores`, a score from `score_field`,
  tags; for each turn of a conversation, its role and the number of turns that follow."""

  scores: tuple[Score, ...] = ()
  score_field: str | None = None
  tags: bool = False
  turns: bool = False

  @property
  def columns(self) -> dict[str, str]:
    """The names and dtypes of the store's additional arrays."""
    names = [f'scores/{name}' for name in (*self.scores, *filter(None, [self.score_field]))]
    tags = {TAG_LENGTHS: 'int32'} if self.tags or self.turns else {}
    return dict.fromkeys(names, 'float32') | tags | ({ROLES: 'int8', TURNS_LEFT: 'int32'} if self.turns else {})


@dataclasses.dataclass(frozen=True)
class Encoded:
  """A batch of segments: their tokens, which of them end a document, and the columns' values for those documents."""

  tokens: Ragged
  last: np.ndarray
  columns: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Batch:
  """Segments that are encoded together. If the first one continues a document, `head` is that document's beginning."""

  segments: list[Segment]
  head: str


def batches(segments: Iterable[Segment]) -> Iterator[Batch]:
  """Yields the segments in batches of about BATCH_BYTES."""
  found, size, head, next_head = [], 0, '', ''
  for segment in segments:
    found.append(segment)
    size += len(segment.text)
    next_head = '' if segment.last else (next_head + segment.text)[:SCORED]
    if size >= BATCH_BYTES:
      yield Batch(found, head)
      found, size, head = [], 0, next_head
  if found:
    yield Batch(found, head)


class Encoder:
  """Encodes batches. Picklable: each process receives a copy."""

  def __init__(self, tokenizer: Tokenizer, recipe: Recipe):
    self._tokenizer, self._recipe = tokenizer, recipe

  def __call__(self, batch: Batch) -> Encoded:
    encode = self._tokenizer.encode_batch
    parts = encode([segment.text for segment in batch.segments])
    _check_required(batch.segments, parts)
    ends = [i for i, segment in enumerate(batch.segments) if segment.last]
    columns = {name: np.zeros(len(ends), dtype) for name, dtype in self._recipe.columns.items()}
    if TAG_LENGTHS in columns:
      tags = encode([segment.tags for segment in batch.segments])
      if not self._recipe.turns:
        tags = [tag if len(ids) else tag[:0] for tag, ids in zip(tags, parts, strict=True)]  # no tags without text
      parts = [np.concatenate(own) for own in zip(tags, parts, strict=True)]
      columns[TAG_LENGTHS][:] = [len(tags[i]) for i in ends]
    if self._recipe.turns:
      columns[ROLES][:] = [batch.segments[i].role for i in ends]
      columns[TURNS_LEFT][:] = [batch.segments[i].turns_left for i in ends]
    if self._recipe.score_field:
      columns[f'scores/{self._recipe.score_field}'][:] = [batch.segments[i].score for i in ends]
    if self._recipe.scores:
      texts = list(_beginnings(batch))
      for name in self._recipe.scores:
        columns[f'scores/{name}'][:] = [score(name, text) for text in texts]
    return Encoded(join(parts, np.uint32), np.array([segment.last for segment in batch.segments]), columns)


def _check_required(segments: list[Segment], parts: list[np.ndarray]) -> None:
  """Raises DataError if a text that must not be empty has no tokens: the model would learn to write only EOS."""
  for segment, ids in zip(segments, parts, strict=True):
    if segment.required and not len(ids):
      raise empty_error(f'{segment.required}: {segment.text!a:.40}')


def _beginnings(batch: Batch) -> Iterator[str]:
  """Yields the first SCORED characters of each document that ends in a batch."""
  held = batch.head
  for segment in batch.segments:
    held = (held + segment.text)[:SCORED]
    if segment.last:
      yield held
      held = ''


def encode_all(found: Iterable[Batch], encoder: Encoder, workers: int) -> Iterator[Encoded]:
  """Yields `encoder(batch)` for each batch, in order; few are held at a time. One worker starts no extra process.

  Raises DataError if a process dies.
  """
  if workers == 1:
    yield from map(encoder, found)
    return
  context = multiprocessing.get_context('spawn')  # TensorStore's threads do not survive a fork
  pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start, (encoder,))
  waiting: collections.deque[concurrent.futures.Future[Encoded]] = collections.deque()
  try:
    for batch in found:
      waiting.append(pool.submit(_encode, batch))
      if len(waiting) > 2 * workers:
        yield waiting.popleft().result()
    while waiting:
      yield waiting.popleft().result()
  except BrokenProcessPool as error:
    raise DataError('a worker process of prepare was killed (out of memory?); try fewer --workers.') from error
  finally:
    with contextlib.suppress(BrokenProcessPool):
      pool.shutdown(wait=True, cancel_futures=True)


_own: list[Encoder] = []  # in a worker process: its encoder


def _start(encoder: Encoder) -> None:
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole process group; the parent ends this process
  parent = multiprocessing.parent_process()
  threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
  _own.append(encoder)


def _encode(batch: Batch) -> Encoded:
  return _own[0](batch)
