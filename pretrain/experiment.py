"""The root of the config: every section of a run, and the facts that span sections."""

import dataclasses

from data.objectives import CausalLm, Objective, Ul2r, check_objective
from data.source import Data
from models.build import KernelsConfig, ModelConfig
from pretrain.errors import ConfigError
from pretrain.loss import LossConfig
from pretrain.mesh import MeshConfig
from pretrain.optim import AdamW
from pretrain.schedule import Schedule, check_schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """`steps` ends the run; `accumulate` cuts the global batch in that many microbatches."""

  steps: int
  log_every: int = 1
  accumulate: int = 1
  profile_steps: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
  """Every `every` steps and at the end, on at most `batches` batches of each held-out set; 0 = never."""

  every: int = 0
  batches: int = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
  """Save every `every` steps; keep the last `keep`, and for ever those at multiples of `keep_every`."""

  every: int = 100
  keep: int = 3
  keep_every: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
  model: ModelConfig
  objective: Objective
  data: Data
  schedule: Schedule
  train: TrainConfig
  loss: LossConfig = LossConfig()
  optimizer: AdamW = AdamW()
  evaluation: EvaluationConfig = EvaluationConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  mesh: MeshConfig = MeshConfig()
  kernels: KernelsConfig = KernelsConfig()
  seed: int = 0


# What a resumed run may change; anything else would make it another run.
MAY_CHANGE = (
  'train.steps',
  'train.log_every',
  'train.profile_steps',
  'evaluation.',
  'checkpoint.',
  'mesh.',
  'data.workers',
  'data.prefetch',
)


def check(cfg: Experiment) -> None:
  """Raises ConfigError for facts that no section can see alone; touches no device and no file."""
  _check_positive(cfg)
  _check_family(cfg)
  _check_batch(cfg)
  try:
    check_schedule(cfg.schedule)
    check_objective(cfg.objective, cfg.data.inputs_length, cfg.data.targets_length, cfg.data.sentinels)
  except ValueError as error:
    raise ConfigError(str(error)) from error


def _check_positive(cfg: Experiment) -> None:
  values = {
    'train.steps': cfg.train.steps, 'train.log_every': cfg.train.log_every, 'train.accumulate': cfg.train.accumulate,
    'checkpoint.every': cfg.checkpoint.every, 'checkpoint.keep': cfg.checkpoint.keep,
    'data.batch_size': cfg.data.batch_size, 'data.targets_length': cfg.data.targets_length,
  }  # fmt: skip
  for key, value in values.items():
    if value < 1:
      raise ConfigError(f'{key}={value}; it must be at least 1.')


def _check_family(cfg: Experiment) -> None:
  encoder = cfg.model.name == 'encoder_decoder'
  if encoder and isinstance(cfg.objective, CausalLm | Ul2r):
    raise ConfigError(f"objective.name='{cfg.objective.name}' is for model.name='decoder', not 'encoder_decoder'.")
  if encoder != (cfg.data.inputs_length > 0):
    fix = 'set it to the encoder length' if encoder else 'remove it (rows have data.targets_length tokens)'
    raise ConfigError(f"data.inputs_length={cfg.data.inputs_length} with model.name='{cfg.model.name}'; {fix}.")
  if cfg.data.sentinels < 0:
    raise ConfigError(f'data.sentinels={cfg.data.sentinels}; it must be at least 0.')


def _check_batch(cfg: Experiment) -> None:
  shards = max(cfg.mesh.replica, 1) * max(cfg.mesh.data, 1) * max(cfg.mesh.fsdp, 1)
  pieces = shards * cfg.train.accumulate
  if cfg.data.batch_size % pieces:
    good = max(cfg.data.batch_size // pieces, 1) * pieces
    raise ConfigError(
      f'data.batch_size={cfg.data.batch_size} does not divide into replica*data*fsdp={shards} shards x '
      f'train.accumulate={cfg.train.accumulate}; use a multiple of {pieces}, e.g. {good}.'
    )
