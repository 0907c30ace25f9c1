"""The sweep of scripts/tune_kernels.py over a GPU, with a clock of our own."""

import types

import jax
import pytest

from pallas_kernels import tuned
from pallas_kernels.attention import gpu_mosaic
from scripts import tune_kernels


@pytest.fixture
def sweep(monkeypatch):
  """A function of (a device's kind, which measurement is the fastest) -> (chip, entries)."""

  def run(kind: str, fastest: int):
    count = iter(range(1000))
    monkeypatch.setattr(tune_kernels, '_time', lambda run, arrays: abs(next(count) - fastest))
    monkeypatch.setattr(jax, 'devices', lambda: [types.SimpleNamespace(platform='gpu', device_kind=kind)])
    return tune_kernels.by_time()

  return run


def test_on_hopper_both_kernels_are_swept_and_the_fastest_blocks_are_used(sweep, tmp_path, monkeypatch):
  triton, hopper = (len(list(of(64))) for of in (tune_kernels.of_triton, tune_kernels.of_hopper))
  wanted = list(tune_kernels.of_hopper(64))[3][1]
  chip, entries = sweep('NVIDIA H100 80GB HBM3', triton + 3)
  assert set(entries) == {f'{kind}d{width}_bfloat16' for kind in ('', 'mosaic_') for width in (64, 128)}
  assert hopper > 8
  monkeypatch.setattr(tune_kernels, 'ROOT', tmp_path)
  (tmp_path / 'pallas_kernels').mkdir()
  path = tune_kernels.write(chip, entries, 'time')
  monkeypatch.setattr(tuned, 'FOLDER', path.parent)
  monkeypatch.setattr(tuned, 'device_kind', lambda: 'NVIDIA H100 80GB HBM3')
  assert gpu_mosaic.choose_blocks(8192, 8192, 64, 'bfloat16') == wanted != gpu_mosaic.DEFAULTS[64]


def test_every_candidate_for_hopper_fits_it():
  for head_dim in (64, 128):
    found = [blocks for _, blocks, _ in tune_kernels.of_hopper(head_dim)]
    assert gpu_mosaic.DEFAULTS[head_dim] in found
    assert all(gpu_mosaic.shared_bytes(blocks, head_dim) <= gpu_mosaic.SHARED_BYTES for blocks in found)


def test_another_gpu_does_not_use_hoppers_entries(sweep):
  chip, entries = sweep('NVIDIA A100-SXM4-80GB', 0)
  assert (chip, set(entries)) == ('a100', {'d64_bfloat16', 'd128_bfloat16'})


def test_a_machine_without_a_gpu_is_reported():
  with pytest.raises(SystemExit, match='--gpu tunes the GPU of this machine, which has cpu; use --aot'):
    tune_kernels.by_time()
