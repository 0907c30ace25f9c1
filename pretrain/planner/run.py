"""The two commands of the planner: the search for a layout, and the explanation of one."""

import argparse
import sys

from pretrain.devices.chips import Slice, parse
from pretrain.errors import ConfigError
from pretrain.experiment.experiment import Experiment
from pretrain.planner import compiled, layouts, tables, workload
from pretrain.planner.search import search as find
from pretrain.tools import plan


def search(cfg: Experiment, options: argparse.Namespace, own: Experiment | None = None) -> None:
  """Prints the table of layouts and writes the file of the fastest. `own`: the config with its own layout.

  Raises ConfigError, before anything is compiled, for a slice that does not exist, and where nothing fits it.
  """
  of = parse(options.topology, options.num_slices)
  path = tables.default_path(of) if options.output is None else options.output
  tables.check_path(path)
  if options.compile < 1:
    raise ConfigError(f'--compile={options.compile} compiles no layout, so that none can be chosen; give 1 or more.')
  plan.check_libtpu(options.topology)
  report = lambda line: print(line, file=sys.stderr, flush=True)
  found = find(cfg, of, options.compile, report, None if own is None else _layout_of(own, of))
  print(tables.table(found))
  if cfg.phases:
    print('The search is for the rows of the first phase; later phases run on the same mesh.')
  print(tables.write(found, path, options.gin_file))
  if options.explain:
    print('\n' + tables.explanation(found.work, of, found.best))


def _layout_of(cfg: Experiment, of: Slice) -> layouts.Layout | None:
  """The layout of a config; None where it is for another number of devices."""
  try:
    return layouts.of_config(cfg, of.devices)
  except ConfigError:
    return None


def explain(cfg: Experiment, options: argparse.Namespace) -> None:
  """Prints where the memory of the config's own layout is, and what its collectives cost."""
  of = parse(options.topology, options.num_slices)
  work = workload.describe(cfg)
  program = compiled.measure(work, layouts.of_config(cfg, of.devices), of)
  print(tables.explanation(work, of, program))
  sizes = program.layout.sizes
  for line in plan.pipeline(cfg, sizes['stage'], program.layout.shards):
    print(line)
