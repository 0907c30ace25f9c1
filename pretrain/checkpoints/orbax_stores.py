"""What Orbax needs to write to gs:// and s3:// with the packages of the lock. The only file with its private names.

Orbax 0.12 refuses s3:// and imports google-cloud-storage for gs://. `use_stores` replaces four of its functions, for
URLs only: paths on a disk are handled as before. `missing_names` lists those that another version of Orbax has moved.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

from data.buckets import spec_of
from pretrain.errors import CheckpointError
from pretrain.workdirs import fsspec_bridge

NAMES = (
  ('gcs_utils', 'is_hierarchical_namespace_enabled'), ('gcs_utils', 'get_kvstore_for_gcs'),
  ('tensorstore_utils', '_use_gcs_driver'), ('tensorstore_utils', '_normalize_path'),
)  # fmt: skip
FILE_BYTES = 2**27  # of a file of arrays, and of a part of an array: one request, which is hashed in memory


def modules() -> dict[str, Any]:
  """Orbax's private modules that have NAMES."""
  from orbax.checkpoint._src.path import gcs_utils
  from orbax.checkpoint._src.serialization import tensorstore_utils

  return {'gcs_utils': gcs_utils, 'tensorstore_utils': tensorstore_utils}


def missing_names() -> list[str]:
  """The private names of Orbax that this version does not have."""
  try:
    there = modules()
  except ImportError as error:
    return [f'{error.name}']
  return [f'{there[module].__name__}.{name}' for module, name in NAMES if not hasattr(there[module], name)]


@functools.cache
def use_stores() -> None:
  """Orbax reads and writes gs:// and s3://. Raises CheckpointError if its version has moved a name."""
  if missing := missing_names():
    raise CheckpointError(
      'CKPT-ORBAX',
      f'this version of orbax-checkpoint has no {missing[0]}, which workdirs in a store need. Nothing was changed; '
      'install the version of requirements.lock, or use a --workdir on a disk.',
    )
  fsspec_bridge.register()
  paths, tensorstore_utils = modules().values()
  # Whether the bucket has real folders; it imports google.cloud.storage to find out. Both kinds list the same way.
  paths.is_hierarchical_namespace_enabled = lambda path: False
  paths.get_kvstore_for_gcs = _spec(paths.get_kvstore_for_gcs)
  tensorstore_utils._use_gcs_driver = is_url
  tensorstore_utils._normalize_path = normalized


def is_url(directory: str) -> bool:
  return directory.startswith(('gs://', 's3://'))


def normalized(path: str) -> str:
  """
  >>> normalized('s3://bucket/run/'), normalized('/a//b/')
  ('s3://bucket/run', '/a/b')
  """
  scheme, mark, rest = path.partition('://')
  return f'{scheme}{mark}{os.path.normpath(rest)}' if is_url(path) else os.path.normpath(path)


def _spec(of_gcs: Callable[[str], Any]) -> Callable[[str], Any]:
  """TensorStore's spec of a folder of arrays; Orbax's own for gs://."""
  return lambda path: spec_of(f'{path.rstrip("/")}/') if path.startswith('s3://') else of_gcs(path)
