"""One save, after its arrays are copied: wait for the files, hash them, write the manifest, remove old steps.

It runs in a background thread of every process. All processes agree how it ended: the step exists for all or for none.
"""

import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping

import jax

from pretrain.checkpoints import manifest, step_folders
from pretrain.checkpoints.manifest import File, Leaf, Manifest
from pretrain.errors import CheckpointError, ConfigError, HostError
from pretrain.hosts.coordination import Agreement
from pretrain.replicas import digest
from pretrain.workdirs.folder import Folder
from pretrain.workdirs.refusals import reason_of
from pretrain.workdirs.store_path import StorePath


class Saving:
  """A save under way. `error` is why it failed, in any process; None if the step exists."""

  def __init__(
    self,
    folder: Folder,
    leaves: Mapping[str, tuple[jax.ShapeDtypeStruct, digest.Sums]],
    scores: Mapping[str, float],
    wait: Callable[[], None],
    retain: Callable[[], None],
    before_commit: Callable[[], None] = lambda: None,
  ):
    self.step, self.size, self.seconds = int(folder.name), 0, 0.0
    self.error: Exception | None = RuntimeError('it has not ended')
    self.untidy: Exception | None = None  # why old steps could not be removed
    self._folder, self._leaves, self._scores, self._agreement = folder, leaves, scores, Agreement.about('save')
    self._wait, self._retain, self._files = wait, retain, dict[str, File]()
    self._start, self._before_commit = time.perf_counter(), before_commit
    self._thread = threading.Thread(target=self._run, name=f'save_{self.step}')
    self._thread.start()

  def ended(self) -> bool:
    return not self._thread.is_alive()

  def join(self) -> None:
    self._thread.join()

  def _run(self) -> None:
    self.error = self._agreed(self._write_files) or self._agreed(self._commit)
    self.seconds = time.perf_counter() - self._start
    if jax.process_index() == 0:
      self._clear()

  def _agreed(self, act: Callable[[], None]) -> Exception | None:
    """The error that `act` raised, here or in another process."""
    own, errors = None, []
    try:
      act()
    except Exception as error:
      own = error
    try:
      errors = self._agreement.gather('' if own is None else str(own) or type(own).__name__)
    except HostError as error:
      own = own or error
    others = [f'process {i}: {error}' for i, error in enumerate(errors) if error]
    return own or (RuntimeError(others[0]) if others else None)

  def _clear(self) -> None:
    """Removes old steps that no rule keeps, or the remains of a failed save, whose space may be needed."""
    if isinstance(self.error, ConfigError):  # the workdir belongs to another run, which may be writing this step
      return
    try:
      if self.error is None:
        self._retain()
      elif step_folders.kind_of(self._folder) == 'finished':  # by another writer; or a peer has ended after the commit
        step_folders.end(self._folder.parent, self.step)
      elif threading.main_thread().is_alive():
        # Otherwise Python is exiting while Orbax still writes: the mark stays, and the next start removes everything.
        step_folders.discard(self._folder.parent, self.step)
    except OSError as error:
      self.untidy = error

  def _write_files(self) -> None:
    """Returns when the files of this process are on the disk and hashed."""
    self._wait()
    index = jax.process_index()
    self._files = manifest.hash_files(self._folder, [n for n in manifest.names_in(self._folder) if owner(n) == index])
    if index:
      manifest.write_part(self._folder, index, self._files)

  def _commit(self) -> None:
    """Process 0 joins the hashes of all processes and writes the manifest."""
    leaves = {k: Leaf(tuple(x.shape), str(x.dtype), digest.text(sums)) for k, (x, sums) in self._leaves.items()}
    if jax.process_index():
      return
    files = dict(self._files)
    for process in range(1, jax.process_count()):
      files |= manifest.take_part(self._folder, process)
    whole = Manifest(self.step, files, leaves, self._scores, manifest.versions())
    self._before_commit()
    manifest.write(self._folder, whole)
    step_folders.end(self._folder.parent, self.step)
    self.size = whole.size


def failure(directory: Folder, step: int, needed: float, error: Exception) -> CheckpointError:
  """The error of a save that needed `needed` MiB and failed with `error`."""
  if isinstance(directory, StorePath):
    what = reason_of(directory.url, error)
  elif any(word in str(error) for word in NO_SPACE):
    free = shutil.disk_usage(directory).free / 2**20
    text = (
      f'saving step {step} needs {needed:.0f} MiB, {free:.0f} MiB free on {directory}. Earlier steps are intact. Free '
      'space.'
    )
    return CheckpointError('CKPT-NOSPACE', text)
  else:
    what = str(error).splitlines()[0][:300]
  return CheckpointError('CKPT-WRITE', f'saving step {step} in {directory} failed: {what}. Earlier steps are intact.')


NO_SPACE = ('RESOURCE_EXHAUSTED', 'No space left', 'File too large')


def owner(name: str) -> int:
  """The process that writes a file: process 2 for state/ocdbt.process_2/…, process 0 for names without a process."""
  found = re.search(r'process_(\d+)(?:/|$)', name)
  return int(found[1]) if found else 0
