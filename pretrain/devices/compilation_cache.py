"""The cache of built corpora, compiled programs and plans, shared by processes; the last two by hosts, in a store."""

import contextlib
import pathlib

import jax
from jax._src import compilation_cache, compiler, distributed  # the choice of who writes the cache is not public

from pretrain.workdirs import fsspec_bridge
from pretrain.workdirs.cache import cache_url, local_cache_dir


def cache_dir() -> pathlib.Path:
  """The folder of this host for built corpora: $PRETRAIN_CACHE unless that is a URL, else ~/.cache/pretrain."""
  return local_cache_dir()


def plans_url() -> str | None:
  """The folder of a store in which plans are kept for all hosts; None unless $PRETRAIN_CACHE is a URL."""
  url = cache_url()
  return f'{url}/plans' if url else None


def use_compilation_cache() -> None:
  """Compiled programs are kept: a second start compiles nothing. In a store ($PRETRAIN_CACHE=gs://…), for all hosts."""
  url = cache_url()
  if url is not None:
    fsspec_bridge.register()
  jax.config.update('jax_compilation_cache_dir', f'{url}/xla' if url else str(cache_dir() / 'xla'))
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
