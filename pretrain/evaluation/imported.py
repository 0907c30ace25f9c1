"""The files that `pretrain import` keeps beside the weights of a run, and the tokenizer among them."""

import pathlib

from data.prepare.prepare import load_model
from pretrain.errors import ConfigError

FOLDER = 'imported'
SENTENCEPIECE = ('spiece.model', 'tokenizer.model', 'sentencepiece.bpe.model')
OTHER_TOKENIZERS = ('tokenizer.json', 'vocab.json', 'vocab.txt')


def sentencepiece_in(folder: pathlib.Path) -> pathlib.Path | None:
  """The SentencePiece model in `folder`, if there is one."""
  return next((folder / name for name in SENTENCEPIECE if (folder / name).is_file()), None)


def tokenizer_of(workdir: pathlib.Path) -> bytes | None:
  """The SentencePiece model that was imported into `workdir`; None where nothing was imported.

  Raises ConfigError for imported weights with another kind of tokenizer, or none; DataError for one whose padding, end
  and unknown token are not 0, 1 and 2.
  """
  folder = workdir / FOLDER
  return tokenizer_in(folder) if folder.is_dir() else None


def tokenizer_in(folder: pathlib.Path) -> bytes:
  """The SentencePiece model in a folder of imported weights. Raises as `tokenizer_of`."""
  if path := sentencepiece_in(folder):
    return load_model(path)
  there = next((name for name in OTHER_TOKENIZERS if (folder / name).is_file()), None)
  what = f'has only {there}, and Pretrain reads SentencePiece models' if there else 'has no tokenizer'
  raise ConfigError(
    f'{folder} {what} ({", ".join(SENTENCEPIECE)}), so no prompt can be read. Nothing was changed; put the '
    'SentencePiece model of these weights there.'
  )
