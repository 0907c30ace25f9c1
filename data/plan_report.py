"""How full the rows of an epoch are: `pretrain data plan`."""

import dataclasses
import time

import numpy as np

from data.batches import DataSource
from data.rows import StoreRows


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
  start, parts = time.perf_counter(), []
  for shard in range(len(rows.store.shards)):
    planned, tasks = rows.shard_pieces(shard, epoch)
    sides = rows.places_taken(planned, tasks)
    of_document = np.unique(planned.documents, return_counts=True)[1]
    taken = [(int(cost.sum()), room * len(tasks)) for cost, room in sides]
    parts.append((len(tasks), int(planned.lengths.sum()), len(planned.lengths), len(of_document),
                  int((of_document > 1).sum()), taken))  # fmt: skip
  totals = [sum(part[i] for part in parts) for i in range(5)]
  sides = [(sum(p[5][k][1] for p in parts), sum(p[5][k][0] for p in parts)) for k in range(len(parts[0][5]))]
  places, used = max(sides, key=lambda side: side[1] / side[0])
  return Fill(*totals, places, used, time.perf_counter() - start)


def report(source: DataSource) -> str:
  """A line for each source."""
  packing = source.cfg.packing.name
  lines = [
    f'packing {packing}, an epoch of each source (no token is dropped; the last row of a shard is padded):',
    f'{"rows":>12} {"tokens":>14} {"padding":>8} {"cut documents":>14} {"pieces/row":>11} {"Mtok/s":>7}  source',
  ]
  for rows in source.sources:
    fill = fill_of(rows)
    lines.append(
      f'{fill.rows:>12,} {fill.tokens:>14,} {fill.padding:>8.2%} {fill.cut / fill.documents:>14.1%} '
      f'{fill.pieces / fill.rows:>11.2f} {fill.tokens / fill.seconds / 1e6:>7.0f}  {rows.store.path}'
    )
  return '\n'.join(lines)
