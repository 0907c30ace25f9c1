"""`pretrain checkpoints restore-as`: a step of one run as a step of another, with another optimizer or average.

Parameters, step and position in the data are kept bit for bit. So are the optimizer's state if no key of `optimizer`
but `offload` differs, moving averages if no key of `averaging` does, and all else of `extra` (histories of delayed
scaling, counts of sparse training). Otherwise they start fresh, averages from the parameters.
The losses that spikes are measured against are kept if no key of `spikes` differs.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from pretrain.checkpoints.checkpoints import Checkpoints
from pretrain.checkpoints.config import CheckpointConfig
from pretrain.config import bindings
from pretrain.devices.mesh import MeshConfig
from pretrain.errors import ConfigError
from pretrain.experiment.checks import check
from pretrain.experiment.experiment import MAY_CHANGE, Experiment
from pretrain.experiment.phases import phase_at
from pretrain.experiment.program import Program, build_program
from pretrain.experiment.resume import differences
from pretrain.experiment.rules.offload import without_offload
from pretrain.experiment.saved import load_saved
from pretrain.experiment.trunk import read_trunk
from pretrain.hosts.ownership import owned
from pretrain.optim.averaging import averaging_tracks
from pretrain.tools.weights import Step, check_new, config_of
from pretrain.workdirs.folder import Folder

FREE = ('optimizer.', 'averaging.', 'schedule.', 'spikes.')


def restore_as(step: Step, overrides: Sequence[str], output: Folder, source: str) -> list[str]:
  """Writes a new workdir that a run can resume from; returns the parts of the state that start fresh."""
  check_new(output)
  old, new = config_of(step.workdir), _changed(step.workdir, overrides)
  own = phase_at(new, max(step.number - 1, 0)).cfg
  program = _program(own)
  stored = _program(dataclasses.replace(own, spikes=old.spikes, averaging=old.averaging))
  same_optimizer = _of_values(old) == _of_values(new)
  kept = ['extra', *['opt_state'] * same_optimizer]
  with contextlib.closing(Checkpoints(step.workdir, CheckpointConfig(), read_only=True)) as checkpoints:
    position = checkpoints.position(step.number)
    parts = checkpoints.restore_parts(_abstract(stored, ['step', 'params', *kept]), step.number)
  averages = []
  if old.averaging != new.averaging:
    averages = [*averaging_tracks(new.averaging)]
    parts['extra'] = {name: x for name, x in parts['extra'].items() if name not in averaging_tracks(old.averaging)}
  text = f'# Step {step.number} made by: {source}\n{bindings.render(new)}'
  whole = {**read_trunk(step.workdir, old, step.number, program.weights), **parts['params']}
  _write(output, step.number, _state(program, parts, whole, old.spikes == new.spikes), position, text)
  return [*['opt_state'] * (not same_optimizer), *(f'extra/{name}' for name in averages)]


def _of_values(cfg: Experiment):
  """The keys of the optimizer that change values: not where its state is kept."""
  return without_offload(cfg).optimizer


def _program(cfg: Experiment) -> Program:
  return build_program(dataclasses.replace(without_offload(cfg), mesh=MeshConfig()), jax.devices()[:1])


def _abstract(program: Program, parts: Sequence[str]) -> dict[str, Any]:
  return {part: getattr(program.abstract, part) for part in parts}


def _state(program: Program, parts: dict[str, Any], whole: Any, same_spikes: bool):
  fresh = program.start(whole).saved()
  fresh = dataclasses.replace(fresh, opt_state=_at(parts['step'], fresh.opt_state))
  if 'opt_state' in parts and not same_spikes:  # a guarded state begins with the optimizer's own
    parts |= {'opt_state': (*parts['opt_state'][:2], *fresh.opt_state[2:])}
  parts |= {'extra': {**fresh.extra, **parts['extra']}}
  return dataclasses.replace(fresh, **{name: part for name, part in parts.items() if name != 'params'})


def _at(step: jax.Array, opt_state):
  """A fresh optimizer state whose step counters continue from `step`: the schedule's, and the spikes' for phases."""
  first, rate, *spikes = opt_state
  return first, rate._replace(count=step), *(state._replace(updates=step) for state in spikes)


def _changed(workdir: Folder, overrides: Sequence[str]) -> Experiment:
  """The config of a run with `overrides`. Raises ConfigError for a key that changes the model or the data."""
  saved = workdir / 'config.gin'
  old, new = load_saved(saved), load_saved(saved, overrides)
  check(new)
  refused = [item for item in differences(old, new) if not item[0].startswith(FREE)]
  if refused:
    key, before, after = refused[0]
    raise ConfigError(
      f'{key} is {before!r} in {saved}, {after!r} in this command: restore-as changes {", ".join(FREE)} and what a '
      f'resumed run may change ({", ".join(MAY_CHANGE)}). Nothing was written; for anything else start a run with '
      'checkpoint.initial.'
    )
  return new


def _write(output: Folder, step: int, state, position: dict[str, Any], text: str) -> None:
  """The config is written last: a folder without it is not a run."""
  with owned(output, '--output'):
    checkpoints = Checkpoints(output, CheckpointConfig())
    checkpoints.save(step, state, position, text)
    checkpoints.close()
    (output / 'config.gin').write_text(text)
