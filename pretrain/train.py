"""The loop: batches in, checkpoints and metrics out. It calls evaluation, checkpoints and metrics by name."""

import os
import pathlib
import signal
import threading
import time

import jax
import numpy as np

from data.loader import loader
from data.source import open_data
from pretrain import config
from pretrain.checkpoint import Checkpoints
from pretrain.errors import CheckpointError, NonFiniteError
from pretrain.evaluate import evaluate
from pretrain.experiment import Experiment
from pretrain.loss import make_eval_step
from pretrain.mesh import host_rows, to_global
from pretrain.metrics import Metrics, read_metrics
from pretrain.report import write_report
from pretrain.resume import check_same_data, check_same_run
from pretrain.runtime import build_program, cache_dir

DONE, PREEMPTED = 0, 75


def train(cfg: Experiment, workdir: str | os.PathLike[str]) -> int:
  """Trains until `cfg.train.steps`, from the newest checkpoint in `workdir` if there is one; returns the exit code."""
  run = Run(cfg, pathlib.Path(workdir))
  with Interrupt() as interrupt:
    try:
      run.loop(interrupt)
    finally:
      run.stop_profile()
      run.metrics.close()
    run.finish()
  return DONE if run.step >= cfg.train.steps else PREEMPTED


class Interrupt:
  """Set by the first SIGTERM or Ctrl-C inside the block: the loop saves and leaves. A second one ends the process.

  Several processes would have to agree on the step first, and only a main thread gets signals: there it is never set.
  """

  def __init__(self):
    self.received, self._previous = False, {}

  def __enter__(self):
    if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
      self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
    return self

  def __exit__(self, kind, error, trace):
    for number, previous in self._previous.items():
      signal.signal(number, previous)

  def _handle(self, number, _frame):
    self.received = True
    signal.signal(number, self._previous[number])


class Stopwatch:
  """Seconds, tokens and seconds waited for data since the last report."""

  def __init__(self):
    self._start, self._tokens, self._waited, self._steps = time.perf_counter(), 0, 0.0, 0

  def count(self, batch, waited: float) -> None:
    self._tokens += sum(int(np.count_nonzero(v)) for k, v in batch.items() if k.endswith('_segment_ids'))
    self._waited += waited
    self._steps += 1

  def report(self) -> dict[str, float]:
    seconds = time.perf_counter() - self._start
    rates = {
      'step_seconds': seconds / max(self._steps, 1),
      'tokens_per_second': self._tokens * jax.process_count() / seconds,
      'data_wait': self._waited / seconds,
    }
    self.__init__()
    return rates


class Run:
  """One process's share of a run: its state, its place in the data, its files."""

  def __init__(self, cfg: Experiment, workdir: pathlib.Path):
    self.cfg, self.workdir, self.text = cfg, workdir, config.render(cfg)
    saved = workdir / 'config.gin'
    recorded = read_metrics(workdir)
    if saved.exists() and (recorded or has_checkpoint(workdir)):  # otherwise it is of a run that never began
      check_same_run(saved, cfg)
    vocab_size = cfg.model.vocab_size
    self.data = open_data(cfg.data, cfg.objective, seed=cfg.seed, vocab_size=vocab_size, cache_dir=cache_dir())
    self.program = build_program(cfg)
    self.rows = host_rows(self.program.mesh, cfg.data.batch_size)
    self.checkpoints = Checkpoints(workdir, cfg.checkpoint)
    check_not_lost(self.checkpoints.latest(), recorded, cfg.checkpoint.every, workdir)
    self.state, self.position = self._restore_or_initialise()
    self.step = self.saved_step = int(self.state.step)
    writes = jax.process_index() == 0
    if writes:
      write_atomically(saved, self.text)
    self.metrics = Metrics(workdir, resume_step=self.step, total_steps=cfg.train.steps, write=writes)
    eval_step = make_eval_step(self.program.model, cfg.kernels, self.data.vocabulary.pieces)
    self._profiling = False
    self._eval_step = jax.jit(eval_step)

  def _restore_or_initialise(self):
    latest = self.checkpoints.latest()
    fingerprint = self.data.fingerprint()
    if latest is None:
      return self.program.init(), {'examples': 0}
    restored = self.checkpoints.restore(self.program.abstract, latest)
    check_same_data(restored.position['data'], fingerprint, latest, self.workdir)
    return restored.state, restored.position['loader']

  def loop(self, interrupt: Interrupt) -> None:
    """Steps until the last one, or until interrupted; the metrics of a step are read while the next one runs."""
    batches = loader(self.data, self.position, self.rows)
    pending, watch = None, Stopwatch()
    while self.step < self.cfg.train.steps and not interrupt.received:
      self._profile()
      start = time.perf_counter()
      self.position, batch = next(batches)
      waited = time.perf_counter() - start
      self.state, metrics = self.program.train_step(self.state, to_global(batch, self.program.mesh))
      self.step += 1
      if pending is not None:
        self._log(self.step - 1, pending, watch)
      watch.count(batch, waited)  # after the row of the step before, which is not its own
      pending = metrics
      if self._due(self.cfg.checkpoint.every) or self._due(self.cfg.evaluation.every) or self._last():
        self._log(self.step, pending, watch)
        pending = None
        self._evaluate_and_save()
        watch = Stopwatch()
    if pending is not None:
      self._log(self.step, pending, watch)

  def finish(self) -> None:
    """Saves what the loop has not, waits for the files, draws the report."""
    if self.saved_step < self.step:
      self._save()
    self.checkpoints.close()
    if jax.process_index() == 0 and read_metrics(self.workdir):  # none where the run was stopped before the first row
      write_report(self.workdir)

  def _due(self, every: int) -> bool:
    return every > 0 and self.step % every == 0

  def _last(self) -> bool:
    return self.step == self.cfg.train.steps

  def _log(self, step: int, metrics, watch: Stopwatch) -> None:
    values = {k: float(v) for k, v in jax.device_get(metrics).items()}
    consecutive = int(values.pop('skipped_consecutive'))
    fatal = consecutive >= self.cfg.optimizer.max_consecutive_nonfinite
    if fatal or step % self.cfg.train.log_every == 0 or step == self.cfg.train.steps:
      self.metrics.write(step, values | watch.report())
    if consecutive:
      self._warn_nonfinite(step, values, consecutive, fatal)

  def _warn_nonfinite(self, step: int, values, consecutive: int, fatal: bool) -> None:
    size, limit = self.cfg.data.batch_size, self.cfg.optimizer.max_consecutive_nonfinite
    message = (
      f'grad_norm={values["grad_norm"]} at step {step} (examples {(step - 1) * size}..{step * size - 1}). '
      f'Update skipped ({consecutive} of {limit} consecutive).'
    )
    if not fatal:
      self.metrics.warn(f'NONFINITE: {message}')
      return
    self.checkpoints.close()  # a save may be under way
    latest = self.checkpoints.latest()
    kept = f'step {latest} is saved in {self.workdir}' if latest else 'no step was saved yet'
    raise NonFiniteError(f'{message} Stopped; {kept}. Lower schedule.peak, in another --workdir.')

  def _evaluate_and_save(self) -> None:
    """Evaluates first: a step that is saved has all its numbers, however soon after the run is killed."""
    if self.cfg.evaluation.every and (self._due(self.cfg.evaluation.every) or self._last()):
      self._evaluate()
    if self._due(self.cfg.checkpoint.every) or self._last():
      self._save()

  def _save(self) -> None:
    position = {'loader': self.position, 'data': self.data.fingerprint()}
    self.checkpoints.save(self.step, self.state, position, self.text)
    self.saved_step = self.step

  def _evaluate(self) -> None:
    values = {}
    for name, batches in self.data.heldout(self.cfg.evaluation.batches, self.rows).items():
      result = evaluate(self._eval_step, self.state.params, batches, self.program.mesh)
      values |= {f'eval/{name}/{k}': v for k, v in result.items()}
    self.metrics.eval(self.step, values)

  def _profile(self) -> None:
    if self.cfg.train.profile_steps is None:
      return
    first, last = self.cfg.train.profile_steps
    if self.step == first:
      jax.profiler.start_trace(self.workdir / 'profile')
      self._profiling = True
    elif self.step == last:
      self.stop_profile()

  def stop_profile(self) -> None:
    """Writes the trace, if one is open."""
    if self._profiling:
      jax.block_until_ready(self.state.step)
      jax.profiler.stop_trace()
      self._profiling = False


def has_checkpoint(workdir: pathlib.Path) -> bool:
  return any((workdir / 'checkpoints').glob('[0-9]*'))


def check_not_lost(latest: int | None, recorded, every: int, workdir: pathlib.Path) -> None:
  """Raises CheckpointError where the metrics tell of checkpoints that are not there: a save ends before the next."""
  if latest is None and every > 0 and recorded and recorded[-1]['step'] > 2 * every:
    raise CheckpointError(
      'CKPT-NONE',
      f'no checkpoint in {workdir}, though its metrics.jsonl reaches step {recorded[-1]["step"]}. Not starting from '
      'step 0; bring checkpoints/ back, or use another --workdir.',
    )


def write_atomically(path: pathlib.Path, text: str) -> None:
  """The whole text or nothing, under a name that appears at once."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_suffix(path.suffix + '.tmp')
  temporary.write_text(text)
  temporary.replace(path)
