"""How fast a run is: seconds and tokens of the steps between two rows of metrics."""

import contextlib
import time
from collections.abc import Iterator

import jax
import numpy as np

WHOLE = 0.5  # of the seconds of the steps before it; a step that seems faster was not timed as a whole


class Stopwatch:
  """Seconds, tokens and seconds waited for data since the last report."""

  def __init__(self):
    self._rates: dict[str, float] = {}
    self._restart()

  def _restart(self) -> None:
    self._start, self._tokens, self._waited, self._steps = time.perf_counter(), 0, 0.0, 0

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """The time inside the block is spent waiting for data."""
    start = time.perf_counter()
    yield
    self._waited += time.perf_counter() - start

  def count(self, batch) -> None:
    """The next row of metrics belongs to a step with `batch`."""
    self._tokens += sum(int(np.count_nonzero(v)) for k, v in batch.items() if k.endswith('_segment_ids'))
    self._steps += 1

  def report(self, *, last: bool = False) -> dict[str, float]:
    """The rates since the last report.

    The row of a step is written while the next step runs. `last`: no step follows, so that the time of this step may
    have been spent before the last report. Then the rates are those of the last report: only whole steps count.
    """
    seconds = time.perf_counter() - self._start
    step_seconds = seconds / max(self._steps, 1)
    if last and self._rates and step_seconds < WHOLE * self._rates['step_seconds']:
      return self._rates
    self._rates = {
      'step_seconds': step_seconds,
      'tokens_per_second': self._tokens * jax.process_count() / seconds,
      'data_wait': self._waited / seconds,
    }
    self._restart()
    return self._rates
