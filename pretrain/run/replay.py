"""`pretrain replay`: steps of a run are computed again from an earlier checkpoint, and compared with their records.

On the same mesh a run computes the same bits again. A step that differs was computed wrongly one of the two times.
Nothing is written. Source: Google 2023, arXiv:2312.11805 (Gemini), §3:
deterministic replay finds the incorrect computations of hardware.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

from pretrain.checkpoints import manifest, step_folders
from pretrain.checkpoints.checkpoints import Checkpoints
from pretrain.checkpoints.config import CheckpointConfig
from pretrain.checkpoints.wording import first_of
from pretrain.errors import ConfigError
from pretrain.experiment.experiment import Experiment
from pretrain.hosts.coordination import Interrupt
from pretrain.hosts.skipping import Ranges
from pretrain.records.metrics import read_metrics
from pretrain.records.timeline import Timeline
from pretrain.replicas import digest
from pretrain.replicas.compare import ReplicasConfig
from pretrain.run.loop import loop
from pretrain.run.starting import Files, start
from pretrain.snapshots.snapshots import Snapshots
from pretrain.step.train_step import TrainState
from pretrain.workdirs.folder import Folder

COMPARED = ('loss', 'grad_norm', 'batch_checksum')
Tell = Callable[[str], None]


def replay(cfg: Experiment, workdir: Folder, step: int, tell: Tell, *, rtol: float | None = None) -> bool:
  """Whether the steps from the newest whole checkpoint before `step` up to `step` are equal to their records.

  `cfg` is the config of the run. Losses and gradient norms may differ by `rtol`. Without `rtol` all bits are compared,
  also those of the arrays at each step that has a checkpoint. `tell` receives a line for each step. Raises ConfigError
  where nothing is recorded of `step`.
  """
  record = Record(workdir, tell, rtol)
  if not record.knows(step):
    raise ConfigError(
      f'--step={step}: {workdir} has neither a row of metrics.jsonl nor a checkpoint of it; its last row is of step '
      f'{max(record.rows, default=0)}.'
    )
  with Interrupt() as interrupt:
    cfg = _as_replayed(cfg, step)
    run = start(cfg, workdir, Timeline(), open_files=functools.partial(ReplayFiles, record))
    run.judge = Unjudged()
    tell(f'replaying steps {run.step + 1} to {step} from {f"step {run.step}" if run.step else "the beginning"}')
    loop(run, interrupt)
  return not record.differing


def _as_replayed(cfg: Experiment, step: int) -> Experiment:
  """The config of the replay: every step is logged and "saved", that is compared; nothing else happens."""
  return dataclasses.replace(
    cfg,
    train=dataclasses.replace(cfg.train, steps=step, log_every=1, profile_steps=None),
    evaluation=dataclasses.replace(cfg.evaluation, every=0, generate=0, lawa_checkpoints=0),
    checkpoint=dataclasses.replace(cfg.checkpoint, every=1, best_of=None, keep_best=0),
    replicas=ReplicasConfig(),
    snapshot=dataclasses.replace(cfg.snapshot, every=0),
  )


class Record:
  """What a run has recorded of its steps. It takes the place of the replay's metrics, and compares with them."""

  def __init__(self, workdir: Folder, tell: Tell, rtol: float | None):
    self.rows = {row['step']: row for row in read_metrics(workdir) if COMPARED[0] in row}
    self.differing: list[int] = []
    self._folder, self._tell, self._rtol = workdir / 'checkpoints', tell, rtol

  def knows(self, step: int) -> bool:
    return step in self.rows or self._is_saved(step)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Compares the numbers of a step."""
    if (row := self.rows.get(step)) is None:
      return
    pairs = [(key, row[key], values[key]) for key in COMPARED]
    wrong = [f'{key} is {new!r}, {old!r} in metrics.jsonl' for key, old, new in pairs if not self._same(key, old, new)]
    self._say(step, wrong, ', '.join(f'{key} {new!r}' for key, _, new in pairs))

  def arrays(self, step: int, state: Mapping[str, object]) -> None:
    """Compares the state after a step, where that was saved."""
    if self._rtol is not None or not self._is_saved(step):
      return
    leaves = manifest.read(self._folder / str(step)).leaves
    wrong = digest.differing({key: leaf.digest for key, leaf in leaves.items()}, state)
    text = [f'{key} is not that of checkpoints/{step}' for key in sorted(wrong, key=_parameters_first)]
    self._say(step, text and [first_of(text)], f'{len(leaves)} arrays of checkpoints/{step}')

  def _is_saved(self, step: int) -> bool:
    return step_folders.kind_of(self._folder / str(step)) == 'finished'

  def _same(self, key: str, old: float, new: float) -> bool:
    if key == 'batch_checksum' or not self._rtol:
      return old == new or (old != old and new != new)
    return abs(old - new) <= self._rtol * abs(old)

  def _say(self, step: int, wrong: Sequence[str], equal: str) -> None:
    if wrong:
      self.differing.append(step)
    self._tell(f'step {step}  DIFFERS  {"; ".join(wrong)}' if wrong else f'step {step}  equal    {equal}')

  def warn(self, text: str) -> None:
    """Prints nothing: the run itself has printed it."""

  def add(self, values: Mapping[str, float]) -> None:
    """Records nothing: a replay has no costs of saves."""


def _parameters_first(key: str) -> tuple[bool, str]:
  """Sorts parameters before the moments and averages that are computed from them."""
  return not key.startswith('params/'), key


class Earlier(Checkpoints):
  """The checkpoints of a run before a step, for reading. A save compares the arrays with what is on disk."""

  def __init__(self, workdir: Folder, cfg: CheckpointConfig, before: int, record: Record | None = None):
    super().__init__(workdir, cfg, read_only=True)
    self._before, self._record = before, record

  def damage(self, step: int) -> str:
    """The damage that any process has found: each reads its share of the files, and all begin at the same step."""
    return next(filter(None, self._agreement.gather(super().damage(step))), '')

  def newest_whole(self, after: int | None = None) -> int | None:
    """The newest whole step before the one that is replayed; None where there is none."""
    steps = [step for step in reversed(step_folders.finished(self.directory)) if step < self._before]
    return next((step for step in steps if not self.damage(step)), None)

  def save(self, step: int, state: TrainState, *_) -> None:
    """Compares the arrays of `step` with those that were saved; writes nothing."""
    self._record.arrays(step, vars(state))


class ReplayFiles(Files):
  """The files of a replay: it reads the checkpoints and the metrics of the run, and writes nothing."""

  def __init__(self, record: Record, cfg: Experiment, workdir: Folder):
    super().__init__(cfg, workdir)
    self._record = record

  def checkpoints(self) -> Checkpoints:
    return Earlier(self.workdir, self.cfg.checkpoint, self.cfg.train.steps, self._record)

  def snapshots(self, skips: Ranges) -> Snapshots:
    return Snapshots(self.cfg.snapshot, self.workdir, {}, read_only=True)

  def check_not_lost(self, latest: int | None, recorded) -> None:
    """Old checkpoints may be gone: a replay can always begin at step 0."""

  def metrics(self, timeline: Timeline, text: str, step: int, examples: int) -> Record:
    return self._record


class Unjudged:
  """In a replay a spike is a step like any other: no warning, no end, no rewind."""

  def is_end(self, values: Mapping[str, float]) -> bool:
    return False

  def check(self, step: int, examples: range, values: Mapping[str, float]) -> None:
    pass
