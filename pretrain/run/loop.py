"""The loop: what happens in a step, in order.

A thing that happens every k steps goes into `run_steps`, as `if run.due(k): …`.
"""

from collections.abc import Iterator

import jax

from data.batches.loader import loader
from pretrain.devices.mesh import to_global
from pretrain.experiment.phases import phase_at
from pretrain.hosts import coordination
from pretrain.hosts.coordination import Interrupt
from pretrain.hosts.skipping import leave_out, steps_to_skip
from pretrain.records.stopwatch import Stopwatch
from pretrain.run import evaluating, saving, step_numbers
from pretrain.run.phase_program import PhaseProgram
from pretrain.run.run import Run
from pretrain.run.starting import announce_cuts


def loop(run: Run, interrupt: Interrupt) -> None:
  """Makes steps until the last one, or until interrupted."""
  while run.step < run.cfg.train.steps and not interrupt.at(run.step):
    run.position = leave_out(run.skips, run.position)
    if not run.phase.holds(run.step):
      enter_phase(run)
    run_steps(run, interrupt)


def enter_phase(run: Run) -> None:
  """The phase of the next step is open, at the run's position."""
  run.phase = PhaseProgram(phase_at(run.cfg, run.step))
  run.phase.data = run.phase.data.at(run.full_position())
  announce_cuts(run)


def run_steps(run: Run, interrupt: Interrupt) -> None:
  """Makes the steps of one phase, or those up to `stop_before`, where the loader must start at another position.

  The numbers of a step are read while the next one runs, so that the devices never wait for them. Only where the
  state is evaluated or saved are they read at once.
  """
  cfg, phase, watch, pending = run.cfg, run.phase, Stopwatch(), None
  batches, stop = loader(phase.data, run.full_position(), phase.rows), stop_before(run)
  while run.step < stop and phase.holds(run.step) and not interrupt.at(run.step):
    run.profile.at(run.step, run.state)
    saving.report_saves(run)
    batch = next_batch(run, batches, watch)
    metrics = take_step(run, batch)  # from here on `run.step` is the step that was just begun
    evaluates = run.due(cfg.evaluation.every) or (cfg.evaluation.every > 0 and run.is_last())
    saves = run.due(cfg.checkpoint.every) or run.is_last()
    pauses = evaluates or saves  # then the numbers of this step are read before the next one begins
    if not pauses:
      saving.take_snapshot(run)
    if pending is not None:
      step_numbers.log(run, run.step - 1, pending, watch)
    watch.count(batch, phase.flops_of(batch))  # after the row of the step before it
    pending = step_numbers.numbers_of(run, metrics, batch)
    if pauses:
      step_numbers.log(run, run.step, pending, watch)
      pending = None
    if evaluates:  # before the save: a step that is saved has all its numbers, however soon after the run is killed
      with run.timeline.during('eval'):
        evaluating.evaluate(run)
    if saves:
      with run.timeline.during('save'):
        saving.save(run)
    if pauses:
      saving.take_snapshot(run)
      watch = Stopwatch()
  if pending is not None:
    step_numbers.log(run, run.step, pending, watch)


def stop_before(run: Run) -> int:
  """The step at which examples are left out, or weights of sources decided; the last step where there is neither."""
  examples, steps = run.position['examples'], run.cfg.train.steps
  if run.mixing is None:
    left = steps_to_skip(run.skips, examples, run.phase.cfg.data.batch_size)
    return steps if left is None else min(run.step + left, steps)
  size = run.cfg.data.batch_size
  left = run.mixing.next_start(run.cfg.data.online, size) - examples
  return min(run.step + left // size, steps)


def next_batch(run: Run, batches: Iterator, watch: Stopwatch):
  """This host's rows of the next batch; the position is behind them."""
  with watch.waiting():
    run.timeline.enter('data')
    run.position, batch = next(batches)
  return batch


def take_step(run: Run, batch):
  """The step with `batch` is begun; returns its metrics, which are on the devices."""
  phase = run.phase
  run.timeline.enter(phase.activity_of(batch))
  arrays = to_global(batch, phase.program.mesh)
  if run.timeline.activity == 'compile':
    compile_together(run, arrays)
  run.state, metrics = phase.program.train_step(run.state, arrays)
  run.step += 1
  run.data = phase.data
  return metrics


def compile_together(run: Run, batch) -> None:
  """With several processes, a step begins when all have compiled it: gloo waits 30 s for a peer, and no longer."""
  if jax.process_count() > 1:
    run.phase.program.train_step.lower(run.state, batch).compile()  # kept: see `use_compilation_cache`
    if run.replicas is not None:
      run.replicas.compile(run.state)
    coordination.barrier(f'compiled for step {run.step + 1}', run.cfg.watchdog.compile)
