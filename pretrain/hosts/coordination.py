"""What processes of a run exchange outside of collectives, over JAX's coordinator, each with a timeout."""

import collections
import itertools
import re
import signal
import threading
from typing import Self

import jax
from jax._src import distributed  # no public name has the client
from jax.experimental import multihost_utils

from pretrain.errors import HostError

SECONDS_BEFORE_TELLING = 2.0  # a longer activity is reported to the other processes, which may be waiting
SECONDS_TO_ANSWER = 600.0  # the slowest process may still write or hash its files
A_DAY = 86_400.0  # the longest that a barrier waits
FOLDER = 'pretrain/doing'


def host() -> int:
  """This process's number, without starting a backend."""
  return distributed.global_state.process_id


def barrier(name: str, seconds: float) -> None:
  """Returns when every process has reached `name`, which is used once in a run; 0 seconds means a day.

  Raises HostError (exit code 70) that names the processes that did not come in time, and what they were doing.
  """
  client, number = distributed.global_state.client, distributed.global_state.num_processes
  if client is None or number == 1:
    return
  try:
    client.wait_at_barrier(f'pretrain/{name}', int(1000 * (seconds or A_DAY)))
  except jax.errors.JaxRuntimeError as error:
    if 'DEADLINE_EXCEEDED' not in str(error):
      raise
    missing = missing_hosts(str(error))
    who = f'process {", ".join(map(str, missing))} has' if missing else 'some process has'
    raise HostError(
      f"{who} not reached the barrier '{name}' within {seconds:.0f} s of process {host()}{others()}. Saved steps are "
      'intact; the same command resumes.'
    ) from error


def missing_hosts(text: str) -> list[int]:
  """The processes that a barrier's error names as missing.

  >>> missing_hosts('# of tasks that reached the barrier: 1/3.\\nSome timed out task names:\\n2\\n1\\n\\nRPC: …')
  [1, 2]
  """
  listed = re.search(r'timed out task names:((?:\s+\d+)+)', text)
  return sorted(map(int, listed[1].split())) if listed else []


def tell(activity: str, step: int, serial: int) -> None:
  """Reports to the other processes what this one is doing; once for each time it began the activity."""
  client = distributed.global_state.client
  if client is None or _told.get('serial') == serial:
    return
  _told['serial'] = serial
  client.key_value_set(f'{FOLDER}/{host()}', f'{activity} {step}', allow_overwrite=True)


_told: dict[str, int] = {}


def doing() -> dict[int, tuple[str, int]]:
  """process -> (activity, steps completed) of the other processes, as they last reported."""
  client = distributed.global_state.client
  if client is None:
    return {}
  try:
    found = client.key_value_dir_get(FOLDER)
  except jax.errors.JaxRuntimeError:  # the coordinator has ended, and this process soon will
    return {}
  told = {int(key.rpartition('/')[2]): value.split() for key, value in found}
  return {other: (activity, int(step)) for other, (activity, step) in sorted(told.items()) if other != host()}


def others() -> str:
  """What the other processes are doing, as the end of a sentence."""
  listed = [f'{other}: {activity} since step {step}' for other, (activity, step) in doing().items()]
  return f'; other processes: {", ".join(listed)}' if listed else ''


NUMBERS: dict[str, itertools.count] = collections.defaultdict(itertools.count)  # makes the key of each question unique


def forget() -> None:
  """Counts questions from 0 again, as in processes that have just started: this process joins a new group."""
  NUMBERS.clear()
  _told.clear()


class Agreement:
  """Questions that all processes answer, in the same order."""

  @classmethod
  def about(cls, name: str) -> Self:
    """With a number of its own, so that a process that gave up the previous question is not out of step."""
    return cls(f'{name}/{next(NUMBERS[name])}')

  def __init__(self, name: str, seconds: float = SECONDS_TO_ANSWER):
    self._name, self._seconds = name, seconds

  def gather(self, answer: str) -> list[str]:
    """The answers of all processes, by their index. Raises HostError that names the first process without an answer."""
    if jax.process_count() == 1:
      return [answer]
    client, key = distributed.global_state.client, f'pretrain/{self._name}/{next(NUMBERS[self._name])}'
    client.key_value_set(f'{key}/{jax.process_index()}', f'={answer}')  # no value may be empty
    return [self._get(client, f'{key}/{process}', process) for process in range(jax.process_count())]

  def first(self, answer: str) -> str:
    """The answer of process 0."""
    return self.gather(answer)[0]

  def _get(self, client, key: str, process: int) -> str:
    try:
      return client.blocking_key_value_get(key, int(self._seconds * 1000))[1:]
    except jax.errors.JaxRuntimeError as error:
      raise HostError(
        f'process {process} of {jax.process_count()} did not answer within {self._seconds:g} s ({key})'
        f'{others()}. Finished checkpoints are intact; end all processes and run the same command again.'
      ) from error


class Interrupt:
  """Set by the first SIGTERM or Ctrl-C inside the block: the loop saves and leaves. A second one ends the process.

  If there are several processes, one SIGTERM to any of them stops all at the same step; JAX handles the signal there.
  """

  def __init__(self):
    self._received, self._previous = False, {}

  def __enter__(self):
    if distributed.global_state.num_processes == 1 and threading.current_thread() is threading.main_thread():
      self._previous = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}
    return self

  def __exit__(self, kind, error, trace):
    for number, previous in self._previous.items():
      signal.signal(number, previous)

  def at(self, step: int) -> bool:
    """Whether the run ends at `step`; the same in all processes, which must call this at each step."""
    if distributed.global_state.num_processes > 1 and not self._received:
      self._received = multihost_utils.reached_preemption_sync_point(step)
    return self._received

  def _handle(self, number, _frame):
    self._received = True
    signal.signal(number, self._previous[number])
