"""The cache of built corpora and compiled programs, shared by processes."""

import contextlib
import os
import pathlib

import jax
from jax._src import compilation_cache, compiler, distributed  # the choice of who writes the cache is not public

from data.arguments import expand_user


def cache_dir() -> pathlib.Path:
  """The folder of built corpora and compiled programs: $PRETRAIN_CACHE, else ~/.cache/pretrain."""
  return pathlib.Path(expand_user(os.environ.get('PRETRAIN_CACHE', '~/.cache/pretrain')))


def use_compilation_cache() -> None:
  """Compiled programs are kept on disk: a second start compiles nothing."""
  jax.config.update('jax_compilation_cache_dir', str(cache_dir() / 'xla'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  if jax.config.jax_platforms == 'cpu' and distributed.global_state.process_id:
    compiler._cache_write = keep_program


def keep_program(key: str, seconds: float, name: str, backend, executable, callbacks=()) -> None:
  """Writes a compiled program to the cache. It replaces JAX's function, which writes only in process 0.

  On CPUs, cache keys contain the devices of a process, so processes cannot share entries. Only JAX 0.10 passes
  `callbacks`; a program with callbacks into Python cannot be kept.
  """
  if not callbacks:
    with contextlib.suppress(OSError):  # a full disk only makes the next start slower
      compilation_cache.put_executable_and_time(key, name, executable, backend, int(seconds))
