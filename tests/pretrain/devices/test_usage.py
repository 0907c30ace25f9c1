"""Peaks and memory of devices, and the utilisation that a run logs."""

import types

import jax
import pytest

from pretrain.devices import usage
from pretrain.records import stopwatch
from pretrain.records.metrics import read_metrics
from pretrain.run import phase_program
from pretrain.run.train import train
from tests.pretrain import tiny


def device(kind: str = 'cpu', stats=None):
  def memory_stats():
    if isinstance(stats, Exception):
      raise stats
    return stats

  return types.SimpleNamespace(device_kind=kind, memory_stats=memory_stats)


@pytest.mark.parametrize(
  ('kind', 'devices', 'chips', 'tflops'),
  [('TPU v5', 4, 4, 459), ('TPU v4', 4, 4, 275), ('TPU v5 lite', 8, 8, 197), ('TPU7x', 8, 4, 2307)],
)
def test_the_peak_of_a_slice_is_that_of_its_chips(kind, devices, chips, tflops):
  """Chips and TFLOPs as Google publishes them; devices as JAX counts them."""
  assert usage.peak_flops([device(kind)] * devices) == chips * tflops * 1e12


def test_one_unknown_chip_means_no_peak():
  assert usage.peak_flops([device('TPU v6 lite'), device('cpu')]) is None
  assert usage.peak_flops([types.SimpleNamespace(device_kind='NVIDIA H200')] * 2) == 2 * 989e12


@pytest.mark.aot
@pytest.mark.parametrize('topology', ['v5e:2x4', 'v5p:2x2x1', 'v6e:2x4', 'tpu7x:2x2x1'])
def test_the_table_has_the_names_that_libtpu_gives_its_devices(topology):
  from pretrain.tools.plan import tpu_devices

  assert usage.peak_flops(tpu_devices(topology)) > 4 * 100e12


def test_memory_is_that_of_the_fullest_device_and_absent_where_none_says_it():
  stats = [{'bytes_in_use': 2 * usage.MIB, 'peak_bytes_in_use': 3 * usage.MIB}, {'bytes_in_use': 5 * usage.MIB}]
  assert usage.memory([device(stats=s) for s in stats]) == {'hbm_mib': 5.0, 'hbm_peak_mib': 3.0}
  assert usage.memory([device(stats=None), device(stats=RuntimeError('UNIMPLEMENTED'))]) == {}
  assert usage.memory(jax.devices()) == {}, 'a CPU does not say'


def test_the_memory_of_the_process_is_what_the_kernel_says():
  with open('/proc/self/status') as file:
    (resident,) = (int(line.split()[1]) for line in file if line.startswith('VmRSS'))
  assert usage.host_memory()['host_mib'] == pytest.approx(resident / 1024, rel=0.1)


def test_a_run_logs_its_memory_and_no_utilisation_of_an_unknown_chip(tmp_path):
  train(tiny.decoder('train.steps=3', 'checkpoint.every=100'), tmp_path)
  for row in read_metrics(tmp_path):
    assert row['host_mib'] > 50
    assert not {'mfu', 'hbm_mib', 'hbm_peak_mib', 'slowest_host', 'slowest_ratio'} & set(row)


def test_the_utilisation_is_a_count_by_hand(tmp_path, monkeypatch):
  """A decoder of two layers: 32 wide, 4 heads of 8, gated MLP 64, vocabulary 512, 8 rows of 32 tokens."""
  monkeypatch.setattr(phase_program, 'peak_flops', lambda devices: float(len(list(devices))))
  train(tiny.decoder('train.steps=3', 'checkpoint.every=100', 'mesh.data=2'), tmp_path)
  matrices = 2 * (4 * 32 * 32 + 3 * 32 * 64) + 32 * 512
  pairs = 2 * 32  # keys of each query, in all layers
  of_token = 3 * (2 * matrices + 4 * 32 * pairs)
  row = read_metrics(tmp_path)[1]
  assert row['mfu'] * row['step_seconds'] * 2 == pytest.approx(8 * 32 * of_token, rel=1e-6)


def test_time_that_a_process_waits_for_devices_is_not_its_own(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(stopwatch, 'time', types.SimpleNamespace(perf_counter=lambda: now[0]))
  watch = stopwatch.Stopwatch()
  for _ in range(2):
    now[0] += 1.0
    with watch.blocked():
      now[0] += 3.0
    watch.count({}, flops=10.0)
  watch.report()
  assert (watch.own_seconds, watch.flops_per_second) == (1.0, 20.0 / 8.0)
