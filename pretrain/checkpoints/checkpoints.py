"""Checkpoints: state, data position and config of a step, written while training continues, verified when read."""

import contextlib
import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax

from pretrain.checkpoints import manifest, step_folders
from pretrain.checkpoints.config import CheckpointConfig
from pretrain.checkpoints.orbax_files import SMALL_FILE, Files
from pretrain.checkpoints.saving import Saving, failure
from pretrain.checkpoints.stored import Stored
from pretrain.checkpoints.wording import among, first_of, shown
from pretrain.errors import CheckpointError, ConfigError
from pretrain.hosts.coordination import Agreement
from pretrain.replicas import digest
from pretrain.step.train_step import TrainState
from pretrain.workdirs.folder import Folder, as_folder


@dataclasses.dataclass(frozen=True)
class Restored:
  state: TrainState
  position: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Saved:
  """How a save ended: seconds that training waited, seconds until it was complete, bytes; `error` if it failed."""

  step: int
  stall: float
  seconds: float
  size: int
  error: CheckpointError | None = None
  untidy: OSError | None = None  # why old steps could not be removed

  def metrics(self) -> dict[str, float]:
    return {'save_stall': self.stall, 'save_seconds': self.seconds, 'save_mib': self.size / 2**20}


class DamagedError(CheckpointError):
  """A step whose files are intact but whose values differ from the saved ones; an older step may be undamaged."""

  def __init__(self, message: str):
    super().__init__('CKPT-CORRUPT', message)


class Checkpoints:
  """The checkpoints of one run, in `workdir/checkpoints/<step>`.

  A step exists once it has its MANIFEST.json, which is written last and lists every file and array. Whatever is read
  is compared with it. Steps from before there were manifests are read too, with a warning that they are unverified.
  """

  def __init__(
    self, workdir: Folder, cfg: CheckpointConfig, *, read_only: bool = False,
    before_commit: Callable[[], None] = lambda: None,
  ):  # fmt: skip
    """`before_commit` is called by process 0 before a step begins to exist; if it raises, the save has failed."""
    self.directory = as_folder(workdir).resolve() / 'checkpoints'
    self._cfg, self._read_only, self._before_commit = cfg, read_only, before_commit
    self._files = Files(self.directory, read_only=read_only)
    self._saving: Saving | None = None
    self._stall, self._failures, self._ended = 0.0, 0, list[Saved]()
    self._whole = set[int]()  # steps whose files were compared
    self._damaged: dict[int, str] = {}  # step -> its damage, for steps that a run tried to resume from
    self._agreement = Agreement('restore')

  def latest(self) -> int | None:
    """The newest finished step on disk, damaged or not."""
    return max(step_folders.finished(self.directory), default=None)

  def finished(self) -> list[int]:
    """Every step on disk, oldest first, after the save under way has ended."""
    self._settle()
    return step_folders.finished(self.directory)

  def newest_whole(self, after: int | None = None) -> int | None:
    """The newest step whose files match its manifest, for a run to resume from; the same one in all processes.

    None if there is no such step. With `after` (a step that a snapshot has), older steps are not read, and damaged ones
    are set aside. Raises CKPT-CORRUPT if there are checkpoints but none is intact: no run starts at step 0 over them.
    """
    if jax.process_index() == 0:
      step_folders.tidy(self.directory)
    seen = [[*reversed(step_folders.folders(self.directory))], step_folders.quarantined(self.directory)]
    steps, aside = json.loads(self._agreement.first(json.dumps(seen)))
    for step in (step for step in steps if after is None or step >= after):
      if not (reason := self._damaged.get(step) or self.damage(step)):
        return step
      self._damaged[step] = reason
    if after is not None:
      self._put_aside(after)
    elif self._damaged or aside:
      raise step_folders.none_left(self.directory, self._damaged, aside)
    return None

  def damage(self, step: int) -> str:
    """What is wrong with the files of `step`, '' if nothing; each process reads its share of them."""
    count, folder = jax.process_count(), self.directory / str(step)
    if step_folders.kind_of(folder) == 'unverified':
      reason = ''
    else:
      try:
        written = manifest.read(folder)
        mine = sorted(written.files)[jax.process_index() :: count]
        reason = first_of(manifest.damage(folder, written, mine))
      except ValueError as error:
        reason = str(error)
    reason = next(filter(None, self._agreement.gather(reason) if not self._read_only else [reason]), '')
    if not reason:
      self._whole.add(step)
    return reason

  def _put_aside(self, whole: int) -> None:
    """Renames the damaged steps once `whole` has been read: if no step can be read, the fault may be elsewhere."""
    for step, reason in self._damaged.items() if jax.process_index() == 0 else ():
      name = step_folders.quarantine(self.directory, step)
      print(
        f'CKPT-CORRUPT: step {step} of {self.directory}: {reason}. Quarantined as {name}; resuming from step {whole}. '
        'Nothing deleted.',
        file=sys.stderr,
      )
    if self._damaged:
      self._agreement.gather('renamed')
      self._files.reload()
    self._damaged.clear()

  def save(
    self,
    step: int,
    state: TrainState,
    position: dict[str, Any],
    config: str,
    scores: Mapping[str, float] | None = None,
  ) -> None:
    """Returns when the arrays are copied. The files are written in the background; `poll` reports how that ended.

    Raises the error of the previous save if no retry is left.
    `scores` is the evaluation of this step, for `checkpoint.best_of`.
    """
    self._save(step, _as_dict(state), position, config, scores or {})

  def save_params(self, step: int, params: Any, position: dict[str, Any], config: str) -> None:
    """Writes a step that holds only parameters (an average or a merge). A run can start from it, but not resume.

    The host needs about 0.3 GB beside the parameters: nothing trains meanwhile, so the files may be many and small.
    """
    self._save(step, {'params': params}, position, config, {}, SMALL_FILE)

  def _save(
    self, step: int, tree: dict[str, Any], position: dict[str, Any], config: str, scores, file_bytes: int | None = None
  ) -> None:
    start = time.perf_counter()
    self._settle()
    if self._ended and self._ended[-1].error and self._failures > self._cfg.retries:
      raise self._ended[-1].error  # no other save is started
    if (self.directory / str(step)).exists():
      raise CheckpointError('CKPT-EXISTS', f'step {step} is already in {self.directory}; it was not overwritten.')
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    leaves = {digest.key_of(path): x for path, x in jax.tree_util.tree_flatten_with_path(shapes)[0]}

    def write() -> None:
      if jax.process_index() == 0:
        step_folders.begin(self.directory, step)
      self._files.begin(step, tree, position, config, file_bytes)

    failed = _error_of(write)
    sums = digest.digests(tree)  # dispatched before the next step reuses the arrays

    def wait() -> None:
      if failed is not None:
        raise failed
      self._files.wait()

    self._saving = Saving(
      self.directory / str(step), {key: (x, sums[key]) for key, x in leaves.items()},
      {key: value for key, value in scores.items() if math.isfinite(value)}, wait, self._retain,
      self._before_commit,
    )  # fmt: skip
    self._needed = _mebibytes(tree)
    self._stall = time.perf_counter() - start

  def poll(self, *, wait: bool = False) -> list[Saved]:
    """The saves that ended since the last call; with `wait` also the one under way.

    A failed save is in the list. Its error is raised once more than `checkpoint.retries` saves in a row have failed.
    """
    if self._saving is not None and (wait or self._saving.ended()):
      self._settle()
    ended, self._ended = self._ended, []
    errors = [saved.error for saved in ended if saved.error]
    if errors and self._failures > self._cfg.retries:
      raise errors[-1]
    return ended

  def close(self) -> None:
    """Waits for the last save; raises its error if `poll` did not report it."""
    self._settle()
    self._files.close()
    if failed := [saved.error for saved in self._ended if saved.error]:
      raise failed[-1]

  def _settle(self) -> None:
    """Waits for the save under way, if there is one."""
    saving, self._saving = self._saving, None
    if saving is None:
      return
    saving.join()
    if isinstance(saving.error, ConfigError):  # the workdir belongs to another run: it is not to be tried again
      raise saving.error
    error = None if saving.error is None else failure(self.directory, saving.step, self._needed, saving.error)
    self._failures = self._failures + 1 if error else 0
    self._ended.append(Saved(saving.step, self._stall, saving.seconds, saving.size, error, saving.untidy))
    if error:
      self._files.give_up()

  def _retain(self) -> None:
    """Removes the steps that no rule keeps. Orbax would do so before the new step has its manifest."""
    cfg, steps = self._cfg, step_folders.finished(self.directory)
    scores = step_folders.scores_of(self.directory, steps, cfg.best_of) if cfg.best_of else {}
    kept = {'keep': cfg.keep, 'keep_every': cfg.keep_every, 'keep_best': cfg.keep_best}
    for step in step_folders.superfluous(steps, scores, **kept):
      step_folders.remove(self.directory, step)

  def restore(self, abstract: TrainState, step: int) -> Restored:
    """The state of `step`, each array placed as in `abstract` (any mesh); shapes and dtypes are checked first.

    Raises CheckpointError: CKPT-MISMATCH if the model differs, CKPT-PARAMS if the step holds only parameters,
    CKPT-CORRUPT if the files cannot be read; DamagedError if values differ from the manifest: then call `newest_whole`
    again. Steps that `newest_whole` found damaged are set aside as `<step>.corrupt`, with a line on stderr.
    """
    with self._reading(step):
      self._check_whole(step)
      self._check_tree(_as_dict(abstract), step)
      state, position = self._files.state(step, _as_dict(abstract)), self._files.position(step)
    if wrong := self._wrong_values(state, step):
      if self._read_only:
        raise self._corrupt(step, wrong)
      self._damaged[step] = wrong
      raise DamagedError(f'step {step} of {self.directory}: {wrong}. Nothing was deleted.')
    if missing := {'loader', 'data'} - position.keys():
      raise self._corrupt(step, f'its position has no {min(missing)!r}')
    if not self._read_only:
      self._put_aside(step)
    return Restored(dataclasses.replace(abstract, **state), position)

  def restore_params(self, abstract: Any, step: int, *, ema: bool = False) -> Any:
    """Only the parameters of `step`, or with `ema` their moving average; shapes are checked first."""
    tree = {'extra': {'ema': abstract}} if ema else {'params': abstract}
    with self._reading(step):
      if ema and 'ema' not in (self._files.metadata(step).get('extra') or {}):
        raise CheckpointError(
          'CKPT-NONE', f"step {step} of {self.directory} has no moving average: averaging.name was not 'ema' there."
        )
      state = self._read(tree, step)
    return state['extra']['ema'] if ema else state['params']

  def restore_parts(self, abstract: dict[str, Any], step: int) -> dict[str, Any]:
    """Some parts (`opt_state`, …) of the state of `step`, which holds a whole state; checked as in `restore`."""
    with self._reading(step):
      self._check_whole(step)
      return self._read(abstract, step)

  def _read(self, abstract: dict[str, Any], step: int) -> dict[str, Any]:
    self._check_tree(abstract, step)
    state = self._files.state(step, abstract)
    if wrong := self._wrong_values(state, step):
      raise self._corrupt(step, wrong)
    return state

  def shapes(self, step: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Every array of `step` by its path, without its values."""
    with self._reading(step):
      found = _leaves(self._files.metadata(step))
    return {digest.key_of(path): jax.ShapeDtypeStruct(tuple(x.shape), x.dtype) for path, x in found}

  def arrays(self, step: int, keys: Collection[str]) -> dict[str, jax.Array]:
    """The arrays of `step` at these paths, on the first device; they are not compared with the manifest."""
    with self._reading(step):
      state = self._files.some(step, lambda path: digest.key_of(path) in keys)
    return {key: x for path, x in _leaves(state) if (key := digest.key_of(path)) in keys}

  def stored(self, step: int, keys: Collection[str]) -> dict[str, Stored]:
    """The arrays of `step` at these paths, to read in parts; their values are not compared with the manifest."""
    with self._reading(step):
      folder, corrupt = self.directory / str(step), functools.partial(self._corrupt, step)
      return {key: Stored(folder, key, corrupt) for key in keys}

  def position(self, step: int) -> dict[str, Any]:
    """The data position that was saved with `step`."""
    with self._reading(step):
      return self._files.position(step)

  def _wrong_values(self, tree: Any, step: int) -> str:
    """Which values differ from the saved ones: damage on the way to or from the disk, which file hashes cannot show."""
    if step_folders.kind_of(self.directory / str(step)) == 'unverified':
      return ''
    leaves = manifest.read(self.directory / str(step)).leaves
    wrong = digest.differing({key: leaf.digest for key, leaf in leaves.items()}, tree)
    return first_of([f'the values of {key} differ from those that were saved' for key in wrong])

  def _check_whole(self, step: int) -> None:
    if 'opt_state' not in self._files.metadata(step):
      raise CheckpointError(
        'CKPT-PARAMS',
        f'step {step} of {self.directory} holds only parameters (it is an average or a merge), so no run can resume '
        f'from it. Start one: --workdir=NEW --gin.checkpoint.initial="\'{self.directory.parent}/{step}\'".',
      )

  def _check_tree(self, abstract: dict[str, Any], step: int) -> None:
    """Raises CKPT-MISMATCH if the parts of the state in `abstract` differ in shape or dtype from those of `step`."""
    parts = {name: tree for name, tree in self._files.metadata(step).items() if name in abstract}
    stored = {digest.key_of(path): (tuple(x.shape), str(x.dtype)) for path, x in _leaves(parts)}
    wanted = {digest.key_of(path): (tuple(x.shape), str(x.dtype)) for path, x in _leaves(abstract)}
    bad = [k for k in sorted(stored.keys() | wanted.keys()) if stored.get(k) != wanted.get(k)]
    if bad:
      raise CheckpointError(
        'CKPT-MISMATCH',
        f'{bad[0]} is {shown(stored.get(bad[0]))} in step {step} of {self.directory}, {shown(wanted.get(bad[0]))} in '
        f'the model ({among(bad)}). Nothing was changed; use the config in {self.directory.parent}/config.gin.',
      )

  @contextlib.contextmanager
  def _reading(self, step: int) -> Iterator[None]:
    """Inside, the files match the manifest; an error of Orbax becomes one CheckpointError."""
    if step not in self._whole and (reason := self.damage(step)):
      raise self._corrupt(step, reason)
    if step_folders.kind_of(self.directory / str(step)) == 'unverified' and jax.process_index() == 0:
      print(
        f'CKPT-UNVERIFIED: step {step} of {self.directory} was written without a manifest; its values are not checked.',
        file=sys.stderr,
      )
    try:
      yield
    except Exception as error:
      cause = error.__cause__ if type(error) is Exception else error  # Orbax wraps TensorStore's errors like this
      if not isinstance(cause, ValueError | KeyError | OSError):
        raise
      raise self._corrupt(step, str(cause).splitlines()[0][:300]) from error

  def _corrupt(self, step: int, what: str) -> CheckpointError:
    earlier = [s for s in step_folders.finished(self.directory) if s < step]
    then = f'use step {max(earlier)}' if earlier else 'start again in another --workdir'
    return CheckpointError(
      'CKPT-CORRUPT',
      f'step {step} of {self.directory} cannot be read: {what}. Nothing was changed; restore its files from a copy, or '
      f'{then}.',
    )


def _as_dict(state: TrainState) -> dict[str, Any]:
  return {'step': state.step, 'params': state.params, 'opt_state': state.opt_state, 'extra': state.extra}


def _leaves(tree):
  return jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: hasattr(x, 'shape'))[0]


def _error_of(act: Callable[[], None]) -> Exception | None:
  try:
    act()
  except Exception as error:
    return error
  return None


def _mebibytes(tree) -> float:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / 2**20
