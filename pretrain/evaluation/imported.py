"""The files that `pretrain import` keeps beside the weights of a run, and the tokenizer among them."""

import pathlib

from data.prepare.published import JSON, SENTENCEPIECE, Published, published, tokenizer_in
from pretrain.errors import ConfigError
from pretrain.workdirs.copies import local_copy
from pretrain.workdirs.folder import Folder

FOLDER = 'imported'
OTHER_TOKENIZERS = ('vocab.json', 'vocab.txt')


def tokenizer_of(workdir: Folder) -> Published | None:
  """The tokenizer that was imported into `workdir`; None where nothing was imported.

  Raises ConfigError for imported weights with a tokenizer that Pretrain does not read, or none; DataError for a damaged
  one.
  """
  folder = workdir / FOLDER
  return tokenizer_from(local_copy(folder)) if folder.is_dir() else None


def tokenizer_from(folder: pathlib.Path) -> Published:
  """The tokenizer in a folder of published weights. Raises as `tokenizer_of`."""
  if path := tokenizer_in(folder):
    return published(path)
  there = next((name for name in OTHER_TOKENIZERS if (folder / name).is_file()), None)
  what = f'has only {there}, which is a part of a tokenizer' if there else 'has no tokenizer'
  raise ConfigError(
    f'{folder} {what} ({", ".join((*SENTENCEPIECE, JSON))}), so no prompt can be read. Nothing was changed; put the '
    'tokenizer of these weights there.'
  )
