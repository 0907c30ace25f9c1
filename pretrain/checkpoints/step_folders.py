"""The folders of checkpoints: which of them are steps, which are removed, which are set aside.

No other module renames them, except `store_steps` those in a store. `<step>/` is a step if it holds MANIFEST.json.
`<step>.saving` marks a step that is being written, `<step>.deleting/` one that is being removed. `<step>.corrupt/` is a
damaged step, kept for inspection. `<step>.undone/` is a step that the run discarded when it went back before a loss
spike.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from typing import Literal

from pretrain.checkpoints import manifest, store_steps
from pretrain.errors import CheckpointError
from pretrain.workdirs.folder import Folder
from pretrain.workdirs.store_path import StorePath

ORBAX_COMMIT = 'commit_success.txt'
CONFIG = 'config/metadata'  # JSON: `text`, and `manifest` if the step will have one
Kind = Literal['finished', 'unverified', 'unfinished']
MORE_IS_BETTER = ('accuracy', 'exact_match')


def kind_of(folder: Folder) -> Kind:
  """'finished' has a manifest; 'unverified' was written before manifests existed, which its config item shows."""
  if folder.is_symlink():  # its target is outside of this folder
    return 'unfinished'
  if (folder / manifest.FILE).exists():
    return 'finished'
  if not (folder / ORBAX_COMMIT).exists():
    return 'unfinished'
  try:
    config = json.loads((folder / CONFIG).read_bytes())
  except (OSError, ValueError):
    return 'unfinished'
  return 'unfinished' if 'manifest' in config else 'unverified'


def folders(directory: Folder) -> dict[int, Folder]:
  """Every folder with the name of a step, oldest first, with any contents."""
  paths = directory.iterdir() if directory.is_dir() else ()
  return dict(sorted((int(path.name), path) for path in paths if _is_step(path.name) and path.is_dir()))


def _is_step(name: str) -> bool:
  """
  >>> [_is_step(name) for name in ('70', '070', '7.corrupt', 'notes', '²')]
  [True, False, False, False, False]
  """
  return name.isdecimal() and str(int(name)) == name


def finished(directory: Folder) -> list[int]:
  """The steps that exist, oldest first, including those from before manifests existed."""
  return [step for step, folder in folders(directory).items() if kind_of(folder) != 'unfinished']


def quarantined(directory: Folder) -> list[str]:
  return sorted(path.name for path in directory.glob('*.corrupt*')) if directory.is_dir() else []


def _mark(directory: Folder, step: int) -> Folder:
  return directory / f'{step}.saving'


def is_marked(directory: Folder, step: int) -> bool:
  """Whether `step` is being written, or its save was cut off."""
  return _mark(directory, step).exists()


def begin(directory: Folder, step: int) -> None:
  """Marks `step` as being written. If the save is cut off before `end`, the next start removes its remains."""
  directory.mkdir(parents=True, exist_ok=True)
  _mark(directory, step).touch()


def end(directory: Folder, step: int) -> None:
  _mark(directory, step).unlink(missing_ok=True)


def discard(directory: Folder, step: int) -> None:
  """Removes the remains of a save that failed."""
  _remove_tree(directory / str(step))
  end(directory, step)


def _remove_tree(folder: Folder) -> None:
  if isinstance(folder, StorePath):
    folder.remove_tree()
  else:
    shutil.rmtree(folder, ignore_errors=True)


def remove(directory: Folder, step: int) -> None:
  """Removes a finished step. It is renamed first, so a removal that is cut off leaves no damaged step."""
  if isinstance(directory, StorePath):
    store_steps.remove(directory, step)
    return
  going = directory / f'{step}.deleting'
  shutil.rmtree(going, ignore_errors=True)
  (directory / str(step)).rename(going)
  shutil.rmtree(going)


def tidy(directory: Folder) -> None:
  """Removes the remains of saves and removals that were cut off."""
  for mark in directory.glob('*.saving'):
    if not _is_step(mark.stem):  # a file of somebody else
      continue
    step = int(mark.stem)
    if kind_of(directory / str(step)) == 'finished':
      end(directory, step)
    else:
      discard(directory, step)
  if isinstance(directory, StorePath):
    store_steps.tidy(directory)
    return
  for path in directory.glob('*.deleting'):
    if _is_step(path.stem):
      shutil.rmtree(path, ignore_errors=True)


def quarantine(directory: Folder, step: int) -> str:
  """Sets a damaged step aside; returns its new name."""
  return put_aside(directory, step, 'corrupt')


def put_aside(directory: Folder, step: int, why: Literal['corrupt', 'undone']) -> str:
  """Renames a step so that it is no longer found as a step; returns the new name. Nothing is deleted."""
  names = (f'{step}.{why}{f".{n}" if n else ""}' for n in range(1000))
  name = next(name for name in names if not (directory / name).exists())
  if isinstance(directory, StorePath):
    store_steps.move(directory, step, name)
    return name
  (directory / str(step)).rename(directory / name)
  manifest.sync_folder(directory)
  return name


def superfluous(
  steps: Sequence[int], scores: Mapping[int, float], *, keep: int, keep_every: int | None, keep_best: int
) -> list[int]:
  """The `steps` that no rule keeps, oldest first: not the last `keep`, not multiples of `keep_every`, not the
  `keep_best` lowest of `scores`.

  >>> superfluous([1, 2, 3, 4, 5], {1: 0.5, 2: 0.3, 3: 0.4}, keep=1, keep_every=4, keep_best=1)
  [1, 3]
  """
  best = sorted((score, step) for step, score in scores.items() if step in steps and math.isfinite(score))
  kept = {*steps[-keep:], *(step for _, step in best[:keep_best])}
  kept |= {step for step in steps if keep_every and step % keep_every == 0}
  return [step for step in steps if step not in kept]


def scores_of(directory: Folder, steps: Sequence[int], key: str) -> dict[int, float]:
  """The score `key` of each evaluated step, negated if higher is better, so that lower is always better."""
  found = {}
  for step in steps:
    with contextlib.suppress(ValueError):  # a step without a manifest has no scores
      found[step] = manifest.read(directory / str(step)).scores.get(key)
  sign = -1 if key.rsplit('/', 1)[-1] in MORE_IS_BETTER else 1
  return {step: sign * value for step, value in found.items() if value is not None}


def none_left(directory: Folder, damaged: Mapping[int, str], aside: Sequence[str]) -> CheckpointError:
  """The error for a run that has checkpoints, none of which can be read."""
  seen = [f'{step}: {reason}' for step, reason in damaged.items()] + [f'{name}: quarantined' for name in aside]
  return CheckpointError(
    'CKPT-CORRUPT',
    f'{len(seen)} checkpoints in {directory}, none intact ({"; ".join(seen[:5])}). Not starting from step 0; nothing '
    'was deleted. Restore their files from a copy, under the name of the step, or use another --workdir.',
  )
