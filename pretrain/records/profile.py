"""A trace of some steps of a run for TensorBoard's profiler: RUN/profile."""

import pathlib

import jax


class Profile:
  """Traces the steps from `steps[0]` until `steps[1]` is reached; None: no trace."""

  def __init__(self, workdir: pathlib.Path, steps: tuple[int, int] | None):
    self._folder, self._steps, self._open = workdir / 'profile', steps, False

  def at(self, step: int, state) -> None:
    """Begins or ends the trace where `step` is its first or last one. `state` is that of `step`."""
    if self._steps is None:
      return
    first, last = self._steps
    if step == first:
      jax.profiler.start_trace(self._folder)
      self._open = True
    elif step == last:
      self.stop(state)

  def stop(self, state) -> None:
    """Writes the trace, if one is open."""
    if self._open:
      jax.block_until_ready(state.step)
      jax.profiler.stop_trace()
      self._open = False
