"""`pretrain replay`: steps of a run are made again from a checkpoint before them, and compared with what was recorded.

What a run has computed once it computes again, bit for bit, on the same mesh. A step that comes out otherwise was
computed wrongly one of the two times. Nothing is written. Source: Google 2023, arXiv:2312.11805 (Gemini), §3:
deterministic replay finds the incorrect computations of hardware.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence

from pretrain.checkpoints import manifest, step_folders
from pretrain.checkpoints.checkpoints import Checkpoints, first_of
from pretrain.errors import ConfigError
from pretrain.experiment.experiment import Experiment
from pretrain.hosts.coordination import Interrupt
from pretrain.records.metrics import read_metrics
from pretrain.records.timeline import Timeline
from pretrain.replicas import digest
from pretrain.replicas.compare import ReplicasConfig
from pretrain.run.train import Run
from pretrain.snapshots.snapshots import Snapshots

COMPARED = ('loss', 'grad_norm', 'batch_checksum')
Tell = Callable[[str], None]


def replay(cfg: Experiment, workdir: pathlib.Path, step: int, tell: Tell, *, rtol: float | None = None) -> bool:
  """Whether the steps after the newest whole checkpoint before `step`, up to it, come out as they are recorded.

  `cfg` is that of the run. Losses and gradient norms may differ by `rtol`; without it not by a bit, nor may arrays
  where there is a checkpoint to compare them with. `tell` is given a line for each step. Raises ConfigError where
  nothing is recorded of `step`.
  """
  record = Record(workdir, tell, rtol)
  if not record.knows(step):
    raise ConfigError(
      f'--step={step}: {workdir} has neither a row of metrics.jsonl nor a checkpoint of it; its last row is of step '
      f'{max(record.rows, default=0)}.'
    )
  with Interrupt() as interrupt:
    run = Replay(_as_replayed(cfg, step), workdir, record)
    tell(f'replaying steps {run.step + 1} to {step} from {f"step {run.step}" if run.step else "the beginning"}')
    run.loop(interrupt)
  return not record.differing


def _as_replayed(cfg: Experiment, step: int) -> Experiment:
  """Every step is asked for its numbers and arrays; nothing else is done beside them."""
  return dataclasses.replace(
    cfg,
    train=dataclasses.replace(cfg.train, steps=step, log_every=1, profile_steps=None),
    evaluation=dataclasses.replace(cfg.evaluation, every=0, generate=0, lawa_checkpoints=0),
    checkpoint=dataclasses.replace(cfg.checkpoint, every=1, best_of=None, keep_best=0),
    replicas=ReplicasConfig(),
    snapshot=dataclasses.replace(cfg.snapshot, every=0),
  )


class Record:
  """What a run has written down of its steps. It stands where a run has its metrics, and compares instead."""

  def __init__(self, workdir: pathlib.Path, tell: Tell, rtol: float | None):
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
    text = [f'{key} is not that of checkpoints/{step}' for key in sorted(wrong, key=_place)]
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
    """The run has said it."""

  def add(self, values: Mapping[str, float]) -> None:
    """Nothing is saved."""


def _place(key: str) -> tuple[bool, str]:
  """Parameters before what is made from them."""
  return not key.startswith('params/'), key


class Earlier(Checkpoints):
  """The checkpoints of a run before a step, to be read."""

  def __init__(self, workdir: pathlib.Path, cfg, before: int):
    super().__init__(workdir, cfg, read_only=True)
    self._before = before

  def damage(self, step: int) -> str:
    """As all processes have found it: each reads its share of the files, and all begin at the same step."""
    return next(filter(None, self._agreement.gather(super().damage(step))), '')

  def newest_whole(self) -> int | None:
    steps = [step for step in reversed(step_folders.finished(self.directory)) if step < self._before]
    return next((step for step in steps if not self.damage(step)), None)


class Unjudged:
  """Replayed, a spike is one step like others: nobody warns, stops or goes back."""

  def is_end(self, values: Mapping[str, float]) -> bool:
    return False

  def check(self, step: int, examples: range, values: Mapping[str, float]) -> None:
    pass


class Replay(Run):
  """A run that writes nothing: each step is compared with what is recorded of it."""

  def __init__(self, cfg: Experiment, workdir: pathlib.Path, record: Record):
    self._record = record
    super().__init__(cfg, workdir, Timeline())
    self.judge = Unjudged()

  def _open_checkpoints(self) -> Checkpoints:
    return Earlier(self.workdir, self.cfg.checkpoint, self.cfg.train.steps)

  def _open_snapshots(self) -> Snapshots:
    return Snapshots(self.cfg.snapshot, self.workdir, {}, read_only=True)

  def _open_metrics(self) -> Record:
    return self._record

  def _restore_or_initialise(self, recorded):
    return super()._restore_or_initialise([])  # old checkpoints may be gone: the beginning is always there

  def _evaluate_and_save(self) -> None:
    self._record.arrays(self.step, vars(self.state))
