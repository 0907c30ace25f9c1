"""`pretrain config` and `pretrain plan`: what a config describes, without running it."""

import argparse
import pathlib

from pretrain.cli import shared
from pretrain.errors import ConfigError


def describe_flags(command: argparse.ArgumentParser) -> None:
  shared.config_flags(command)
  command.add_argument(
    '--plot',
    nargs='?',
    const=pathlib.Path('learning_rate.png'),
    type=shared.path,
    metavar='FILE.png',
    help='draw the learning rate of every step instead (default: learning_rate.png); print the path',
  )


def config_command(options, overrides) -> None:
  """Print the resolved config, the parameters and FLOPs per token; touches no device."""
  from pretrain.tools import describe

  cfg = shared.load(options, overrides)
  print(describe.describe(cfg) if options.plot is None else plot_schedule(cfg, options.plot))


def plot_schedule(cfg, path: pathlib.Path) -> pathlib.Path:
  """Draws the learning rate of a run to `path`, on the CPU; raises ConfigError if it cannot write a PNG file there."""
  if path.suffix.lower() != '.png':
    raise ConfigError(f'--plot={path} is no PNG; name a file that ends in .png.')
  import jax

  jax.config.update('jax_platforms', 'cpu')  # an accelerator is not needed, and may be in use
  from pretrain.experiment.phases import phases_of
  from pretrain.records.plots import draw_schedule
  from pretrain.tools.describe import learning_rates

  names = ', '.join(dict.fromkeys(phase.cfg.schedule.name for phase in phases_of(cfg)))
  try:
    draw_schedule(lambda steps: learning_rates(cfg, steps), cfg.train.steps, names, path)
  except OSError as error:
    raise ConfigError(f'--plot={path} cannot be written ({error.strerror}); choose another place.') from error
  return path


# A search replaces the layout of a config, so that need not divide the rows.
NO_LAYOUT = (
  'mesh.replica=1', 'mesh.data=1', 'mesh.fsdp=1', 'mesh.sequence=1', 'mesh.tensor=1', 'mesh.expert=1', 'mesh.stage=1',
  'train.accumulate=1',
)  # fmt: skip


def plan_flags(command: argparse.ArgumentParser) -> None:
  shared.config_flags(command)
  command.add_argument('--topology', required=True, help='e.g. v5e:2x4, v5p:4x4x8, v6e:2x4, tpu7x:2x2x1')
  command.add_argument('--num_slices', type=int, default=1, metavar='N', help='slices of it, joined by mesh.replica')
  command.add_argument('--global_batch', type=int, metavar='ROWS', help='rows of a step, in place of data.batch_size')
  command.add_argument('--search', action='store_true', help='find the fastest mesh, remat and microbatches that fit')
  command.add_argument('--explain', action='store_true', help='where the memory is, and which collectives cost')
  command.add_argument('--compile', type=int, default=4, metavar='N', help='how many layouts --search compiles')
  command.add_argument('--output', type=shared.path, metavar='F.gin', help="the layout's file (mesh_TOPOLOGY.gin)")


def plan_command(options, overrides) -> None:
  """Compile the train step for TPU slices without one; print its memory, or with --search choose its layout."""
  rows = [] if options.global_batch is None else [f'data.batch_size={options.global_batch}']
  cfg = shared.load(options, [*overrides, *rows, *(NO_LAYOUT if options.search else ())])
  if options.search or options.explain:
    from pretrain.config import bindings
    from pretrain.planner.run import explain, search

    if options.search:
      search(cfg, options, bindings.load(type(cfg), options.gin_file, overrides))
    else:
      explain(cfg, options)
    return
  from pretrain.tools import plan

  print(plan.plan(cfg, options.topology, options.num_slices))
