"""The coordinator's address: where process 0 listens, and how the others find it. It is open to one network only."""

import ipaddress
import socket
import time

from pretrain.errors import ConfigError, HostError
from pretrain.fleet import cluster

MEET_FIX = (
  'Nothing was changed; start the missing processes (on a cluster the command must run on every host), open the port '
  'in firewalls, or set a longer watchdog.init.'
)
EVERYWHERE = ('0.0.0.0', '::', '*')
POLL_SECONDS = 0.02
NAME_SECONDS = 120.0  # a scheduler may start a process before the name of its host can be found


def place_of(address: str) -> tuple[str, int]:
  """(host, port) of the coordinator's address. Raises ConfigError if it is not an address, or open to every network.

  >>> place_of('10.0.0.7:8476')
  ('10.0.0.7', 8476)
  """
  host, _, port = address.rpartition(':')
  host = host.strip('[]')
  if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
    raise ConfigError(f'{cluster.COORDINATOR}={address} is not an address; write HOST:PORT, e.g. 10.0.0.7:8476.')
  if host in EVERYWHERE:
    raise ConfigError(
      f'{cluster.COORDINATOR}={address} would open the coordinator, which has no password, to every network; name the '
      'address of one network, e.g. 10.0.0.7:8476.'
    )
  return host, int(port)


def check_free(place: tuple[str, int], address: str) -> None:
  """Raises ConfigError if process 0 cannot listen there."""
  try:
    family, *_, where = socket.getaddrinfo(*place, type=socket.SOCK_STREAM)[0]
    with socket.socket(family) as probe:
      probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      probe.bind(where)
  except OSError as error:
    raise ConfigError(
      f'{cluster.COORDINATOR}={address}: process 0 cannot listen there ({error.strerror}). No process was '
      'started; end the program that listens there, or use another port.'
    ) from error


def wait_until_heard(place: tuple[str, int], address: str, host: int, seconds: float) -> None:
  """Returns when something listens there; raises HostError if nothing does within `seconds`."""
  deadline = time.monotonic() + seconds
  while True:
    try:
      socket.create_connection(place, timeout=max(0.1, min(5.0, deadline - time.monotonic()))).close()
      return
    except OSError as error:
      if time.monotonic() > deadline:
        raise HostError(
          f'process {host} has not reached the coordinator at {address} within {seconds:.0f} s ({error}). {MEET_FIX}'
        ) from error
    time.sleep(POLL_SECONDS)


def bind_address(address: str, found: cluster.Member | None, seconds: float) -> str:
  """HOST:PORT where process 0 listens for the others: `address`, or where a scheduler gave the name of a host, its own
  address in their network.

  Debian gives a host's own name the address 127.0.1.1, which the others cannot reach: then it is the address from
  which this host would reach `found.peer`. Raises ConfigError where the name of the host is not known.
  """
  if found is None or found.how == 'pretrain':
    return address
  host, port = place_of(address)
  patience = min(seconds, NAME_SECONDS)
  own = resolved(host, patience)
  if found.peer and is_loopback(own):
    own = own_address_towards(resolved(found.peer, patience), port)
  return f'[{own}]:{port}' if ':' in own else f'{own}:{port}'


def resolved(host: str, seconds: float) -> str:
  """The address of a host's name, which may become known within `seconds`. Raises ConfigError where it is not."""
  deadline = time.monotonic() + seconds
  while True:
    try:
      return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError as error:
      if time.monotonic() > deadline:
        raise ConfigError(
          f'{host}, where process 0 should listen, has no address ({error.strerror}). No process was started; check '
          f'the name, or set {cluster.COORDINATOR}.'
        ) from error
    time.sleep(POLL_SECONDS)


def own_address_towards(peer: str, port: int) -> str:
  """The address of this host in the network of `peer`. Nothing is sent."""
  family = socket.AF_INET6 if ':' in peer else socket.AF_INET
  with socket.socket(family, socket.SOCK_DGRAM) as probe:
    probe.connect((peer, port))
    return probe.getsockname()[0]


def is_loopback(address: str) -> bool:
  return ipaddress.ip_address(address.partition('%')[0]).is_loopback
