"""The metadata server of a Google Cloud VM, which knows the other hosts of a TPU slice."""

import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping

from pretrain.errors import HostError

SERVER = 'metadata.google.internal'
SECONDS, TRIES, PAUSE_SECONDS = 2.0, 3, 0.2


def asking(environ: Mapping[str, str] = os.environ) -> Callable[[str], str | None]:
  """A function: attribute of the VM -> its value; None where the VM has none or is not Google's.

  It raises HostError where the server is there and does not answer. GCE_METADATA_IP names another address.
  """
  server = environ.get('GCE_METADATA_IP', SERVER)

  def attribute(name: str) -> str | None:
    url = f'http://{server}/computeMetadata/v1/instance/attributes/{name}'
    for attempt in range(TRIES):
      try:
        return get(url)
      except (TimeoutError, urllib.error.HTTPError) as error:
        reason = error
        if attempt + 1 < TRIES:
          time.sleep(PAUSE_SECONDS)
    raise HostError(
      f'the metadata server {server} did not say {name} ({reason}), so the other hosts of this TPU VM are not known; '
      'no process was started. The same command tries again; --cluster=none trains on this host alone.'
    )

  return attribute


def get(url: str) -> str | None:
  """The text at `url`; None for 404, and where no such server is. Raises TimeoutError, or HTTPError for other codes."""
  request = urllib.request.Request(url, headers={'Metadata-Flavor': 'Google'})
  direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy reaches the server of this VM
  try:
    with direct.open(request, timeout=SECONDS) as answer:
      return answer.read().decode()
  except urllib.error.HTTPError as error:
    error.close()
    if error.code != 404:
      raise
  except urllib.error.URLError as error:
    if isinstance(error.reason, TimeoutError | socket.timeout):
      raise TimeoutError(f'no answer within {SECONDS:g} s') from error
  return None
