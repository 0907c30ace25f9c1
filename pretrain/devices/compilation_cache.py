"""Where built corpora and compiled programs are kept between processes."""

import contextlib
import os
import pathlib

import jax
from jax._src import compilation_cache, compiler, distributed  # no public name has who writes the cache

from data.arguments import expand_user


def cache_dir() -> pathlib.Path:
  """Where built corpora and compiled programs are kept: $PRETRAIN_CACHE, else ~/.cache/pretrain."""
  return pathlib.Path(expand_user(os.environ.get('PRETRAIN_CACHE', '~/.cache/pretrain')))


def use_compilation_cache() -> None:
  """Compiled programs are kept across processes: a second start compiles nothing."""
  jax.config.update('jax_compilation_cache_dir', str(cache_dir() / 'xla'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  if jax.config.jax_platforms == 'cpu' and distributed.global_state.process_id:
    compiler._cache_write = keep_program


def keep_program(key: str, seconds: float, name: str, backend, executable, callbacks=()) -> None:
  """Writes a compiled program to the cache, in place of JAX's own function, which does so in process 0 alone.

  On CPUs the devices of a process are in the keys: no process could use what another one has written. `callbacks`
  into Python, which cannot be kept, are an argument of JAX 0.10 alone.
  """
  if not callbacks:
    with contextlib.suppress(OSError):  # a full disk costs the next start its seconds, no more
      compilation_cache.put_executable_and_time(key, name, executable, backend, int(seconds))
