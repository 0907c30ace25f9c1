"""`Folder`: a path on a disk, or of an object store. Every signature that takes a workdir takes one.

On a disk it is a `pathlib.Path`. Text that begins with gs:// or s3:// is a `StorePath`: `pathlib.Path` would turn
`gs://b` into the relative path `gs:/b`.
"""

import os
import pathlib
import re

from pretrain.errors import ConfigError
from pretrain.redact import redact
from pretrain.workdirs.store_path import StorePath

Folder = pathlib.Path | StorePath
SCHEME = re.compile(r'([A-Za-z][A-Za-z0-9+.-]*)://')
# A bucket, then names without a part that is empty, `.` or `..`: an object store would take them as they are written,
# and Orbax would not.
URL = re.compile(r'(gs|s3)://[a-z0-9][a-z0-9._-]+(/(?!\.{1,2}(/|$))[^/?#%\\]+)*/?')


def as_folder(text: str | os.PathLike[str] | StorePath, flag: str = '--workdir') -> Folder:
  """The path or URL as a `Folder`. Raises ConfigError for a URL of another kind, and for credentials in a URL."""
  if isinstance(text, StorePath):
    return text
  name = os.fspath(text)
  if not SCHEME.match(name):
    return pathlib.Path(name)
  if redact(name) != name:
    raise ConfigError(
      f'{flag}={redact(name)} has credentials in it; a URL is saved and printed. Nothing was read or written; remove '
      'them, and give them in the environment (AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS).'
    )
  if not URL.fullmatch(name):
    raise ConfigError(
      f'{flag}={name} is not the URL of a folder in a store. Nothing was read or written; write gs://BUCKET/FOLDER or '
      's3://BUCKET/FOLDER (no ?, #, % or backslash), or a path.'
    )
  return StorePath(name)


def write_whole(path: Folder, text: str) -> None:
  """The file has the new text or, if this is cut off, the old one."""
  if isinstance(path, StorePath):
    path.write_text(text)
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_suffix(path.suffix + '.tmp')
  temporary.write_text(text, encoding='utf-8')
  temporary.replace(path)
