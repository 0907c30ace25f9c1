"""`train`: a run from its start to its end. Start reading here; the steps are in `loop.py`."""

import os
import pathlib

import jax

from pretrain.experiment.experiment import Experiment
from pretrain.hosts import coordination
from pretrain.hosts.coordination import Interrupt
from pretrain.hosts.ownership import owned_by_run
from pretrain.hosts.watchdog import Watchdog
from pretrain.records.metrics import read_metrics
from pretrain.records.timeline import Timeline
from pretrain.redact import redact
from pretrain.run.loop import loop
from pretrain.run.run import Run
from pretrain.run.saving import save_rest
from pretrain.run.starting import start
from pretrain.tools.report import write_report

DONE, PREEMPTED = 0, 75


def train(
  cfg: Experiment, workdir: str | os.PathLike[str], *, allow_data_change: bool = False, began: float | None = None
) -> int:
  """Trains until `cfg.train.steps`, from the newest checkpoint in `workdir` if there is one; returns the exit code.

  With `allow_data_change` a run whose data has changed continues with it, from the same row of each source. `began`:
  see `Timeline`. Raises ConfigError where another run owns `workdir`.
  """
  timeline, workdir = Timeline(began), pathlib.Path(workdir)
  with Watchdog(timeline, cfg.watchdog, workdir), Interrupt() as interrupt, owned_by_run(workdir):
    run = start(cfg, workdir, timeline, allow_data_change=allow_data_change)
    with timeline.during('restore'):
      coordination.barrier('begin', cfg.watchdog.restore)
    try:
      loop(run, interrupt)
      with timeline.during('save'):
        save_rest(run)
    finally:
      stop(run)
    with timeline.during('close'):
      finish(run)
      coordination.barrier('end', cfg.watchdog.close)
    timeline.enter('done')
    timeline.flush()
  return DONE if run.step >= cfg.train.steps else PREEMPTED


def stop(run: Run) -> None:
  """The record of the run is on disk, also where the loop ended with an error."""
  run.timeline.flush()
  run.profile.stop(run.state)
  run.snapshots.stop()
  run.metrics.close()


def finish(run: Run) -> None:
  """Checkpoints and snapshots are closed, and the report is drawn."""
  run.checkpoints.close()
  run.snapshots.close()
  if jax.process_index() == 0 and read_metrics(run.workdir):  # none where the run was stopped before the first row
    draw_report(run)


def draw_report(run: Run) -> None:
  """RUN/report.html is drawn. Where that fails a warning is printed: the run itself is complete and saved."""
  try:
    write_report(run.workdir)
  except Exception as error:
    reason = (str(error).strip().splitlines() or [''])[-1][:200]
    run.metrics.warn(
      f'REPORT: {run.workdir}/report.html could not be drawn ({type(error).__name__}: {redact(reason)}). The run is '
      f'complete and saved; draw it again with pretrain report {run.workdir}.'
    )
