"""Prefetched batches for this host, from any position. The only module that imports Grain, which imports JAX.

Grain runs the work in a thread or in processes; its own state is never saved. A run's position in the data is
{'version', 'examples'}. It is the same on every host, and any number of hosts and workers can resume from it.
"""

import math
import multiprocessing
import os
import threading
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import numpy as np
from absl import flags

from data.batches.batches import DataSource, Rows
from data.batches.source import Data
from data.errors import DataError
from data.objectives.features import Batch
from data.packing.full_rows import FullRows

VERSION = 2
FULL_ROWS = 3  # of positions in full rows, which earlier releases cannot read


class _Steps:
  """Element i of a Grain source: this host's rows of the i-th global batch after `examples`."""

  def __init__(self, source: DataSource, examples: int, rows: Rows):
    self._source, self._examples, self._rows = source, examples, rows

  def __len__(self) -> int:
    return 2**62 // self._source.cfg.batch_size  # in effect endless: the run stops at its own number of steps

  def __getitem__(self, index: int) -> Batch:
    return self._source.batch_at(self._examples + int(index) * self._source.cfg.batch_size, self._rows)


def loader(source: DataSource, position: Mapping[str, Any], rows: Rows) -> Iterator[tuple[dict[str, Any], Batch]]:
  """Yields (position after the batch, this host's `rows` of the global batch) for each step from `position` on.

  `position` is {'examples': 0} at the beginning, and later the position that came with the last used batch. Its other
  keys (`DataSource.at`) are kept. Raises DataError for a position of another version.
  """
  if position.get('version', VERSION) not in (VERSION, FULL_ROWS):
    found = position['version']
    raise DataError(
      f'position has data version {found}, but this release reads {VERSION} and {FULL_ROWS}; use the one that wrote it.'
    )
  return _Batches(_ahead(source.at(position), position['examples'], rows), position, source.cfg)


class _Batches(Iterator):
  """Counts examples along Grain's iterator, and closes that when this object is garbage collected or at exit."""

  def __init__(self, batches: grain.DatasetIterator[Batch], position: Mapping[str, Any], cfg: Data):
    version = FULL_ROWS if isinstance(cfg.packing, FullRows) else VERSION
    self._position, self._size, self._held = {**position, 'version': version}, cfg.batch_size, [batches]
    self._shared = cfg.workers > 0
    weakref.finalize(self, _close, self._held)

  def __next__(self) -> tuple[dict[str, Any], Batch]:
    batch = next(self._held[0])
    self._position = {**self._position, 'examples': self._position['examples'] + self._size}
    return self._position, _unpacked(batch) if self._shared else batch


def _packed(batch: Batch) -> dict[str, Any]:
  """A batch as one array: Grain passes every array in its own block of shared memory, which costs 0.4 ms each."""
  layout = [[name, values.dtype.str, *values.shape] for name, values in batch.items()]
  return {'layout': layout, 'values': np.concatenate([values.ravel().view(np.int32) for values in batch.values()])}


def _unpacked(packed: dict[str, Any]) -> Batch:
  """The inverse of `_packed`, copied to this process's memory: shared memory would stay in use as long as the batch."""
  values, end, batch = np.array(packed.pop('values')), 0, {}
  for name, dtype, *shape in packed['layout']:
    begin, end = end, end + math.prod(shape)
    batch[name] = values[begin:end].view(dtype).reshape(shape)
  return batch


def _close(held: list[grain.DatasetIterator[Batch]]) -> None:
  """Stops threads and processes; Grain's own clean-up at exit comes too late for them and prints errors."""
  held.pop().close()


def _ahead(source: DataSource, examples: int, rows: Rows) -> grain.DatasetIterator[Batch]:
  workers, prefetch = source.cfg.workers, source.cfg.prefetch
  steps = grain.MapDataset.source(_Steps(source, examples, rows))
  # Reader threads contend for the interpreter lock: several are slower than none.
  batches = steps.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
  if workers:
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()  # Grain's workers read absl flags, which exist only in absl apps
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=max(prefetch, 1))
    batches = batches.map(_packed).mp_prefetch(options, worker_init_fn=_die_with_parent)
  elif prefetch:
    batches = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=prefetch)
  return iter(batches)


def _die_with_parent(_index: int, _count: int) -> None:
  """Ends this worker when its parent process is killed; otherwise it would wait for ever.

  PR_SET_PDEATHSIG does not work here: it reacts to the end of the *thread* that started the worker, which Grain ends
  earlier.
  """
  parent = multiprocessing.parent_process()
  threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
