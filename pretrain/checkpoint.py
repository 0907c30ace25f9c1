"""Checkpoints: the state, the data position and the config of a step, written asynchronously. The only orbax import."""

import contextlib
import dataclasses
import logging
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import args

from pretrain.errors import CheckpointError
from pretrain.experiment import CheckpointConfig
from pretrain.step import TrainState


@dataclasses.dataclass(frozen=True)
class Restored:
  state: TrainState
  position: dict[str, Any]


class Checkpoints:
  """The checkpoints of one run, in `workdir/checkpoints/<step>`.

  A step exists when its commit file does: a save that was cut off is invisible and is cleaned up at the next start.
  """

  def __init__(self, workdir: pathlib.Path, cfg: CheckpointConfig, *, read_only: bool = False):
    self.directory = pathlib.Path(workdir).resolve() / 'checkpoints'
    self._cfg = cfg
    logging.getLogger('absl').setLevel(logging.ERROR)  # Orbax tells a reader what the options below say
    options = ocp.CheckpointManagerOptions(
      max_to_keep=None if read_only else cfg.keep,
      keep_period=cfg.keep_every,
      cleanup_tmp_directories=not read_only,  # a killed save would keep its space for ever
      create=not read_only,
      read_only=read_only,
      # The default on a local disk does not look for the commit file when it reads.
      atomicity_options=ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE),
    )
    handlers = {
      'state': ocp.PyTreeCheckpointHandler(),
      'position': ocp.JsonCheckpointHandler(),
      'config': ocp.JsonCheckpointHandler(),
    }
    self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

  def latest(self) -> int | None:
    """The newest committed step on disk. Ask before the first save: afterwards Orbax counts steps in flight too."""
    return self._manager.latest_step()

  def finished(self) -> list[int]:
    """Every step on disk, oldest first, after the last save has ended; raises what it failed with."""
    self._wait()
    return sorted(self._manager.all_steps())

  def save(self, step: int, state: TrainState, position: dict[str, Any], config: str) -> None:
    """Returns when the arrays are copied; the files are written behind. Raises what an earlier save failed with."""
    self._save(step, _as_dict(state), position, config)

  def save_params(self, step: int, params: Any, position: dict[str, Any], config: str) -> None:
    """A step that holds parameters alone: what averages and merges are. A run can start from it, not go on."""
    self._save(step, {'params': params}, position, config)

  def _save(self, step: int, tree: dict[str, Any], position: dict[str, Any], config: str) -> None:
    items = args.Composite(
      state=args.PyTreeSave(tree),
      position=args.JsonSave(position),
      config=args.JsonSave({'text': config}),
    )
    try:
      saved = self._manager.save(step, args=items)
    except Exception as error:
      raise self._failure(step, tree, error) from error
    if not saved:
      raise CheckpointError('CKPT-EXISTS', f'step {step} is already in {self.directory}; it was not overwritten.')

  def restore(self, abstract: TrainState, step: int) -> Restored:
    """The state of `step`, each array placed as in `abstract` (any mesh); shapes and dtypes are checked first.

    Raises CheckpointError: CKPT-MISMATCH where the model is another one, CKPT-PARAMS where the step holds parameters
    alone, CKPT-CORRUPT where the files cannot be read.
    """
    with self._reading(step):
      self._check_whole(step)
      self._check_tree(_as_dict(abstract), step)
      items = self._manager.restore(
        step,
        args=args.Composite(state=_restore_args(_as_dict(abstract)), position=args.JsonRestore()),
      )
    if missing := {'loader', 'data'} - items.position.keys():
      raise self._corrupt(step, f'its position has no {min(missing)!r}')
    return Restored(dataclasses.replace(abstract, **items.state), items.position)

  def restore_params(self, abstract: Any, step: int, *, ema: bool = False) -> Any:
    """The parameters of `step` alone, or with `ema` their moving average; shapes are checked first."""
    tree = {'extra': {'ema': abstract}} if ema else {'params': abstract}
    with self._reading(step):
      if ema and 'ema' not in (self._metadata(step).get('extra') or {}):
        raise CheckpointError(
          'CKPT-NONE', f"step {step} of {self.directory} has no moving average: averaging.name was not 'ema' there."
        )
      self._check_tree(tree, step)
      state = self._manager.restore(step, args=args.Composite(state=_restore_args(tree))).state
    return state['extra']['ema'] if ema else state['params']

  def position(self, step: int) -> dict[str, Any]:
    """What was saved beside the arrays of `step`."""
    with self._reading(step):
      return self._manager.restore(step, args=args.Composite(position=args.JsonRestore())).position

  def close(self) -> None:
    """Waits for the last save; raises what it failed with."""
    try:
      self._wait()
    finally:
      self._manager.close()

  def _wait(self) -> None:
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      raise self._failure(None, None, error) from error

  def _check_whole(self, step: int) -> None:
    if 'opt_state' not in self._metadata(step):
      raise CheckpointError(
        'CKPT-PARAMS',
        f'step {step} of {self.directory} holds parameters alone (it is an average or a merge), so no run goes on from '
        f'it. Start one: --workdir=NEW --gin.checkpoint.initial="\'{self.directory.parent}/{step}\'".',
      )

  def _check_tree(self, abstract: dict[str, Any], step: int) -> None:
    """Raises CKPT-MISMATCH where the parts of the state in `abstract` are not those of `step`."""
    parts = {name: tree for name, tree in self._metadata(step).items() if name in abstract}
    stored = {_key(path): (tuple(x.shape), str(x.dtype)) for path, x in _leaves(parts)}
    wanted = {_key(path): (tuple(x.shape), str(x.dtype)) for path, x in _leaves(abstract)}
    bad = [k for k in sorted(stored.keys() | wanted.keys()) if stored.get(k) != wanted.get(k)]
    if bad:
      raise CheckpointError(
        'CKPT-MISMATCH',
        f'{bad[0]} is {_show(stored.get(bad[0]))} in step {step} of {self.directory}, {_show(wanted.get(bad[0]))} in '
        f'the model (first of {len(bad)}). Nothing was changed; use the config in {self.directory.parent}/config.gin.',
      )

  def _metadata(self, step: int):
    return self._manager.item_metadata(step)['state'].tree

  @contextlib.contextmanager
  def _reading(self, step: int) -> Iterator[None]:
    """Inside, what files that are missing or damaged raise is one CheckpointError."""
    for item in ('state/_METADATA', 'state/manifest.ocdbt', 'position/metadata'):
      if not (self.directory / str(step) / item).exists():
        raise self._corrupt(step, f'{item} is missing')
    try:
      yield
    except Exception as error:
      cause = error.__cause__ if type(error) is Exception else error  # so Orbax wraps what TensorStore raises
      if not isinstance(cause, ValueError | KeyError | OSError):
        raise
      raise self._corrupt(step, str(cause).splitlines()[0][:300]) from error

  def _corrupt(self, step: int, what: str) -> CheckpointError:
    earlier = [s for s in self._manager.all_steps() if s < step]
    then = f'go on from step {max(earlier)}' if earlier else 'begin anew'
    return CheckpointError(
      'CKPT-CORRUPT',
      f'step {step} of {self.directory} cannot be read: {what}. Nothing was changed; restore its files from a copy, or '
      f'move {self.directory / str(step)} away to {then}.',
    )

  def _failure(self, step: int | None, state: dict[str, Any] | None, error: Exception) -> CheckpointError:
    free = shutil.disk_usage(self.directory).free / 2**20
    which = 'the last step' if step is None else f'step {step}'
    if 'RESOURCE_EXHAUSTED' in str(error) or 'No space left' in str(error):
      need = '' if state is None else f' needs {_mebibytes(state):.0f} MiB,'
      text = (
        f'saving {which}{need} {free:.0f} MiB free on {self.directory}. Earlier steps are intact. Free space and rerun.'
      )
      return CheckpointError('CKPT-NOSPACE', text)
    return CheckpointError(
      'CKPT-WRITE', f'saving {which} in {self.directory} failed: {error}. Earlier steps are intact.'
    )


def _as_dict(state: TrainState) -> dict[str, Any]:
  return {'step': state.step, 'params': state.params, 'opt_state': state.opt_state, 'extra': state.extra}


def _restore_args(tree) -> args.PyTreeRestore:
  """Restores exactly the leaves of `tree`, each with its sharding, shape and dtype."""
  place = lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding, dtype=x.dtype, global_shape=x.shape)
  return args.PyTreeRestore(tree, restore_args=jax.tree.map(place, tree), partial_restore=True)


def _leaves(tree):
  return jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: hasattr(x, 'shape'))[0]


def _key(path) -> str:
  names = (getattr(p, 'key', getattr(p, 'name', getattr(p, 'idx', None))) for p in path)
  return '/'.join(str(name) for name in names)


def _show(leaf) -> str:
  return 'absent' if leaf is None else f'{leaf[1]}{list(leaf[0])}'


def _mebibytes(tree) -> float:
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / 2**20
