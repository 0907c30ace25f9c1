"""Batches for this host, ahead of time, from any position. The only import of Grain, which imports JAX.

Grain runs the work (a thread, or processes); its own state is never saved. A run's position in the data is
{'version', 'examples'}, the same on every host, and any number of hosts and workers may go on from it.
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

from data.batches.batches import DataSource
from data.batches.source import Data
from data.errors import DataError
from data.objectives.features import Batch

VERSION = 2


class _Steps:
  """Element i of a Grain source: this host's rows of the i-th global batch after `examples`."""

  def __init__(self, source: DataSource, examples: int, rows: slice):
    self._source, self._examples, self._rows = source, examples, rows

  def __len__(self) -> int:
    return 2**62 // self._source.cfg.batch_size  # a run ends by its own count

  def __getitem__(self, index: int) -> Batch:
    start = self._examples + int(index) * self._source.cfg.batch_size
    return self._source.global_rows(start + self._rows.start, self._rows.stop - self._rows.start)


def loader(source: DataSource, position: Mapping[str, Any], rows: slice) -> Iterator[tuple[dict[str, Any], Batch]]:
  """(position after the batch, this host's `rows` of the global batch) for each step from `position` on.

  `position` is {'examples': 0} at the beginning, later what came with the last batch that was used. What else stands
  in it (`DataSource.at`) is kept. Raises DataError for a position of another version.
  """
  if position.get('version', VERSION) != VERSION:
    raise DataError(f'position of data version {position["version"]}, this version reads {VERSION}; use its release.')
  return _Batches(_ahead(source.at(position), position['examples'], rows), position, source.cfg)


class _Batches(Iterator):
  """Counts examples along Grain's iterator, and closes it when nobody iterates any more or at exit."""

  def __init__(self, batches: grain.DatasetIterator[Batch], position: Mapping[str, Any], cfg: Data):
    self._position, self._size, self._held = {**position, 'version': VERSION}, cfg.batch_size, [batches]
    self._shared = cfg.workers > 0
    weakref.finalize(self, _close, self._held)

  def __next__(self) -> tuple[dict[str, Any], Batch]:
    batch = next(self._held[0])
    self._position = {**self._position, 'examples': self._position['examples'] + self._size}
    return self._position, _unpacked(batch) if self._shared else batch


def _packed(batch: Batch) -> dict[str, Any]:
  """A batch as one array: Grain hands each to another process in a piece of shared memory of its own, at 0.4 ms."""
  layout = [[name, values.dtype.str, *values.shape] for name, values in batch.items()]
  return {'layout': layout, 'values': np.concatenate([values.ravel().view(np.int32) for values in batch.values()])}


def _unpacked(packed: dict[str, Any]) -> Batch:
  """`_packed`, undone, in memory of this process: what is shared is taken for as long as the batch lives."""
  values, end, batch = np.array(packed.pop('values')), 0, {}
  for name, dtype, *shape in packed['layout']:
    begin, end = end, end + math.prod(shape)
    batch[name] = values[begin:end].view(dtype).reshape(shape)
  return batch


def _close(held: list[grain.DatasetIterator[Batch]]) -> None:
  """Stops threads and processes; Grain's own clean-up at exit comes too late for them, and is noisy."""
  held.pop().close()


def _ahead(source: DataSource, examples: int, rows: slice) -> grain.DatasetIterator[Batch]:
  workers, prefetch = source.cfg.workers, source.cfg.prefetch
  steps = grain.MapDataset.source(_Steps(source, examples, rows))
  # Reader threads contend for the interpreter: several are slower than none.
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
  """Ends this worker when the run is killed; otherwise it would wait for ever.

  Not by PR_SET_PDEATHSIG: that is the death of the *thread* that started the worker, which Grain ends before it.
  """
  parent = multiprocessing.parent_process()
  threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
