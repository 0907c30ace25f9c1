"""Phases: the objective, data, batch size, precision and learning rate of a run may change at given steps.

Every phase has a config of its own; the model and the state stay. Source: Wang et al. 2022, arXiv:2204.05832, §3.4,
for adapting a model from one objective to another. Batch-size ramps are phases too.
"""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from pretrain.config import bindings
from pretrain.errors import ConfigError

# What a phase may set: nothing that would change the shape of the state.
MAY_SET = (
  'objective.', 'data.', 'loss.', 'schedule.', 'model.dtype', 'model.dropout', 'model.remat', 'model.remat_keep',
  'model.remat_offload', 'train.accumulate',
  'kernels.', 'precision.recipe', 'precision.overrides', 'precision.first_layers', 'precision.last_layers',
  'precision.edge_recipe', 'sparsity.rate', 'model.pipeline_microbatches', 'model.pipeline_repeats',
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseConfig:
  """From the update after `start_step` on, the keys in `set` have these values, until a later phase sets them again.

  >>> PhaseConfig(start_step=1000, set={'objective.name': 'prefix_lm', 'data.batch_size': 64})
  PhaseConfig(start_step=1000, set={'objective.name': 'prefix_lm', 'data.batch_size': 64})
  """

  start_step: Annotated[int, '>= 1']
  set: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Phase:
  """The steps `start` to `end` (None: the last one) of a run, under one config.

  Its first batch begins at example `first_example` of the run. Its learning rate counts from `schedule_start`: the
  start of the newest phase that set a key of the schedule.
  """

  index: int
  cfg: Any
  start: int
  end: int | None
  first_example: int
  schedule_start: int

  def holds(self, step: int) -> bool:
    """Whether the update from `step` to `step + 1` belongs to this phase."""
    return self.start <= step and (self.end is None or step < self.end)

  def example(self, step: int) -> int:
    """How many examples the run has used at `step`."""
    return self.first_example + (step - self.start) * self.cfg.data.batch_size


def phases_of(cfg: Any) -> tuple[Phase, ...]:
  """The phases of an Experiment in order; the first one is the config itself.

  Raises ConfigError for keys that no phase may set, and for a phase that does not start after the one before it.
  """
  ends = [*(phase.start_step for phase in cfg.phases), None]
  found = [Phase(0, dataclasses.replace(cfg, phases=()), 0, ends[0], 0, 0)]
  for i, phase in enumerate(cfg.phases):
    before, where = found[-1], f'phases[{i}]'
    if phase.start_step <= before.start:
      raise ConfigError(f'{where}.start_step={phase.start_step} is not after {before.start}; list phases in order.')
    _check_keys(phase, where)
    own = bindings.override(before.cfg, phase.set, f'{where}.set')
    anew = any(key.startswith('schedule.') for key in phase.set)
    schedule_start = phase.start_step if anew else before.schedule_start
    example = before.example(phase.start_step)
    found.append(Phase(i + 1, own, phase.start_step, ends[i + 1], example, schedule_start))
  return tuple(found)


def phase_at(cfg: Any, step: int) -> Phase:
  """The phase of the update from `step` to `step + 1`."""
  return next(phase for phase in phases_of(cfg) if phase.holds(step))


def _check_keys(phase: PhaseConfig, where: str) -> None:
  for key in phase.set:
    if not any(key == allowed or (allowed.endswith('.') and key.startswith(allowed)) for allowed in MAY_SET):
      listed = ', '.join(name + '*' if name.endswith('.') else name for name in MAY_SET)
      raise ConfigError(f'{where}.set: {key} is the same in all phases of a run; a phase may set {listed}.')
