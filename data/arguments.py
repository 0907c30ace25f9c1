"""What a user writes on a command line, in a config or in an environment variable, as a path or as text."""

import argparse
import os
import pathlib


def expand_user(path: str) -> str:
  """`path` with a leading `~` or `~user` replaced by that home folder, as a shell does; any other path is unchanged.

  Where there is no such user the path stays as it is. A folder whose own name begins with ~ is written `./~name`.

  >>> expand_user('runs/x~1'), expand_user('gs://bucket/~x'), expand_user('./~x')
  ('runs/x~1', 'gs://bucket/~x', './~x')
  """
  return os.path.expanduser(path)


def path(text: str) -> pathlib.Path:
  """A flag that is a path. Expanded before it is a Path, which would turn `./~name` into `~name`."""
  return pathlib.Path(expand_user(text))


def is_text(value: str) -> bool:
  """Whether `value` can be written as UTF-8. Bytes of a command line that are not UTF-8 become lone surrogates."""
  return value.isascii() or not any('\ud800' <= char <= '\udfff' for char in value)


def text(value: str) -> str:
  """A flag that is text; raises ArgumentTypeError for bytes that are not UTF-8, which are legal only in paths."""
  if not is_text(value):
    raise argparse.ArgumentTypeError(f'{value!r} has bytes that are not UTF-8; write the text in UTF-8')
  return value
