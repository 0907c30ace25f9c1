"""What the machine is; answered without JAX, whose start decides which devices it uses."""

import glob
import os


def has_accelerator() -> bool:
  """True where a TPU or GPU device file exists; importing libtpu to find out would take seconds, or hang."""
  return any(glob.glob(pattern) for pattern in ('/dev/accel*', '/dev/vfio/[0-9]*', '/dev/nvidia[0-9]*', '/dev/kfd'))


def set_threads(devices: int) -> None:
  """Gives XLA's CPU client two threads a simulated device, or one a core, whichever is more; unless NPROC is set.

  With no more threads than devices all of them can wait for each other in a collective, and a matrix product then
  loses part of its first block: with microbatches the head's gradient was wrong by percents, at random (docs/LOG.md;
  jaxlib 0.10.2 and 0.12). Call before a JAX backend starts; again before another one.
  """
  if 'NPROC' not in os.environ or os.environ['NPROC'] in _set:
    _set[:] = [str(max(cores(), 2 * devices))]
    os.environ['NPROC'] = _set[0]


_set: list[str] = []  # what NPROC was set to here


def threads(devices: int) -> int:
  """Threads of XLA's CPU client with `devices` devices: NPROC, else one a core, and at least one a device."""
  number = os.environ.get('NPROC', '')
  return max(int(number) if number.isdigit() else cores(), devices)


def cores() -> int:
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
