"""Steps in an object store are removed and set aside here. A store cannot rename, so each change begins with a mark.

`<step>.deleting` (an object, not a folder) says that a step is being removed. `<step>.moving` holds the new name of a
step that is being copied, and whether the copy is complete. Whatever is cut off is finished, or undone, by `tidy`. The
manifest is copied last and removed first, so no name ever holds a step that is not whole.
"""

import json

from pretrain.checkpoints import manifest
from pretrain.workdirs.store_path import StorePath

DELETING, MOVING = '.deleting', '.moving'


def remove(directory: StorePath, step: int) -> None:
  """Removes a finished step."""
  mark = directory / f'{step}{DELETING}'
  mark.touch()
  _remove_objects(directory / str(step))
  mark.unlink()


def move(directory: StorePath, step: int, name: str) -> None:
  """The objects of a step are below `name` instead; nothing is deleted before all are copied."""
  mark = directory / f'{step}{MOVING}'
  mark.write_text(json.dumps({'to': name, 'copied': False}))
  (directory / str(step)).copy_tree(directory / name, last=manifest.FILE)
  mark.write_text(json.dumps({'to': name, 'copied': True}))
  _remove_objects(directory / str(step))
  mark.unlink()


def tidy(directory: StorePath) -> None:
  """Ends removals that were cut off. A move is ended if its copy is complete, and undone otherwise."""
  for mark in directory.glob(f'*{DELETING}'):
    _remove_objects(directory / mark.stem)
    mark.unlink()
  for mark in directory.glob(f'*{MOVING}'):
    found = json.loads(mark.read_bytes())
    _remove_objects(directory / (mark.stem if found['copied'] else found['to']))
    mark.unlink()


def _remove_objects(folder: StorePath) -> None:
  (folder / manifest.FILE).unlink()
  folder.remove_tree()
