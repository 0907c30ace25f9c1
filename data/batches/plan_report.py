"""How full the rows of an epoch are, and plans made ahead: `pretrain data plan`."""

import concurrent.futures
import dataclasses
import multiprocessing
import time

import numpy as np

from data.batches.batches import DataSource
from data.batches.rows import StoreRows


@dataclasses.dataclass(frozen=True)
class Fill:
  """Counts of an epoch. `places` and `used` are of the leading side: the one that is fuller."""

  rows: int
  tokens: int
  pieces: int
  documents: int
  cut: int  # documents that stand in several pieces
  places: int
  used: int
  seconds: float

  @property
  def padding(self) -> float:
    return 1 - self.used / self.places


def fill_of(rows: StoreRows, epoch: int = 0) -> Fill:
  """Counts of all shards of an epoch. One shard's plan is in memory at a time."""
  start, totals, sides = time.perf_counter(), np.zeros(5, np.int64), np.zeros((0, 2), np.int64)
  for shard in range(len(rows.store.shards)):
    number, pieces, filled = rows.fill(shard, epoch)
    of_document = np.unique(pieces.documents, return_counts=True)[1]
    totals += (number, pieces.lengths.sum(), len(pieces.lengths), len(of_document), (of_document > 1).sum())
    sides = np.array(filled) + (sides if len(sides) else 0)
  used, places = max(sides.tolist(), key=lambda side: side[0] / side[1])
  return Fill(*totals.tolist(), places, used, time.perf_counter() - start)


def keep_plans(source: DataSource, workers: int) -> int:
  """Makes every plan of every shard that is not kept yet, in `workers` processes; returns how many there are."""
  jobs = [(i, s, v) for i, rows in enumerate(source.sources) for s in range(len(rows.store.shards))
          for v in range(rows.variants)]  # fmt: skip
  workers = min(workers, len(jobs))
  if workers < 2:
    for job in jobs:
      _keep(source, job)
    return len(jobs)
  context = multiprocessing.get_context('spawn')
  with concurrent.futures.ProcessPoolExecutor(workers, context, _open, (source,)) as pool:
    for _ in pool.map(_keep_here, jobs):
      pass
  return len(jobs)


def _keep(source: DataSource, job: tuple[int, int, int]) -> None:
  number, shard, variant = job
  source.sources[number].keep_plan(shard, variant)


_here: list[DataSource] = []  # of a worker process


def _open(source: DataSource) -> None:
  _here.append(source)


def _keep_here(job: tuple[int, int, int]) -> None:
  _keep(_here[0], job)


def report(source: DataSource) -> str:
  """A line for each source."""
  packing = source.cfg.packing.name
  lines = [
    f'packing {packing}, an epoch of each source{_promise(source)}:',
    f'{"rows":>12} {"tokens":>14} {"padding":>8} {"cut documents":>14} {"pieces/row":>11} {"Mtok/s":>7}  source',
  ]
  for rows in source.sources:
    fill = fill_of(rows)
    lines.append(
      f'{fill.rows:>12,} {fill.tokens:>14,} {fill.padding:>8.2%} {fill.cut / fill.documents:>14.1%} '
      f'{fill.pieces / fill.rows:>11.2f} {fill.tokens / fill.seconds / 1e6:>7.0f}  {rows.store.path}'
    )
  return '\n'.join([*lines, *source.losses()])


def _promise(source: DataSource) -> str:
  return '' if source.losses() else ' (no token is dropped; the last row of a shard is padded)'
