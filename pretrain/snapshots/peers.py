"""How processes read each other's snapshots: bytes over sockets, answers over JAX's coordinator, each with a timeout.

No collectives: training and snapshots would wait for each other on the devices. A process listens at the address
through which it reaches the coordinator (127.0.0.1 under `pretrain run`), and answers only requests with its token,
which it publishes over the coordinator. Requests and replies are fixed-size structs: nothing is unpickled or evaluated.
"""

import contextlib
import hmac
import secrets
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable

import jax
import numpy as np
from jax._src import distributed  # no public name has the client

KINDS = ('block', 'parity')
TOKEN_BYTES = 16
REQUEST = struct.Struct('<BQQQ')  # kind, step, first, end
REPLY = struct.Struct('<?I')  # whether the bytes exist, their crc32; then the bytes
FOLDER, ADDRESS = 'pretrain/snapshot', 'address'

Serve = Callable[[int, str], np.ndarray | None]  # (step, kind) -> all bytes of it, if this process has it


class PeerError(Exception):
  """Another process did not answer in time, or does not have the requested bytes."""


class Answers:
  """Answers of all processes, by name: a process may answer early; a process that reads waits for all answers."""

  def __init__(self, seconds: float):
    self._seconds, self._lock = seconds, threading.Lock()
    self._told: list[tuple[float, str]] = []  # when, and the key

  def tell(self, name: str, answer: str) -> None:
    if jax.process_count() == 1:
      return
    client, now = distributed.global_state.client, time.monotonic()
    key = f'{FOLDER}/{name}/{jax.process_index()}'
    client.key_value_set(key, f'={answer}', allow_overwrite=True)
    if name == ADDRESS:
      return
    with self._lock:  # otherwise the coordinator keeps all answers; no process waits longer than this
      self._told.append((now, key))
      while now - self._told[0][0] > 3 * self._seconds:
        client.key_value_delete(self._told.pop(0)[1])

  def gather(self, name: str, answer: str) -> list[str]:
    """The answers of all processes, by their index. Raises PeerError that names the first process without an answer."""
    if jax.process_count() == 1:
      return [answer]
    self.tell(name, answer)
    deadline = time.monotonic() + self._seconds
    return [self.ask(name, process, deadline) for process in range(jax.process_count())]

  def ask(self, name: str, process: int, deadline: float) -> str:
    left = max(int(1000 * (deadline - time.monotonic())), 1)
    try:
      return distributed.global_state.client.blocking_key_value_get(f'{FOLDER}/{name}/{process}', left)[1:]
    except jax.errors.JaxRuntimeError as error:
      raise PeerError(f'process {process} did not answer within {self._seconds:g} s') from error


class Server:
  """Serves reads of other processes, in its own threads, until the process ends."""

  def __init__(self, serve: Serve, address: str, seconds: float):
    self._serve, self._seconds, self.token = serve, seconds, secrets.token_bytes(TOKEN_BYTES)
    self._socket = socket.create_server((address, 0))
    self.place = f'{address} {self._socket.getsockname()[1]} {self.token.hex()}'
    threading.Thread(target=self._accept, name='snapshot_server', daemon=True).start()

  def close(self) -> None:
    with contextlib.suppress(OSError):
      self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept()
    self._socket.close()

  def _accept(self) -> None:
    with contextlib.suppress(OSError):  # closed
      while True:
        connection, _ = self._socket.accept()
        threading.Thread(target=self._answer, args=(connection,), name='snapshot_peer', daemon=True).start()

  def _answer(self, connection: socket.socket) -> None:
    with connection, contextlib.suppress(OSError, EOFError):
      connection.settimeout(self._seconds)
      if not hmac.compare_digest(receive(connection, TOKEN_BYTES, self._seconds).tobytes(), self.token):
        return
      while True:
        connection.settimeout(None)  # until the next request
        kind, step, first, end = REQUEST.unpack(receive(connection, REQUEST.size, None))
        found = self._serve(step, KINDS[kind]) if kind < len(KINDS) else None
        connection.settimeout(self._seconds)
        if found is None or not first <= end <= len(found):
          connection.sendall(REPLY.pack(False, 0))
        else:
          connection.sendall(REPLY.pack(True, zlib.crc32(found[first:end])))
          connection.sendall(found[first:end])


class Peers:
  """Reads from other processes, over one connection to each, opened at the first read."""

  def __init__(self, answers: Answers, seconds: float):
    self._answers, self._seconds = answers, seconds
    self._connections: dict[int, socket.socket] = {}

  def read(self, process: int, kind: str, step: int, first: int, end: int) -> np.ndarray:
    """uint8 [end - first]. Raises PeerError."""
    try:
      connection = self._connect(process)
      connection.settimeout(self._seconds)
      connection.sendall(REQUEST.pack(KINDS.index(kind), step, first, end))
      there, crc = REPLY.unpack(receive(connection, REPLY.size, self._seconds))
      if not there:
        raise PeerError(f'process {process} has no {kind} of step {step}')
      found = receive(connection, end - first, self._seconds)
    except (OSError, EOFError) as error:
      self.forget(process)
      reason = str(error) or 'it closed the connection'
      raise PeerError(f'process {process} did not send its {kind} of step {step}: {reason}') from error
    if zlib.crc32(found) != crc:
      raise PeerError(f'the {kind} of step {step} of process {process} was damaged during the transfer')
    return found

  def forget(self, process: int) -> None:
    if connection := self._connections.pop(process, None):
      connection.close()

  def close(self) -> None:
    for process in list(self._connections):
      self.forget(process)

  def _connect(self, process: int) -> socket.socket:
    if process not in self._connections:
      place = self._answers.ask(ADDRESS, process, time.monotonic() + self._seconds)
      address, port, token = place.split()
      connection = socket.create_connection((address, int(port)), self._seconds)
      connection.sendall(bytes.fromhex(token))
      self._connections[process] = connection
    return self._connections[process]


def receive(connection: socket.socket, size: int, seconds: float | None) -> np.ndarray:
  """uint8 [size], received within `seconds`. Raises EOFError if the other side has closed the connection."""
  found, got = np.empty(size, np.uint8), 0
  deadline = None if seconds is None else time.monotonic() + seconds
  while got < size:
    if deadline is not None:
      connection.settimeout(max(deadline - time.monotonic(), 1e-3))
    if not (count := connection.recv_into(memoryview(found)[got:])):
      raise EOFError('it closed the connection')
    got += count
  return found


def own_address() -> str:
  """The address of this host on the network of the coordinator: other networks cannot reach a socket bound to it."""
  host, _, port = (distributed.global_state.coordinator_address or '127.0.0.1:1').rpartition(':')
  with socket.socket(socket.AF_INET6 if ':' in host else socket.AF_INET, socket.SOCK_DGRAM) as probe:
    probe.connect((host.strip('[]'), int(port)))  # a datagram socket sends nothing
    return probe.getsockname()[0]
