"""The built-in corpus: real English text that every installation contains; nothing is downloaded.

It is the documentation of the Python standard library and of the packages that Pretrain installs. A document is all the
documentation strings of one file; a string that occurs in several files is kept once. One file in twenty, chosen by the
hash of its name, is held out. The stores are made once for each combination of package versions and vocabulary.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator

from rich.console import Console
from rich.progress import track

from data.prepare import docstrings
from data.prepare.prepare import tokenizer_from_documents
from data.stores.store import FORMAT, StoreWriter, open_store
from data.stores.vocabulary import MODES, Tokenizer

PACKAGES = (
  'absl', 'etils', 'flax', 'fsspec', 'gin', 'google', 'grain', 'jax', 'jaxtyping', 'markdown_it', 'matplotlib',
  'ml_collections', 'ml_dtypes', 'msgpack', 'numpy', 'opt_einsum', 'optax', 'orbax', 'PIL', 'pygments', 'rich', 'scipy',
  'sentencepiece', 'setuptools', 'tensorboardX', 'tensorstore', 'treescope', 'yaml',
)  # fmt: skip
ARRAYS = {
  'flax', 'grain', 'jax', 'jaxtyping', 'ml_dtypes', 'numpy', 'opt_einsum', 'optax', 'orbax', 'scipy', 'tensorstore',
  'treescope',
}  # fmt: skip
GROUPS = ('python', 'arrays', 'tools')  # the standard library; packages about arrays; the others
RECIPE = 1  # increase when a change of this module changes the text
HELDOUT_PERCENT = 5
MIN_DOCUMENT_CHARACTERS = 200
SAMPLE_BYTES = 4_000_000
SKIPPED = {'site-packages', 'dist-packages', '__pycache__', 'test', 'tests'}


def builtin_store(
  cache_dir: str | os.PathLike[str], vocab_size: int, sentinels: int
) -> tuple[pathlib.Path, pathlib.Path]:
  """(training store, held-out store) under `cache_dir`, made on first use (about half a minute), then reused.

  `vocab_size` counts all ids: pieces, sentinels and mode tokens. If several processes need the stores, one makes them
  and the others wait. Raises DataError if `vocab_size` leaves too few pieces.
  """
  folder = pathlib.Path(cache_dir) / 'builtin' / _key(vocab_size - sentinels - len(MODES))
  train, heldout = folder / 'train', folder / 'heldout'
  folder.mkdir(parents=True, exist_ok=True)
  with _exclusive(folder / 'lock'):
    if not (heldout.exists() and train.exists()):
      _build(train, heldout, vocab_size, sentinels)
  return train, heldout


def builtin_groups(
  cache_dir: str | os.PathLike[str], vocab_size: int, sentinels: int
) -> tuple[dict[str, pathlib.Path], pathlib.Path]:
  """({group: store}, held-out store): the training text of `builtin_store` split by `GROUPS`, with its tokenizer."""
  train, heldout = builtin_store(cache_dir, vocab_size, sentinels)
  groups = {name: train.with_name(f'train-{name}') for name in GROUPS}
  with _exclusive(train.with_name('lock')):
    if not all(path.exists() for path in groups.values()):
      _build_groups(groups, open_store(train).tokenizer(sentinels))
  return groups, heldout


@contextlib.contextmanager
def _exclusive(path: pathlib.Path) -> Iterator[None]:
  """Only one process of this machine is inside at a time. The kernel frees the lock of a killed process."""
  with path.open('w') as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


def versions() -> dict[str, str]:
  """The version of Python and of each distribution whose text is in the corpus."""
  names = importlib.metadata.packages_distributions()
  found = sorted({d for package in PACKAGES for d in names.get(package, ())})
  return {'python': sys.version.split()[0]} | {d: importlib.metadata.version(d) for d in found}


def _key(pieces: int) -> str:
  """The name of a corpus, derived from everything that its contents depend on."""
  inputs = json.dumps([RECIPE, FORMAT, versions(), importlib.metadata.version('sentencepiece')], sort_keys=True)
  return f'{pieces}-{hashlib.sha256(inputs.encode()).hexdigest()[:12]}'


def roots() -> dict[str, pathlib.Path]:
  """The folders of the standard library and of each installed package, by name."""
  found = {'python': pathlib.Path(sysconfig.get_paths()['stdlib'])}
  for package in PACKAGES:
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
      found[package] = pathlib.Path(folder)
  return found


def files() -> list[tuple[str, pathlib.Path]]:
  """(name, path) of every source file; the name, such as jax/numpy/linalg.py, is the same on every machine."""
  listed = []
  for name, root in roots().items():
    for path in root.rglob('*.py'):
      inside = path.relative_to(root)
      if not SKIPPED & set(inside.parts):
        listed.append((f'{name}/{inside.as_posix()}', path))
  return sorted(listed)


def documents() -> Iterator[tuple[str, str]]:
  """Yields (file name, text) of each document, sorted by file name; no documentation string occurs twice."""
  found = files()
  seen: set[bytes] = set()
  for (name, _), texts in zip(found, _extract_all([str(path) for _, path in found]), strict=True):
    fresh = []
    for text in texts:
      digest = hashlib.sha256(text.encode('utf-8', 'replace')).digest()
      if digest not in seen:
        seen.add(digest)
        fresh.append(text)
    if sum(map(len, fresh)) >= MIN_DOCUMENT_CHARACTERS:
      yield name, ' '.join(fresh)


def _extract_all(paths: list[str]) -> Iterator[list[str]]:
  """The documentation strings of each file, in order, extracted by one process per core."""
  count = min(len(os.sched_getaffinity(0)), 8)
  command = [sys.executable, '-I', docstrings.__file__]
  workers = [
    subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding='utf-8') for _ in range(count)
  ]
  try:
    # Round robin: all workers parse at the same time. The window of pending paths keeps the pipes from filling up.
    window = 8 * count
    for i in range(len(paths) + window):
      if i < len(paths):
        _send(workers[i % count], paths[i])
      if i >= window:
        yield json.loads(workers[i % count].stdout.readline())
  finally:
    for worker in workers:
      worker.kill()
      worker.communicate()


def _send(worker: subprocess.Popen, path: str) -> None:
  worker.stdin.write(json.dumps(path) + '\n')  # JSON, because a path may contain a newline
  worker.stdin.flush()


def is_heldout(name: str) -> bool:
  return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % 100 < HELDOUT_PERCENT


def group_of(name: str) -> str:
  """The group of a file of the corpus."""
  package = name.split('/')[0]
  return 'python' if package == 'python' else 'arrays' if package in ARRAYS else 'tools'


def _read() -> dict[str, str]:
  """name -> text of each document, ordered by hash, so that neighbouring rows come from different packages."""
  found = dict(_track(documents(), 'reading', len(files())))
  return {name: found[name] for name in sorted(found, key=lambda n: hashlib.sha256(b'order ' + n.encode()).digest())}


def _track(items: Iterable, what: str, total: int) -> Iterable:
  """A progress bar on a terminal; nothing elsewhere."""
  console = Console(stderr=True)
  return track(
    items, f'built-in corpus: {what}', total=total, transient=True, console=console, disable=not console.is_terminal
  )


def _build_groups(groups: dict[str, pathlib.Path], tokenizer: Tokenizer) -> None:
  found = _read()
  for group, path in groups.items():
    _write(path, [found[name] for name in found if not is_heldout(name) and group_of(name) == group], tokenizer)


def _build(train: pathlib.Path, heldout: pathlib.Path, vocab_size: int, sentinels: int) -> None:
  found = _read()
  training = [found[name] for name in found if not is_heldout(name)]
  tokenizer = tokenizer_from_documents(training, vocab_size, sentinels, sample_bytes=SAMPLE_BYTES)
  _write(train, training, tokenizer)
  _write(heldout, [found[name] for name in found if is_heldout(name)], tokenizer)


def _write(path: pathlib.Path, texts: list[str], tokenizer: Tokenizer) -> None:
  if path.exists():  # an earlier build was interrupted between the two stores
    return
  digest = hashlib.sha256('\n'.join(texts).encode('utf-8', 'replace')).hexdigest()
  with StoreWriter(path, tokenizer) as writer:
    threads = len(os.sched_getaffinity(0))
    for i in _track(range(0, len(texts), 256), path.name, -(-len(texts) // 256)):
      writer.add(tokenizer.encode_batch(texts[i : i + 256], threads))
    writer.finish(text_sha256=digest, source='documentation strings', packages=versions())
