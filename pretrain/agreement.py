"""What several processes tell each other about files, through the coordination service: no device takes part.

A device collective has no timeout: a peer that is stuck would be waited for for ever. Here the one who is missing is
named.
"""

import collections
import itertools
from typing import Self

import jax
from jax._src import distributed

from pretrain.errors import HostError

SECONDS = 600  # the slowest process still writes or hashes its files


NUMBERS: dict[str, itertools.count] = collections.defaultdict(itertools.count)  # no question has the key of another


class Agreement:
  """Questions, which all processes answer in the same order."""

  @classmethod
  def about(cls, name: str) -> Self:
    """With a number of its own, so that whoever gave up the one before it is not out of step with the others."""
    return cls(f'{name}/{next(NUMBERS[name])}')

  def __init__(self, name: str, seconds: float = SECONDS):
    self._name, self._seconds = name, seconds

  def gather(self, answer: str) -> list[str]:
    """The answers of all processes, by their index. Raises HostError that names the first one who gave none."""
    if jax.process_count() == 1:
      return [answer]
    client, key = distributed.global_state.client, f'pretrain/{self._name}/{next(NUMBERS[self._name])}'
    client.key_value_set(f'{key}/{jax.process_index()}', f'={answer}')  # no value may be empty
    return [self._get(client, f'{key}/{process}', process) for process in range(jax.process_count())]

  def first(self, answer: str) -> str:
    """What process 0 says."""
    return self.gather(answer)[0]

  def _get(self, client, key: str, process: int) -> str:
    try:
      return client.blocking_key_value_get(key, int(self._seconds * 1000))[1:]
    except jax.errors.JaxRuntimeError as error:
      raise HostError(
        f'process {process} of {jax.process_count()} did not answer within {self._seconds:g} s ({key}). Finished '
        'checkpoints are intact; end all processes and run the same command again.'
      ) from error
