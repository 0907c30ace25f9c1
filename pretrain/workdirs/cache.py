"""$PRETRAIN_CACHE: compiled programs, built corpora and plans, shared by processes; in a store, by hosts too."""

import os
import pathlib

from data.arguments import expand_user

DEFAULT = '~/.cache/pretrain'


def cache_url() -> str | None:
  """The URL in $PRETRAIN_CACHE; None where that is a folder of this host, or nothing."""
  found = os.environ.get('PRETRAIN_CACHE', '')
  return found.rstrip('/') if found.startswith(('gs://', 's3://')) else None


def local_cache_dir() -> pathlib.Path:
  """The folder of this host in which things are kept: $PRETRAIN_CACHE unless that is a URL, else ~/.cache/pretrain."""
  return pathlib.Path(expand_user(DEFAULT if cache_url() else os.environ.get('PRETRAIN_CACHE', DEFAULT)))
