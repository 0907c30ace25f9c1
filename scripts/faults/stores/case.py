"""One run in an object store that is broken while it trains: a store of its own, and hosts that come and go."""

import argparse
import contextlib
import functools
import logging
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence

from faults.case import CONFIG, EXACT, PYTHONPATH, TINY, Case, dying_with_this
from faults.stores.fake_gcs import Server, Store, serve
from pretrain.checkpoints import manifest, step_folders
from pretrain.errors import UserError
from pretrain.records.metrics import read_metrics
from pretrain.workdirs.store_path import StorePath

SECONDS = 600.0  # for one start of a run


class StoreCase:
  """A run at `url`. `on_host(i)` is a start of it; each host has a folder of its own, which `lose_host` removes."""

  def __init__(self, name: str, options: argparse.Namespace, url: str, steps: int, hosts: int = 1):
    self.url, self.steps, self.hosts = url, steps, hosts
    self.folder = options.workdir / name
    shutil.rmtree(self.folder, ignore_errors=True)
    self.folder.mkdir(parents=True)
    self.host, self.said, self.process = 0, '', None

  @property
  def spool(self) -> pathlib.Path:
    return self.folder / f'host{self.host}'

  def command(self, *keys: str) -> list[str]:
    devices = {'mesh.data': 6} if self.hosts > 1 else {}
    values = TINY | {'checkpoint.keep': 2, 'train.steps': self.steps} | devices
    flags = [f'--gin_file={CONFIG}', f'--workdir={self.url}', *(f'--gin.{k}={v}' for k, v in values.items()), *keys]
    several = ['run', f'--hosts={self.hosts}', '--max_restarts=0', '--'] if self.hosts > 1 else []
    return dying_with_this([sys.executable, '-m', 'pretrain', *several, 'train', *flags])

  def start(self, *keys: str) -> subprocess.Popen:
    env = os.environ | {'PYTHONPATH': PYTHONPATH, 'PRETRAIN_SPOOL': str(self.spool), 'JAX_PLATFORMS': 'cpu'}
    log = (self.folder / 'log').open('a')
    self.process = subprocess.Popen(self.command(*keys), env=env, stdout=log, stderr=log, process_group=0)
    return self.process

  def run(self, *keys: str) -> tuple[int, str]:
    """(exit code, what it printed) of a start that is not broken."""
    before = len(self.log())
    code = self.start(*keys).wait(SECONDS)
    return code, self.log()[before:]

  def log(self) -> str:
    path = self.folder / 'log'
    return path.read_text() if path.exists() else ''

  def kill(self) -> None:
    """kill -9 to all processes of the run."""
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self.process.pid, signal.SIGKILL)

  def lose_host(self) -> None:
    """The host and what it had are gone; the next start is on another one."""
    self.process.wait(SECONDS)
    shutil.rmtree(self.spool, ignore_errors=True)
    self.host += 1

  def rows(self) -> int:
    """The rows in the spool of the host that runs."""
    found = list(self.spool.glob('*-0/*/metrics.jsonl'))
    return len(found[0].read_bytes().splitlines()) if found else 0

  def wait_for_rows(self, count: int) -> bool:
    return self.wait_for(lambda: self.rows() >= count)

  def wait_for(self, condition) -> bool:
    deadline = time.monotonic() + SECONDS
    while self.process.poll() is None and time.monotonic() < deadline:
      if condition():
        return True
      time.sleep(0.005)
    return False

  def finished(self) -> list[int]:
    return step_folders.finished(StorePath(self.url) / 'checkpoints')

  def kill_when(self, condition) -> str:
    """Kills the run once `condition()` is true, and loses its host; '' if the run had not ended before."""
    met = self.wait_for(condition)
    ended = self.process.poll()
    self.kill()
    self.lose_host()
    return '' if met else f'it ended with exit code {ended} before it was killed: {self.log()[-300:]}'

  def differs(self, reference: Case) -> str:
    """'' if the store has every row once, with the numbers and the final arrays of `reference`, and no step is half
    there."""
    run = StorePath(self.url)
    try:
      own = read_metrics(run)
      there = {path.name for path in (run / 'checkpoints').iterdir()}
      leaves = manifest.read(run / 'checkpoints' / str(self.steps)).leaves
    except (UserError, ValueError) as error:
      return str(error)
    other = read_metrics(reference.workdir)[: self.steps]
    if [row['step'] for row in own] != [row['step'] for row in other]:
      return f'steps {[row["step"] for row in own][-3:]} of {len(own)}'
    for a, b in zip(own, other, strict=True):
      if wrong := [key for key in EXACT if a[key] != b[key]]:
        return f'{wrong[0]} {a[wrong[0]]!r} for {b[wrong[0]]!r} at step {a["step"]}'
    if left := {name for name in there if not name.partition('.corrupt')[0].isdecimal()}:
      return f'left behind: {sorted(left)}'
    same = {name: leaf.digest for name, leaf in leaves.items()} == reference.leaves(self.steps)
    return '' if same else f'the arrays of step {self.steps} are others'


@contextlib.contextmanager
def google() -> Iterator[Store]:
  """A fake of Google's store with the bucket `runs`, which this process and those that it starts use."""
  server = fake()
  server.RequestHandlerClass.store = store = Store('runs')
  values = {'TENSORSTORE_GCS_HTTP_URL': f'http://127.0.0.1:{server.server_port}', 'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'x'}
  with environment(values):
    yield store


@functools.cache
def fake() -> Server:
  """The only server of this process: its TensorStore keeps the first address that it was given."""
  return serve('runs')


@contextlib.contextmanager
def amazon() -> Iterator[None]:
  """An S3 server (moto) with the bucket `runs`."""
  import boto3
  from moto import server

  logging.getLogger('werkzeug').setLevel(logging.ERROR)
  moto = server.ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False)
  moto.start()
  host, port = moto.get_host_and_port()
  values = {'AWS_ENDPOINT_URL': f'http://{host}:{port}', 'AWS_ACCESS_KEY_ID': 'key', 'AWS_SECRET_ACCESS_KEY': 'secret'}
  with environment(values):
    client = boto3.client('s3', region_name='us-east-1', endpoint_url=values['AWS_ENDPOINT_URL'])
    client.create_bucket(Bucket='runs')
    yield
  moto.stop()


@contextlib.contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
  before = {name: os.environ.get(name) for name in values}
  os.environ.update(values)
  try:
    yield
  finally:
    for name, value in before.items():
      os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


@contextlib.contextmanager
def silent() -> Iterator[int]:
  """The port of a server that takes connections and never answers."""
  with socket.create_server(('127.0.0.1', 0), backlog=100) as server:
    yield server.getsockname()[1]


def unused() -> int:
  """A port on which nothing listens."""
  with socket.create_server(('127.0.0.1', 0)) as server:
    return server.getsockname()[1]


def store_of(url: str):
  return google() if url.startswith('gs') else amazon()


def soon(act) -> None:
  """`act` in a thread: the fake answers a request while it happens."""
  threading.Thread(target=act, daemon=True).start()


def first_wrong(problems: Sequence[str]) -> str:
  return next(filter(None, problems), '')
