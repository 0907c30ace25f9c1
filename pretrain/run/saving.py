"""Saving: steps on disk, snapshots in host RAM, and what finished saves report."""

from typing import Any

import jax

from pretrain.run.run import Run


def save(run: Run) -> None:
  """The save of this step is under way. Its replicas are equal: a later restart can rely on every saved step."""
  check_replicas(run)
  step, scores = run.evaluated
  scores = scores if step == run.step else {}
  run.checkpoints.save(run.step, run.state.saved(), saved_position(run), run.text, scores)
  run.saved_step = run.step


def take_snapshot(run: Run) -> None:
  """The copy of this step into host RAM has begun, where a snapshot is due."""
  if run.due(run.cfg.snapshot.every) and not run.is_last():  # the last step is saved
    run.timeline.moved('save', run.snapshots.begin(run.step, run.state.saved(), saved_position(run)))


def saved_position(run: Run) -> dict[str, Any]:
  """What is saved beside the arrays: the position in the data, and what the data was."""
  used = run.data.used(run.position['examples'])
  return {'loader': run.full_position(), 'data': run.data.fingerprint(), 'used': used, **run.trunk}


def report_saves(run: Run, *, wait: bool = False) -> None:
  """Records the cost of saves that have ended since the last call. After a failed save the next one is its retry."""
  metrics, warning = run.snapshots.news()
  if metrics:
    run.metrics.add(metrics)
  if warning:
    run.metrics.warn(warning)
  for saved in run.checkpoints.poll(wait=wait):
    if saved.error is None:
      run.saved_step = max(run.saved_step, saved.step)  # an earlier one may have failed since this one was begun
      run.metrics.add(saved.metrics())
    else:
      run.saved_step = min(run.saved_step, saved.step - 1)
      run.metrics.warn(f'{saved.error} The next save is its retry.')
    if saved.untidy is not None:
      run.metrics.warn(f'CKPT-WRITE: old steps in {run.workdir} could not be removed: {saved.untidy}')


def save_rest(run: Run) -> None:
  """The last step is on disk. A failed save is retried here, because no step follows that would retry it."""
  report_saves(run, wait=True)
  while run.saved_step < run.step:
    save(run)
    report_saves(run, wait=True)


def check_replicas(run: Run) -> None:
  """Raises ReplicaError where copies of an array differ at this step."""
  if run.replicas is not None:
    run.judge.check_replicas(run.replicas, jax.device_get(run.replicas.digests(run.state)), run.step)
