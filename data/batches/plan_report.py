"""Plans made before a run, and counts of what its rows hold: the numbers behind `pretrain data plan`."""

import concurrent.futures
import dataclasses
import math
import multiprocessing
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from data.batches.batches import DataSource
from data.batches.rows import StoreRows
from data.mixing.curriculum import Random
from data.packing.buckets import LengthBuckets

SAMPLE = 2560  # rows whose used positions are counted
MOST_POSITIONS = 2**24  # of a side, in all sampled rows: a few seconds of an objective's work


@dataclasses.dataclass(frozen=True)
class Packed:
  """Counts of an epoch's plan."""

  rows: int
  tokens: int
  pieces: int
  documents: int
  cut: int  # documents that were split into several pieces


def packed(rows: StoreRows, epoch: int = 0) -> Packed:
  """Counts over all shards of an epoch. One shard's plan is in memory at a time."""
  totals = np.zeros(5, np.int64)
  for shard in range(len(rows.store.shards)):
    number, pieces = rows.planned(shard, epoch)
    of_document = np.unique(pieces.documents, return_counts=True)[1]
    totals += (number, pieces.lengths.sum(), len(pieces.lengths), len(of_document), (of_document > 1).sum())
  return Packed(*totals.tolist())


class Used(NamedTuple):
  """Positions of one batch that hold a token, by side (encoder, decoder), and how long that side of a row is."""

  sources: np.ndarray  # int[rows]: the source of each row
  lengths: dict[str, int]
  positions: dict[str, np.ndarray]  # int64[rows]


def used_positions(source: DataSource, first: int = 0, end: int | None = None) -> Iterator[Used]:
  """The used positions of sampled rows between examples `first` and `end` of a run, batch by batch.

  Rows are counted after the objective: a position is used where its segment id is not 0. What is sampled:
  `sampled_batches`.
  """
  for start in sampled_batches(source, first, end):
    batch = source.global_rows(start, source.cfg.batch_size)
    sides = {name.removesuffix('_segment_ids'): ids for name, ids in batch.items() if name.endswith('_segment_ids')}
    number = next(len(ids) for ids in sides.values())
    yield Used(
      batch.get('source_index', np.zeros(number, np.int32)),
      {side: ids.shape[1] for side, ids in sides.items()},
      {side: np.count_nonzero(ids, axis=1) for side, ids in sides.items()},
    )


def sampled_batches(source: DataSource, first: int = 0, end: int | None = None) -> list[int]:
  """The examples at which the sampled batches begin: whole batches of SAMPLE rows, or of fewer where rows are long.

  They are the first ones from `first` on. Where rows are not in random order the first ones are not like the rest
  (`is_ordered`): there the batches are spread evenly over an epoch.
  """
  cfg = source.cfg
  most = min(SAMPLE, MOST_POSITIONS // max(cfg.inputs_length, cfg.targets_length))
  number = max(most // cfg.batch_size, 1)
  available = math.inf if end is None else (end - first) // cfg.batch_size
  number = int(min(number, available))
  if not is_ordered(source):
    return [first + i * cfg.batch_size for i in range(number)]
  steps = int(min(max(_epoch(source) // cfg.batch_size, number), available))
  return [first + i * steps // number * cfg.batch_size for i in range(number)]


def is_ordered(source: DataSource) -> bool:
  """Whether lengths or a curriculum decide the order of rows."""
  return isinstance(source.cfg.packing, LengthBuckets) or not isinstance(source.cfg.order, Random)


def _epoch(source: DataSource) -> int:
  """How many examples an epoch of all sources has."""
  if isinstance(source.cfg.packing, LengthBuckets):
    return sum(rows.order.steps_per_epoch for rows in source.sources) * source.cfg.batch_size
  return sum(rows.num_rows(0) for rows in source.sources)


def keep_plans(source: DataSource, workers: int) -> int:
  """Makes every plan of every shard that is not on disk yet, in `workers` processes; returns how many there are."""
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


_here: list[DataSource] = []  # the data of this worker process


def _open(source: DataSource) -> None:
  _here.append(source)


def _keep_here(job: tuple[int, int, int]) -> None:
  _keep(_here[0], job)
