"""$PRETRAIN_CACHE: compiled programs, plans and built corpora. Where it is a store, hosts share all but the corpora."""

import os
import pathlib

from data.arguments import expand_user
from pretrain.workdirs.folder import as_folder

DEFAULT = '~/.cache/pretrain'


def cache_url() -> str | None:
  """The URL in $PRETRAIN_CACHE; None where that is a folder of this host, or nothing. Raises ConfigError for others."""
  found = os.environ.get('PRETRAIN_CACHE', '')
  if '://' not in found:
    return None
  return str(as_folder(found, 'PRETRAIN_CACHE'))


def local_cache_dir() -> pathlib.Path:
  """The folder of this host in which things are kept: $PRETRAIN_CACHE unless that is a URL, else ~/.cache/pretrain."""
  return pathlib.Path(expand_user(DEFAULT if cache_url() else os.environ.get('PRETRAIN_CACHE', DEFAULT)))
