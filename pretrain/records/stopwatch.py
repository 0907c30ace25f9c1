"""How fast a run is: seconds and tokens of the steps that were finished between two rows of metrics."""

import collections
import contextlib
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np


class Stopwatch:
  """Counts whole steps: a step counts, with all its tokens, from the moment when its metrics are computed.

  The host may be ahead of the devices or behind them, so `look` asks the metrics of each step whether they are ready.
  """

  def __init__(self):
    self._running: collections.deque[tuple[int, Any]] = collections.deque()  # (tokens, metrics) of unfinished steps
    self._steps = self._tokens = 0  # of the steps finished since the last report
    self._waited = 0.0
    self._last = self._reported = (time.perf_counter(), 0.0)  # (when, seconds waited until then) a step was finished
    self._rates: dict[str, float] = {}

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """The time inside the block is spent waiting for data."""
    self.look()
    start = time.perf_counter()
    yield
    self._waited += time.perf_counter() - start
    self.look()

  def started(self, batch, metrics) -> None:
    """A step with `batch` has been begun; `metrics` are its results."""
    tokens = sum(int(np.count_nonzero(v)) for k, v in batch.items() if k.endswith('_segment_ids'))
    self._running.append((tokens, next(iter(metrics.values()))))
    self.look()

  def look(self) -> None:
    """Counts the steps that have been finished since the last look."""
    while self._running and self._running[0][1].is_ready():
      tokens, _ = self._running.popleft()
      self._tokens, self._steps = self._tokens + tokens, self._steps + 1
      self._last = time.perf_counter(), self._waited

  def report(self) -> dict[str, float]:
    """The rates of the steps since the last report; those of the last report where no step was finished since."""
    self.look()
    if not self._steps:
      return self._rates
    seconds, waited = self._last[0] - self._reported[0], self._last[1] - self._reported[1]
    self._rates = {
      'step_seconds': seconds / self._steps,
      'tokens_per_second': self._tokens * jax.process_count() / seconds,
      'data_wait': waited / seconds,
    }
    self._reported, self._steps, self._tokens = self._last, 0, 0
    return self._rates
