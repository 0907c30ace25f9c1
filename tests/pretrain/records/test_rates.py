"""The rates of a run: in metrics.jsonl and on the console they count whole steps only."""

import io
import re
import types

import numpy as np
import pytest

from pretrain.records import progress, stopwatch
from pretrain.records.progress import make_display
from pretrain.records.stopwatch import Stopwatch

BATCH = {'decoder_segment_ids': np.ones((2, 50), np.int32)}


@pytest.fixture
def now(monkeypatch):
  """A clock that stands still; `now[0]` is its time."""
  time = [0.0]
  clock = types.SimpleNamespace(perf_counter=lambda: time[0], monotonic=lambda: time[0])
  monkeypatch.setattr(stopwatch, 'time', clock)
  monkeypatch.setattr(progress, 'time', clock)
  return time


def rows(now, steps: int, seconds: float, waits_for_devices: bool) -> list[dict[str, float]]:
  """The rates of steps that all take `seconds`, as the loop asks for them.

  Where the devices run beside the host, the row of a step waits for that step. Otherwise the next step has ended, too.
  """
  watch, found = Stopwatch(), []
  for step in range(1, steps + 1):
    now[0] = seconds * (step - 1 if waits_for_devices else step)
    if step > 1:
      found.append(watch.report())
    watch.count(BATCH)
  now[0] = seconds * steps + 0.001
  return [*found, watch.report(last=True)]


@pytest.mark.parametrize('waits_for_devices', [True, False])
@pytest.mark.parametrize('steps', [1, 2, 3, 9])
def test_no_row_is_faster_than_the_steps_were(now, steps, waits_for_devices):
  for found in rows(now, steps, 2.0, waits_for_devices):
    assert found['step_seconds'] >= 1.99
    assert found['tokens_per_second'] <= 50.1
  assert found['tokens_per_second'] == pytest.approx(50.0 if steps != 2 or waits_for_devices else 25.0, rel=1e-2)


def test_the_wait_for_data_belongs_to_the_row_in_whose_time_it_was(now):
  watch = Stopwatch()
  with watch.waiting():
    now[0] += 3.0
  now[0] += 1.0
  watch.count(BATCH)
  assert watch.report() == {'step_seconds': 4.0, 'tokens_per_second': 25.0, 'data_wait': 0.75}
  now[0] += 2.0
  watch.count(BATCH)
  assert watch.report()['data_wait'] == 0.0


def test_the_console_counts_whole_steps(now):
  """Three steps of 0.1 s whose rows come together, because the first one was written late."""
  text = io.StringIO()
  display = make_display(3, text)
  for step in (1, 2, 3):
    display.show(step, {'loss': 1.0, 'step_seconds': 0.1})
    now[0] += 0.001 if step < 3 else 0.0
    display._next = 0.0
  rates = [float(rate) for rate in re.findall(r'([\d.]+) steps/s', text.getvalue())]
  assert rates == [10.0, 10.0], text.getvalue()


def test_the_console_counts_the_time_between_rows_too(now):
  """An evaluation of 8 s between two steps of 1 s."""
  text = io.StringIO()
  display = make_display(12, text)
  display.show(1, {'step_seconds': 1.0})
  now[0] += 10.0
  display.show(3, {'step_seconds': 1.0})
  assert '0.20 steps/s  ETA 0:00:45' in text.getvalue()
