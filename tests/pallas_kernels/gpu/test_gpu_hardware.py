"""Every GPU implementation against the definition, on a GPU, in a process that can use it."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[3]
NO_GPU = pytest.mark.skipif(not pathlib.Path('/dev/nvidia0').exists(), reason='this machine has no NVIDIA GPU')


def measured(script: str, **env: str) -> list[str]:
  own = {name: x for name, x in os.environ.items() if name not in ('JAX_PLATFORMS', 'XLA_FLAGS')}
  command = [sys.executable, script, '--gpu']
  done = subprocess.run(command, env=own | env, cwd=ROOT, check=True, capture_output=True, text=True)
  return done.stdout.splitlines()


def table(**env: str) -> list[list[str]]:
  return [line.split() for line in measured('scripts/bench/attention.py', **env)[1:]]


def test_without_a_gpu_the_bench_says_not_measured():
  found = table(JAX_PLATFORMS='cpu')
  names = 'reference', 'triton', 'mosaic_gpu', 'cudnn'
  assert [row[:2] for row in found] == [[name, mask] for name in names for mask in ('causal', 'full')]
  assert all(' '.join(row[2:]) == 'not measured: no GPU here, cpu' for row in found)


def test_without_a_gpu_the_bench_of_products_says_not_measured():
  assert measured('scripts/bench/matmul.py', JAX_PLATFORMS='cpu') == ['not measured: no GPU here, cpu']


@NO_GPU
@pytest.mark.slow
def test_on_a_gpu_values_and_gradients_are_about_as_accurate_as_the_definition():
  for name, mask, *rest in table():
    assert all(float(x) < 3 for x in rest[:4]), (name, mask, rest)


@NO_GPU
@pytest.mark.slow
def test_on_a_gpu_triton_is_the_definition_in_every_case():
  command = [sys.executable, '-m', 'tests.pallas_kernels.gpu.on_gpu']
  own = {name: x for name, x in os.environ.items() if name not in ('JAX_PLATFORMS', 'XLA_FLAGS')}
  done = subprocess.run(command, env=own, cwd=ROOT, check=True, capture_output=True, text=True)
  for row in map(json.loads, done.stdout.splitlines()):
    limit = 1e-5 if row['dtype'] == 'float32' else 3
    assert all(error < limit for error in row['errors'].values()), row
