"""Batches ahead of time: Grain is the engine, the order is ours. The only grain import.

The state of a run's data is {'version', 'examples'}: how many rows were consumed. Grain's own state is never kept: it
depends on the number of workers.
"""

import ctypes
import itertools
import os
import signal
from collections.abc import Iterator
from typing import Any

import grain
from absl import flags

from data.errors import DataError
from data.sources import Batch, DataSource

VERSION = 1


class _Steps:
  """Grain's random-access source: element s is this host's rows of step s."""

  def __init__(self, source: DataSource, rows: slice, first: int):
    self._source, self._rows, self._first = source, (rows.start, rows.stop), first
    self._home = os.getpid()

  def __len__(self) -> int:
    return 1 << 40

  def __getitem__(self, index: int) -> Batch:
    if os.getpid() != self._home:
      _die_with_parent()
    return self._source.batches.batch(self._first + int(index), slice(*self._rows))

  def __repr__(self) -> str:
    return f'Steps(from {self._first}, rows {self._rows})'


def _die_with_parent() -> None:
  """A worker must not outlive a trainer that was killed."""
  ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def position_at(step: int, batch_size: int) -> dict[str, Any]:
  """The place in the data after `step` batches."""
  return {'version': VERSION, 'examples': step * batch_size}


def loader(source: DataSource, position: dict[str, Any], rows: slice) -> Iterator[tuple[dict[str, Any], Batch]]:
  """Endless (position after it, this host's `rows` of the batch), from `position` on.

  Raises DataError where the position is inside a batch: the batch size was another when it was saved.
  """
  cfg = source.batches.cfg
  first, inside = divmod(position.get('examples', 0), cfg.batch_size)
  if inside:
    raise DataError(
      f'the run stopped after {position["examples"]} examples, no multiple of data.batch_size={cfg.batch_size}; '
      'set the batch size back.'
    )
  dataset = grain.MapDataset.source(_Steps(source, rows, first))
  options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
  batches = dataset.to_iter_dataset(options)
  if cfg.workers:
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()  # Grain asks absl for a flag, and this is no absl program
    batches = batches.mp_prefetch(grain.MultiprocessingOptions(cfg.workers, per_worker_buffer_size=max(cfg.prefetch, 1)))
  elif cfg.prefetch:
    batches = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=cfg.prefetch)
  for step, batch in zip(itertools.count(first + 1), batches):  # noqa: B905 - both are endless
    yield position_at(step, cfg.batch_size), batch
