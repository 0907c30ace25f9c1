"""`pretrain data`: its flags, and each action as one call into `data`."""

import argparse

from pretrain.errors import ConfigError


def data_flags(command: argparse.ArgumentParser) -> None:
  actions = command.add_subparsers(required=True, metavar='ACTION')
  ways = {'prepare': prepare_command, 'show': show_command, 'explain': explain_command, 'plan': plan_command}
  flags = {'prepare': _prepare_flags, 'show': _row_flags, 'explain': _row_flags, 'plan': _plan_flags}
  for name, function in ways.items():
    action = actions.add_parser(name, help=function.__doc__)
    action.set_defaults(command=function)
    flags[name](action)


def data_command(options, overrides) -> None:
  """Prepare token stores and look at rows."""
  raise ConfigError('pretrain data needs an action, e.g. prepare or show.')


def _prepare_flags(action: argparse.ArgumentParser) -> None:
  from data.prepare import add_flags

  add_flags(action)


def _config_flags(action: argparse.ArgumentParser) -> None:
  from pretrain import cli

  cli.config_flags(action)


def _row_flags(action: argparse.ArgumentParser) -> None:
  _config_flags(action)
  action.add_argument('--step', type=int, default=0)
  action.add_argument('--row', type=int, default=0)


def _plan_flags(action: argparse.ArgumentParser) -> None:
  _config_flags(action)
  action.add_argument('--workers', type=int, default=1, help='processes that make plans')


def prepare_command(options, overrides) -> None:
  """Turn text or JSONL into a token store."""
  from data.prepare import run

  run(options)


def show_command(options, overrides) -> None:
  """Print a training row as a person reads it."""
  from data.show import show_row

  source, stretch = _open(options, overrides, max(options.step, 0))
  print(show_row(source, options.step, options.row, stretch.example(options.step)))


def explain_command(options, overrides) -> None:
  """Print where each piece of a training row comes from: source, document, offset, length."""
  from data.show import explain_row

  source, stretch = _open(options, overrides, max(options.step, 0))
  print(explain_row(source, options.step, options.row, stretch.example(options.step)))


def plan_command(options, overrides) -> None:
  """Make the plans of large stores ahead; print how full the rows of an epoch are, how many documents are cut."""
  from data.plan_report import keep_plans, report

  source = _open(options, overrides, 0)[0]
  keep_plans(source, options.workers)
  print(report(source))


def _open(options, overrides, step: int):
  """(data, stretch) of a config at a step of its run."""
  from data.source import open_data
  from pretrain import cli
  from pretrain.phases import stretch_at
  from pretrain.runtime import cache_dir

  stretch = stretch_at(cli.load(options, overrides), step)
  cfg = stretch.cfg
  source = open_data(cfg.data, cfg.objective, seed=cfg.seed, vocab_size=cfg.model.vocab_size, cache_dir=cache_dir())
  return source, stretch
