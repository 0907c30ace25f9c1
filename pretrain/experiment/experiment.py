"""The root of the config: every section of a run, and which keys a resumed run may change."""

import dataclasses
from typing import Annotated, Literal

from data.batches.source import Data
from data.objectives.objectives import Objective
from models.build import KernelsConfig, ModelConfig
from models.layers.low_rank import LoraConfig
from models.precision import PrecisionConfig
from models.rendered import IF_SET
from pretrain.checkpoints.config import CheckpointConfig
from pretrain.devices.compiler import CompilerConfig
from pretrain.devices.mesh import MeshConfig
from pretrain.experiment.phases import PhaseConfig
from pretrain.fleet.surviving import ElasticConfig
from pretrain.hosts.watchdog import WatchdogConfig
from pretrain.optim.averaging import Averaging, NoAveraging
from pretrain.optim.optimizer import AdamW, Optimizer
from pretrain.optim.schedule import Schedule
from pretrain.optim.sparsity import NoSparsity, Sparsity
from pretrain.optim.spikes import NoSpikes, Spikes
from pretrain.replicas.compare import ReplicasConfig
from pretrain.snapshots.slots import SnapshotConfig
from pretrain.step.loss import LossConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """`steps` ends the run; `accumulate` splits the global batch into that many microbatches. `profile_steps` = (first,
  last) are traced by every process, or only by those in `profile_hosts`.

  With `mesh.replica` > 1 gradients are summed over replicas in `replica_dtype`: 'bfloat16' sends half the bytes between
  slices, and rounds each replica's gradients before the sum.

  `decay_delay` = 1 starts the decay of the learning rate one step late: the peak comes twice. Versions before 0.1.0 did
  that, and their runs keep it when they are resumed; leave it at 0.
  """

  steps: Annotated[int, '>= 1']
  log_every: Annotated[int, '>= 1'] = 1
  accumulate: Annotated[int, '>= 1'] = 1
  profile_steps: tuple[int, int] | None = None
  profile_hosts: tuple[Annotated[int, '>= 0'], ...] | None = dataclasses.field(default=None, metadata=IF_SET)
  decay_delay: Literal[0, 1] = 0
  replica_dtype: Literal['float32', 'bfloat16'] = dataclasses.field(default='float32', metadata=IF_SET)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
  """Every `every` steps and at the end, on at most `batches` batches of each held-out set; 0 = never. A phase with
  another data.batch_size is evaluated on as many batches of that size: on more text, or less.

  `lawa_checkpoints` = k also evaluates the mean of the last k checkpoints at multiples of `checkpoint.every`, as soon
  as there are k. They are read one at a time, so the memory needed is that of two copies of the parameters.

  For pairs, outputs for `generate` inputs of each set are written and compared with their targets; 0 = none.
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
  lora: LoraConfig = LoraConfig()
  precision: PrecisionConfig = PrecisionConfig()
  loss: LossConfig = LossConfig()
  optimizer: Optimizer = AdamW()
  spikes: Spikes = NoSpikes()
  averaging: Averaging = NoAveraging()
  sparsity: Sparsity = dataclasses.field(default=NoSparsity(), metadata=IF_SET)
  evaluation: EvaluationConfig = EvaluationConfig()
  checkpoint: CheckpointConfig = CheckpointConfig()
  snapshot: SnapshotConfig = SnapshotConfig()
  mesh: MeshConfig = MeshConfig()
  watchdog: WatchdogConfig = WatchdogConfig()
  elastic: ElasticConfig = ElasticConfig()
  replicas: ReplicasConfig = ReplicasConfig()
  kernels: KernelsConfig = KernelsConfig()
  compiler: CompilerConfig = CompilerConfig()
  phases: tuple[PhaseConfig, ...] = ()
  seed: Annotated[int, '[0, 4294967296)'] = 0  # a JAX key holds 32 bits of it: seed 2**32 would be seed 0


# The keys that a resumed run may change; any other key would make it a different run.
MAY_CHANGE = (
  'train.steps',
  'train.log_every',
  'train.accumulate',
  'train.profile_steps',
  'train.profile_hosts',
  'train.replica_dtype',
  'evaluation.',
  'checkpoint.every',
  'checkpoint.keep',
  'checkpoint.keep_every',
  'checkpoint.keep_best',
  'checkpoint.best_of',
  'checkpoint.retries',
  'snapshot.',
  'mesh.',
  'optimizer.offload',
  'model.remat',
  'model.remat_keep',
  'model.remat_offload',
  'model.pipeline_microbatches',
  'model.pipeline_repeats',
  'compiler.',
  'watchdog.',
  'elastic.',
  'replicas.',
  'spikes.max_consecutive',
  'spikes.steps',
  'spikes.max_rewinds',
  'data.workers',
  'data.prefetch',
)
