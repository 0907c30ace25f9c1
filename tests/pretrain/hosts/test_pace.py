"""Which of several processes is slow, without a collective."""

import io
import os
import sys
import types

import pytest

from pretrain.fleet import launch
from pretrain.hosts import pace
from pretrain.records.metrics import read_metrics
from tests.pretrain import tiny

# Process 1 of two sleeps before each batch, and its device is the fuller one.
SLOW = """
import os, sys, time
from pretrain.devices import usage
usage.memory = lambda devices: {'hbm_mib': 100.0 * (1 + int(os.environ['PRETRAIN_HOST']))}
from pretrain.run import loop
next_batch = loop.next_batch
def slow(*args):
  time.sleep(0.1 * int(os.environ['PRETRAIN_HOST']))
  return next_batch(*args)
loop.next_batch = slow
from pretrain.cli.main import main
sys.exit(main(['train', *sys.argv[1:]]))
"""


def test_nothing_is_said_of_one_process():
  pace.tell(1.0, {'hbm_mib': 2.0})
  assert pace.of_all({'hbm_mib': 3.0}) == {'hbm_mib': 3.0}


class Client:
  """The coordinator's folder of keys, as JAX's client shows it."""

  def __init__(self):
    self.keys = {}

  def key_value_set(self, key, value, allow_overwrite):
    self.keys[key] = value

  def key_value_dir_get(self, folder):
    return [(key, value) for key, value in self.keys.items() if key.startswith(folder)]


def test_a_row_has_the_fullest_device_and_the_least_busy_chip_of_all_processes(monkeypatch):
  client = Client()
  told = ((0.5, {'hbm_mib': 2.0, 'duty_cycle_pct': 90.0}), (1.5, {'hbm_mib': 7.0, 'hbm_peak_mib': 8.0}),
          (0.5, {'duty_cycle_pct': 40.0, 'tpu_throttle_score': 2.0}))  # fmt: skip
  for process in (2, 1, 0):
    state = types.SimpleNamespace(client=client, num_processes=3, process_id=process)
    monkeypatch.setattr(pace.distributed, 'global_state', state)
    pace.tell(*told[process])
    if process:
      assert 'slowest_host' not in pace.of_all({}), 'not before all have told their time'
  assert pace.of_all({'hbm_mib': 3.0}) == {
    'hbm_mib': 7.0, 'hbm_peak_mib': 8.0, 'duty_cycle_pct': 40.0, 'tpu_throttle_score': 2.0, 'slowest_host': 1,
    'slowest_ratio': 3.0,
  }  # fmt: skip


@pytest.mark.slow  # half a minute of two processes
def test_the_slow_process_is_named(tmp_path, monkeypatch):
  monkeypatch.delenv('XLA_FLAGS')
  monkeypatch.delenv('NPROC')
  keys = (*tiny.SMALL_DECODER, 'train.steps=20', 'mesh.data=2', 'checkpoint.every=100', 'train.profile_steps=(3, 5)',
          'train.profile_hosts=(1,)')  # fmt: skip
  flags = [f'--gin_file={tiny.DECODER}', f'--workdir={tmp_path / "run"}', *(f'--gin.{key}' for key in keys)]
  stream = io.StringIO()
  assert launch.run_program(2, [sys.executable, '-c', SLOW, *flags], stream) == 0, stream.getvalue()
  rows = read_metrics(tmp_path / 'run')
  late = [row for row in rows[5:] if row['slowest_host'] == 1 and row['slowest_ratio'] > 1.5]
  assert {row['hbm_mib'] for row in rows[5:]} == {200.0}
  assert len(late) > 10, [(row.get('slowest_host'), row.get('slowest_ratio')) for row in rows]
  traces = {name for _, _, names in os.walk(tmp_path / 'run/profile') for name in names}
  assert len([name for name in traces if name.endswith('.xplane.pb')]) == 1, 'of process 1 alone'


def test_the_slowest_is_compared_with_the_median():
  assert pace.compared({0: 1.0, 1: 4.0}) == {'slowest_host': 1, 'slowest_ratio': 4.0}
  assert pace.compared({0: 0.0, 1: 0.0}) == {}
  assert pace.compared({3: 2.0, 1: 1.0, 2: 1.0, 0: 1.0}) == pytest.approx({'slowest_host': 3, 'slowest_ratio': 2.0})
