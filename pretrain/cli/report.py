"""`pretrain report`: report.html of a run."""

import argparse

from pretrain.cli import shared


def report_flags(command: argparse.ArgumentParser) -> None:
  command.add_argument('workdir', type=shared.workdir)


def report_command(options, overrides) -> None:
  """Write report.html of a run again."""
  from pretrain.tools.report import write_report

  print(write_report(options.workdir))
