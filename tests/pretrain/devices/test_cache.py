"""Where compiled programs are kept: a folder of the host, or a store for all hosts."""

import pathlib
import shutil

import jax
import pytest
from jax._src import compilation_cache

from data.examples import makers
from pretrain.cli.main import main
from pretrain.devices.compilation_cache import cache_dir, plans_url, use_compilation_cache
from pretrain.errors import ConfigError
from pretrain.run.train import train
from tests.pretrain import tiny


@pytest.fixture
def own_programs(monkeypatch):
  """JAX's cache is as before after the test."""
  before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
  yield monkeypatch
  jax.config.update('jax_compilation_cache_dir', before[0])
  jax.config.update('jax_persistent_cache_min_compile_time_secs', before[1])
  compilation_cache.reset_cache()


def test_compiled_programs_are_kept_in_a_store_and_found_there(gcs, own_programs):
  own_programs.setenv('PRETRAIN_CACHE', 'gs://runs/cache/')
  use_compilation_cache()
  compilation_cache.reset_cache()
  for _ in range(2):  # another function each time, with the same program
    assert jax.jit(lambda x: x * 3.25 + 1.5)(2.0) == 8.0
  kept = [name for name in gcs.names('runs') if name.startswith('cache/xla/jit__lambda') and name.endswith('-cache')]
  assert len(kept) == 1
  assert gcs.log['GET /storage/v1/b/runs/o/NAME'] > 1
  assert cache_dir() == pathlib.Path('~/.cache/pretrain').expanduser()  # built corpora stay on the host


@pytest.mark.slow
def test_plans_made_ahead_and_those_of_a_run_are_kept_in_a_store(gcs, own_programs, text_store, tmp_path):
  assert plans_url() is None
  own_programs.setenv('HOME', str(tmp_path))
  own_programs.setenv('PRETRAIN_CACHE', 'gs://runs/cache')
  own_programs.setattr(makers, 'LARGE', 1)
  keys = (*tiny.over(text_store), *tiny.SMALL_UL2, 'train.steps=1')
  assert main(['data', 'plan', f'--gin_file={tiny.UL2}', *(f'--gin.{key}' for key in keys)]) == 0
  planned = {name for name in gcs.names('runs') if name.startswith('cache/plans/')}
  assert planned
  gcs.objects.clear()
  shutil.rmtree(tmp_path / '.cache')
  train(tiny.experiment(tiny.UL2, *keys), tmp_path / 'run')
  there = {name for name in gcs.names('runs') if name.startswith('cache/plans/')}
  assert there
  assert there <= planned


def test_a_cache_url_of_another_kind_is_refused(own_programs):
  own_programs.setenv('PRETRAIN_CACHE', 'http://host/cache')
  with pytest.raises(ConfigError, match='PRETRAIN_CACHE=http://host/cache is not the URL of a folder in a store'):
    use_compilation_cache()
