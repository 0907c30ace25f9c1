"""`train`: a run from its start to its end. Start reading here; the steps are in `loop.py`."""

import functools
import os

import jax

from pretrain.experiment.experiment import Experiment
from pretrain.hosts import coordination
from pretrain.hosts.coordination import Interrupt
from pretrain.hosts.lease import kept
from pretrain.hosts.ownership import owned_by_run
from pretrain.hosts.watchdog import Watchdog
from pretrain.records.metrics import read_metrics
from pretrain.records.timeline import Timeline
from pretrain.redact import redact
from pretrain.run.loop import loop
from pretrain.run.run import Run
from pretrain.run.saving import save_rest
from pretrain.run.starting import Files, start
from pretrain.tools.report import write_report
from pretrain.workdirs.folder import Folder, as_folder
from pretrain.workdirs.run_files import RunFiles, run_files

DONE, PREEMPTED = 0, 75


def train(
  cfg: Experiment,
  workdir: str | os.PathLike[str] | Folder,
  *,
  allow_data_change: bool = False,
  began: float | None = None,
) -> int:
  """Trains until `cfg.train.steps`, from the newest checkpoint in `workdir` if there is one; returns the exit code.

  `workdir` is a folder, or the URL of one in a store (gs://, s3://).
  With `allow_data_change` a run whose data has changed continues with it, from the same row of each source. `began`:
  see `Timeline`. Raises ConfigError where another run owns `workdir`.
  """
  files = run_files(as_folder(workdir), coordination.host())
  with files.named():
    return train_in(files, cfg, Timeline(began), allow_data_change=allow_data_change)


def train_in(files: RunFiles, cfg: Experiment, timeline: Timeline, *, allow_data_change: bool) -> int:
  """`train`, with the small files of the run in `files.folder`."""
  with (
    Watchdog(timeline, cfg.watchdog, files.folder, files.upload), Interrupt() as interrupt,
    owned_by_run(files.place) as lock, kept(files, lock) as before_commit,
  ):  # fmt: skip
    open_files = functools.partial(Files, place=files.place, before_commit=before_commit)
    run = start(cfg, files.folder, timeline, allow_data_change=allow_data_change, open_files=open_files)
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
