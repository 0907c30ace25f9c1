"""Errors that a user can fix: one line, a stable code, an exit code. A traceback is for bugs."""

from typing import Any


class UserError(Exception):
  """`code: what | where | what is safe | what to do`, shown without a traceback; `exit_code` ends the process."""

  code = 'ERROR'
  exit_code = 1

  def __init__(self, message: str):
    super().__init__(f'{self.code}: {message}')


class ConfigError(UserError):
  code, exit_code = 'CONFIG', 64


class CheckpointError(UserError):
  """Raised with its own code: `CheckpointError('CKPT-MISMATCH', message)`."""

  exit_code = 66

  def __init__(self, code: str, message: str):
    self.code = code
    super().__init__(message)


class NonFiniteError(UserError):
  code, exit_code = 'NONFINITE', 71


class SpikeError(UserError):
  """The run has gone back to a step before a loss spike: the same command resumes from there."""

  code, exit_code = 'SPIKE', 72


class ReplicaError(UserError):
  """A device has computed wrong values: the same command resumes from the last saved step."""

  code, exit_code = 'REPLICAS', 74


class HostError(UserError):
  """A process that others wait for does not come: they end as those that hang do."""

  code, exit_code = 'HANG', 70


def __getattr__(name: str) -> Any:
  """USER_ERRORS is made when it is asked for: nothing of `data` is imported before it is known to be ours."""
  if name != 'USER_ERRORS':
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
  from data.errors import DataError
  from pallas_kernels.errors import KernelError

  return UserError, DataError, KernelError
