"""The command `pretrain`. Each subcommand imports what it needs, so that --help and errors are quick."""

import os
import select
import signal
import sys
from collections.abc import Sequence

from pretrain.cli import checkpoints, config, data, eval, generate, interchange, replay, report, run, shared, train
from pretrain.devices.allocator import keep_memory
from pretrain.devices.platform import has_accelerator
from pretrain.errors import UserError
from pretrain.neighbours import check_neighbours
from pretrain.redact import redact

COMMANDS = (
  ('train', train.train_command, train.train_flags),
  ('config', config.config_command, config.describe_flags),
  ('data', data.data_command, data.data_flags),
  ('generate', generate.generate_command, generate.generate_flags),
  ('eval', eval.eval_command, eval.eval_flags),
  ('checkpoints', checkpoints.checkpoints_command, checkpoints.checkpoints_flags),
  ('import', interchange.import_command, interchange.import_flags),
  ('export', interchange.export_command, interchange.export_flags),
  ('report', report.report_command, report.report_flags),
  ('replay', replay.replay_command, replay.replay_flags),
  ('run', run.run_command, run.run_flags),
  ('plan', config.plan_command, config.plan_flags),
)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one subcommand; a user's mistake is one line on stderr and its exit code."""
  is_command = argv is None  # called as the command, not by a test or another program
  argv = list(sys.argv[1:] if argv is None else argv)
  try:
    check_neighbours()
    if is_command:
      sys.stdout.reconfigure(errors='surrogateescape')  # a path is printed with the bytes it was given
    if is_command and argv[:1] == ['train'] and not has_accelerator():
      keep_memory()
    options, overrides = shared.parse(argv, COMMANDS)
    code = options.command(options, overrides) or 0
    sys.stdout.flush()
    return code
  except KeyboardInterrupt:
    return 130
  except Exception as error:
    if isinstance(error, BrokenPipeError) and reader_is_gone():
      return 128 + signal.SIGPIPE
    if '--traceback' in argv or not is_user_error(error):
      raise
    # Bytes of a path that are not UTF-8 are shown as \udcXX: the line can be written anywhere.
    print(redact(str(error)).encode(errors='backslashreplace').decode(), file=sys.stderr)
    return error.exit_code


def is_user_error(error: Exception) -> bool:
  """Whether `error` is a user's mistake. `data` is imported last: it may be the mistake (`check_neighbours`)."""
  if isinstance(error, UserError):
    return True
  from pretrain.errors import USER_ERRORS

  return isinstance(error, USER_ERRORS)


def reader_is_gone() -> bool:
  """Whether stdout is a pipe whose reader has ended, as in `| head`; then the remaining output is discarded."""
  stdout = sys.stdout.fileno()
  poll = select.poll()
  poll.register(stdout, 0)
  gone = any(event & select.POLLERR for _, event in poll.poll(0))
  if gone:
    os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
  return gone
