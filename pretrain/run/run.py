"""What one process holds of a run: the objects that a step uses and the values that a step changes."""

import dataclasses
import pathlib
from typing import Any

from data.batches.batches import DataSource
from data.mixing.online import Mixing
from pretrain.checkpoints.checkpoints import Checkpoints
from pretrain.experiment.experiment import Experiment
from pretrain.hosts.skipping import Ranges
from pretrain.records.metrics import Metrics
from pretrain.records.profile import Profile
from pretrain.records.timeline import Timeline
from pretrain.replicas.compare import Replicas
from pretrain.run.judging import Judge
from pretrain.run.phase_program import PhaseProgram
from pretrain.snapshots.snapshots import Snapshots
from pretrain.step.train_step import TrainState


@dataclasses.dataclass(kw_only=True)
class Run:
  """One process's share of a run. `starting.start` makes it; the other modules of this folder read and change it."""

  cfg: Experiment
  text: str  # the resolved config, as it is saved
  workdir: pathlib.Path
  skips: Ranges  # examples that are left out

  timeline: Timeline
  checkpoints: Checkpoints
  snapshots: Snapshots
  metrics: Metrics
  judge: Judge
  replicas: Replicas | None
  profile: Profile

  phase: PhaseProgram
  data: DataSource  # of the last step; at the border of two phases `phase.data` may already be the next one's
  state: TrainState
  position: dict[str, Any]  # what the loader has counted; see `full_position`
  mixing: Mixing | None  # with data.online: the weights of the sources, and the losses since they were decided
  trunk: dict[str, str]  # the fingerprint of the weights under adapters, as it is saved
  step: int
  saved_step: int
  evaluated: tuple[int, dict[str, float]] = (-1, {})  # the last step that was evaluated, and its scores

  def due(self, every: int) -> bool:
    """Whether something that is done every `every` steps (0 = never) is done at this step."""
    return every > 0 and self.step % every == 0

  def is_last(self) -> bool:
    return self.step == self.cfg.train.steps

  def full_position(self) -> dict[str, Any]:
    """Where the run is in its data: what the loader has counted, and the weights of sources that were decided."""
    return self.position | self.mixture()

  def mixture(self) -> dict[str, Any]:
    return {'mixture': dataclasses.asdict(self.mixing)} if self.mixing else {}
