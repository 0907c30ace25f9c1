"""The command `pretrain`. Each subcommand imports what it needs, so that --help and errors are quick."""

import argparse
import os
import pathlib
import select
import signal
import sys
import tempfile
from collections.abc import Sequence
from typing import NoReturn

from pretrain.cli.checkpoints import checkpoints_command, checkpoints_flags
from pretrain.cli.data import data_command, data_flags
from pretrain.devices.allocator import keep_memory
from pretrain.devices.platform import has_accelerator
from pretrain.errors import ConfigError, UserError
from pretrain.neighbours import check_neighbours
from pretrain.redact import redact

EXIT_CODES = (
  'exit codes: 0 done, 64 config, 65 data, 66 checkpoint, 70 hang, 71 non-finite, 72 gone back before a loss spike, '
  '74 replicas differ, 75 interrupted; after 70, 72, 74 and 75 the same command goes on'
)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one subcommand; a user's mistake is one line on stderr and its exit code."""
  is_command = argv is None  # not a test or a program that calls it
  argv = list(sys.argv[1:] if argv is None else argv)
  try:
    check_neighbours()
    if is_command and argv[:1] == ['train'] and not has_accelerator():
      keep_memory()
    options, overrides = parse(argv)
    code = options.command(options, overrides) or 0
    sys.stdout.flush()
    return code
  except KeyboardInterrupt:
    return 130
  except Exception as error:
    if isinstance(error, BrokenPipeError) and nobody_reads():
      return 128 + signal.SIGPIPE
    if '--traceback' in argv or not is_user_error(error):
      raise
    print(redact(str(error)), file=sys.stderr)
    return error.exit_code


def is_user_error(error: Exception) -> bool:
  """Whether `error` is a user's mistake. `data` is asked last: it may be the mistake (`check_neighbours`)."""
  if isinstance(error, UserError):
    return True
  from pretrain.errors import USER_ERRORS

  return isinstance(error, USER_ERRORS)


def nobody_reads() -> bool:
  """Whether stdout is a pipe whose reader has gone, as in `| head`; then what is left is thrown away, quietly."""
  stdout = sys.stdout.fileno()
  poll = select.poll()
  poll.register(stdout, 0)
  gone = any(event & select.POLLERR for _, event in poll.poll(0))
  if gone:
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
  return gone


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
  """(options, overrides): `--gin.KEY=VALUE` becomes the override 'KEY=VALUE'; after `--` nothing is read."""
  cut = argv.index('--') if '--' in argv else len(argv)
  ours, rest = argv[:cut], argv[cut + 1 :]
  overrides = [arg.removeprefix('--gin.') for arg in ours if arg.startswith('--gin.')]
  if bad := [o for o in overrides if '=' not in o]:
    raise ConfigError(f'--gin.{bad[0]} has no value; write --gin.{bad[0]}=VALUE.')
  options = parser().parse_args([arg for arg in ours if not arg.startswith('--gin.')])
  options.rest = rest
  return options, overrides


class Parser(argparse.ArgumentParser):
  """Its errors are those of the config: one line, exit code 64."""

  def error(self, message: str) -> NoReturn:
    raise ConfigError(f'{message}; see {self.prog} --help.')


def parser() -> argparse.ArgumentParser:
  root = Parser('pretrain', description='Pretrain T5, UL2 and decoder models.', epilog=EXIT_CODES)
  commands = root.add_subparsers(required=True, metavar='COMMAND')
  for name, function, flags in COMMANDS:
    summary = function.__doc__.splitlines()[0]
    command = commands.add_parser(name, help=summary, description=function.__doc__, epilog=EXIT_CODES)
    command.add_argument('--traceback', action='store_true', help='show the Python traceback of an error')
    command.set_defaults(command=function)
    flags(command)
  return root


def config_flags(command: argparse.ArgumentParser, required: bool = True) -> None:
  command.add_argument(
    '--gin_file',
    action='append',
    required=required,
    metavar='F',
    help='a .gin file; repeatable, the last binding wins',
  )
  command.add_argument(
    '--gin.KEY', metavar='VALUE', dest='_shown_in_help_only', help='one binding, e.g. --gin.train.steps=20'
  )


def train_flags(command: argparse.ArgumentParser) -> None:
  config_flags(command)
  command.add_argument(
    '--workdir', required=True, type=pathlib.Path, help='where the run lives; the same command resumes it'
  )
  command.add_argument(
    '--allow_data_change', action='store_true', help='go on with other data, from the same row of each source'
  )


def load(options, overrides):
  """The checked config of a command."""
  from pretrain.config import bindings
  from pretrain.experiment import experiment

  cfg = bindings.load(experiment.Experiment, options.gin_file, overrides)
  experiment.check(cfg)
  return cfg


def check_workdir(workdir: pathlib.Path, flag: str = '--workdir') -> None:
  """Raises ConfigError where no run can be written; leaves nothing behind."""
  try:
    existing = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
    with tempfile.TemporaryFile(dir=existing):
      pass
  except OSError as error:
    raise ConfigError(
      f'{flag}={workdir} cannot be written ({error.strerror}). Nothing was changed; choose another folder.'
    ) from error


def train_command(options, overrides) -> int:
  """Train a model, or go on with a run that was cut off."""
  from pretrain.devices import mesh
  from pretrain.fleet import launch

  cfg = load(options, overrides)
  check_workdir(options.workdir)
  prepare = lambda hosts: mesh.prepare_platform(cfg.mesh, hosts)
  prepare(launch.num_hosts())
  launch.initialize_from_env(cfg.watchdog.init or launch.MEETING_SECONDS)
  from pretrain.devices.compilation_cache import use_compilation_cache
  from pretrain.fleet import surviving
  from pretrain.run import train

  use_compilation_cache()
  start = lambda began: train.train(cfg, options.workdir, allow_data_change=options.allow_data_change, began=began)
  with launch.leaving_at_once():
    return surviving.surviving(cfg.elastic, prepare, start)


def describe_flags(command: argparse.ArgumentParser) -> None:
  config_flags(command)
  command.add_argument(
    '--plot',
    nargs='?',
    const=pathlib.Path('learning_rate.png'),
    type=pathlib.Path,
    metavar='FILE.png',
    help='draw the learning rate of every step instead (default: learning_rate.png); print the path',
  )


def config_command(options, overrides) -> None:
  """Print the resolved config, the parameters and FLOPs per token; touches no device."""
  from pretrain.tools import describe

  cfg = load(options, overrides)
  print(describe.describe(cfg) if options.plot is None else plot_schedule(cfg, options.plot))


def plot_schedule(cfg, path: pathlib.Path) -> pathlib.Path:
  """Draws the learning rate of a run to `path`, on the CPU; raises ConfigError where that is no PNG it can write."""
  if path.suffix.lower() != '.png':
    raise ConfigError(f'--plot={path} is no PNG; name a file that ends in .png.')
  import jax

  jax.config.update('jax_platforms', 'cpu')  # an accelerator may be in use, and is not needed
  from pretrain.experiment.phases import phases_of
  from pretrain.records.plots import draw_schedule
  from pretrain.tools.describe import learning_rates

  names = ', '.join(dict.fromkeys(phase.cfg.schedule.name for phase in phases_of(cfg)))
  try:
    draw_schedule(lambda steps: learning_rates(cfg, steps), cfg.train.steps, names, path)
  except OSError as error:
    raise ConfigError(f'--plot={path} cannot be written ({error.strerror}); choose another place.') from error
  return path


def generate_flags(command: argparse.ArgumentParser) -> None:
  command.add_argument('--workdir', required=True, type=pathlib.Path)
  command.add_argument(
    '--text',
    action='append',
    required=True,
    help='a prompt: <extra_id_0>, <extra_id_1>, … mark blanks; without them it is continued',
  )
  command.add_argument(
    '--max_tokens', type=int, default=64, help='at most; an output also ends where a training row did'
  )


def generate_command(options, overrides) -> None:
  """Fill blanks, or continue text, with a trained run."""
  from pretrain.devices import mesh

  mesh.prepare_platform(mesh.MeshConfig())
  from pretrain.tools.generate import generate

  for result in generate(options.workdir, options.text, options.max_tokens):
    print(f'prompt  {result.prompt}\noutput  {result.output}\ntext    {result.text}\n')


def report_flags(command: argparse.ArgumentParser) -> None:
  command.add_argument('workdir', type=pathlib.Path)


def report_command(options, overrides) -> None:
  """Draw report.html of a run again."""
  from pretrain.tools.report import write_report

  print(write_report(options.workdir))


def replay_flags(command: argparse.ArgumentParser) -> None:
  command.add_argument('--workdir', required=True, type=pathlib.Path)
  command.add_argument('--step', required=True, type=int, help='the last step that is made again')
  command.add_argument(
    '--rtol', type=float, help='how far losses may be off, e.g. 1e-5 on another mesh (float32); without it: bit for bit'
  )
  command.add_argument('--gin.mesh.AXIS', metavar='N', dest='_shown_in_help_only', help='another mesh than the run had')


def replay_command(options, overrides) -> int:
  """Make a step of a run again and compare it with what was recorded; exit code 66 where it differs. Writes nothing."""
  from pretrain.devices import mesh
  from pretrain.fleet import launch

  saved = options.workdir / 'config.gin'
  if not saved.exists():
    raise ConfigError(f'--workdir={options.workdir} is no run: it has no config.gin.')
  if others := [key for key in overrides if not key.startswith('mesh.')]:
    raise ConfigError(f'--gin.{others[0]} would be another run; replay takes mesh.* alone.')
  if overrides and options.rtol is None:
    raise ConfigError(f'--gin.{overrides[0]}: only the mesh of the run gives its bits; give --rtol, e.g. --rtol=1e-5.')
  options.gin_file = [saved]
  cfg = load(options, overrides)
  mesh.prepare_platform(cfg.mesh, launch.num_hosts())
  launch.initialize_from_env()
  from pretrain.devices.compilation_cache import use_compilation_cache
  from pretrain.errors import CheckpointError
  from pretrain.hosts import coordination
  from pretrain.run import replay

  use_compilation_cache()
  tell = print if coordination.host() == 0 else lambda line: None
  with launch.leaving_at_once():
    equal = replay.replay(cfg, options.workdir, options.step, tell, rtol=options.rtol)
  tell('equal' if equal else 'DIFFERS: a device has computed wrongly, then or now; or the run had another number of '
       'processes or devices, another version of jax, another machine.')  # fmt: skip
  return 0 if equal else CheckpointError.exit_code


def run_flags(command: argparse.ArgumentParser) -> None:
  command.add_argument('--hosts', type=int, required=True, help='processes on this machine, over loopback')
  command.add_argument(
    '--max_restarts', type=int, default=100, help='how often training that fails is started again (default: 100)'
  )
  command.add_argument(
    '--min_hosts', type=int, help='go on with fewer processes, at least so many, where one stays away (default: all)'
  )
  command.add_argument(
    '--skip_poisoned', action='store_true', help='leave out the examples of a step that fails three times'
  )


def run_command(options, overrides) -> int:
  """Start several local processes of a command: pretrain run --hosts=2 -- train …; training that fails goes on."""
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
  """Raises ConfigError for numbers that cannot be."""
  if options.hosts < 1:
    raise ConfigError(f'--hosts={options.hosts}; it must be at least 1.')
  if options.max_restarts < 0:
    raise ConfigError(f'--max_restarts={options.max_restarts}; it must be at least 0 (0 = never).')
  if options.min_hosts is not None and not 1 <= options.min_hosts <= options.hosts:
    raise ConfigError(f'--min_hosts={options.min_hosts} with --hosts={options.hosts}; it must be 1 to --hosts.')


def supervised(options) -> int:
  """`pretrain run -- train …`; its mistakes show before a process is started."""
  from pretrain.devices.mesh import shares_evenly
  from pretrain.experiment.experiment import check_skippable
  from pretrain.fleet import launch
  from pretrain.fleet.supervise import Policy, Supervisor

  train, overrides = parse(options.rest)
  cfg = load(train, overrides)
  check_workdir(train.workdir)
  if options.skip_poisoned:
    check_skippable(cfg, '--skip_poisoned')
  if cfg.elastic.survive and has_accelerator() and os.environ.get('JAX_PLATFORMS') != 'cpu':
    raise ConfigError('elastic.survive=True is for CPU processes, and here is an accelerator; remove it.')
  policy = Policy(
    max_restarts=options.max_restarts, min_hosts=options.min_hosts, skip_poisoned=options.skip_poisoned,
    survive=cfg.elastic.seconds if cfg.elastic.survive else None,
  )  # fmt: skip
  fits = lambda hosts: shares_evenly(cfg.mesh, cfg.data.batch_size, hosts)
  return Supervisor(
    options.hosts, launch.program(options.rest), train.workdir, policy, fits, batch_size=cfg.data.batch_size
  ).run()


def plan_flags(command: argparse.ArgumentParser) -> None:
  config_flags(command)
  command.add_argument('--topology', required=True, help='e.g. v5e:2x4, v5p:2x2x1, v6e:2x4, tpu7x:2x2x1')


def plan_command(options, overrides) -> None:
  """Compile the train step for a TPU slice without one; print the memory it needs."""
  from pretrain.tools import plan

  print(plan.plan(load(options, overrides), options.topology))


COMMANDS = (
  ('train', train_command, train_flags),
  ('config', config_command, describe_flags),
  ('data', data_command, data_flags),
  ('generate', generate_command, generate_flags),
  ('checkpoints', checkpoints_command, checkpoints_flags),
  ('report', report_command, report_flags),
  ('replay', replay_command, replay_flags),
  ('run', run_command, run_flags),
  ('plan', plan_command, plan_flags),
)
