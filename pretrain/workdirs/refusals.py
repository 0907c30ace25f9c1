"""What a store answered instead of doing what it was asked, in one line: the bucket, the credentials, what to do."""

import contextlib
import re
from collections.abc import Iterator

from data.buckets import credentials_of, endpoint_of
from pretrain.errors import UserError
from pretrain.redact import redact

# A part of TensorStore's message -> what it means, and what to do.
MEANINGS = (
  (r"http_response_code='(401|403)'|PERMISSION_DENIED|UNAUTHENTICATED|InvalidAccessKeyId|AccessDenied",
   'these credentials may not do that', 'use others, or give them read and write permission for the bucket'),
  (r'NoSuchBucket|NOT_FOUND', 'there is no such bucket', 'check its name'),
  (r'UNAVAILABLE|DEADLINE|Deadline|DeadlineExceeded|ABORTED|TimeoutError|timed out',
   'it did not answer', 'check the network and the address, then run the same command again'),
)  # fmt: skip


class StoreError(UserError, OSError):
  """A store refused a request, or could not be reached. `strerror` is the reason, as for errors of a disk."""

  code, exit_code = 'STORE', 66

  def __init__(self, url: str, what: str, reason: str, fix: str):
    super().__init__(f'{url} cannot be {what}: {reason}. Nothing was changed; {fix}.')
    self.strerror, self.url = reason, url

  def __str__(self) -> str:
    return str(self.args[0])


@contextlib.contextmanager
def refused(url: str, what: str) -> Iterator[None]:
  """Inside the block, an error of TensorStore is raised as a StoreError: `url` cannot be `what`."""
  try:
    yield
  except StoreError:
    raise
  except (ValueError, OSError, TimeoutError, RuntimeError) as error:
    raise StoreError(url, what, *in_words(url, error)) from error


def in_words(url: str, error: Exception) -> tuple[str, str]:
  """(reason, what to do) of an error of TensorStore about `url`."""
  text = f'{type(error).__name__} {error}'
  found = ((meaning, fix) for pattern, meaning, fix in MEANINGS if re.search(pattern, text))
  meaning, fix = next(found, ('the store refused', 'check the bucket and the credentials'))
  endpoint = endpoint_of(url)
  where = f', at {redact(endpoint)}' if endpoint else ''
  return f'{meaning} ({short(error)}; bucket {bucket_of(url)}{where}, credentials from {credentials_of(url)})', fix


def reason_of(url: str, error: Exception) -> str:
  """Why something at `url` failed: the reason of a StoreError, or of an error of TensorStore that others passed on."""
  if isinstance(error, StoreError):
    return error.strerror
  if isinstance(error, FileExistsError):
    return f'{error.filename}: {error.strerror}'
  cause = error.__cause__ if type(error) is Exception and isinstance(error.__cause__, Exception) else error
  return in_words(url, cause)[0]


def short(error: Exception) -> str:
  """The first line of a message of TensorStore, without headers and addresses of requests."""
  line = (str(error) or type(error).__name__).splitlines()[0]
  code = re.search(r"http_response_code='(\d+)'", line)
  line = re.sub(r"\s*\[[\w-]+='.*", '', line)[:200]
  return redact(f'HTTP {code[1]}, {line}' if code else line)


def bucket_of(url: str) -> str:
  """
  >>> bucket_of('gs://runs/a/b')
  'runs'
  """
  return url.partition('://')[2].partition('/')[0]
