"""The files of one step, written and read by Orbax, its only import. `step_folders` finds the steps, not Orbax."""

import contextlib
import inspect
import itertools
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import args

from data.stores.paths import plain_path
from pretrain.checkpoints import manifest, orbax_stores
from pretrain.workdirs.folder import Folder
from pretrain.workdirs.store_path import StorePath

ORBAX = os.path.dirname(ocp.__file__) + os.sep
CHUNK = 64 * 2**20  # bytes: the most of an array that must be unpacked to read a part of it
SMALL_FILE = 16 * 2**20  # bytes, for saves of parameters alone: they must need little memory and may take longer


def be_quiet() -> None:
  """Silences Orbax's hundreds of log lines about a failed save: `Checkpoints.poll` reports it in one."""
  for name in ('absl', 'asyncio'):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  if sys.unraisablehook is sys.__unraisablehook__:
    sys.unraisablehook = without_what_is_left_behind


def without_what_is_left_behind(found: Any) -> None:
  """After a read or a write fails, Orbax drops the others. What these raise then is harmless and not shown."""
  of_orbax = inspect.iscoroutine(found.object) and found.object.cr_code.co_filename.startswith(ORBAX)
  if not (of_orbax or (isinstance(found.exc_value, RuntimeError) and str(found.exc_value) == 'Event loop is closed')):
    sys.__unraisablehook__(found)


def forget_processes() -> None:
  """Resets what Orbax remembers about the processes of a run, as if this process had just started."""
  from orbax.checkpoint._src.futures import signaling_client, synchronization  # no public name does it

  signaling_client.get_signaling_client.cache_clear()  # it holds the client of the previous coordinator
  ids = synchronization.OperationIdGenerator  # part of the names under which processes synchronise a save
  ids._operation_id_counter = itertools.count()
  ids._operation_id = next(ids._operation_id_counter)


class Files:
  """Orbax's manager of a folder of steps, opened at the first read or write, because opening makes the folder."""

  def __init__(self, directory: Folder, *, read_only: bool):
    self._directory, self._read_only = directory, read_only
    self._opened: ocp.CheckpointManager | None = None

  @property
  def _manager(self) -> ocp.CheckpointManager:
    if self._opened is None:
      be_quiet()
      options = ocp.CheckpointManagerOptions(
        create=not self._read_only,
        read_only=self._read_only,
        # The default on a local disk does not look for the commit file when it reads.
        atomicity_options=ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE),
      )
      handlers = {
        'state': ocp.PyTreeCheckpointHandler(),
        'position': ocp.JsonCheckpointHandler(),
        'config': ocp.JsonCheckpointHandler(),
      }
      self._opened = ocp.CheckpointManager(self._name(), options=options, item_handlers=handlers)
    return self._opened

  def _name(self) -> str:
    if not isinstance(self._directory, StorePath):
      return plain_path(str(self._directory))
    orbax_stores.use_stores()
    return self._directory.url

  def _save_args(self, tree: Any, file_bytes: int | None) -> args.PyTreeSave:
    """How the arrays are written: to a store in files of one request each."""
    largest = orbax_stores.FILE_BYTES if isinstance(self._directory, StorePath) else None
    size = min(filter(None, (largest, file_bytes)), default=None)
    save = lambda x: _chunks(x, min(file_bytes or CHUNK, CHUNK), largest)
    return args.PyTreeSave(tree, save_args=jax.tree.map(save, tree), ocdbt_target_data_file_size=size)

  def begin(self, step: int, tree: Any, position: dict[str, Any], config: str, file_bytes: int | None = None) -> None:
    """Returns when the arrays are copied; `wait` for the files.

    TensorStore keeps the compressed values in memory until a file has `file_bytes` (Orbax's default: 2 GiB), and fills
    several files at a time. A large array has chunks of at most CHUNK, each layer its own, so that a part can be read
    alone.
    """
    items = args.Composite(
      state=self._save_args(tree, file_bytes),
      position=args.JsonSave(position),
      config=args.JsonSave({'text': config, 'manifest': manifest.FORMAT}),
    )
    if not self._manager.save(step, args=items):
      raise ValueError(f'Orbax has a step after {step}')

  def wait(self) -> None:
    """Returns when the files are written; raises the error if writing failed."""
    self._manager.wait_until_finished()

  def give_up(self) -> None:
    """Closes the manager after a failed save: it would still count the step, and raise again."""
    opened, self._opened = self._opened, None
    for _ in range(2 if opened else 0):  # the first call raises the error of the save
      with contextlib.suppress(Exception):
        opened.close()

  def reload(self) -> None:
    """Reads the list of folders again."""
    if self._opened is not None:
      self._opened.reload()

  def close(self) -> None:
    opened, self._opened = self._opened, None
    if opened is not None:
      opened.close()

  def metadata(self, step: int) -> dict[str, Any]:
    """The tree of the state, with shapes and dtypes."""
    return dict(self._manager.item_metadata(step)['state'].tree)

  def state(self, step: int, tree: Any) -> dict[str, Any]:
    """Exactly the leaves of `tree`, each with its sharding, shape and dtype."""
    return self._manager.restore(step, args=args.Composite(state=_restore_args(tree, partial=True))).state

  def position(self, step: int) -> dict[str, Any]:
    return self._manager.restore(step, args=args.Composite(position=args.JsonRestore())).position

  def some(self, step: int, wanted: Callable[[Any], bool]) -> Any:
    """The tree of the state, with values on the first device for paths where `wanted(path)` is true."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def choose(path, x):
      return jax.ShapeDtypeStruct(tuple(x.shape), x.dtype, sharding=place) if wanted(path) else ocp.PLACEHOLDER

    is_leaf = lambda x: hasattr(x, 'shape')
    tree = jax.tree_util.tree_map_with_path(choose, self.metadata(step), is_leaf=is_leaf)
    return self._manager.restore(step, args=args.Composite(state=_restore_args(tree, partial=False))).state


def _chunks(x: jax.Array, large: int, largest: int | None) -> ocp.SaveArgs:
  """The chunks of an array: at most `largest` bytes (None: its part on a device). One of more than `large` bytes has
  chunks of at most CHUNK, each layer its own.

  The axis of layers is the first of three or more, unless it has very many small parts; Orbax would divide longer axes
  before it.
  """
  if x.nbytes <= large:
    return ocp.SaveArgs(chunk_byte_size=largest)
  layers = x.ndim >= 3 and 64 * x.nbytes >= large * x.shape[0]
  return ocp.SaveArgs(chunk_byte_size=min(largest or CHUNK, CHUNK), shard_axes=(0,) if layers else ())


def _restore_args(tree, *, partial: bool) -> args.PyTreeRestore:
  """`partial`: `tree` is a part of the saved tree. Otherwise it has a PLACEHOLDER for each array that is not read."""

  def place(x):
    if x is ocp.PLACEHOLDER:
      return x
    return ocp.ArrayRestoreArgs(sharding=x.sharding, dtype=x.dtype, global_shape=x.shape)

  return args.PyTreeRestore(tree, restore_args=jax.tree.map(place, tree), partial_restore=partial)
