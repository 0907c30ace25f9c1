"""How fast a run is, and how full its rows are: means over the steps between two rows of metrics."""

import collections
import time
from collections.abc import Mapping

import jax
import numpy as np

MEANS = ('fill/encoder', 'fill/decoder', 'padding_flops')  # metrics of a step that a row has the mean of


class Stopwatch:
  """Seconds, tokens, seconds waited for data and sums of step metrics since the last report."""

  def __init__(self):
    self._start, self._tokens, self._waited, self._steps = time.perf_counter(), 0, 0.0, 0
    self._values: dict[str, list[float]] = collections.defaultdict(list)

  def count(self, batch, waited: float) -> None:
    """Adds a step. Its tokens are those of this process's rows."""
    self._tokens += sum(int(np.count_nonzero(v)) for k, v in batch.items() if k.endswith('_segment_ids'))
    self._waited += waited
    self._steps += 1

  def add(self, values: Mapping[str, float]) -> None:
    """Adds the metrics of a step that a row has the mean of: of the global batch, the same in all processes."""
    for key in MEANS:
      if key in values:
        self._values[key].append(values[key])

  def report(self) -> dict[str, float]:
    """The means since the last report, which begin anew. Tokens are taken to be as many in every process."""
    seconds = time.perf_counter() - self._start
    rates = {
      'step_seconds': seconds / max(self._steps, 1),
      'tokens_per_second': self._tokens * jax.process_count() / seconds,
      'data_wait': self._waited / seconds,
    }
    means = {key: sum(values) / len(values) for key, values in self._values.items()}
    self.__init__()
    return rates | means
