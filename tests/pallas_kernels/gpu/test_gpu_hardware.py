"""Every GPU implementation against the definition, on a GPU, in a process that can use it."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[3]
BENCH = [sys.executable, 'scripts/bench/attention.py', '--gpu']
NO_GPU = pytest.mark.skipif(not pathlib.Path('/dev/nvidia0').exists(), reason='this machine has no NVIDIA GPU')


def table(**env: str) -> list[list[str]]:
  own = {name: x for name, x in os.environ.items() if name not in ('JAX_PLATFORMS', 'XLA_FLAGS')}
  done = subprocess.run(BENCH, env=own | env, cwd=ROOT, check=True, capture_output=True, text=True)
  return [line.split() for line in done.stdout.splitlines()[1:]]


def test_without_a_gpu_the_bench_says_not_measured():
  found = table(JAX_PLATFORMS='cpu')
  assert [row[:2] for row in found] == [[n, m] for n in ('triton', 'mosaic_gpu', 'cudnn') for m in ('causal', 'full')]
  assert all(' '.join(row[2:]) == 'not measured: no GPU here, cpu' for row in found)


@NO_GPU
@pytest.mark.slow
def test_on_a_gpu_values_and_gradients_are_about_as_accurate_as_the_definition():
  for name, mask, *rest in table():
    assert all(float(x) < 3 for x in rest[:4]), (name, mask, rest)
