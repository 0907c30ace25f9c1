"""`pretrain config`: the resolved config, the parameter table and FLOPs per token, without a device."""

import math

import numpy as np
from jax.sharding import AbstractMesh, AxisType, PartitionSpec
from jax.tree_util import tree_flatten_with_path

import models.build
from models import partition
from models.flops import flops_per_token
from models.specs import ParamSpec
from pretrain.config import bindings
from pretrain.devices.mesh import AXES, axis_sizes
from pretrain.experiment.experiment import Experiment
from pretrain.experiment.phases import phases_of
from pretrain.experiment.program import check_divisible
from pretrain.optim.schedule import make_schedule

COLUMNS = ('path', 'shape', 'axes', 'sharding', 'count', 'init std')


def abstract_mesh(cfg: Experiment) -> AbstractMesh:
  """The config's mesh without devices; -1 counts as one device."""
  sizes = axis_sizes(cfg.mesh, math.prod(max(n, 1) for n in vars(cfg.mesh).values()))
  return AbstractMesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parameter_rows(cfg: Experiment) -> list[tuple[str, ...]]:
  """One row of `COLUMNS` for each parameter, then the total."""
  model = models.build.build(cfg.model, cfg.kernels, lora=cfg.lora)
  check_divisible(model.specs, abstract_mesh(cfg))
  leaves = tree_flatten_with_path(model.specs, is_leaf=lambda x: isinstance(x, ParamSpec))[0]
  rows, total = [], 0
  for path, spec in leaves:
    count = math.prod(spec.shape)
    total += count
    placed = partition.spec_for(spec.axes, partition.PARAMETER_RULES)
    name = '/'.join(p.key for p in path)
    shape, axes = ' '.join(map(str, spec.shape)), ' '.join(spec.axes)
    rows.append((name, shape, axes, show_spec(placed), f'{count:,}', f'{spec.init.std(spec.shape, spec.axes):.4g}'))
  return [*rows, ('total', '', '', '', f'{total:,}', '')]


def show_spec(spec: PartitionSpec) -> str:
  return ' '.join('-' if s is None else '+'.join(s) if isinstance(s, tuple) else s for s in spec)


def table(rows: list[tuple[str, ...]], header: tuple[str, ...]) -> str:
  widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
  return '\n'.join(
    '  '.join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [header, *rows]
  )


def describe(cfg: Experiment) -> str:
  """Everything `pretrain config` prints."""
  lengths = {'inputs_length': cfg.data.inputs_length, 'targets_length': cfg.data.targets_length}
  flops = flops_per_token(cfg.model, **lengths, lora=cfg.lora)
  lines = [f'# {name}: {value:,.0f}' for name, value in flops.items()]
  parameters = '\n'.join(f'# {line}' for line in table(parameter_rows(cfg), COLUMNS).splitlines())
  return (
    f'{bindings.render(cfg)}\n# Parameters\n{parameters}\n\n# FLOPs per token (forward and backward)\n'
    + '\n'.join(lines)
  )


def learning_rates(cfg: Experiment, steps: np.ndarray) -> np.ndarray:
  """float64: the learning rate of the update at each of `steps`, by the schedule of its phase."""
  rates = np.zeros(len(steps))
  for phase in phases_of(cfg):
    own = (steps >= phase.start) & (steps < (np.inf if phase.end is None else phase.end))
    schedule = make_schedule(phase.cfg.schedule, phase.schedule_start, decay_delay=cfg.train.decay_delay)
    rates[own] = schedule(steps[own])
  return rates
