"""Phases: what changes at stated steps of a run: objective, data, batch size, precision, learning rate; not the model.

Adapting one model from one objective to another is Wang et al. 2022, arXiv:2204.05832, §3.4; batch-size ramps are
phases too. A phase is another config over the same state.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from pretrain.config import bindings
from pretrain.errors import ConfigError

# What a phase may set: nothing that would change the shape of the state.
MAY_SET = (
  'objective.', 'data.', 'loss.', 'schedule.', 'model.dtype', 'model.dropout', 'model.remat', 'train.accumulate',
  'kernels.',
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
  """From the update after `start_step` on, the keys in `set` have these values, until a later phase sets them again.

  >>> Phase(start_step=1000, set={'objective.name': 'prefix_lm', 'data.batch_size': 64})
  Phase(start_step=1000, set={'objective.name': 'prefix_lm', 'data.batch_size': 64})
  """

  start_step: Annotated[int, '>= 1']
  set: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Stretch:
  """The steps `start` to `end` (None: the last one) of a run, under one config.

  Its first batch begins at example `first_example` of the run; its learning rate counts from `schedule_start`, the
  start of the phase that last set a key of the schedule.
  """

  index: int
  cfg: Any
  start: int
  end: int | None
  first_example: int
  schedule_start: int

  def holds(self, step: int) -> bool:
    """Whether the update that leads from `step` to `step + 1` is one of its own."""
    return self.start <= step and (self.end is None or step < self.end)

  def example(self, step: int) -> int:
    """How many examples the run has used at `step`."""
    return self.first_example + (step - self.start) * self.cfg.data.batch_size


def stretches(cfg: Any) -> tuple[Stretch, ...]:
  """The phases of an Experiment in order, the first one being the config itself.

  Raises ConfigError for keys that no phase may set, and where a phase does not start after the one before it.
  """
  ends = [*(phase.start_step for phase in cfg.phases), None]
  found = [Stretch(0, dataclasses.replace(cfg, phases=()), 0, ends[0], 0, 0)]
  for i, phase in enumerate(cfg.phases):
    before, place = found[-1], f'phases[{i}]'
    if phase.start_step <= before.start:
      raise ConfigError(f'{place}.start_step={phase.start_step} is not after {before.start}; list phases in order.')
    _check_keys(phase, place)
    own = bindings.override(before.cfg, phase.set, f'{place}.set')
    anew = any(key.startswith('schedule.') for key in phase.set)
    schedule_start = phase.start_step if anew else before.schedule_start
    example = before.example(phase.start_step)
    found.append(Stretch(i + 1, own, phase.start_step, ends[i + 1], example, schedule_start))
  return tuple(found)


def stretch_at(cfg: Any, step: int) -> Stretch:
  """The stretch of the update that leads from `step` to `step + 1`."""
  return next(stretch for stretch in stretches(cfg) if stretch.holds(step))


def _check_keys(phase: Phase, place: str) -> None:
  for key in phase.set:
    if not any(key == allowed or (allowed.endswith('.') and key.startswith(allowed)) for allowed in MAY_SET):
      listed = ', '.join(name + '*' if name.endswith('.') else name for name in MAY_SET)
      raise ConfigError(f'{place}.set: {key} is the same in all phases of a run; a phase may set {listed}.')
