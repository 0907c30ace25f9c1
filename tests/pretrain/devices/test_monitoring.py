"""What libtpu says of its chips, through a stand-in with the functions and texts of its own library (0.0.42.1)."""

import os
import subprocess
import sys
import threading
import types

import pytest

from pretrain.devices import monitoring

# Texts as in the library's own `description()` of each metric.
TEXTS = {'duty_cycle_pct': ['100.00', '20.00', '98.50', '97.00'], 'tpu_throttle_score': ['0-0', '1-1', '2-0', '3-0']}


class Stand:
  """libtpu.sdk.tpumonitoring: list_supported_metrics() -> list[str], get_metric(name) -> .description(), .data()."""

  def __init__(self, **texts: list[str] | Exception):
    self._texts, self.go = texts, threading.Event()
    self.go.set()

  def list_supported_metrics(self) -> list[str]:
    self.go.wait(10)
    return ['tensorcore_util', *self._texts]

  def get_metric(self, name: str):
    if isinstance(found := self._texts[name], Exception):
      raise found
    return types.SimpleNamespace(description=lambda: name, data=lambda: found)


def read(stand: Stand) -> dict[str, float]:
  monitor = monitoring.Monitor(stand)
  assert monitor.latest() == {}, 'the first call begins the first reading'
  monitor._thread.join()
  return monitor.latest()


def test_the_least_busy_and_the_most_throttled_chip():
  assert read(Stand(**TEXTS)) == {'duty_cycle_pct': 20.0, 'tpu_throttle_score': 1.0}


@pytest.mark.parametrize(
  ('texts', 'found'),
  [
    ({'duty_cycle_pct': ['5.00']}, {'duty_cycle_pct': 5.0}),  # an older libtpu has fewer metrics
    ({'duty_cycle_pct': [], 'tpu_throttle_score': []}, {}),  # as without a TPU
    ({'duty_cycle_pct': RuntimeError('UNAVAILABLE'), 'tpu_throttle_score': ['0-1']}, {}),
    ({'tpu_throttle_score': ['none']}, {}),
  ],
)
def test_what_is_not_said_is_absent(texts, found):
  assert read(Stand(**texts)) == found


def test_a_reading_that_does_not_end_delays_nothing_and_no_second_one_begins():
  stand = Stand(**TEXTS)
  stand.go.clear()
  monitor = monitoring.Monitor(stand)
  threads = threading.active_count()
  assert [monitor.latest() for _ in range(3)] == [{}, {}, {}]
  assert threading.active_count() == threads + 1
  stand.go.set()
  monitor._thread.join()
  assert monitor.latest() == {'duty_cycle_pct': 20.0, 'tpu_throttle_score': 1.0}


def test_only_tpus_are_asked(monkeypatch):
  monkeypatch.setattr(monitoring, '_monitor', lambda: pytest.fail('libtpu was asked'))
  assert monitoring.readings([types.SimpleNamespace(platform='cpu')]) == {}
  monkeypatch.setattr(monitoring, '_monitor', lambda: None)  # a libtpu without the library
  assert monitoring.readings([types.SimpleNamespace(platform='tpu')]) == {}


@pytest.mark.aot
def test_the_installed_libtpu_has_the_functions_and_the_metrics():
  program = f"""
from {monitoring.MODULE.rpartition('.')[0]} import {monitoring.MODULE.rpartition('.')[2]} as source
names = source.list_supported_metrics()
for name in {list(TEXTS)}:
  assert name in names, names
  assert source.get_metric(name).data() == [], 'there is no TPU'
assert "['0-0', '1-1', '2-0', '3-0']" in source.get_metric('tpu_throttle_score').description()
"""
  env = os.environ | {'TPU_SKIP_MDS_QUERY': '1', 'TPU_WORKER_HOSTNAMES': 'localhost'}
  done = subprocess.run([sys.executable, '-c', program], env=env, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
