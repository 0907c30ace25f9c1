"""What a pipeline changes in the cost of a step: layers are divided over stages, and some ticks have no work."""

from models.layers.pipeline.schedule import Pipeline, Schedule
from pretrain.planner.layouts import Layout
from pretrain.planner.workload import Layers, Workload


def schedule(work: Workload, layout: Layout) -> Schedule:
  """That of a microbatch of `train.accumulate`; without stages one tick."""
  model, stages = work.cfg.model, layout.sizes['stage']
  if stages == 1:
    return Schedule(1, 1)
  return Pipeline(model.pipeline_microbatches, model.pipeline_repeats).of(layout.rows(work.rows), stages)


def turns(work: Workload, layout: Layout, stack: Layers) -> float:
  """How many layers of `stack` a device computes for all of its rows, ticks without work included: `stack.number`
  without stages."""
  return stack.number / layout.sizes['stage'] / (1 - schedule(work, layout).bubble)


def gathers(work: Workload, layout: Layout) -> float:
  """How often a stage gathers what it holds, for all of its rows: once in each tick, of one of its repeats."""
  own = schedule(work, layout)
  return own.ticks / own.repeats
