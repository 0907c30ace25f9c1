"""The loop: batches in, checkpoints and metrics out. It calls evaluation, checkpoints and metrics by name."""

import dataclasses
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax

from data.batches.loader import loader
from data.mixing.online import Mixing, begin
from data.packing.buckets import LengthBuckets
from pretrain.checkpoints.checkpoints import Checkpoints, DamagedError
from pretrain.config import bindings
from pretrain.devices.mesh import to_global
from pretrain.errors import ConfigError
from pretrain.experiment import same_stores
from pretrain.experiment.experiment import Experiment
from pretrain.experiment.phases import stretch_at
from pretrain.experiment.resume import check_not_lost, check_same_data, check_same_run, has_checkpoint, identity
from pretrain.experiment.same_stores import as_begun
from pretrain.hosts import coordination
from pretrain.hosts.coordination import Interrupt
from pretrain.hosts.skipping import check_skips, leave_out, read_skips, steps_to_skip
from pretrain.hosts.watchdog import Watchdog
from pretrain.optim.averaging import lawa_steps, linear_combination
from pretrain.records.metrics import Metrics, read_metrics
from pretrain.records.stopwatch import Stopwatch
from pretrain.records.timeline import Timeline
from pretrain.replicas.compare import Replicas
from pretrain.run.judging import Judge, shown
from pretrain.run.phase_program import Stage
from pretrain.snapshots.snapshots import Snapshots, freshest
from pretrain.tools.evaluate import check_best_of, evaluate_sets
from pretrain.tools.exact_match import matches
from pretrain.tools.report import write_report
from pretrain.tools.weights import initial_params

DONE, PREEMPTED = 0, 75


def train(
  cfg: Experiment, workdir: str | os.PathLike[str], *, allow_data_change: bool = False, began: float | None = None
) -> int:
  """Trains until `cfg.train.steps`, from the newest checkpoint in `workdir` if there is one; returns the exit code.

  With `allow_data_change` a run goes on where its data has changed, from the same row of each source.
  """
  timeline, workdir = Timeline(began), pathlib.Path(workdir)
  with Watchdog(timeline, cfg.watchdog, workdir), Interrupt() as interrupt:
    run = Run(cfg, workdir, timeline, allow_data_change)
    with timeline.during('restore'):
      coordination.barrier('begin', cfg.watchdog.restore)
    try:
      run.loop(interrupt)
      with timeline.during('save'):
        run.save_rest()
    finally:
      timeline.flush()  # how far it has come, where it did not end well
      run.stop_profile()
      run.snapshots.stop()
      run.metrics.close()
    with timeline.during('close'):
      run.finish()
      coordination.barrier('end', cfg.watchdog.close)
    timeline.enter('done')
    timeline.flush()
  return DONE if run.step >= cfg.train.steps else PREEMPTED


class Run:
  """One process's share of a run: its state, its place in the data, its files."""

  def __init__(self, cfg: Experiment, workdir: pathlib.Path, timeline: Timeline, allow_data_change: bool = False):
    cfg = as_begun(workdir, cfg)
    self.cfg, self.workdir, self.timeline, self.text = cfg, workdir, timeline, bindings.render(cfg)
    self._allow_data_change, self._changes, self.skips = allow_data_change, [], read_skips(workdir)
    check_lawa_processes(cfg.evaluation.lawa_checkpoints, jax.process_count())
    saved = workdir / 'config.gin'
    recorded = read_metrics(workdir)
    if saved.exists() and (recorded or has_checkpoint(workdir)):  # otherwise it is of a run that never began
      self._changes = check_same_run(saved, cfg, allow_data_change=allow_data_change)
    self.checkpoints = self._open_checkpoints()
    self.snapshots = self._open_snapshots()
    self.state, self.position = self._restore_or_initialise(recorded)
    self.mixing: Mixing | None = None
    if cfg.data.online is not None:
      self.mixing = begin(self.position, self.data.used(self.position['examples']))
    else:
      check_skips(self.skips, self.position['examples'], self.stage.cfg.data.batch_size)
    self.step = int(self.state.step)
    self.saved_step = min(self.step, self.checkpoints.latest() or 0)
    self.replicas = Replicas(self.stage.program.abstract, self.stage.program.mesh) if cfg.replicas.every else None
    self.metrics = self._open_metrics()
    self.judge = Judge(cfg, workdir, self.checkpoints, self.metrics, self.step)
    self._profiling, self._evaluated = False, (-1, dict[str, float]())
    if warning := self.snapshots.start(self.stage.program.abstract):
      self.metrics.warn(warning)
    if self._changes and self.step:
      self.metrics.warn(f'DATA-CHANGE: from step {self.step} on {"; ".join(self._changes)}.')
    self._say_losses()

  def _open_checkpoints(self) -> Checkpoints:
    return Checkpoints(self.workdir, self.cfg.checkpoint)

  def _open_snapshots(self) -> Snapshots:
    return Snapshots(self.cfg.snapshot, self.workdir, identity(self.cfg, self.skips))

  def _open_metrics(self) -> Metrics:
    """From here on the run is on the disk."""
    writes = jax.process_index() == 0
    if writes:
      write_atomically(self.workdir / 'config.gin', self.text)
      write_atomically(self.workdir / same_stores.FILE, same_stores.record(self.cfg))
      self.timeline.open(self.workdir, self.step, self.position['examples'])
    return Metrics(self.workdir, resume_step=self.step, total_steps=self.cfg.train.steps, write=writes)

  def _say_losses(self) -> None:
    """Shows what of pairs and conversations no row has room for."""
    for line in self.stage.data.losses():
      self.metrics.warn(f'DATA-CUT: {line}.')

  def _restore_or_initialise(self, recorded):
    """(state, position) of the newest step whose files and values are those that were saved, else of step 0."""
    with self.timeline.during('restore'):
      source, latest = freshest(self.snapshots, self.checkpoints)
    check_not_lost(latest, recorded, self.cfg.checkpoint.every, self.workdir)
    # At the border of two phases the one that ended saved the step. Its mistakes show before a file is written.
    self.stage = Stage(stretch_at(self.cfg, max(latest - 1, 0) if latest else 0))
    self.data = self.stage.data  # that of the last step: a run that is stopped at the border saves it, not the next one
    check_best_of(self.cfg.checkpoint.best_of, self.data.heldout(self.cfg.evaluation.batches, self.stage.rows))
    fingerprint = self.stage.data.fingerprint()
    if latest is None:
      with self.timeline.during('compile'):
        return self._initialise(self.cfg.checkpoint.initial, fingerprint['tokenizer']), {'examples': 0}
    try:
      with self.timeline.during('restore'):
        restored = source.restore(self.stage.program.abstract, latest)
    except DamagedError:
      return self._restore_or_initialise(recorded)  # an older one
    self._changes += check_same_data(
      restored.position['data'], fingerprint, latest, self.workdir, allow_data_change=self._allow_data_change
    )
    position = restored.position['loader']
    if self._changes:
      position = self.data.after_change(position, restored.position['used'], latest)
    self.data = self.stage.data = self.stage.data.at(position)
    return restored.state, position

  def _initialise(self, initial: str | None, tokenizer: str | None):
    if initial is None:
      return self.stage.program.init()
    return self.stage.program.start(initial_params(initial, self.stage.program, tokenizer))

  def loop(self, interrupt: Interrupt) -> None:
    """Steps until the last one, or until interrupted, phase by phase."""
    while self.step < self.cfg.train.steps and not interrupt.at(self.step):
      self.position = leave_out(self.skips, self.position)
      if not self.stage.stretch.holds(self.step):
        self.stage = Stage(stretch_at(self.cfg, self.step))
        self.stage.data = self.stage.data.at(self._place())
        self._say_losses()
      self._loop(interrupt)

  def _loop(self, interrupt: Interrupt) -> None:
    """The steps of one phase, or until weights are decided; the metrics of a step are read while the next one runs."""
    stage, pending, watch = self.stage, None, Stopwatch()
    batches, last = loader(stage.data, self._place(), stage.rows), self._last_step()
    while self.step < last and stage.stretch.holds(self.step) and not interrupt.at(self.step):
      self._profile()
      self._hear_of_saves()
      start = time.perf_counter()
      self.timeline.enter('data')
      self.position, batch = next(batches)
      waited = time.perf_counter() - start
      self.timeline.enter(stage.phase_of(batch))
      arrays = to_global(batch, stage.program.mesh)
      if self.timeline.phase == 'compile':
        self._compile_together(arrays)
      self.state, metrics = stage.program.train_step(self.state, arrays)
      self.step += 1
      self.data = stage.data
      ends = self._due(self.cfg.checkpoint.every) or self._due(self.cfg.evaluation.every) or self._last()
      if not ends:
        self._take_snapshot()
      if pending is not None:
        self._log(self.step - 1, pending, watch)
      watch.count(batch, waited)  # after the row of the step before, which is not its own
      pending = metrics | self._row_length(batch) | {'examples': self.position['examples']}
      if self.replicas is not None and (self._due(self.cfg.replicas.every) or self._due(self.cfg.snapshot.every)):
        pending['replicas'] = self.replicas.digests(self.state)
      if ends:
        self._log(self.step, pending, watch)
        pending = None
        self._evaluate_and_save()
        self._take_snapshot()
        watch = Stopwatch()
    if pending is not None:
      self._log(self.step, pending, watch)

  def _compile_together(self, batch) -> None:
    """Where there are several processes, none begins a step before all have compiled it: gloo waits 30 s, no longer."""
    if jax.process_count() > 1:
      self.stage.program.train_step.lower(self.state, batch).compile()  # kept: see `use_compilation_cache`
      if self.replicas is not None:
        self.replicas.compile(self.state)
      coordination.barrier(f'compiled for step {self.step + 1}', self.cfg.watchdog.compile)

  def _last_step(self) -> int:
    """The step before which no examples are left out, and no weights of sources decided anew, if there are others."""
    if self.mixing is None:
      left = steps_to_skip(self.skips, self.position['examples'], self.stage.cfg.data.batch_size)
      return self.cfg.train.steps if left is None else min(self.step + left, self.cfg.train.steps)
    size = self.cfg.data.batch_size
    left = self.mixing.next_start(self.cfg.data.online, size) - self.position['examples']
    return min(self.step + left // size, self.cfg.train.steps)

  def _place(self) -> dict[str, Any]:
    """Where the run is in its data: what the loader has counted, and what was decided of the sources."""
    return self.position | self._mixture()

  def _mixture(self) -> dict[str, Any]:
    return {'mixture': dataclasses.asdict(self.mixing)} if self.mixing else {}

  def _observe(self, examples: int, losses, weights) -> None:
    """Takes the losses of a step for the weights of sources; decides them where it is time."""
    cfg, data = self.cfg.data, self.stage.data
    self.mixing = self.mixing.seen(losses, weights)
    if examples == self.mixing.next_start(cfg.online, cfg.batch_size):
      self.mixing = self.mixing.decided(cfg.online, examples, data.used(examples), cfg.batch_size)
      self.stage.data = data.at(self._place())

  def save_rest(self) -> None:
    """Saves what the loop has not, and waits for the files; what fails is tried again here: there is no next step."""
    self._hear_of_saves(wait=True)
    while self.saved_step < self.step:
      self._save()
      self._hear_of_saves(wait=True)

  def finish(self) -> None:
    """Draws the report."""
    self.checkpoints.close()
    self.snapshots.close()
    if jax.process_index() == 0 and read_metrics(self.workdir):  # none where the run was stopped before the first row
      write_report(self.workdir)

  def _due(self, every: int) -> bool:
    return every > 0 and self.step % every == 0

  def _last(self) -> bool:
    return self.step == self.cfg.train.steps

  def _log(self, step: int, metrics, watch: Stopwatch) -> None:
    found = jax.device_get(metrics)
    examples = found.pop('examples')
    self.timeline.completed(step, examples)
    by_source = found.pop('source_loss', None), found.pop('source_weight', None)
    digests = found.pop('replicas', None)
    values = {k: float(v) for k, v in found.items()} | self._source_metrics(examples, *by_source)
    watch.add(values)
    if self.mixing is not None:
      self._observe(examples, *by_source)
    ends = self.judge.is_end(values)
    if ends or step % self.cfg.train.log_every == 0 or step == self.cfg.train.steps:
      phase = {'phase': self.stage.stretch.index} if self.cfg.phases else {}
      self.metrics.write(step, shown(values) | watch.report() | phase)
    if digests is not None:
      self.judge.check_replicas(self.replicas, digests, step)
    elif ends:
      self.timeline.enter('restore')  # a save is waited for, steps to go back to are read
      self._check_replicas()  # a device that computes wrongly is a reason to start again, not to stop
    self.judge.check(step, range(examples - self.stage.cfg.data.batch_size, examples), values)
    self.snapshots.recorded(step, self._mixture())

  def _row_length(self, batch) -> dict[str, int]:
    """Where steps have rows of different lengths, that of this one."""
    bucketed = isinstance(self.stage.cfg.data.packing, LengthBuckets)
    return {'row_length': batch['decoder_target_tokens'].shape[1]} if bucketed else {}

  def _source_metrics(self, examples: int, losses, weights) -> dict[str, float]:
    """Of several sources: the loss of each in this batch, and its `DataSource.progress`."""
    if losses is None:
      return {}
    data, values = self.stage.data, {}
    for i, (name, progress) in enumerate(data.progress(examples).items()):
      loss = {f'loss/{name}': float(losses[i] / weights[i])} if weights[i] else {}
      values |= loss | {f'{key}/{name}': value for key, value in progress.items()}
    return values

  def _evaluate_and_save(self) -> None:
    """Evaluates first: a step that is saved has all its numbers, however soon after the run is killed."""
    if self.cfg.evaluation.every and (self._due(self.cfg.evaluation.every) or self._last()):
      with self.timeline.during('eval'):
        self._evaluate()
    if self._due(self.cfg.checkpoint.every) or self._last():
      with self.timeline.during('save'):
        self._save()

  def _saved_position(self) -> dict[str, Any]:
    used = self.data.used(self.position['examples'])
    return {'loader': self._place(), 'data': self.data.fingerprint(), 'used': used}

  def _take_snapshot(self) -> None:
    if self._due(self.cfg.snapshot.every) and not self._last():  # the last step is saved
      self.timeline.moved('save', self.snapshots.begin(self.step, self.state, self._saved_position()))

  def _save(self) -> None:
    """A step that is saved has equal replicas: what a run goes back to, where they differ later, is sound."""
    self._check_replicas()
    step, scores = self._evaluated
    scores = scores if step == self.step else {}
    self.checkpoints.save(self.step, self.state, self._saved_position(), self.text, scores)
    self.saved_step = self.step

  def _check_replicas(self) -> None:
    if self.replicas is not None:
      self.judge.check_replicas(self.replicas, jax.device_get(self.replicas.digests(self.state)), self.step)

  def _hear_of_saves(self, *, wait: bool = False) -> None:
    """Records what saves have cost that ended since this was last asked; the next one makes good for a failure."""
    metrics, warning = self.snapshots.news()
    if metrics:
      self.metrics.add(metrics)
    if warning:
      self.metrics.warn(warning)
    for saved in self.checkpoints.poll(wait=wait):
      if saved.error is None:
        self.saved_step = max(self.saved_step, saved.step)  # one before it may have failed since it was begun
        self.metrics.add(saved.metrics())
      else:
        self.saved_step = min(self.saved_step, saved.step - 1)
        self.metrics.warn(f'{saved.error} The next save is its retry.')
      if saved.untidy is not None:
        self.metrics.warn(f'CKPT-WRITE: old steps in {self.workdir} could not be removed: {saved.untidy}')

  def _evaluate(self) -> None:
    evaluation = self.cfg.evaluation
    sets, values = self.stage.data.heldout(evaluation.batches, self.stage.rows), {}
    pairs = self.stage.data.heldout_pairs(evaluation.generate)
    for average, params in self._weights() if sets else ():
      values |= evaluate_sets(self.stage.eval_step, params, sets, self.stage.program.mesh, average)
      if self.stage.exact_match is not None:
        values |= matches(self.stage.exact_match, params, pairs, average)
    self.metrics.eval(self.step, values)
    self._evaluated = self.step, values

  def _weights(self) -> Iterator[tuple[str, Any]]:
    """The parameters as '', then each average of them by its name."""
    yield '', self.state.params
    if 'ema' in self.state.extra:
      yield 'ema', self.state.extra['ema']
    steps = lawa_steps(self.step, self.cfg.checkpoint.every, self.cfg.evaluation.lawa_checkpoints)
    # This step is saved after it is evaluated. No step is taken in place of one that is not there: a run that was
    # interrupted and resumed would have another average.
    if steps and {self.step, *self.checkpoints.finished()}.issuperset(steps):
      yield 'lawa', linear_combination((1 / len(steps), self._params_of(step)) for step in steps)

  def _params_of(self, step: int):
    if step == self.step:
      return self.state.params
    return self.checkpoints.restore_params(self.stage.program.abstract.params, step)

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


def check_lawa_processes(count: int, processes: int) -> None:
  """Raises ConfigError for LAWA in several processes: there all but the first see a step they wrote as unfinished."""
  if count and processes > 1:
    raise ConfigError(
      f'evaluation.lawa_checkpoints={count} with {processes} processes: one process alone can read what it has just '
      'saved. Set it to 0, and afterwards use pretrain checkpoints average.'
    )


def write_atomically(path: pathlib.Path, text: str) -> None:
  """The whole text or nothing, under a name that appears at once."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_suffix(path.suffix + '.tmp')
  temporary.write_text(text)
  temporary.replace(path)
