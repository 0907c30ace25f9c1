"""One snapshot under way, in a background thread, and how it ended."""

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

from jax import Array

from pretrain.snapshots.layout import Piece


@dataclasses.dataclass(frozen=True)
class Taken:
  """How a snapshot ended: seconds the step waited, seconds until it was usable, bytes on this host; `error` or ''."""

  step: int
  stall: float
  seconds: float
  size: int
  error: str = ''

  def metrics(self) -> dict[str, float]:
    cost = {'snapshot_stall': self.stall, 'snapshot_seconds': self.seconds, 'snapshot_mib': self.size / 2**20}
    return {'snapshot_step': self.step} | cost


class Taking:
  """A snapshot under way, in a background thread."""

  def __init__(
    self,
    step: int,
    copies: list[tuple[Piece, Array]],
    position: dict[str, Any],
    write: Callable[['Taking'], int],
    known: bool,
  ):
    self.step, self.copies, self.position, self.stall = step, copies, position, 0.0
    self.known, self.cancelled = threading.Event(), ''
    if known:
      self.known.set()
    self._write, self._size, self._error = write, 0, ''
    self._began, self._seconds = time.perf_counter(), 0.0
    self._thread = threading.Thread(target=self._run, name=f'snapshot_{step}', daemon=True)

  def start(self, stall: float) -> None:
    """Starts the thread. `stall`: the seconds that a step has waited for the copies."""
    self.stall = stall
    self._thread.start()

  def ended(self) -> bool:
    return not self._thread.is_alive()

  def cancel(self) -> None:
    self.cancelled = 'the process ends'
    self.known.set()
    self._thread.join(5.0)

  def outcome(self) -> Taken:
    return Taken(self.step, self.stall, self.stall + self._seconds, self._size, self._error)

  def _run(self) -> None:
    try:
      self._size = self._write(self)
    except Exception as error:  # any error: training continues and reports it
      self._error = str(error) or type(error).__name__
    self._seconds = time.perf_counter() - self._began
