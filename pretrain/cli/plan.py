"""`pretrain plan`: the train step compiled for a TPU slice that is not there."""

import argparse

from pretrain.cli import shared


def plan_flags(command: argparse.ArgumentParser) -> None:
  shared.config_flags(command)
  command.add_argument('--topology', required=True, help='e.g. v5e:2x4, v5p:2x2x1, v6e:2x4, tpu7x:2x2x1')


def plan_command(options, overrides) -> None:
  """Compile the train step for a TPU slice without one; print the memory it needs."""
  from pretrain.tools import plan

  print(plan.plan(shared.load(options, overrides), options.topology))
