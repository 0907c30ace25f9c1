"""A run that writes: its config, its data and the parameters of a step, on one device or on a mesh."""

import dataclasses
from typing import Any, Protocol

import jax

from data.batches.batches import DataSource
from data.batches.source import open_data
from data.prepare.published import Published
from data.stores.paths import looked_in
from models.build import KernelsConfig, Model, check_precision
from models.precision import PrecisionConfig
from pretrain.checkpoints.checkpoints import Checkpoints
from pretrain.config import bindings
from pretrain.devices.compilation_cache import cache_dir
from pretrain.devices.mesh import MeshConfig, batch_shards, make_mesh
from pretrain.errors import CheckpointError, ConfigError
from pretrain.evaluation.imported import tokenizer_of
from pretrain.experiment.experiment import Experiment
from pretrain.experiment.phases import phase_at
from pretrain.experiment.program import Program, build_program
from pretrain.experiment.rules.offload import without_offload
from pretrain.experiment.trunk import plain, read_weights
from pretrain.workdirs.folder import Folder

ONE_DEVICE = MeshConfig()


@dataclasses.dataclass(frozen=True)
class Writer:
  """A trained model, its config and its data: all that reads a prompt and writes an answer."""

  cfg: Experiment
  data: DataSource
  model: Model
  params: Any


class Readable(Protocol):
  """A model whose parameters have not been read: a step of a run, or published weights."""

  @property
  def cfg(self) -> Experiment: ...

  @property
  def data(self) -> DataSource: ...

  def writer(self, mesh: MeshConfig) -> Writer: ...


@dataclasses.dataclass(frozen=True)
class Opened:
  """A run whose parameters have not been read: its config, its data, and the step that will be."""

  cfg: Experiment
  data: DataSource
  checkpoints: Checkpoints
  step: int

  def writer(self, mesh: MeshConfig = ONE_DEVICE) -> Writer:
    """With its parameters on one device, or on a mesh. Raises ConfigError for a mesh that does not fit the model."""
    program = program_for(plain(self.cfg), mesh)
    params = read_weights(self.checkpoints.directory.parent, self.step, program.abstract.params)
    return Writer(self.cfg, self.data, program.model, params)


def program_for(cfg: Experiment, mesh: MeshConfig) -> Program:
  """The model of a run on one device or on a mesh, whose experts drop nothing: what a text scores must not depend on
  other texts of its row. Raises ConfigError for a mesh that does not fit the model.
  """
  cfg = without_offload(dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, expert_capacity=None)))
  if mesh == ONE_DEVICE:
    return build_program(cfg, jax.devices()[:1])
  if mesh.sequence != 1:
    raise ConfigError(f'mesh.sequence={mesh.sequence}: prompts and outputs are not divided by length; set it to 1.')
  shards = batch_shards(make_mesh(mesh))
  one_each = dataclasses.replace(cfg.data, batch_size=shards)  # rows are those of the command, not of training
  model = dataclasses.replace(cfg.model, pipeline_microbatches=None)
  return build_program(
    dataclasses.replace(cfg, mesh=mesh, model=model, data=one_each, train=dataclasses.replace(cfg.train, accumulate=1))
  )


def open_writer(workdir: Folder, step: int | None = None, mesh: MeshConfig = ONE_DEVICE) -> Writer:
  """A step of a run, the newest by default. Raises the errors of `open_run`, and ConfigError for a mesh."""
  return open_run(workdir, step).writer(mesh)


def at_precision(cfg: Experiment, precision: PrecisionConfig | None) -> Experiment:
  """`cfg` with `precision` in the place of its own, for evaluation and generation; None: as it is.

  Raises ConfigError for parts that the model lacks, and for blocks that do not divide what a product sums over.
  """
  if precision is None:
    return cfg
  try:
    check_precision(cfg.model, precision, {}, forward_only=True)
  except ValueError as error:
    raise ConfigError(str(error)) from error
  return dataclasses.replace(cfg, precision=precision)


def open_run(
  workdir: Folder, step: int | None = None, *, encoders: bool = False, precision: PrecisionConfig | None = None
) -> Opened:
  """A run that reads text, at a step, by default the newest. Raises ConfigError for a run without text and, unless
  `encoders`, of an encoder, CheckpointError where `workdir` has no finished step, or not this one; and as
  `at_precision`."""
  whole = config_of(workdir, encoders=encoders)
  checkpoints = Checkpoints(workdir, whole.checkpoint, read_only=True)
  finished = sorted(checkpoints.finished())
  if step is None:
    step = checkpoints.latest()
  elif step not in finished:
    raise CheckpointError(
      'CKPT-NONE', f'{workdir} has no finished step {step}; it has {", ".join(map(str, finished)) or "none"}.'
    )
  if step is None:
    raise CheckpointError(
      'CKPT-NONE', f'no finished checkpoint in {workdir}/checkpoints; let the run reach checkpoint.every.'
    )
  cfg = at_precision(phase_at(whole, max(step - 1, 0)).cfg, precision)  # prompts are read as in the step's phase
  return Opened(cfg, data_of(cfg, tokenizer_of(workdir) if cfg.data.name == 'synthetic' else None), checkpoints, step)


def data_of(cfg: Experiment, tokenizer: Published | None = None) -> DataSource:
  """The data of a run; `tokenizer` is that of imported weights, where the config names none."""
  return open_data(
    cfg.data, cfg.objective, seed=cfg.seed, vocab_size=cfg.model.vocab_size, cache_dir=cache_dir(), model=tokenizer
  )


def config_of(workdir: Folder, *, encoders: bool = False) -> Experiment:
  """The config of a run on text, for one device of any platform, whose kernels 'auto' chooses; of an encoder, which
  writes none, only with `encoders`.
  """
  saved = workdir / 'config.gin'
  if not saved.exists():
    raise CheckpointError(
      'CKPT-NONE',
      f'no run in {workdir}{looked_in(str(workdir))}: config.gin is missing; '
      f'train first: pretrain train --workdir={workdir}.',
    )
  cfg = bindings.load(Experiment, [str(saved)], [])
  cfg = dataclasses.replace(cfg, mesh=MeshConfig(), kernels=KernelsConfig())
  if cfg.model.name == 'encoder' and not encoders:
    raise ConfigError(
      f"{saved}: model.name='encoder' writes no text; generate from a run with model.name='encoder_decoder' or "
      "'decoder' (pretrain eval measures this one)."
    )
  if cfg.data.name == 'synthetic' and tokenizer_of(workdir) is None:
    raise ConfigError(
      f"{saved}: data.name='synthetic' is random tokens, without a tokenizer to read a prompt; generate from a run "
      "trained with data.name='builtin' or 'store'."
    )
  return cfg
