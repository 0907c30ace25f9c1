"""What the machine is, and what its compiler must be told."""

import glob
import importlib.metadata

FIRST_JAXLIB_WITHOUT_RACE = (0, 12)


def has_accelerator() -> bool:
  """True where a TPU or GPU device file exists. Without JAX: its start decides which devices it uses, and may hang."""
  return any(glob.glob(pattern) for pattern in ('/dev/accel*', '/dev/vfio/[0-9]*', '/dev/nvidia[0-9]*', '/dev/kfd'))


def compiler_options(platform: str) -> dict[str, str]:
  """For jax.jit: on the CPU, where jaxlib needs it, no reductions by YNNPACK.

  Through jaxlib 0.11 they race with other operations of their device: with microbatches, a block of 96 columns of the
  head's gradient came out up to three times too large, at random (docs/LOG.md; compare jax issue 39741).
  """
  version = tuple(int(part) for part in importlib.metadata.version('jaxlib').split('.')[:2])
  if platform != 'cpu' or version >= FIRST_JAXLIB_WITHOUT_RACE:
    return {}
  return {'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_DOT'}
