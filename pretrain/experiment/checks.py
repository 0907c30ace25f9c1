"""Facts that span sections of the config, checked before a device or a file is touched."""

import itertools
import math
import pathlib

from data.batches.source import KIND_OF, PREPARED, StoreData, check_mixture, has_heldout
from data.examples.tags import check_tags
from data.mixing.curriculum import check_order
from data.mixing.online import check_online
from data.objectives.fitting import PAIRS_INSTEAD, check_objective
from data.objectives.objectives import (
  FillInTheMiddle,
  Instruction,
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
from models.build import check_attention, check_kernels, check_lora, check_model, check_precision, row_order
from models.layers.low_rank import LoraConfig
from models.precision import DELAYED, RECIPES, PrecisionConfig, named_by
from pallas_kernels.errors import KernelError
from pallas_kernels.quantized_matmul.api import IMPLEMENTATIONS, check_recipe
from pretrain.config import bindings
from pretrain.config.gin_text import inside
from pretrain.devices.compiler import check_options
from pretrain.devices.mesh import BATCH_AXES
from pretrain.errors import ConfigError
from pretrain.experiment.experiment import Experiment
from pretrain.experiment.phases import phases_of
from pretrain.experiment.pipelines import check_pipeline
from pretrain.experiment.rules.multi_token import check_multi_token
from pretrain.experiment.rules.offload import check_offload
from pretrain.experiment.rules.sparsity import check_rates, check_sparsity
from pretrain.optim.optimizer import check_optimizer
from pretrain.optim.schedule import check_schedule
from pretrain.optim.spikes import RewindSpikes
from pretrain.redact import redact
from pretrain.snapshots.slots import check_snapshot


def check(cfg: Experiment) -> None:
  """Raises ConfigError for values that contradict each other, in any phase; touches no device and no file."""
  _check_secrets(cfg)
  _check_evaluation(cfg)
  _check_sentinels(cfg)
  _check_buckets(cfg)
  _check_stages(cfg)
  _check_online(cfg)
  _check_rewinds(cfg)
  _check_history(cfg)
  check_rates(cfg)
  for phase in phases_of(cfg):
    where = f'phases[{phase.index - 1}]: ' if phase.index else ''
    try:
      _check_one(phase.cfg)
    except ValueError as error:
      raise ConfigError(f'{where}{error}') from error
    except ConfigError as error:
      raise ConfigError(where + str(error).removeprefix('CONFIG: ')) from error


def _check_secrets(cfg: Experiment) -> None:
  """Refuses passwords and tokens: a config is saved, shown, compared and shared."""
  for key, value in bindings.flatten(cfg).items():
    for text in filter(lambda found: isinstance(found, str), inside(value)):
      if (hidden := redact(text)) != text:
        raise ConfigError(
          f"{key}='{hidden}' has a password or token in it, and a config is saved and shown. Leave it out; put it in "
          'the environment, e.g. AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.'
        )


def _check_sentinels(cfg: Experiment) -> None:
  """Sentinels and modes are the last ids, counted from the end: with more sentinels, each of them gets another id."""
  marked = [phase for phase in phases_of(cfg) if any(map(has_marks, tasks_of(phase.cfg.objective)))]
  for before, after in itertools.pairwise(marked):
    old, new = before.cfg.data.sentinels, after.cfg.data.sentinels
    if old != new:
      raise ConfigError(
        f'phases[{after.index - 1}]: data.sentinels={new}, {old} in an earlier phase with sentinels or modes: '
        f'each of them would get another id; set data.sentinels={max(old, new)} from the beginning.'
      )


def _check_one(cfg: Experiment) -> None:
  check_options(cfg.compiler)
  _check_family(cfg)
  _check_units(cfg)
  _check_documents(cfg)
  _check_profile(cfg)
  _check_lawa(cfg)
  _check_initial(cfg.checkpoint.initial)
  _check_best(cfg)
  check_snapshot(cfg.snapshot)
  # The size of an axis of -1 is not known before devices are counted; build_program checks again with the mesh.
  shards = math.prod(max(getattr(cfg.mesh, axis), 1) for axis in BATCH_AXES)
  check_batch(cfg, shards)
  check_model(cfg.model)
  _check_experts(cfg)
  check_multi_token(cfg, stages=cfg.mesh.stage, devices=cfg.mesh.sequence)
  check_offload(cfg, stages=cfg.mesh.stage)
  _check_lora(cfg)
  check_sparsity(cfg)
  _check_precision(cfg)
  _check_positions(cfg)
  check_kernels(cfg.kernels)
  check_features(cfg, cfg.mesh.sequence)
  check_sequence(cfg, cfg.mesh.sequence)
  check_pipeline(cfg, cfg.mesh.stage, shards)
  check_optimizer(cfg.optimizer)
  check_schedule(cfg.schedule)
  check_objective(cfg.objective, cfg.data.inputs_length, cfg.data.targets_length, cfg.data.sentinels)
  check_mixture(cfg.data)
  check_packing(cfg.data, cfg.objective)
  check_order(cfg.data)
  check_online(cfg.data)
  check_tags(cfg.data, cfg.objective)


def _check_experts(cfg: Experiment) -> None:
  for key in ('load_balance', 'router_z'):
    if (given := getattr(cfg.loss, key)) and cfg.model.experts is None:
      raise ConfigError(f'loss.{key}={given} without model.experts, which it is about; set it, or remove loss.{key}.')
  check_mesh_of_experts(cfg, cfg.mesh.expert)


def check_mesh_of_experts(cfg: Experiment, size: int) -> None:
  """Raises ConfigError where each of `size` devices along mesh.expert cannot hold equally many experts."""
  experts = cfg.model.experts
  if experts is not None and size > 1 and experts % size:
    near = min((n for n in range(1, experts + 1) if experts % n == 0), key=lambda n: (abs(n - size), n))
    raise ConfigError(
      f'model.experts={experts} does not divide over mesh.expert={size}; use mesh.expert={near}, or a multiple of '
      f'{size} experts.'
    )


def _check_buckets(cfg: Experiment) -> None:
  """Each step takes `batch_size` rows of one length: another batch size would group other rows into steps."""
  sizes = {phase.cfg.data.batch_size for phase in phases_of(cfg)}
  if len(sizes) > 1 and any(isinstance(phase.cfg.data.packing, LengthBuckets) for phase in phases_of(cfg)):
    raise ConfigError(
      f"data.batch_size is {sorted(sizes)} in the phases of a run with data.packing.name='length_buckets', whose steps "
      'depend on it; give all phases one size.'
    )


def _check_stages(cfg: Experiment) -> None:
  """The start steps of data.stages are converted to rows with one batch size."""
  sizes = {phase.cfg.data.batch_size for phase in phases_of(cfg)}
  if len(sizes) > 1 and any(getattr(phase.cfg.data, 'stages', ()) for phase in phases_of(cfg)):
    raise ConfigError(
      f'data.stages start at steps of one data.batch_size, the phases of this run have {sorted(sizes)}; set one size '
      'in all phases, or remove data.stages.'
    )


def _check_online(cfg: Experiment) -> None:
  """Online decisions refer to the sources and batches of the whole run: no phase may change them."""
  for phase in phases_of(cfg)[1:]:
    if (cfg.data.online or phase.cfg.data.online) and phase.cfg.data != cfg.data:
      key = next(key for other in cfg.phases for key in other.set if key.startswith('data.'))
      raise ConfigError(
        f'phases: from step {phase.start} on {key} changes the data, and data.online decides for the data of '
        'the whole run; let no phase set data.*, or remove data.online.'
      )


def _check_rewinds(cfg: Experiment) -> None:
  """A run that rewinds needs a checkpoint old enough to rewind to, and examples that can be skipped."""
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


def _check_history(cfg: Experiment) -> None:
  """The history of delayed scaling is state of the whole run, so at least one phase uses it."""
  used = [recipe for phase in phases_of(cfg) for recipe in named_by(phase.cfg.precision)]
  if cfg.precision.amax_history and DELAYED not in used:
    raise ConfigError(
      f"precision.amax_history={cfg.precision.amax_history} and no recipe is '{DELAYED}', which alone reads it; set "
      'precision.recipe or precision.overrides, here or in a phase, or remove it.'
    )


def check_skippable(cfg: Experiment, what: str) -> None:
  """Raises ConfigError where the examples of a step cannot be skipped, as the setting `what` requires."""
  if cfg.data.online is not None:
    raise ConfigError(f'{what} with data.online, whose weights come from the losses of all examples; remove one.')
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
  """Pairs and conversations come only from stores, and attention stays inside each of them."""
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
  """An objective that splits documents needs rows in which the ends of documents are known."""
  fim = any(isinstance(part, FillInTheMiddle) for part in parts_of(cfg.objective))
  if fim and cfg.data.attend_across_documents:
    raise ConfigError("data.attend_across_documents=True hides the documents that 'fim' splits; remove it.")


def _check_evaluation(cfg: Experiment) -> None:
  """An evaluation needs held-out data, and generation needs pairs, in at least one phase."""
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
      f"checkpoint.initial='{initial}' has no step; write 'RUN/<step>', one of `pretrain checkpoints list "
      '--workdir=RUN`.'
    )


def _check_lora(cfg: Experiment) -> None:
  """Adapters belong to weights that exist, and to products that the model has."""
  if not cfg.lora.rank:
    if cfg.lora != LoraConfig():
      raise ConfigError('lora.* is set with lora.rank=0, which makes no adapters; set lora.rank, or remove the others.')
    return
  check_lora(cfg.model, cfg.lora)
  if cfg.checkpoint.initial is None:
    raise ConfigError(
      f'lora.rank={cfg.lora.rank} trains adapters of weights, and checkpoint.initial=None names none; set '
      "checkpoint.initial='RUN/<step>', or lora.rank=0."
    )


def _check_precision(cfg: Experiment) -> None:
  """The model has every product that a recipe names, and block sizes divide the model's sizes and the rows."""
  if cfg.precision != PrecisionConfig():
    keys = ('inputs_length', 'targets_length')
    lengths = {f'data.{key}': length for key in keys if (length := getattr(cfg.data, key))}
    if isinstance(cfg.data.packing, LengthBuckets):
      lengths |= {'data.packing.min_length': cfg.data.packing.min_length}
    if cfg.model.positions == 'disentangled':  # the gradients of keys and queries also sum over its distances
      lengths |= {'model.relative_buckets': cfg.model.relative_buckets}
    check_precision(cfg.model, cfg.precision, lengths)
  if cfg.kernels.quantized_matmul in IMPLEMENTATIONS:
    try:
      for recipe in filter(None, map(RECIPES.get, named_by(cfg.precision))):
        check_recipe(cfg.kernels.quantized_matmul, recipe)
    except KernelError as error:
      raise ConfigError(str(error).removeprefix('CONFIG: ')) from error


def _check_best(cfg: Experiment) -> None:
  own = cfg.checkpoint
  if own.keep_best and own.best_of is None:
    raise ConfigError(
      f'checkpoint.keep_best={own.keep_best} and no metric to compare them by; set checkpoint.best_of, e.g. '
      "'eval/<set>/loss'."
    )
  if own.best_of is not None and not own.keep_best:
    raise ConfigError(f"checkpoint.best_of='{own.best_of}' with checkpoint.keep_best=0 keeps none; set keep_best >= 1.")
  if own.best_of is not None and not cfg.evaluation.every:
    raise ConfigError(
      f"checkpoint.best_of='{own.best_of}' with evaluation.every=0 is never computed; set evaluation.every."
    )


def check_batch(cfg: Experiment, shards: int) -> None:
  """Raises ConfigError where the rows of a step do not divide into `shards` x `train.accumulate` equal parts."""
  pieces = shards * cfg.train.accumulate
  if cfg.data.batch_size % pieces:
    good = max(cfg.data.batch_size // pieces, 1) * pieces
    raise ConfigError(
      f'data.batch_size={cfg.data.batch_size} does not divide into {"*".join(BATCH_AXES)}={shards} shards x '
      f'train.accumulate={cfg.train.accumulate}; use a multiple of {pieces}, e.g. {good}.'
    )


def check_features(cfg: Experiment, devices: int) -> None:
  """Raises ConfigError where the attention that `kernels` names lacks what the model needs: dropout, disentangled
  scores, or rows that `devices` share.
  """
  try:
    check_attention(cfg.model, cfg.kernels, divided=devices > 1)
  except KernelError as error:
    raise ConfigError(str(error).removeprefix('CONFIG: ')) from error


def check_sequence(cfg: Experiment, devices: int) -> None:
  """Raises ConfigError where `devices` cannot share a row because parts would be unequal."""
  if devices <= 1:
    return
  if cfg.evaluation.generate and cfg.model.experts is not None:
    raise ConfigError(
      f'evaluation.generate={cfg.evaluation.generate} with model.experts and mesh.sequence={devices}: outputs are '
      'written token by token, and devices do not share a token; set evaluation.generate=0, or mesh.sequence=1.'
    )
  balanced = row_order(cfg.model, cfg.kernels, devices).devices > 1
  lengths = {'inputs_length': (cfg.data.inputs_length, 1), 'targets_length': (cfg.data.targets_length, 1 + balanced)}
  if isinstance(cfg.data.packing, LengthBuckets):
    lengths['packing.min_length'] = (cfg.data.packing.min_length, 1 + balanced)
  for key, (length, parts) in lengths.items():
    if length % (multiple := parts * devices):
      near = max(round(length / multiple), 1) * multiple
      both = ', of which each device has an early and a late one' if parts > 1 else ''
      raise ConfigError(
        f'data.{key}={length} does not divide into {"2 x " * (parts > 1)}mesh.sequence={devices} equal parts{both}; '
        f'use a multiple of {multiple}, e.g. {near}.'
      )
  if cfg.precision != PrecisionConfig():  # blocks along a row are those of one device
    own = {f'data.{key} / {parts * devices}': n // (parts * devices) for key, (n, parts) in lengths.items() if n}
    check_precision(cfg.model, cfg.precision, own)
