"""The root of the config: every section of a run, and the facts that span sections."""

import dataclasses
import itertools
import math
import pathlib
from typing import Annotated

from data.batches.source import KIND_OF, PREPARED, Data, StoreData, check_mixture, has_heldout
from data.examples.tags import check_tags
from data.mixing.curriculum import check_order
from data.mixing.online import check_online
from data.objectives.fitting import PAIRS_INSTEAD, check_objective
from data.objectives.objectives import (
  FillInTheMiddle,
  Instruction,
  Objective,
  OfUnits,
  Supervised,
  has_marks,
  is_decoder_only,
  is_encoder_only,
  parts_of,
  tasks_of,
)
from data.packing.buckets import LengthBuckets
from data.packing.packing import check_packing
from models.build import KernelsConfig, ModelConfig, check_kernels, check_model
from pretrain.checkpoints.config import CheckpointConfig
from pretrain.config import bindings
from pretrain.devices.mesh import MeshConfig
from pretrain.errors import ConfigError
from pretrain.experiment.phases import PhaseConfig, phases_of
from pretrain.fleet.surviving import ElasticConfig
from pretrain.hosts.watchdog import WatchdogConfig
from pretrain.optim.averaging import Averaging, NoAveraging
from pretrain.optim.optimizer import AdamW, Optimizer, check_optimizer
from pretrain.optim.schedule import Schedule, check_schedule
from pretrain.optim.spikes import NoSpikes, RewindSpikes, Spikes
from pretrain.redact import redact
from pretrain.replicas.compare import ReplicasConfig
from pretrain.snapshots.slots import SnapshotConfig, check_snapshot
from pretrain.step.loss import LossConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """`steps` ends the run; `accumulate` cuts the global batch in that many microbatches."""

  steps: Annotated[int, '>= 1']
  log_every: Annotated[int, '>= 1'] = 1
  accumulate: Annotated[int, '>= 1'] = 1
  profile_steps: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
  """Every `every` steps and at the end, on at most `batches` batches of each held-out set; 0 = never. A phase with
  another data.batch_size is judged on as many batches, of that size: its losses are those of more text, or less.

  `lawa_checkpoints` = k also evaluates the mean of the last k checkpoints at multiples of `checkpoint.every`, from
  where there are k of them. They are read one at a time: it takes the memory of two copies of the parameters.

  Of pairs, outputs for `generate` inputs of each set are written and compared with their targets; 0 = none.
  """

  every: Annotated[int, '>= 0'] = 0
  batches: Annotated[int, '>= 1'] = 8
  lawa_checkpoints: Annotated[int, '>= 0'] = 0
  generate: Annotated[int, '>= 0'] = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
  model: ModelConfig
  objective: Objective
  data: Data
  schedule: Schedule
  train: TrainConfig
  loss: LossConfig = LossConfig()
  optimizer: Optimizer = AdamW()
  spikes: Spikes = NoSpikes()
  averaging: Averaging = NoAveraging()
  evaluation: EvaluationConfig = EvaluationConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  snapshot: SnapshotConfig = SnapshotConfig()
  mesh: MeshConfig = MeshConfig()
  watchdog: WatchdogConfig = WatchdogConfig()
  elastic: ElasticConfig = ElasticConfig()
  replicas: ReplicasConfig = ReplicasConfig()
  kernels: KernelsConfig = KernelsConfig()
  phases: tuple[PhaseConfig, ...] = ()
  seed: Annotated[int, '[0, 4294967296)'] = 0  # a JAX key holds 32 bits of it: seed 2**32 would be seed 0


# What a resumed run may change; anything else would make it another run.
MAY_CHANGE = (
  'train.steps',
  'train.log_every',
  'train.profile_steps',
  'evaluation.',
  'checkpoint.every',
  'checkpoint.keep',
  'checkpoint.keep_every',
  'checkpoint.keep_best',
  'checkpoint.best_of',
  'checkpoint.retries',
  'snapshot.',
  'mesh.',
  'watchdog.',
  'elastic.',
  'replicas.',
  'spikes.max_consecutive',
  'spikes.steps',
  'spikes.max_rewinds',
  'data.workers',
  'data.prefetch',
)


def check(cfg: Experiment) -> None:
  """Raises ConfigError for facts that no section can see alone, in any phase; touches no device and no file."""
  _check_secrets(cfg)
  _check_evaluation(cfg)
  _check_sentinels(cfg)
  _check_buckets(cfg)
  _check_stages(cfg)
  _check_online(cfg)
  _check_rewinds(cfg)
  for phase in phases_of(cfg):
    where = f'phases[{phase.index - 1}]: ' if phase.index else ''
    try:
      _check_one(phase.cfg)
    except ValueError as error:
      raise ConfigError(f'{where}{error}') from error
    except ConfigError as error:
      raise ConfigError(where + str(error).removeprefix('CONFIG: ')) from error


def _check_secrets(cfg: Experiment) -> None:
  """A config is saved, shown, compared and sent around."""
  for key, value in bindings.flatten(cfg).items():
    for text in filter(lambda found: isinstance(found, str), bindings.inside(value)):
      if (hidden := redact(text)) != text:
        raise ConfigError(
          f"{key}='{hidden}' has a password or token in it, and a config is saved and shown. Leave it out; put it in "
          'the environment, e.g. AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.'
        )


def _check_sentinels(cfg: Experiment) -> None:
  """Sentinels and modes are the ids after the pieces, counted from the last: with more sentinels each is another id."""
  marked = [phase for phase in phases_of(cfg) if any(map(has_marks, tasks_of(phase.cfg.objective)))]
  for before, after in itertools.pairwise(marked):
    old, new = before.cfg.data.sentinels, after.cfg.data.sentinels
    if old != new:
      raise ConfigError(
        f'phases[{after.index - 1}]: data.sentinels={new}, {old} in an earlier phase with sentinels or modes: '
        f'each would become another id; set data.sentinels={max(old, new)} from the beginning.'
      )


def _check_one(cfg: Experiment) -> None:
  _check_family(cfg)
  _check_units(cfg)
  _check_documents(cfg)
  _check_profile(cfg)
  _check_lawa(cfg)
  _check_initial(cfg.checkpoint.initial)
  _check_best(cfg)
  check_snapshot(cfg.snapshot)
  # An axis of -1 takes devices that nobody has counted yet; build_program asks again with the mesh.
  check_batch(cfg, math.prod(max(n, 1) for n in (cfg.mesh.replica, cfg.mesh.data, cfg.mesh.fsdp)))
  check_model(cfg.model)
  _check_positions(cfg)
  check_kernels(cfg.kernels)
  check_optimizer(cfg.optimizer)
  check_schedule(cfg.schedule)
  check_objective(cfg.objective, cfg.data.inputs_length, cfg.data.targets_length, cfg.data.sentinels)
  check_mixture(cfg.data)
  check_packing(cfg.data, cfg.objective)
  check_order(cfg.data)
  check_online(cfg.data)
  check_tags(cfg.data, cfg.objective)


def _check_buckets(cfg: Experiment) -> None:
  """A step of rows of one length is cut by the batch size: another one would cut other steps."""
  sizes = {phase.cfg.data.batch_size for phase in phases_of(cfg)}
  if len(sizes) > 1 and any(isinstance(phase.cfg.data.packing, LengthBuckets) for phase in phases_of(cfg)):
    raise ConfigError(
      f"data.batch_size is {sorted(sizes)} in the phases of a run with data.packing.name='length_buckets', whose steps "
      'are cut by it; give all phases one size.'
    )


def _check_stages(cfg: Experiment) -> None:
  """Steps of data.stages are counted in batches of one size."""
  sizes = {phase.cfg.data.batch_size for phase in phases_of(cfg)}
  if len(sizes) > 1 and any(getattr(phase.cfg.data, 'stages', ()) for phase in phases_of(cfg)):
    raise ConfigError(
      f'data.stages start at steps of one data.batch_size, the phases of this run have {sorted(sizes)}; set one size '
      'in all phases, or remove data.stages.'
    )


def _check_online(cfg: Experiment) -> None:
  """What was decided is of the sources and batches of the config."""
  for phase in phases_of(cfg)[1:]:
    if (cfg.data.online or phase.cfg.data.online) and phase.cfg.data != cfg.data:
      key = next(key for other in cfg.phases for key in other.set if key.startswith('data.'))
      raise ConfigError(
        f'phases: from step {phase.start} on data is another, by {key}, and data.online decides on that of the '
        'whole run; let no phase set data.*, or remove data.online.'
      )


def _check_rewinds(cfg: Experiment) -> None:
  """Where the run may go back, there is a step to go back to, and examples can be left out."""
  if not isinstance(cfg.spikes, RewindSpikes):
    return
  check_skippable(cfg, "spikes.name='rewind'")
  own, back = cfg.checkpoint, cfg.spikes.steps
  if (own.keep - 1) * own.every < back:
    enough = -(-back // own.every) + 1
    raise ConfigError(
      f'spikes.steps={back} with checkpoint.keep={own.keep} and checkpoint.every={own.every}: no step so old is kept; '
      f'set checkpoint.keep >= {enough}.'
    )


def check_skippable(cfg: Experiment, what: str) -> None:
  """Raises ConfigError where the examples of a step cannot be left out, as `what` would."""
  if cfg.data.online is not None:
    raise ConfigError(f'{what} with data.online, whose weights are of losses of all examples; remove one of them.')
  if len(sizes := {phase.cfg.data.batch_size for phase in phases_of(cfg)}) > 1:
    raise ConfigError(f'{what} with data.batch_size={sorted(sizes)} in phases; give all one size, or remove it.')


def _check_family(cfg: Experiment) -> None:
  model, objective = cfg.model.name, cfg.objective.name
  if (model == 'encoder') != is_encoder_only(cfg.objective):
    fix = "set objective.name='mlm'" if model == 'encoder' else "set model.name='encoder', or another objective"
    raise ConfigError(f"objective.name='{objective}' cannot train model.name='{model}'; {fix}.")
  two_sides = model == 'encoder_decoder'
  if two_sides and is_decoder_only(cfg.objective):
    fix = PAIRS_INSTEAD.replace(', or', '; take a decoder, or') * isinstance(cfg.objective, Instruction)
    raise ConfigError(f"objective.name='{objective}' is for model.name='decoder', not 'encoder_decoder'{fix}.")
  if two_sides != (cfg.data.inputs_length > 0):
    fix = 'set it to the encoder length' if two_sides else 'remove it (rows have data.targets_length tokens)'
    raise ConfigError(f"data.inputs_length={cfg.data.inputs_length} with model.name='{cfg.model.name}'; {fix}.")


def _check_units(cfg: Experiment) -> None:
  """Where `objective` is of pairs or conversations: only stores hold them, and each is alone."""
  if not isinstance(cfg.objective, OfUnits):
    return
  kind = KIND_OF[cfg.objective.name]
  if not isinstance(cfg.data, StoreData):
    raise ConfigError(
      f"data.name='{cfg.data.name}' has no {kind} for objective.name='{cfg.objective.name}'; set data.name='store', "
      f'with data.sources made by pretrain data prepare {PREPARED[kind]}.'
    )
  if cfg.data.attend_across_documents:
    raise ConfigError(
      f"data.attend_across_documents=True would mix the {kind} of objective.name='{cfg.objective.name}'; remove it."
    )


def _check_documents(cfg: Experiment) -> None:
  """Where `objective` takes documents apart, rows must know where they end."""
  fim = any(isinstance(part, FillInTheMiddle) for part in parts_of(cfg.objective))
  if fim and cfg.data.attend_across_documents:
    raise ConfigError("data.attend_across_documents=True hides the documents that 'fim' takes apart; remove it.")


def _check_evaluation(cfg: Experiment) -> None:
  """What is asked of an evaluation has something to work on, in some phase."""
  own, parts = cfg.evaluation, [phase.cfg for phase in phases_of(cfg)]
  if own.every and not any(has_heldout(part.data) for part in parts):
    fix = 'set it to 0' if cfg.data.name == 'synthetic' else 'set data.heldout, or evaluation.every=0'
    raise ConfigError(f"evaluation.every={own.every} with data.name='{cfg.data.name}' and nothing held out; {fix}.")
  if own.generate and not any(isinstance(part.objective, Supervised) for part in parts):
    raise ConfigError(
      f'evaluation.generate={own.generate} compares outputs with targets of pairs, '
      f"objective.name='{cfg.objective.name}' has none; set it to 0, or objective.name='supervised'."
    )
  for key in ('generate', 'lawa_checkpoints'):
    if (given := getattr(own, key)) and not own.every:
      raise ConfigError(
        f'evaluation.{key}={given} with evaluation.every=0: it would never be used; set evaluation.every.'
      )


def _check_profile(cfg: Experiment) -> None:
  if cfg.train.profile_steps is None:
    return
  first, last = cfg.train.profile_steps
  if not 0 <= first < last <= cfg.train.steps:
    raise ConfigError(
      f'train.profile_steps=({first}, {last}) with train.steps={cfg.train.steps}; '
      'give (first, last) with 0 <= first < last <= train.steps.'
    )


def _check_positions(cfg: Experiment) -> None:
  most = cfg.model.max_positions
  for key in ('inputs_length', 'targets_length'):
    if most is not None and (length := getattr(cfg.data, key)) > most:
      raise ConfigError(
        f'data.{key}={length} with model.max_positions={most}; set model.max_positions >= {length}, or shorter rows.'
      )


def _check_lawa(cfg: Experiment) -> None:
  count, keep = cfg.evaluation.lawa_checkpoints, cfg.checkpoint.keep
  if keep < count:
    raise ConfigError(
      f'evaluation.lawa_checkpoints={count} but checkpoint.keep={keep}: older ones are deleted; '
      f'set checkpoint.keep >= {count}.'
    )


def _check_initial(initial: str | None) -> None:
  if initial is not None and not pathlib.PurePath(initial).name.isdecimal():
    raise ConfigError(
      f"checkpoint.initial='{initial}' names no step; write 'RUN/<step>', one of `pretrain checkpoints list "
      '--workdir=RUN`.'
    )


def _check_best(cfg: Experiment) -> None:
  own = cfg.checkpoint
  if own.keep_best and own.best_of is None:
    raise ConfigError(
      f'checkpoint.keep_best={own.keep_best} and no metric says which are best; set checkpoint.best_of, e.g. '
      "'eval/<set>/loss'."
    )
  if own.best_of is not None and not own.keep_best:
    raise ConfigError(f"checkpoint.best_of='{own.best_of}' with checkpoint.keep_best=0 keeps none; set keep_best >= 1.")
  if own.best_of is not None and not cfg.evaluation.every:
    raise ConfigError(
      f"checkpoint.best_of='{own.best_of}' with evaluation.every=0 is never known; set evaluation.every."
    )


def check_batch(cfg: Experiment, shards: int) -> None:
  """Raises ConfigError where the rows of a step do not fill that many shards, `train.accumulate` times."""
  pieces = shards * cfg.train.accumulate
  if cfg.data.batch_size % pieces:
    good = max(cfg.data.batch_size // pieces, 1) * pieces
    raise ConfigError(
      f'data.batch_size={cfg.data.batch_size} does not divide into replica*data*fsdp={shards} shards x '
      f'train.accumulate={cfg.train.accumulate}; use a multiple of {pieces}, e.g. {good}.'
    )
