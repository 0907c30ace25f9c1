"""What is done with the numbers of a step: logged, used to weigh sources, compared between replicas, judged."""

import jax

from data.packing.buckets import LengthBuckets
from pretrain.devices import monitoring, usage
from pretrain.hosts import pace
from pretrain.records.stopwatch import Stopwatch
from pretrain.run import saving
from pretrain.run.judging import shown
from pretrain.run.run import Run


def numbers_of(run: Run, metrics, batch) -> dict:
  """The numbers of the step that was just begun; most of them are still being computed."""
  numbers = metrics | row_length(run, batch) | {'examples': run.position['examples']}
  if run.replicas is not None and (run.due(run.cfg.replicas.every) or run.due(run.cfg.snapshot.every)):
    numbers['replicas'] = run.replicas.digests(run.state)
  return numbers


def log(run: Run, step: int, numbers, watch: Stopwatch) -> None:
  """Waits for the numbers of `step`, writes them where they are due, and acts on them.

  Raises what `Judge` raises where the run must not continue.
  """
  with watch.blocked():
    found = jax.device_get(numbers)
  examples = found.pop('examples')
  run.timeline.completed(step, examples)
  by_source = found.pop('source_loss', None), found.pop('source_weight', None)
  digests = found.pop('replicas', None)
  values = {k: float(v) for k, v in found.items()} | source_metrics(run, examples, *by_source)
  watch.add(values)
  if run.mixing is not None:
    weigh_sources(run, examples, *by_source)
  ends = run.judge.is_end(values)
  if ends or step % run.cfg.train.log_every == 0 or step == run.cfg.train.steps:
    phase = {'phase': run.phase.index} if run.cfg.phases else {}
    rates = watch.report(last=step == run.step)
    run.metrics.write(step, shown(values) | rates | phase | telemetry(run, watch))
  if digests is not None:
    run.judge.check_replicas(run.replicas, digests, step)
  elif ends:
    run.timeline.enter('restore')  # it waits for a save, and reads the steps that the run may go back to
    saving.check_replicas(run)  # a device that computes wrongly is a reason to restart, not to stop
  run.judge.check(step, range(examples - run.phase.cfg.data.batch_size, examples), values)
  run.snapshots.recorded(step, run.mixture())


def telemetry(run: Run, watch: Stopwatch) -> dict[str, float]:
  """Memory, work of the chips, share of the peak FLOPs, and the slowest process. No collective, nothing waits."""
  peak = run.phase.peak_flops
  used = {'mfu': watch.flops_per_second / peak} if peak and watch.flops_per_second else {}
  devices = usage.memory(jax.local_devices()) | monitoring.readings(jax.local_devices())
  pace.tell(watch.own_seconds, devices)
  of_all = pace.of_all(devices) if jax.process_index() == 0 else {}  # the one that writes rows
  return usage.host_memory() | used | of_all


def row_length(run: Run, batch) -> dict[str, int]:
  """The length of the rows of this step, where steps have rows of different lengths."""
  bucketed = isinstance(run.phase.cfg.data.packing, LengthBuckets)
  return {'row_length': batch['decoder_target_tokens'].shape[1]} if bucketed else {}


def source_metrics(run: Run, examples: int, losses, weights) -> dict[str, float]:
  """With several sources: the loss of each in this batch, and its `DataSource.progress`."""
  if losses is None:
    return {}
  data, values = run.phase.data, {}
  for i, (name, progress) in enumerate(data.progress(examples).items()):
    loss = {f'loss/{name}': float(losses[i] / weights[i])} if weights[i] else {}
    values |= loss | {f'{key}/{name}': value for key, value in progress.items()}
  return values


def weigh_sources(run: Run, examples: int, losses, weights) -> None:
  """Adds the losses of a step to those that decide the weights of sources; decides the weights when they are due."""
  cfg, data = run.cfg.data, run.phase.data
  run.mixing = run.mixing.seen(losses, weights)
  if examples == run.mixing.next_start(cfg.online, cfg.batch_size):
    run.mixing = run.mixing.decided(cfg.online, examples, data.used(examples), cfg.batch_size)
    run.phase.data = data.at(run.full_position())
