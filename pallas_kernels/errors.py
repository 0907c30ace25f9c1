"""The error that kernels raise for a user's mistake."""


class KernelError(ValueError):
  """`CONFIG: what | what to do`, shown without a traceback; exit code 64."""

  exit_code = 64

  def __init__(self, message: str):
    super().__init__(f'CONFIG: {message}')
