"""Is there an accelerator? Answered without JAX: starting it decides which devices it uses."""

import glob


def has_accelerator() -> bool:
  """True where a TPU or GPU device file exists; importing libtpu to find out would take seconds, or hang."""
  return any(glob.glob(pattern) for pattern in ('/dev/accel*', '/dev/vfio/[0-9]*', '/dev/nvidia[0-9]*', '/dev/kfd'))
