"""What training, evaluation and generation share: the mesh, the model and where each array of the state lies."""

import contextlib
import dataclasses
import functools
import os
import pathlib
from typing import Any

import jax
from jax._src import compilation_cache, compiler, distributed  # no public name has who writes the cache
from jax.sharding import Mesh

import models.build
from models import partition, specs
from pretrain.averaging import make_track, track_shardings
from pretrain.errors import ConfigError
from pretrain.experiment import Experiment, check_batch
from pretrain.loss import make_loss
from pretrain.mesh import batch_shards, make_mesh, replicated
from pretrain.optim import make_optimizer, skipped
from pretrain.optim_state import state_shardings
from pretrain.schedule import make_schedule
from pretrain.step import TrainState, init_state, make_train_step, start_state


def cache_dir() -> pathlib.Path:
  """Where built corpora and compiled programs are kept: $PRETRAIN_CACHE, else ~/.cache/pretrain."""
  return pathlib.Path(os.environ.get('PRETRAIN_CACHE', pathlib.Path.home() / '.cache' / 'pretrain'))


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


@dataclasses.dataclass(frozen=True)
class Program:
  """One run's functions, bound to a mesh. `train_step(state, batch)` donates the state."""

  mesh: Mesh
  model: models.build.Model
  abstract: TrainState  # shapes, dtypes and shardings of the state
  init: Any
  start: Any  # params -> the state of step 0 with them, which it takes over
  train_step: Any


def check_divisible(parameters, mesh) -> None:
  """Raises ConfigError where the mesh does not divide a parameter."""
  try:
    partition.check_divisible(parameters, mesh)
  except ValueError as error:
    raise ConfigError(str(error)) from error


def build_program(cfg: Experiment, devices=None, *, schedule_start: int = 0, start: int = 0) -> Program:
  """Everything a run needs that holds no arrays; nothing is allocated. The schedule counts from `schedule_start`, a
  phase's losses from its `start`.

  Raises ConfigError where the mesh does not divide the batch or a parameter.
  """
  mesh = make_mesh(cfg.mesh, devices)
  check_batch(cfg, batch_shards(mesh))
  model = models.build.build(cfg.model, cfg.kernels, mesh)
  check_divisible(model.specs, mesh)
  schedule = make_schedule(cfg.schedule, schedule_start)
  tx = make_optimizer(cfg.optimizer, schedule, model.specs, mesh, spikes=cfg.spikes, since=start)
  track = make_track(cfg.averaging)
  init = functools.partial(init_state, functools.partial(specs.initialize, model.specs), tx, cfg.seed, track)
  shapes = jax.eval_shape(init)
  params = partition.shardings(model.specs, mesh)
  everywhere = replicated(mesh)
  opt_state = state_shardings(tx, shapes.params, params, mesh)
  placed = TrainState(everywhere, params, opt_state, track_shardings(cfg.averaging, params))
  abstract = jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, placed)
  step = make_train_step(
    make_loss(cfg.loss, model, cfg.kernels, cfg.data.num_sources), tx, schedule, skipped, cfg.seed,
    track=track, num_microbatches=cfg.train.accumulate, shardings=params,
  )  # fmt: skip
  start = functools.partial(start_state, tx=tx, track=track)
  return Program(
    mesh, model, abstract, jax.jit(init, out_shardings=placed),
    jax.jit(start, donate_argnums=0, out_shardings=placed),
    jax.jit(step, donate_argnums=0, out_shardings=(placed, everywhere)),
  )  # fmt: skip
