"""`pretrain data`: its flags, and each action as one call into `data`."""

import argparse
import json

from pretrain.cli import shared
from pretrain.errors import ConfigError


def data_flags(command: argparse.ArgumentParser) -> None:
  actions = command.add_subparsers(required=True, metavar='ACTION')
  ways = {
    'prepare': prepare_command, 'verify': verify_command, 'inspect': inspect_command, 'stats': stats_command,
    'show': show_command, 'explain': explain_command, 'plan': plan_command,
  }  # fmt: skip
  flags = {
    'prepare': _prepare_flags, 'verify': _store_flags, 'inspect': _inspect_flags, 'stats': _stats_flags,
    'show': _row_flags, 'explain': _row_flags, 'plan': _plan_flags,
  }  # fmt: skip
  for name, function in ways.items():
    action = actions.add_parser(name, help=function.__doc__)
    action.set_defaults(command=function)
    flags[name](action)


def data_command(options, overrides) -> None:
  """Prepare token stores and look at rows."""
  raise ConfigError('pretrain data needs an action, e.g. prepare or show.')


def _prepare_flags(action: argparse.ArgumentParser) -> None:
  from data.prepare.prepare import add_flags

  add_flags(action)


def _store_flags(action: argparse.ArgumentParser) -> None:
  action.add_argument('path', type=shared.location, help='a token store: a path or a URL (gs://, s3://)')


def _inspect_flags(action: argparse.ArgumentParser) -> None:
  _store_flags(action)
  action.add_argument('--documents', type=int, default=3, help='how many documents to print')


def _stats_flags(action: argparse.ArgumentParser) -> None:
  _store_flags(action)
  action.add_argument('--out', type=shared.path, required=True, metavar='DIR', help='gets stats.json and stats.png')


def _config_flags(action: argparse.ArgumentParser, required: bool = True) -> None:
  shared.config_flags(action, required)


def _row_flags(action: argparse.ArgumentParser) -> None:
  _config_flags(action, required=False)
  action.add_argument(
    '--workdir', type=shared.workdir, metavar='RUN', help='the rows that this run has read; its config.gin by default'
  )
  action.add_argument('--step', type=int, default=0)
  action.add_argument('--row', type=int, default=0)


def _plan_flags(action: argparse.ArgumentParser) -> None:
  _config_flags(action)
  action.add_argument('--workers', type=int, default=1, help='processes that make plans')


def prepare_command(options, overrides) -> None:
  """Turn text or JSONL into a token store."""
  from data.prepare.prepare import run

  run(options)


def verify_command(options, overrides) -> int:
  """Read all of a token store and check every hash; exit code 65 where something is damaged."""
  from data.errors import DataError
  from data.stores.verify import verify

  damaged = 0
  for line in verify(options.path):
    print(f'damaged: {line}')
    damaged += 1
  many = f'damaged places: {damaged}; restore it from a copy, or prepare it again'
  print(f'{options.path}: {many if damaged else "whole"}')
  return DataError.exit_code if damaged else 0


def inspect_command(options, overrides) -> None:
  """Print what a token store holds, and its first documents."""
  from data.prepare.inspect import inspect

  print(inspect(options.path, options.documents))


def stats_command(options, overrides) -> None:
  """Measure a token store: lengths of documents, frequent tokens, duplicates (stats.json, stats.png)."""
  from data.stores.stats import store_stats
  from pretrain.records.plots import draw_stats

  shared.check_writable(options.out, '--out')
  found = store_stats(options.path)
  options.out.mkdir(parents=True, exist_ok=True)
  values = found.to_json()
  (options.out / 'stats.json').write_text(json.dumps(values, indent=1, ensure_ascii=False) + '\n')
  draw_stats(values, options.out / 'stats.png')
  half, most = (values['length_percentiles'][p] for p in ('50', '99'))
  print(f'{options.path}: half of the documents have up to {half:,} tokens, 99% up to {most:,}')
  print(f'duplicates: {values["duplicate_documents"]:,} documents ({values["duplicate_share"]:.2%}) repeat one before')
  print(f'{options.out / "stats.json"}\n{options.out / "stats.png"}')


def show_command(options, overrides) -> None:
  """Print a training row as a person reads it."""
  from data.batches.show import show_row

  source, example = _open_row(options, overrides)
  print(show_row(source, options.step, options.row, example))


def explain_command(options, overrides) -> None:
  """Print where each piece of a training row comes from: source, document, offset, length."""
  from data.batches.show import explain_row

  source, example = _open_row(options, overrides)
  print(explain_row(source, options.step, options.row, example))


def plan_command(options, overrides) -> None:
  """Make the plans of large stores before a run; print how full rows are, and what padding costs, phase by phase."""
  from data.batches.plan_report import keep_plans
  from pretrain.experiment.phases import phases_of
  from pretrain.tools.data_plan import report

  if options.workers < 1:
    raise ConfigError(f'--workers={options.workers}; it must be >= 1.')
  for phase in (parts := phases_of(shared.load(options, overrides))):
    source = _open(phase.cfg)
    keep_plans(source, options.workers)
    if len(parts) > 1:
      print(f'{"" if phase.index == 0 else chr(10)}phase {phase.index}, from step {phase.start:,}:')
    print(report(phase, source))


def _open(cfg):
  """The data of a config."""
  from data.batches.source import open_data
  from pretrain.devices.compilation_cache import cache_dir, plans_url

  return open_data(
    cfg.data, cfg.objective, seed=cfg.seed, vocab_size=cfg.model.vocab_size, cache_dir=cache_dir(),
    plans_url=plans_url(),
  )  # fmt: skip


def _open_row(options, overrides):
  """(data, first example) of --step: of the run in --workdir, or of any run of the config."""
  from pretrain.experiment import same_stores
  from pretrain.experiment import saved as saved_config
  from pretrain.experiment.phases import phase_at
  from pretrain.experiment.resume import check_same_run

  saved, step = options.workdir and options.workdir / 'config.gin', max(options.step, 0)
  if not (saved or options.gin_file):
    raise ConfigError('nothing says which rows; give --gin_file=F, or --workdir=RUN.')
  options.gin_file = options.gin_file or [str(saved)]
  cfg = shared.load(options, overrides)
  cfg = saved_config.as_begun(cfg, saved) if saved else cfg
  phase = phase_at(cfg, step)
  if saved is None:
    _check_decided(cfg.data.online, step)
    return _open(phase.cfg), phase.example(options.step)
  cfg = same_stores.as_begun(options.workdir, cfg)
  check_same_run(saved, cfg)
  import jax

  jax.config.update('jax_platforms', 'cpu')
  from pretrain.tools.history import data_of_run

  return data_of_run(options.workdir, cfg, _open(phase_at(cfg, step).cfg), step)


def _check_decided(online, step: int) -> None:
  """Raises ConfigError for a step whose rows the losses of a run decide."""
  if online is not None and step >= online.every:
    raise ConfigError(
      f'--step={step} with data.online.every={online.every}: from there on the losses of a run decide which source a '
      f'row is of; give a step before {online.every}, or the --workdir of the run.'
    )
