"""Properties of the machine, found without JAX, because JAX fixes its devices when it starts."""

import glob
import os
from collections.abc import Mapping


def has_accelerator() -> bool:
  """True where a TPU or GPU device file exists; importing libtpu to find out would take seconds, or hang."""
  return any(glob.glob(pattern) for pattern in ('/dev/accel*', '/dev/vfio/[0-9]*', '/dev/nvidia[0-9]*', '/dev/kfd'))


def has_tpu() -> bool:
  """True where a device file of a TPU exists. A few machines without one have such files too (`/dev/vfio`)."""
  return any(glob.glob(pattern) for pattern in ('/dev/accel[0-9]*', '/dev/vfio/[0-9]*'))


def visible_gpus(environ: Mapping[str, str]) -> int:
  """NVIDIA GPUs that a process with this environment sees."""
  listed = environ.get('CUDA_VISIBLE_DEVICES')
  return len(glob.glob('/dev/nvidia[0-9]*')) if listed is None else len([x for x in listed.split(',') if x.strip()])


def set_threads(devices: int) -> None:
  """Gives XLA's CPU client two threads per simulated device or one per core, whichever is more; unless NPROC is set.

  If there are no more threads than devices, all threads can wait for each other in a collective, and a matrix product
  then loses part of its first block: with microbatches the gradient of the head was wrong by percents, at random
  (docs/LOG.md; jaxlib 0.10.2 and 0.12). Call before each start of a JAX backend.
  """
  if 'NPROC' not in os.environ or os.environ['NPROC'] in _set:
    _set[:] = [str(max(cores(), 2 * devices))]
    os.environ['NPROC'] = _set[0]


_set: list[str] = []  # the value that set_threads gave NPROC


def threads(devices: int) -> int:
  """Threads of XLA's CPU client with `devices` devices: NPROC, else one per core, and at least one per device."""
  number = os.environ.get('NPROC', '')
  return max(int(number) if number.isdigit() else cores(), devices)


def cores() -> int:
  return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
