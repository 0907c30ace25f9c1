"""Which microbatch and which layers each stage works on, tick by tick: arithmetic without arrays of a model."""

import dataclasses

import numpy as np

MOST_PER_STAGE = 4  # microbatches for each stage, by default: a fifth of the ticks then fill and drain one round


@dataclasses.dataclass(frozen=True)
class Schedule:
  """`stages` in a circle, through which each of `microbatches` goes `repeats` times.

  A stage holds `repeats` groups of consecutive layers, and has one tick of work for each (repeat, microbatch). A round
  of microbatches begins every `period` ticks. Source: Narayanan et al. 2021, arXiv:2104.04473, §2.2 (interleaved
  stages), in the order of GPipe (Huang et al. 2018, arXiv:1811.06965): all forward passes, then all backward passes.
  """

  stages: int
  microbatches: int
  repeats: int = 1

  @property
  def period(self) -> int:
    return max(self.microbatches, self.stages)

  @property
  def ticks(self) -> int:
    """Of a forward pass; a backward pass has as many.

    >>> Schedule(4, 8).ticks, Schedule(4, 8, 2).ticks, Schedule(4, 2, 2).ticks
    (11, 19, 9)
    """
    return (self.repeats - 1) * self.period + self.microbatches + self.stages - 1

  @property
  def bubble(self) -> float:
    """The share of its ticks in which a stage has no work: (stages - 1) / ticks where there are no fewer microbatches
    than stages.

    >>> round(Schedule(4, 8).bubble, 4), round(Schedule(4, 8, 2).bubble, 4)
    (0.2727, 0.1579)
    """
    return 1 - self.microbatches * self.repeats / self.ticks

  def table(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(microbatch, repeat, whether it works) of each tick and stage, [ticks, stages]; (0, 0) where it does not.

    >>> Schedule(2, 2).table()[0].tolist()
    [[0, 0], [1, 0], [0, 1]]
    """
    since = np.arange(self.ticks)[:, None] - np.arange(self.stages)
    repeat, microbatch = np.divmod(since, self.period)
    active = (since >= 0) & (repeat < self.repeats) & (microbatch < self.microbatches)
    table = (np.where(active, x, 0).astype(np.int32) for x in (microbatch, repeat))
    return *table, active


def most_microbatches(rows: int, stages: int) -> int:
  """The default: the most that divide the rows of a device, at most MOST_PER_STAGE for each stage.

  >>> most_microbatches(64, 4), most_microbatches(6, 2), most_microbatches(1, 2)
  (16, 6, 1)
  """
  return max(n for n in range(1, MOST_PER_STAGE * stages + 1) if rows % n == 0)


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """How a stack is divided over the stages of a mesh; `microbatches` None: `most_microbatches`."""

  microbatches: int | None = None
  repeats: int = 1

  def of(self, rows: int, stages: int) -> Schedule:
    """The schedule for a number of rows on each device. Where they do not divide into `microbatches`, as those of an
    evaluation may not, there are as many as divide them."""
    wanted = self.microbatches
    if wanted is None:
      return Schedule(stages, most_microbatches(rows, stages), self.repeats)
    return Schedule(stages, max(n for n in range(1, wanted + 1) if rows % n == 0), self.repeats)
