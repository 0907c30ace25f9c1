"""Paths of stores: a path on a local disk is never read as a URL, whatever characters it contains.

Only text that begins with a scheme and `://` is a URL (`gs://bucket/x`). `./s3://x`, `file:x` and `a%20b` are paths.
"""

import atexit
import functools
import hashlib
import os
import re
import shutil
import tempfile
import urllib.parse

from data.errors import DataError

_URL = re.compile(r'([A-Za-z][A-Za-z0-9+.-]*)://')
_LOCK = '.__lock'  # TensorStore reserves this suffix


def is_local(path: str | os.PathLike[str]) -> bool:
  """Whether a path or URL is on a local disk.

  >>> [is_local(path) for path in ('a b', 'file:///a%20b', 'file:x', './s3://x', 's3://x')]
  [True, True, True, True, False]
  """
  found = _URL.match(os.fspath(path))
  return found is None or found[1].lower() == 'file'


def local_path(path: str | os.PathLike[str]) -> str:
  """A local path or file:// URL as a file system path, without a trailing slash.

  A file:// URL is decoded as in RFC 8089: `%20` is a space, and `%`, `?`, `#` must be written as `%25`, `%3F`, `%23`.
  Raises DataError for an empty path, a NUL, and an invalid file:// URL.

  >>> local_path('a%20b/'), local_path('file:///a%20b'), local_path('file:x')
  ('a%20b', '/a b', 'file:x')
  """
  text = os.fspath(path)
  text = _decoded(text) if _URL.match(text) else text
  if not text or '\0' in text:
    raise DataError(f'the path {text!r} is not valid for a store; give a folder, e.g. stores/mine.')
  return text.rstrip('/') or '/'


def _decoded(url: str) -> str:
  host, slash, name = url.partition('://')[2].partition('/')
  fix = 'write file:///absolute/path, or the path itself'
  if host not in ('', 'localhost'):
    raise DataError(f'{url} names the host {host!r}, but a file:// URL must be on this host; {fix}.')
  if found := re.search(r'[?#]|%(?![0-9A-Fa-f]{2})', name):
    raise DataError(f'{url} has a {found[0]} that is not written as %{ord(found[0]):02X}; {fix}.')
  return slash + urllib.parse.unquote(name, errors='surrogateescape')


def looked_in(path: str | os.PathLike[str]) -> str:
  """For messages about a missing relative path: the folder in which it was looked for. '' for any other path."""
  relative = is_local(path) and not os.path.isabs(local_path(path))
  return f' (looked for in {os.getcwd()})' if relative else ''


def absolute(path: str) -> str:
  """The absolute form of a local path. As in the kernel, `..` after a symbolic link is the parent of its target."""
  parts = os.path.join(os.getcwd(), path).split('/')
  if '..' not in parts:
    return os.path.abspath(path)
  last = len(parts) - parts[::-1].index('..')
  return os.path.abspath(os.path.join(os.path.realpath('/'.join(parts[:last])), *parts[last:]))


def plain_path(path: str) -> str:
  """An absolute path of a local file or folder that C++ libraries accept.

  TensorStore's file driver refuses names that contain a backslash or end in `.__lock`, and names that are not UTF-8
  cannot be passed at all. Such a path is replaced by a symbolic link to it in a temporary folder, which is removed when
  the process ends.
  """
  full = absolute(path)
  return _link(full) if _is_awkward(full) else full


def _is_awkward(path: str) -> bool:
  return '\\' in path or any(part.endswith(_LOCK) for part in path.split('/')) or not _is_utf8(path)


def _is_utf8(text: str) -> bool:
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True


def _link(target: str) -> str:
  link = os.path.join(_links(), hashlib.sha256(os.fsencode(target)).hexdigest()[:16])
  try:
    os.makedirs(_links(), exist_ok=True)
    if not os.path.lexists(link):
      os.symlink(target, link)
  except FileExistsError:  # another thread was faster
    pass
  except OSError as error:
    raise DataError(f'{target} cannot be opened through a symbolic link at {link} ({error.strerror}).') from error
  return link


@functools.cache
def _links() -> str:
  if _is_awkward(tempfile.gettempdir()):
    raise DataError(f'{tempfile.gettempdir()} cannot hold links to stores; set TMPDIR to a folder with a plain name.')
  folder, owner = tempfile.mkdtemp(prefix='pretrain-paths-'), os.getpid()
  # A process forked from this one shares the folder, and must not remove it when it ends.
  atexit.register(lambda: shutil.rmtree(folder, ignore_errors=True) if os.getpid() == owner else None)
  return folder


def with_names(text: str) -> str:
  """A message of TensorStore with the links of `plain_path` replaced by the real paths."""
  folder = _links() if _links.cache_info().currsize else None
  if folder is None or folder not in text:
    return text
  return re.sub(re.escape(folder) + '/[0-9a-f]{16}', lambda link: os.readlink(link[0]), text)
