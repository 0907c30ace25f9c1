"""How fast a run is: seconds and tokens between two rows of metrics."""

import time

import jax
import numpy as np


class Stopwatch:
  """Seconds, tokens and seconds waited for data since the last report."""

  def __init__(self):
    self._start, self._tokens, self._waited, self._steps = time.perf_counter(), 0, 0.0, 0

  def count(self, batch, waited: float) -> None:
    self._tokens += sum(int(np.count_nonzero(v)) for k, v in batch.items() if k.endswith('_segment_ids'))
    self._waited += waited
    self._steps += 1

  def report(self) -> dict[str, float]:
    seconds = time.perf_counter() - self._start
    rates = {
      'step_seconds': seconds / max(self._steps, 1),
      'tokens_per_second': self._tokens * jax.process_count() / seconds,
      'data_wait': self._waited / seconds,
    }
    self.__init__()
    return rates
