"""How a run starts: from which state, at which position in its data, with which files."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from data.mixing.online import Mixing, begin
from pretrain.checkpoints.checkpoints import Checkpoints, DamagedError
from pretrain.config import bindings
from pretrain.evaluation.losses import check_best_of
from pretrain.experiment import same_stores, saved
from pretrain.experiment.experiment import Experiment, TrainConfig
from pretrain.experiment.phases import phase_at
from pretrain.experiment.resume import check_not_lost, check_same_data, check_same_run, has_checkpoint, identity
from pretrain.experiment.trunk import KEY, check_trunk
from pretrain.experiment.trunk import fingerprint as fingerprint_of
from pretrain.hosts.skipping import Ranges, check_skips, read_skips
from pretrain.records.metrics import Metrics, read_metrics
from pretrain.records.profile import Profile
from pretrain.records.timeline import Timeline
from pretrain.replicas.compare import Replicas
from pretrain.run.evaluating import check_lawa_processes
from pretrain.run.judging import Judge
from pretrain.run.phase_program import PhaseProgram
from pretrain.run.run import Run
from pretrain.snapshots.snapshots import Snapshots, freshest
from pretrain.step.train_step import TrainState
from pretrain.tools.weights import find, initial_params
from pretrain.workdirs.folder import Folder

Rows = Sequence[Mapping[str, float]]


class Files:
  """The files of a run in `workdir`: what it restores from, and what it writes."""

  def __init__(
    self, cfg: Experiment, workdir: Folder, place: Folder | None = None,
    before_commit: Callable[[], None] = lambda: None,
  ):  # fmt: skip
    """`place` is the workdir itself where that is in a store, and `workdir` only has its small files."""
    self.cfg, self.workdir, self.place, self._before_commit = cfg, workdir, place or workdir, before_commit

  def checkpoints(self) -> Checkpoints:
    return Checkpoints(self.place, self.cfg.checkpoint, before_commit=self._before_commit)

  def snapshots(self, skips: Ranges) -> Snapshots:
    return Snapshots(self.cfg.snapshot, self.workdir, identity(self.cfg, skips), place=self.place)

  def check_not_lost(self, latest: int | None, recorded: Rows) -> None:
    """Raises CheckpointError where the run had checkpoints and none is left."""
    check_not_lost(latest, recorded, self.cfg.checkpoint.every, self.workdir)

  def metrics(self, timeline: Timeline, text: str, step: int, examples: int) -> Metrics:
    """Opens the files that a run at `step` writes to. From here on the run is on the disk."""
    writes = jax.process_index() == 0
    if writes:
      write_atomically(self.workdir / 'config.gin', text)
      write_atomically(self.workdir / same_stores.FILE, same_stores.record(self.cfg))
      timeline.open(self.workdir, step, examples)
    return Metrics(self.workdir, resume_step=step, total_steps=self.cfg.train.steps, write=writes)


@dataclasses.dataclass(frozen=True)
class Beginning:
  """Where a run begins: its first phase, the state, the position in the data, how the data has changed, the trunk."""

  phase: PhaseProgram
  state: TrainState
  position: dict[str, Any]
  changes: list[str]
  trunk: dict[str, str]


def start(
  cfg: Experiment,
  workdir: Folder,
  timeline: Timeline,
  *,
  allow_data_change: bool = False,
  open_files: Callable[[Experiment, Folder], Files] = Files,
) -> Run:
  """A run that is ready for its next step: restored from its newest whole step, or new.

  Everything that can be refused is refused before a file is written.
  """
  cfg = same_stores.as_begun(workdir, saved.as_begun(cfg, workdir / 'config.gin'))
  cfg = saved.with_chip_options(cfg, workdir / 'config.gin', jax.devices()[0].device_kind)
  files, skips, text = open_files(cfg, workdir), read_skips(workdir), bindings.render(cfg)
  check_lawa_processes(cfg.evaluation.lawa_checkpoints, jax.process_count())
  recorded = read_metrics(workdir)
  changes = check_config(cfg, files, recorded, allow_data_change)
  checkpoints, snapshots = files.checkpoints(), files.snapshots(skips)
  found = restore_or_initialise(files, timeline, checkpoints, snapshots, recorded, changes, allow_data_change)
  phase, step, examples = found.phase, int(found.state.step), found.position['examples']
  mixing = begin_mixing(cfg, found, skips)
  saved_step = min(step, checkpoints.latest() or 0)
  replicas = Replicas(phase.program.abstract, phase.program.mesh) if cfg.replicas.every else None
  metrics = files.metrics(timeline, text, step, examples)
  run = Run(
    cfg=cfg, text=text, workdir=workdir, skips=skips, timeline=timeline, checkpoints=checkpoints, snapshots=snapshots,
    metrics=metrics, judge=Judge(cfg, workdir, checkpoints, metrics, step), replicas=replicas,
    profile=Profile(workdir, traced_steps(cfg.train)), phase=phase, data=phase.data, state=found.state,
    position=found.position, mixing=mixing, trunk=found.trunk, step=step, saved_step=saved_step,
  )  # fmt: skip
  announce(run, found.changes)
  return run


def traced_steps(cfg: TrainConfig) -> tuple[int, int] | None:
  """The steps that this process traces."""
  traces = cfg.profile_hosts is None or jax.process_index() in cfg.profile_hosts
  return cfg.profile_steps if traces else None


def check_config(cfg: Experiment, files: Files, recorded: Rows, allow_data_change: bool) -> list[str]:
  """How the data of the config has changed since the run was saved. Raises ConfigError where it is another run."""
  saved = files.workdir / 'config.gin'
  if saved.exists() and (recorded or has_checkpoint(files.place)):  # otherwise it belongs to a run that never began
    return check_same_run(saved, cfg, allow_data_change=allow_data_change)
  return []


def restore_or_initialise(
  files: Files,
  timeline: Timeline,
  checkpoints: Checkpoints,
  snapshots: Snapshots,
  recorded: Rows,
  changes: list[str],
  allow_data_change: bool,
) -> Beginning:
  """The newest step whose files and values are those that were saved; step 0 where there is none."""
  cfg = files.cfg
  with timeline.during('restore'):
    source, latest = freshest(snapshots, checkpoints)
  files.check_not_lost(latest, recorded)
  # At the border of two phases the one that ended has saved the step. Its mistakes show before a file is written.
  phase = PhaseProgram(phase_at(cfg, max(latest - 1, 0) if latest else 0))
  check_best_of(cfg.checkpoint.best_of, phase.data.heldout(cfg.evaluation.batches, phase.rows))
  fingerprint, trunk = phase.data.fingerprint(), trunk_record(cfg)
  if latest is None:
    with timeline.during('compile'):
      state = initialise(phase, cfg.checkpoint.initial, fingerprint['tokenizer'])
      return Beginning(phase, state, {'examples': 0}, changes, trunk)
  try:
    with timeline.during('restore'):
      restored = source.restore(phase.program.abstract.saved(), latest)
      check_trunk(trunk.get(KEY, ''), restored.position.get(KEY), files.workdir, cfg.checkpoint.initial)
      frozen = read_frozen(phase, cfg.checkpoint.initial, fingerprint['tokenizer'])
  except DamagedError:  # try an older one
    return restore_or_initialise(files, timeline, checkpoints, snapshots, recorded, changes, allow_data_change)
  changes = changes + check_same_data(
    restored.position['data'], fingerprint, latest, files.workdir, allow_data_change=allow_data_change
  )
  position = restored.position['loader']
  if changes:
    position = phase.data.after_change(position, restored.position['used'], latest)
  phase.data = phase.data.at(position)
  return Beginning(phase, restored.state.replace(frozen=frozen), position, changes, trunk)


def trunk_record(cfg: Experiment) -> dict[str, str]:
  """The fingerprint of the weights that adapters belong to; nothing without adapters."""
  if not cfg.lora.rank:
    return {}
  step = find(cfg.checkpoint.initial)
  return {KEY: fingerprint_of(step.workdir, step.number)}


def read_frozen(phase: PhaseProgram, initial: str, tokenizer: str | None):
  """The parameters that a run does not train, and does not save: those of its trunk."""
  return initial_params(initial, phase.program, tokenizer) if phase.program.abstract.frozen else {}


def initialise(phase: PhaseProgram, initial: str | None, tokenizer: str | None) -> TrainState:
  """The state of step 0, with the parameters of the checkpoint `initial` if there is one."""
  if initial is None:
    return phase.program.init()
  return phase.program.start(initial_params(initial, phase.program, tokenizer))


def begin_mixing(cfg: Experiment, found: Beginning, skips: Ranges) -> Mixing | None:
  """The weights of sources that losses decide; None without data.online. Raises ConfigError for impossible skips."""
  examples = found.position['examples']
  if cfg.data.online is not None:
    return begin(found.position, found.phase.data.used(examples))
  check_skips(skips, examples, found.phase.cfg.data.batch_size)
  return None


def announce(run: Run, changes: Sequence[str]) -> None:
  """Prints what is special about this start."""
  if warning := run.snapshots.start(run.phase.program.abstract.saved()):
    run.metrics.warn(warning)
  if changes and run.step:
    run.metrics.warn(f'DATA-CHANGE: from step {run.step} on {"; ".join(changes)}.')
  if run.step >= run.cfg.train.steps:
    run.metrics.warn(
      f'DONE: already at step {run.step}, and train.steps={run.cfg.train.steps}: no step is left to train. To train '
      f'longer, set train.steps to more than {run.step}.'
    )
  announce_cuts(run)


def announce_cuts(run: Run) -> None:
  """Prints which parts of pairs and conversations of this phase do not fit into a row."""
  for line in run.phase.data.losses():
    run.metrics.warn(f'DATA-CUT: {line}.')


def write_atomically(path: pathlib.Path, text: str) -> None:
  """The whole text or nothing, under a name that appears at once."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_suffix(path.suffix + '.tmp')
  temporary.write_text(text)
  temporary.replace(path)
