"""Checks the numbers of a step: a warning, the end of the run, or a rewind to an older checkpoint."""

import pathlib
from collections.abc import Mapping
from math import inf

import numpy as np

from pretrain.checkpoints.checkpoints import Checkpoints
from pretrain.errors import NonFiniteError, ReplicaError
from pretrain.experiment.experiment import Experiment
from pretrain.optim.spikes import NoSpikes, RewindSpikes
from pretrain.records.metrics import Metrics
from pretrain.replicas.compare import Replicas
from pretrain.run.rewinding import rewind


class Judge:
  """Checks the numbers of each step. All processes have the same numbers, and decide the same at the same step."""

  def __init__(self, cfg: Experiment, workdir: pathlib.Path, checkpoints: Checkpoints, metrics: Metrics, resumed: int):
    self._cfg, self._workdir, self._checkpoints, self._metrics = cfg, workdir, checkpoints, metrics
    self._alike = resumed  # the last step with equal replicas: a restored state has been verified

  def is_end(self, values: Mapping[str, float]) -> bool:
    """Whether the run ends or rewinds at a step with these metrics."""
    return self._is_last_nonfinite(values) or self._is_last_spike(values)

  def check(self, step: int, examples: range, values: Mapping[str, float]) -> None:
    """Warns of an update that was skipped; raises NonFiniteError after too many of them, SpikeError for a rewind."""
    if consecutive := int(values['skipped_consecutive']):
      limit = self._cfg.optimizer.max_consecutive_nonfinite
      text = (
        f'grad_norm={values["grad_norm"]} at step {step} ({_show(examples)}). '
        f'Update skipped ({consecutive} of {limit} consecutive).'
      )
      if not self._is_last_nonfinite(values):
        self._metrics.warn(f'NONFINITE: {text}')
        return
      raise NonFiniteError(f'{text} Stopped; {self._kept()}. Lower schedule.peak, in another --workdir.')
    if not isinstance(self._cfg.spikes, NoSpikes) and values['spikes_consecutive']:
      self._spike(step, examples, values)

  def _spike(self, step: int, examples: range, values: Mapping[str, float]) -> None:
    cfg = self._cfg.spikes
    found = [f'{key}={values[key]:.6g} (limit {values[f"{key}_limit"]:.6g})' for key in ('loss', 'grad_norm')]
    text = f'{" and ".join(found)} at step {step} ({_show(examples)})'
    if isinstance(cfg, RewindSpikes):
      rewind(self._workdir, self._checkpoints, cfg, step, examples.stop, text)
    count = f'({int(values["spikes_consecutive"])} of {cfg.max_consecutive} consecutive)'
    if not self._is_last_spike(values):
      self._metrics.warn(f'SPIKE: {text}. Update skipped {count}.')
      return
    raise NonFiniteError(
      f'{text}. Update skipped {count}. Stopped; {self._kept()}. The level of the losses has changed, or the run has '
      'diverged: raise spikes.sigmas, or lower schedule.peak, in another --workdir.'
    )

  def check_replicas(self, replicas: Replicas, found: np.ndarray, step: int) -> None:
    """Raises ReplicaError where copies of an array differ at `step`."""
    try:
      replicas.check(found, step, self._alike)
    except ReplicaError:
      self._checkpoints.finished()  # waits for the save under way: the run may resume from that step
      raise
    self._alike = step

  def _is_last_nonfinite(self, values: Mapping[str, float]) -> bool:
    return values['skipped_consecutive'] >= self._cfg.optimizer.max_consecutive_nonfinite

  def _is_last_spike(self, values: Mapping[str, float]) -> bool:
    cfg = self._cfg.spikes
    if isinstance(cfg, NoSpikes):
      return False
    return values['spikes_consecutive'] >= (1 if isinstance(cfg, RewindSpikes) else cfg.max_consecutive)

  def _kept(self) -> str:
    latest = max(self._checkpoints.finished(), default=None)  # a save may be under way
    return f'step {latest} is saved in {self._workdir}' if latest else 'no step was saved yet'


def shown(values: Mapping[str, float]) -> dict[str, float]:
  """The numbers of a step that are logged: without counts of consecutive skips, and without infinite limits."""
  return {k: v for k, v in values.items() if not k.endswith('_consecutive') and not (k.endswith('_limit') and v == inf)}


def _show(examples: range) -> str:
  return f'examples {examples.start}..{examples.stop - 1}'
