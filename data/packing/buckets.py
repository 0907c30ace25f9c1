"""Length buckets: rows of one document each, of several lengths; a step has rows of one length, all steps one size.

A document becomes pieces of 2^k tokens, the longest first, as its length is written in binary. What is left below the
shortest length is packed with others' rests in rows of that length (best fit); nothing is dropped. Source: Pouransari
et al. 2024, arXiv:2405.13226 ("Dataset Decomposition"), which drops the rests and every batch that is not full.
"""

import dataclasses
from typing import Annotated, Literal, NamedTuple

import numpy as np

from data.bits import permute, stream_key, uniform
from data.packing.best_fit import fill
from data.packing.plan import Bins, Pieces, Stream
from data.ragged import starts

WINDOW = 8  # shards whose rows are mixed


@dataclasses.dataclass(frozen=True, kw_only=True)
class LengthBuckets:
  """Rows of min_length, twice that, … up to data.targets_length tokens, for causal_lm on one source.

  A batch has data.batch_size rows of the full length, or more shorter ones of as many tokens. An epoch has `cycles`, in
  each of which shorter lengths tend to come first: a step is `odds` times likelier to come next than one of twice its
  length (Grow-P2 of the paper; 1 mixes all lengths, less than 1 has long ones first). With `longest_first` the first
  step of a run is one of the longest rows, which shows at once whether they fit the memory.
  """

  name: Literal['length_buckets'] = 'length_buckets'
  min_length: Annotated[int, '>= 8'] = 256
  odds: Annotated[float, '> 0'] = 2.0
  cycles: Annotated[int, '>= 1'] = 8
  longest_first: bool = True

  def lengths(self, longest: int) -> tuple[int, ...]:
    """The lengths of rows, ascending. Raises ValueError where doubling does not lead from the shortest to `longest`."""
    found = [self.min_length]
    while found[-1] < longest:
      found.append(2 * found[-1])
    if found[-1] != longest:
      raise ValueError(
        f'data.packing.min_length={self.min_length} doubled leads to {found[-1]}, not to data.targets_length={longest}'
        '; make their quotient a power of two.'
      )
    return tuple(found)


def decompose(stream: Stream, lengths: tuple[int, ...]) -> list[Bins]:
  """The rows of each length, ascending, as plans of their own. Rows have one piece, but the shortest may have more."""
  sizes = np.array(lengths[::-1])
  digits = stream.lengths[:, None] // sizes % 2
  digits[:, 0] = stream.lengths // sizes[0]
  rest = stream.lengths % lengths[0]
  counts = np.concatenate([digits, (rest > 0)[:, None]], 1)  # of each size, then the rest
  which = np.repeat(np.tile(np.arange(counts.shape[1]), len(counts)), counts.ravel())
  documents = np.repeat(np.arange(len(counts)), counts.sum(1))
  own = np.append(sizes, 0)[which]
  own[which == len(sizes)] = rest[documents[which == len(sizes)]]
  some = counts.sum(1)[counts.sum(1) > 0]
  before = starts(own) - np.repeat(starts(own)[starts(some)], some)
  pieces = Pieces(which, stream.first + documents, stream.begins[documents] + before, own)
  plans = [_one_each(pieces, which == len(sizes) - 1 - k) for k in range(len(sizes))]
  return [_with_rests(plans[0], pieces, which == len(sizes), lengths[0]), *plans[1:]]


def _one_each(pieces: Pieces, chosen: np.ndarray) -> Bins:
  number = int(chosen.sum())
  listed = pieces.take(chosen, np.arange(number))
  return Bins(np.zeros(number, np.int8), np.arange(number + 1), listed)


def _with_rests(plan: Bins, pieces: Pieces, rests: np.ndarray, room: int) -> Bins:
  """A plan of rows of `room` tokens, and after them those that the rests fill."""
  rest = pieces.take(rests, pieces.rows[rests])
  bins = fill(rest.lengths, (np.arange(room + 1), room))
  order = np.lexsort((rest.places, bins))
  firsts = np.searchsorted(bins[order], np.arange(bins.max(initial=-1) + 2)) + len(plan.tasks)
  listed = [np.concatenate([a, b[order]]) for a, b in zip(plan.listed[1:4], rest[1:4], strict=True)]
  rows = np.concatenate([plan.listed.rows, bins[order] + len(plan.tasks)])
  tasks = np.zeros(len(plan.tasks) + len(firsts) - 1, np.int8)
  return Bins(tasks, np.concatenate([plan.firsts[:-1], firsts]), Pieces(rows, *listed))


class Place(NamedTuple):
  """A step of the run: its epoch, window of shards, length (index), and which step of this length in the window."""

  epoch: int
  window: int
  bucket: int
  number: int


class BucketOrder:
  """Which length each step has, and which rows. `counts` (int64[windows, lengths]) are the rows of each."""

  def __init__(self, counts: np.ndarray, cfg: LengthBuckets, rows_per_step: np.ndarray, *, seed: int, purpose: str):
    self._counts, self._cfg, self._rows_per_step = counts, cfg, rows_per_step
    self._seed, self._purpose = seed, purpose
    self._steps = -(-counts // rows_per_step)  # the last step of a length may have empty rows
    self._schedules: dict[tuple[int, int], np.ndarray] = {}

  @property
  def steps_per_epoch(self) -> int:
    return int(self._steps.sum())

  def place(self, step: int) -> Place:
    epoch, rest = divmod(step, self.steps_per_epoch)
    number = len(self._counts)
    order = permute(np.arange(number), number, stream_key(self._seed, self._purpose + ' windows', epoch))
    ends = np.cumsum(self._steps[order].sum(1))
    at = int(np.searchsorted(ends, rest, side='right'))
    window, rest = int(order[at]), rest - int(ends[at] - self._steps[order[at]].sum())
    if (epoch, window) not in self._schedules:
      self._schedules = {(epoch, window): self._make_schedule(epoch, window)}
    schedule = self._schedules[epoch, window]
    bucket = int(schedule[rest])
    return Place(epoch, window, bucket, int((schedule[:rest] == bucket).sum()))

  def rows(self, place: Place, first: int, count: int) -> np.ndarray:
    """int64[count]: rows `first` … of a step, as rows of its length in its window; -1 where the length has no more."""
    total = int(self._counts[place.window, place.bucket])
    wanted = place.number * int(self._rows_per_step[place.bucket]) + first + np.arange(count)
    key = stream_key(self._seed, self._purpose + ' rows', place.epoch, place.window, place.bucket)
    found = np.full(count, -1)
    found[wanted < total] = permute(wanted[wanted < total], total, key)
    return found

  def _make_schedule(self, epoch: int, window: int) -> np.ndarray:
    """int8[steps]: the length of each step of a window in an epoch."""
    buckets = np.repeat(np.arange(self._steps.shape[1]), self._steps[window])
    number = np.concatenate([np.arange(n) for n in self._steps[window]])
    cycle = number * self._cfg.cycles // self._steps[window][buckets]
    drawn = uniform(stream_key(self._seed, self._purpose + ' lengths', epoch, window, np.arange(len(buckets))))
    # Drawn without replacement with these odds (Efraimidis and Spirakis 2006): the smallest -log(u) / odds first.
    late = -np.log(drawn) * float(self._cfg.odds) ** buckets
    schedule = buckets[np.lexsort((late, cycle))].astype(np.int8)
    longest = np.flatnonzero(schedule == schedule.max())[0]
    if self._cfg.longest_first and epoch == 0:
      schedule = np.concatenate([schedule[longest : longest + 1], np.delete(schedule, longest)])
    return schedule


def windows_of(num_shards: int) -> list[range]:
  """The shards of each window."""
  return [range(i, min(i + WINDOW, num_shards)) for i in range(0, num_shards, WINDOW)]


def joined_plans(plans: list[Bins]) -> Bins:
  """The rows of several shards, one shard after another."""
  rows = np.cumsum([0, *(len(plan.tasks) for plan in plans)])
  pieces = np.cumsum([0, *(len(plan.listed.rows) for plan in plans)])
  firsts = np.concatenate([*(plan.firsts[:-1] + at for plan, at in zip(plans, pieces[:-1], strict=True)), pieces[-1:]])
  numbered = [plan.listed.rows + at for plan, at in zip(plans, rows[:-1], strict=True)]
  listed = [np.concatenate(own) for own in zip(*(plan.listed[1:4] for plan in plans), strict=True)]
  return Bins(np.zeros(rows[-1], np.int8), firsts, Pieces(np.concatenate(numbered), *listed))
