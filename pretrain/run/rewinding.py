"""The way back before a loss spike: to an older checkpoint, and past the examples from there to the spike.

A rewind is a restart (docs/design/0013): the run leaves with code 72, and whoever starts it again finds an older newest
step and one more range in skipped.json. RUN/rewinds.jsonl has a line for each: it is what the limit counts.
"""

import json
import pathlib
import time
from typing import NoReturn

import jax

from pretrain.checkpoints import step_folders
from pretrain.checkpoints.checkpoints import Checkpoints
from pretrain.errors import NonFiniteError, SpikeError
from pretrain.hosts.coordination import Agreement
from pretrain.hosts.skipping import REWINDS, add_skip, leave_out, read_rewinds, read_skips
from pretrain.optim.spikes import RewindSpikes
from pretrain.records.timeline import append, end_line


def rewind(
  workdir: pathlib.Path, checkpoints: Checkpoints, cfg: RewindSpikes, step: int, end: int, text: str
) -> NoReturn:
  """Raises SpikeError once the next start will begin before the spike of `step` and leave out what led to it.

  `end` is the first example behind the spike. Raises NonFiniteError where `cfg.max_rewinds` were made already. All
  processes call it at the same step.
  """
  checkpoints.finished()  # a save may be under way; one that fails is no reason not to go back
  agreement = Agreement.about('rewind')
  made = int(agreement.first(str(len(read_rewinds(workdir)))))
  if made >= cfg.max_rewinds:
    raise NonFiniteError(
      f'{text}, after {made} rewinds (spikes.max_rewinds={cfg.max_rewinds}). Stopped; step '
      f'{checkpoints.latest() or 0} is saved in {workdir}. The data is not the cause: lower schedule.peak, in another '
      '--workdir.'
    )
  to = _target(checkpoints, step - cfg.steps, agreement)
  position = checkpoints.position(to)['loader'] if to else {'examples': 0}
  first = leave_out(read_skips(workdir), position)['examples']
  agreement.gather('read')
  if jax.process_index() == 0:
    _leave(workdir, checkpoints, step, to, (first, end))
  agreement.gather('left')
  raise SpikeError(
    f'{text}. Gone back to step {to}; examples {first}..{end - 1} are left out from now on (rewind {made + 1} of '
    f'{cfg.max_rewinds}). Nothing was deleted; the same command goes on from there.'
  )


def _target(checkpoints: Checkpoints, before: int, agreement: Agreement) -> int:
  """The newest whole step up to `before`; else the oldest there is; 0, the beginning, where there is none."""
  steps = json.loads(agreement.first(json.dumps(step_folders.finished(checkpoints.directory))))
  old = [step for step in reversed(steps) if step <= before]
  return next((step for step in [*old, *steps] if not checkpoints.damage(step)), 0)


def _leave(workdir: pathlib.Path, checkpoints: Checkpoints, step: int, to: int, examples: tuple[int, int]) -> None:
  """Puts later steps aside, newest first, then notes what is left out. A run that is killed in between goes on from a
  step before the spike, meets it again, and does the rest."""
  for later in reversed(step_folders.finished(checkpoints.directory)):
    if later > to:
      step_folders.put_aside(checkpoints.directory, later, 'undone')
  add_skip(workdir, *examples)
  end_line(workdir / REWINDS)
  append(workdir / REWINDS, {'time': time.time(), 'step': step, 'to': to, 'examples': examples})
