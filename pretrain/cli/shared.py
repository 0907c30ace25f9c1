"""What several commands share: the parser, the flags and loading of a config, the check of a new workdir."""

import argparse
import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import NoReturn

from pretrain.errors import ConfigError

# The name, the function of (options, overrides), and the function that adds the flags.
Command = tuple[str, Callable, Callable[[argparse.ArgumentParser], None]]

EXIT_CODES = (
  'exit codes: 0 done, 64 config, 65 data, 66 checkpoint, 70 hang, 71 non-finite, '
  '72 back to a step before a loss spike, 74 replicas differ, 75 interrupted; '
  'after 70, 72, 74 and 75 the same command resumes the run'
)


class Parser(argparse.ArgumentParser):
  """Reports errors as config errors: one line, exit code 64."""

  def error(self, message: str) -> NoReturn:
    raise ConfigError(f'{message}; see {self.prog} --help.')


def parse(argv: list[str], commands: Sequence[Command]) -> tuple[argparse.Namespace, list[str]]:
  """(options, overrides): `--gin.KEY=VALUE` becomes the override 'KEY=VALUE'; options.rest is what follows `--`."""
  cut = argv.index('--') if '--' in argv else len(argv)
  ours, rest = argv[:cut], argv[cut + 1 :]
  overrides = [arg.removeprefix('--gin.') for arg in ours if arg.startswith('--gin.')]
  if bad := [o for o in overrides if '=' not in o]:
    raise ConfigError(f'--gin.{bad[0]} has no value; write --gin.{bad[0]}=VALUE.')
  options = parser(commands).parse_args([arg for arg in ours if not arg.startswith('--gin.')])
  options.rest = rest
  return options, overrides


def parser(commands: Sequence[Command]) -> argparse.ArgumentParser:
  root = Parser('pretrain', description='Pretrain T5, UL2 and decoder models.', epilog=EXIT_CODES)
  actions = root.add_subparsers(required=True, metavar='COMMAND')
  for name, function, add_flags in commands:
    summary = function.__doc__.splitlines()[0]
    command = actions.add_parser(name, help=summary, description=function.__doc__, epilog=EXIT_CODES)
    command.add_argument('--traceback', action='store_true', help='show the Python traceback of an error')
    command.set_defaults(command=function)
    add_flags(command)
  return root


def path(value: str) -> pathlib.Path:
  """A flag that is a path. `data` is imported late, here and below: `main` checks first that it is ours."""
  from data import arguments

  return arguments.path(value)


def workdir(value: str):
  """A flag that is the folder of a run: a path, or the URL of a folder in a store."""
  from data import arguments
  from pretrain.workdirs.folder import as_folder

  return as_folder(arguments.expand_user(value))


def location(value: str) -> str:
  """A flag that is a path or a URL."""
  from data import arguments

  return arguments.expand_user(value)


def text(value: str) -> str:
  """A flag that is text."""
  from data import arguments

  return arguments.text(value)


def config_flags(command: argparse.ArgumentParser, required: bool = True) -> None:
  command.add_argument(
    '--gin_file',
    action='append',
    type=location,
    required=required,
    metavar='F',
    help='a .gin file; repeatable, the last binding wins',
  )
  command.add_argument(
    '--gin.KEY', metavar='VALUE', dest='_shown_in_help_only', help='one binding, e.g. --gin.train.steps=20'
  )


def cluster_flag(command: argparse.ArgumentParser) -> None:
  from pretrain.fleet.cluster import CHOICES

  command.add_argument(
    '--cluster', choices=CHOICES, help='who started the processes of the run, where the environment names several'
  )


def model_flags(command: argparse.ArgumentParser) -> None:
  """The keys that a command may give to a finished model: see `model_overrides`."""
  command.add_argument('--gin.mesh.AXIS', metavar='N', dest='_shown_in_help_only', help='devices along a mesh axis')
  command.add_argument(
    '--gin.precision.KEY', metavar='VALUE', dest='_shown_in_help_only',
    help="how products are quantized, e.g. --gin.precision.recipe=\"'int8'\" (default: as in training)",
  )  # fmt: skip


def model_overrides(overrides: Sequence[str], command: str):
  """(mesh, precision) of a command that takes no other key; precision None: not given, and as in training.

  Raises ConfigError for another key.
  """
  from models.precision import PrecisionConfig
  from pretrain.config import bindings
  from pretrain.devices.mesh import MeshConfig

  @dataclasses.dataclass(frozen=True, kw_only=True)
  class Given:
    mesh: MeshConfig = MeshConfig()
    precision: PrecisionConfig = PrecisionConfig()

  own = [key.strip() for key in overrides]
  if others := [key for key in own if not key.startswith(('mesh.', 'precision.'))]:
    raise ConfigError(
      f'--gin.{others[0]}: the run has its config; pretrain {command} takes mesh.* and precision.* alone.'
    )
  given = bindings.load(Given, [], own)
  return given.mesh, given.precision if any(key.startswith('precision.') for key in own) else None


def load(options, overrides, saved=None):
  """The checked config of a command, from --gin_file or from the config.gin of a run."""
  from pretrain.config import bindings
  from pretrain.experiment import checks, experiment
  from pretrain.experiment.saved import load_saved

  own = saved is not None
  cfg = load_saved(saved, overrides) if own else bindings.load(experiment.Experiment, options.gin_file, overrides)
  checks.check(cfg)
  return cfg


def check_workdir(workdir, flag: str = '--workdir') -> None:
  """Raises ConfigError where no run can be written; leaves nothing behind. A store is asked when it is written to."""
  from data.arguments import is_text

  if not isinstance(workdir, pathlib.Path):
    return
  if not is_text(str(workdir.absolute())):
    raise ConfigError(
      f'{flag}={workdir} is the folder {workdir.absolute()}, whose name has bytes that are not UTF-8: checkpoints '
      'cannot be written there. Nothing was changed; choose another folder.'
    )
  check_writable(workdir, flag)


def check_file(path: pathlib.Path, flag: str) -> None:
  """Raises ConfigError where a file cannot be written; leaves nothing behind."""
  if path.is_dir():
    raise ConfigError(f'{flag}={path} is a folder; name a file.')
  check_writable(path.parent, flag)


def check_writable(workdir: pathlib.Path, flag: str) -> None:
  """Raises ConfigError where a folder cannot be written; leaves nothing behind."""
  try:
    existing = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
    with tempfile.TemporaryFile(dir=existing):
      pass
  except OSError as error:
    raise ConfigError(
      f'{flag}={workdir} cannot be written ({error.strerror}). Nothing was changed; choose another folder.'
    ) from error
