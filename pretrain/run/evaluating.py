"""Evaluation inside the loop: the losses of the parameters, and of their averages, on held-out data."""

from collections.abc import Iterator
from typing import Any

from pretrain.errors import ConfigError
from pretrain.evaluation.exact_match import matches
from pretrain.evaluation.losses import evaluate_sets
from pretrain.optim.averaging import lawa_steps, linear_combination
from pretrain.run.run import Run


def evaluate(run: Run) -> None:
  """The metrics of every held-out set are in the row of this step; `checkpoint.best_of` finds them when it is saved."""
  cfg, phase = run.cfg.evaluation, run.phase
  sets, values = phase.data.heldout(cfg.batches, phase.rows), {}
  pairs = phase.data.heldout_pairs(cfg.generate)
  for average, trained in weights(run) if sets else ():
    params = run.state.whole(trained)
    values |= evaluate_sets(phase.eval_step, params, sets, phase.program.mesh, average, phase.heldout_bytes)
    if phase.exact_match is not None:
      values |= matches(phase.exact_match, params, pairs, average)
  run.metrics.eval(run.step, values)
  run.evaluated = run.step, values


def weights(run: Run) -> Iterator[tuple[str, Any]]:
  """The trained parameters as '', then each average of them by its name."""
  yield '', run.state.params
  if 'ema' in run.state.extra:
    yield 'ema', run.state.extra['ema']
  steps = lawa_steps(run.step, run.cfg.checkpoint.every, run.cfg.evaluation.lawa_checkpoints)
  # This step is saved after it is evaluated. A missing step is not replaced by another one: a run that was interrupted
  # and resumed would have another average.
  if steps and {run.step, *run.checkpoints.finished()}.issuperset(steps):
    yield 'lawa', linear_combination((1 / len(steps), params_of(run, step)) for step in steps)


def params_of(run: Run, step: int):
  """The parameters of this step, or of one on disk."""
  if step == run.step:
    return run.state.params
  return run.checkpoints.restore_params(run.phase.program.abstract.params, step)


def check_lawa_processes(count: int, processes: int) -> None:
  """Raises ConfigError for LAWA in several processes: there all but the first see a step they wrote as unfinished."""
  if count and processes > 1:
    raise ConfigError(
      f'evaluation.lawa_checkpoints={count} with {processes} processes: one process alone can read what it has just '
      'saved. Set it to 0, and afterwards use pretrain checkpoints average.'
    )
