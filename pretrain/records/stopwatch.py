"""How fast a run is, and how full its rows are: means over the steps between two rows of metrics."""

import collections
import contextlib
import time
from collections.abc import Iterator, Mapping

import jax
import numpy as np

MEANS = ('fill/encoder', 'fill/decoder', 'padding_flops')  # metrics of a step that a row has the mean of
WHOLE = 0.5  # of the seconds of the steps before it; a step that seems faster was not timed as a whole


class Stopwatch:
  """Seconds, tokens, seconds waited for data and sums of step metrics since the last report.

  `own_seconds`: seconds per step that the process did not wait for devices; `flops_per_second`: of all devices. Both
  are those of the last report.
  """

  def __init__(self):
    self.own_seconds, self.flops_per_second = 0.0, 0.0
    self._rates: dict[str, float] = {}
    self._values: dict[str, list[float]] = collections.defaultdict(list)
    self._restart()

  def _restart(self) -> None:
    self._start, self._tokens, self._waited, self._steps = time.perf_counter(), 0, 0.0, 0
    self._blocked, self._flops = 0.0, 0.0

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """The time inside the block is spent waiting for data."""
    start = time.perf_counter()
    yield
    self._waited += time.perf_counter() - start

  @contextlib.contextmanager
  def blocked(self) -> Iterator[None]:
    """The time inside the block is spent waiting for devices, and so for other processes."""
    start = time.perf_counter()
    yield
    self._blocked += time.perf_counter() - start

  def count(self, batch, flops: float = 0.0) -> None:
    """Adds a step with `batch`. Its tokens are those of this process's rows, its `flops` those of the global batch."""
    self._flops += flops
    self._tokens += sum(int(np.count_nonzero(v)) for k, v in batch.items() if k.endswith('_segment_ids'))
    self._steps += 1

  def add(self, values: Mapping[str, float]) -> None:
    """Adds the metrics of a step that a row has the mean of: of the global batch, the same in all processes."""
    for key in MEANS:
      if key in values:
        self._values[key].append(values[key])

  def report(self, *, last: bool = False) -> dict[str, float]:
    """The rates and means since the last report. Tokens are taken to be as many in every process.

    The row of a step is written while the next step runs. `last`: no step follows, so that the time of this step may
    have been spent before the last report. Then the rates are those of the last report: only whole steps count.
    """
    means = {key: sum(values) / len(values) for key, values in self._values.items()}
    self._values.clear()
    return self._measure(last) | means

  def _measure(self, last: bool) -> dict[str, float]:
    seconds = time.perf_counter() - self._start
    step_seconds = seconds / max(self._steps, 1)
    if last and self._rates and step_seconds < WHOLE * self._rates['step_seconds']:
      return self._rates
    self._rates = {
      'step_seconds': step_seconds,
      'tokens_per_second': self._tokens * jax.process_count() / seconds,
      'data_wait': self._waited / seconds,
    }
    self.own_seconds = max(seconds - self._blocked, 0.0) / max(self._steps, 1)
    self.flops_per_second = self._flops / seconds
    self._restart()
    return self._rates
