"""The sweep of scripts/tune_kernels.py over a GPU, with a clock of our own."""

import types

import jax
import pytest

from pallas_kernels import tuned
from pallas_kernels.attention import gpu, gpu_mosaic
from scripts import tune_kernels


@pytest.fixture
def sweep(monkeypatch):
  """A function of (a device's kind, which measurement is the fastest) -> (chip, entries)."""

  def run(kind: str, fastest: int):
    count = iter(range(1000))
    monkeypatch.setattr(tune_kernels, '_time', lambda run, arrays: abs(next(count) - fastest))
    monkeypatch.setattr(tune_kernels, '_compiled', lambda sizes, run, arrays: run if sizes.get('kv') != 128 else None)
    monkeypatch.setattr(jax, 'devices', lambda: [types.SimpleNamespace(platform='gpu', device_kind=kind)])
    return tune_kernels.by_time()

  return run


def test_on_hopper_both_kernels_are_swept_and_the_fastest_blocks_are_used(sweep, tmp_path, monkeypatch):
  """A candidate that does not compile has no time."""
  parts = [part(64)[1] for part in (tune_kernels.of_triton, tune_kernels.of_triton_gradients, tune_kernels.of_hopper)]
  forward, gradients, hopper = ([sizes for sizes, _ in part if sizes.get('kv') != 128] for part in parts)
  assert len(forward) < len(gradients)
  chip, entries = sweep('NVIDIA H100 80GB HBM3', len(forward) + len(gradients) + 3)
  assert set(entries) == {f'{kind}d{width}_bfloat16' for kind in ('', 'mosaic_') for width in (64, 128)}
  monkeypatch.setattr(tune_kernels, 'ROOT', tmp_path)
  (tmp_path / 'pallas_kernels').mkdir()
  path = tune_kernels.write(chip, entries, 'time')
  monkeypatch.setattr(tuned, 'FOLDER', path.parent)
  monkeypatch.setattr(tuned, 'device_kind', lambda: 'NVIDIA H100 80GB HBM3')
  assert vars(gpu_mosaic.choose_blocks(8192, 8192, 64, 'bfloat16')) == hopper[3] != vars(gpu_mosaic.DEFAULTS[64])
  # Their times fall until the fastest measurement, which is of the other kernel.
  assert vars(gpu.choose_blocks(8192, 8192, 64, 'bfloat16')) == forward[-1] | gradients[-1]


def test_every_candidate_for_hopper_fits_it():
  for head_dim in (64, 128):
    found = [gpu_mosaic.Blocks(**sizes) for sizes, _ in tune_kernels.of_hopper(head_dim)[1]]
    assert gpu_mosaic.DEFAULTS[head_dim] in found
    assert all(gpu_mosaic.shared_bytes(blocks, head_dim) <= gpu_mosaic.SHARED_BYTES for blocks in found)


def test_another_gpu_does_not_use_hoppers_entries(sweep):
  chip, entries = sweep('NVIDIA A100-SXM4-80GB', 0)
  assert (chip, set(entries)) == ('a100', {'d64_bfloat16', 'd128_bfloat16'})


def test_a_machine_without_a_gpu_is_reported():
  with pytest.raises(SystemExit, match='--gpu tunes the GPU of this machine, which has cpu; use --aot'):
    tune_kernels.by_time()
