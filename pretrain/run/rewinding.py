"""Rewinding after a loss spike: the run returns to an older checkpoint and skips the examples from there to the spike.

A rewind is a restart (docs/design/0013): the run exits with code 72. The next start finds an older newest step and one
more range in skipped.json. RUN/rewinds.jsonl has a line for each rewind; `spikes.max_rewinds` limits their number.
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
  """Raises SpikeError when the next start will resume before the spike of `step` and skip the examples that led to it.

  `end` is the first example after the spike. Raises NonFiniteError after `cfg.max_rewinds` rewinds. All processes call
  it at the same step.
  """
  checkpoints.finished()  # waits for the save under way; the rewind happens also where that save fails
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
    f'{text}. Returned to step {to}; examples {first}..{end - 1} are skipped from now on (rewind {made + 1} of '
    f'{cfg.max_rewinds}). Nothing was deleted; the same command resumes from there.'
  )


def _target(checkpoints: Checkpoints, before: int, agreement: Agreement) -> int:
  """The newest whole step up to `before`, else the oldest whole step, else 0: the beginning."""
  steps = json.loads(agreement.first(json.dumps(step_folders.finished(checkpoints.directory))))
  old = [step for step in reversed(steps) if step <= before]
  return next((step for step in [*old, *steps] if not checkpoints.damage(step)), 0)


def _leave(workdir: pathlib.Path, checkpoints: Checkpoints, step: int, to: int, examples: tuple[int, int]) -> None:
  """Sets later steps aside, newest first, then records which examples are skipped.

  A run that is killed in between resumes before the spike, reaches it again, and completes the rewind.
  """
  for later in reversed(step_folders.finished(checkpoints.directory)):
    if later > to:
      step_folders.put_aside(checkpoints.directory, later, 'undone')
  add_skip(workdir, *examples)
  end_line(workdir / REWINDS)
  append(workdir / REWINDS, {'time': time.time(), 'step': step, 'to': to, 'examples': examples})
