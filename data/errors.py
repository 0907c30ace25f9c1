"""The one error that data raises for a user's mistake."""


class DataError(ValueError):
  """`DATA: what | where | what is safe | what to do`, shown without a traceback; exit code 65."""

  exit_code = 65

  def __init__(self, message: str, code: str = 'DATA'):
    message = message.replace('\r', r'\r').replace('\n', r'\n')  # names of files may hold them
    self.code, self.message = code, message
    super().__init__(f'{code}: {message}')

  def __reduce__(self):
    # Worker processes pickle it; the default would put the code in front twice.
    return DataError, (self.message, self.code)
