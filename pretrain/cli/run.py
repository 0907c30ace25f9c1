"""`pretrain run`: local processes of a command; those of `train` are started again."""

import argparse
import os

from pretrain.cli import shared
from pretrain.cli.train import train_command, train_flags
from pretrain.devices.platform import has_accelerator
from pretrain.errors import ConfigError


def run_flags(command: argparse.ArgumentParser) -> None:
  command.add_argument('--hosts', type=int, required=True, help='processes on this machine, over loopback')
  command.add_argument(
    '--max_restarts', type=int, default=100, help='how often training that fails is started again (default: 100)'
  )
  command.add_argument(
    '--min_hosts',
    type=int,
    help='continue with at least this many processes if others fail to start (default: all)',
  )
  command.add_argument(
    '--skip_poisoned', action='store_true', help='skip the examples of a step that fails three times'
  )


def run_command(options, overrides) -> int:
  """Start several local processes of a command: pretrain run --hosts=2 -- train …; training that fails is resumed."""
  from pretrain.fleet import launch

  if not options.rest:
    raise ConfigError(
      'pretrain run needs a command after --, e.g. pretrain run --hosts=2 -- train --gin_file=F --workdir=RUN.'
    )
  check_hosts(options)
  if options.rest[0] == 'train':
    return supervised(options)
  return launch.run(options.hosts, options.rest)


def check_hosts(options) -> None:
  """Raises ConfigError for numbers out of range."""
  if options.hosts < 1:
    raise ConfigError(f'--hosts={options.hosts}; it must be at least 1.')
  if options.max_restarts < 0:
    raise ConfigError(f'--max_restarts={options.max_restarts}; it must be at least 0 (0 = never).')
  if options.min_hosts is not None and not 1 <= options.min_hosts <= options.hosts:
    raise ConfigError(f'--min_hosts={options.min_hosts} with --hosts={options.hosts}; it must be 1 to --hosts.')


def supervised(options) -> int:
  """`pretrain run -- train …`; mistakes are reported before a process is started."""
  from pretrain.devices.mesh import shares_evenly
  from pretrain.experiment.checks import check_skippable
  from pretrain.fleet import launch
  from pretrain.fleet.supervise import Policy, Supervisor

  train, overrides = shared.parse(options.rest, [('train', train_command, train_flags)])
  if train.cluster not in (None, 'pretrain'):
    raise ConfigError(f'--cluster={train.cluster}: pretrain run starts the processes itself; leave the flag out.')
  cfg = shared.load(train, overrides)
  shared.check_workdir(train.workdir)
  if options.skip_poisoned:
    check_skippable(cfg, '--skip_poisoned')
  if cfg.elastic.survive and has_accelerator() and os.environ.get('JAX_PLATFORMS') != 'cpu':
    raise ConfigError('elastic.survive=True is for CPU processes, and this machine has an accelerator; remove it.')
  policy = Policy(
    max_restarts=options.max_restarts, min_hosts=options.min_hosts, skip_poisoned=options.skip_poisoned,
    survive=cfg.elastic.seconds if cfg.elastic.survive else None,
  )  # fmt: skip
  fits = lambda hosts: shares_evenly(cfg.mesh, cfg.data.batch_size, hosts)
  return Supervisor(
    options.hosts, launch.program(options.rest), train.workdir, policy, fits, batch_size=cfg.data.batch_size
  ).run()
