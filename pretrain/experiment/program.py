"""What training, evaluation and generation share: the mesh, the model and where each array of the state lies."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

import models.build
from models import partition, specs
from models.host_memory import HOST
from pretrain.devices.compiler import check_compiles, options_for
from pretrain.devices.mesh import batch_shards, check_memory, make_mesh, replicated
from pretrain.errors import ConfigError
from pretrain.experiment.checks import check_batch, check_features, check_mesh_of_experts, check_sequence
from pretrain.experiment.experiment import Experiment
from pretrain.experiment.pipelines import check_pipeline
from pretrain.experiment.rules.multi_token import check_multi_token
from pretrain.experiment.rules.offload import check_offload
from pretrain.optim.averaging import averaging_tracks
from pretrain.optim.offload import on_host, params_on_host, streamed
from pretrain.optim.optimizer import make_optimizer, skipped
from pretrain.optim.schedule import make_schedule
from pretrain.optim.sparsity import Rule, begun, sparse, sparsity_rule, sparsity_tracks
from pretrain.optim.state import state_shardings
from pretrain.step.across_replicas import across_replicas
from pretrain.step.fill import make_fill
from pretrain.step.loss import make_loss
from pretrain.step.scaling import scaling_tracks
from pretrain.step.train_step import Tracks, TrainState, init_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Program:
  """One run's functions, bound to a mesh. `train_step(state, batch)` donates the state."""

  mesh: Mesh
  model: models.build.Model
  abstract: TrainState  # shapes, dtypes and shardings of the state
  init: Any
  start: Any  # params -> the state of step 0 with them, which it takes over; parameters that they lack are drawn
  train_step: Any

  @property
  def weights(self):
    """Shapes, dtypes and shardings of the parameters of the model without adapters."""
    return self.abstract.frozen or self.abstract.params


def tracks_of(cfg: Experiment, model: models.build.Model, rule: Rule) -> Tracks:
  """What the methods of a run keep in `TrainState.extra`: each contributes entries of its own."""
  return {
    **averaging_tracks(cfg.averaging),
    **scaling_tracks(cfg.precision, model.specs),
    **sparsity_tracks(cfg.sparsity, rule, model.split(model.specs)[0]),
  }


def whole_batch(cfg: Experiment, mesh: Mesh, shardings: Any, tracks: Tracks) -> Callable[[Callable], Callable]:
  """What makes gradients of the whole batch of those of microbatches: nothing, or sums over replicas."""
  if mesh.shape['replica'] == 1:
    return lambda value_and_grad: value_and_grad
  own = {'mesh': mesh, 'shardings': shardings, 'dtype': cfg.train.replica_dtype, 'tracks': tracks}
  return functools.partial(across_replicas, **own)


def check_divisible(parameters, mesh) -> None:
  """Raises ConfigError where the mesh does not divide a parameter."""
  try:
    partition.check_divisible(parameters, mesh)
  except ValueError as error:
    raise ConfigError(str(error)) from error


def build_program(cfg: Experiment, devices=None, *, schedule_start: int = 0, start: int = 0) -> Program:
  """Everything a run needs that holds no arrays; nothing is allocated. The schedule counts from `schedule_start`, a
  phase's losses from its `start`.

  Raises ConfigError where the mesh does not divide the batch or a parameter, and where the compiler refuses an option.
  """
  mesh = make_mesh(cfg.mesh, devices)
  check_compiles(cfg.compiler, mesh)
  if cfg.model.remat_offload:
    check_memory(mesh, HOST, f'model.remat_offload={list(cfg.model.remat_offload)}')
  if cfg.optimizer.offload:
    check_memory(mesh, HOST, f'optimizer.offload={list(cfg.optimizer.offload)}')
  check_batch(cfg, batch_shards(mesh))
  check_mesh_of_experts(cfg, mesh.shape['expert'])
  check_features(cfg, mesh.shape['sequence'])
  check_sequence(cfg, mesh.shape['sequence'])
  check_pipeline(cfg, mesh.shape['stage'], batch_shards(mesh))
  check_multi_token(cfg, stages=mesh.shape['stage'], devices=mesh.shape['sequence'])
  check_offload(cfg, stages=mesh.shape['stage'])
  model = models.build.build(cfg.model, cfg.kernels, mesh, cfg.lora, cfg.precision)
  check_divisible(model.specs, mesh)
  schedule = make_schedule(cfg.schedule, schedule_start, decay_delay=cfg.train.decay_delay)
  trained = model.split(model.specs)[0]
  rule = sparsity_rule(cfg.sparsity, trained, cfg.seed)
  tracks = tracks_of(cfg, model, rule)
  tx = sparse(make_optimizer(cfg.optimizer, schedule, trained, mesh, spikes=cfg.spikes, since=start), rule)
  draw = lambda key: begun(rule, specs.initialize(model.specs, key))
  begin = lambda tx: functools.partial(init_state, draw, tx, cfg.seed, tracks, model.split)
  shapes = jax.eval_shape(begin(tx))
  params, frozen = model.split(partition.shardings(model.specs, mesh))
  everywhere = replicated(mesh)
  opt_state = state_shardings(tx, shapes.params, params, mesh)
  opt_state = on_host(cfg.optimizer.offload, trained, shapes.opt_state, opt_state)
  homes = params_on_host(cfg.optimizer.offload, trained, params)
  tx = streamed(tx, opt_state, homes)
  extra = {name: track.place(params, everywhere) for name, track in tracks.items()}
  placed = TrainState(everywhere, homes, opt_state, extra, frozen)
  abstract = jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, placed)
  step = make_train_step(
    make_loss(cfg.loss, model, cfg.kernels, cfg.data.num_sources), tx, schedule, skipped, cfg.seed,
    fill=make_fill(cfg.model, cfg.lora), tracks=tracks, num_microbatches=cfg.train.accumulate, shardings=params,
    whole=whole_batch(cfg, mesh, params, tracks),
  )  # fmt: skip

  def start(params) -> TrainState:
    absent = {name: branch for name, branch in model.specs.items() if name not in params}
    draw = lambda key: begun(rule, {**specs.initialize(absent, key), **params})
    return init_state(draw, tx, cfg.seed, tracks, model.split)

  return Program(
    mesh, model, abstract, jax.jit(begin(tx), out_shardings=placed),
    jax.jit(start, donate_argnums=0, out_shardings=placed),
    jax.jit(
      step, donate_argnums=0, out_shardings=(placed, everywhere),
      compiler_options=options_for(cfg.compiler, mesh.devices.flat[0].device_kind) or None,
    ),
  )  # fmt: skip
