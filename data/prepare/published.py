"""A tokenizer as it is published: its file, and the ids in the files beside it that are not text.

A later source replaces ids of an earlier one:

1. the file itself: SentencePiece's bos, eos, pad and unk; the unknown token of a tokenizer.json
2. config.json: bos_token_id, eos_token_id, pad_token_id, decoder_start_token_id
3. generation_config.json: the same keys
4. tokenizer_config.json: the ids of its bos_token, eos_token, pad_token and unk_token; of an encoder's cls_token,
   sep_token and mask_token, which BERT and its relatives have by name where the file has no such key

Generation stops at all eos ids of 4 and 3 (of 2, where 3 has none; of 1, where none has any); documents end with that
of 4, else with the first; without one, with sep_token. A decoder reads bos first unless `add_bos_token` in 4 is
false; where 4 has no such key, if the post-processor of tokenizer.json puts it there, or the file is a SentencePiece
model. decoder_start_token_id, which an encoder-decoder has, comes before bos. In the folder of a store, the store's
manifest alone has the ids.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from data.errors import DataError
from data.stores.paths import looked_in
from data.stores.sentencepiece_model import SentencePieceModel
from data.stores.special_ids import SpecialIds
from data.stores.tokenizer_json import Description, is_json
from data.stores.vocabulary import Tokenizer

SENTENCEPIECE = ('spiece.model', 'tokenizer.model', 'sentencepiece.bpe.model', 'spm.model')
JSON = 'tokenizer.json'
TOKENS = {
  'pad': 'pad_token', 'unknown': 'unk_token', 'bos': 'bos_token', 'eos': 'eos_token', 'cls': 'cls_token',
  'sep': 'sep_token', 'mask': 'mask_token',
}  # fmt: skip
# The tokens of `transformers` for files that name none (tokenization_bert.py, tokenization_deberta_v2.py, …).
BERT_TOKENS = {'pad_token': '[PAD]', 'cls_token': '[CLS]', 'sep_token': '[SEP]', 'mask_token': '[MASK]'}
ENCODERS = {
  'bert': BERT_TOKENS, 'electra': BERT_TOKENS, 'deberta-v2': BERT_TOKENS,
  'roberta': {'cls_token': '<s>', 'sep_token': '</s>', 'mask_token': '<mask>'},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Published:
  """A tokenizer's file and ids; reading it needs no package beside SentencePiece. `open` makes the tokenizer."""

  path: pathlib.Path
  content: bytes
  pieces: int
  ids: SpecialIds

  def open(self, sentinels: int) -> Tokenizer:
    """Raises DataError for a tokenizer.json without the package `tokenizers`, or that it cannot read."""
    try:
      return Tokenizer(self.content, sentinels, self.ids)
    except (ValueError, RuntimeError) as error:
      reason = error.message if isinstance(error, DataError) else f'it cannot be read: {error}'
      raise DataError(f'{self.path}: {reason}') from error


def tokenizer_in(folder: pathlib.Path) -> pathlib.Path | None:
  """The path of the tokenizer in `folder`, or None.

  A SentencePiece model comes first, unless the files beside it name an id that it lacks: tokens that were added to such
  a model are in tokenizer.json alone.
  """
  there = [folder / name for name in (*SENTENCEPIECE, JSON) if (folder / name).is_file()]
  if len(there) > 1 and there[-1].name == JSON and not (folder / 'manifest.json').is_file():
    try:
      published(there[0])
    except DataError:
      return there[-1]
  return there[0] if there else None


def published(given: str | os.PathLike[str]) -> Published:
  """The tokenizer at a path: a file, or a folder that has one (of a model, or a store).

  Raises DataError for a path that is neither, for a damaged file, and for ids that the tokenizer lacks.
  """
  path = pathlib.Path(given)
  if path.is_dir():
    if (found := tokenizer_in(path)) is None:
      raise DataError(f'{path} has none of {", ".join((*SENTENCEPIECE, JSON))}; check --tokenizer.')
    path = found
  try:
    content = path.read_bytes()
  except OSError as error:
    raise DataError(f'{path}{looked_in(path)} cannot be read ({error.strerror}); check --tokenizer.') from error
  try:
    own = _of_json(content) if is_json(content) else _of_sentencepiece(content)
  except (RuntimeError, ValueError) as error:
    reason, what = str(error).splitlines()[0], 'tokenizer.json' if is_json(content) else 'SentencePiece model'
    raise DataError(f'{path} is not a {what} ({reason}); copy it again, or choose another.') from error
  return Published(path, content, own.pieces, _ids_of(path, own))


@dataclasses.dataclass(frozen=True)
class _Own:
  """What a tokenizer's file itself says. `first`: the id that it puts before a text."""

  pieces: int
  names: Mapping[str, int]
  special: Mapping[str, int]
  first: int | None
  is_json: bool


def _of_sentencepiece(content: bytes) -> _Own:
  model = SentencePieceModel(content)
  found = {'pad': model.processor.pad_id(), 'unknown': model.processor.unk_id(), 'bos': model.processor.bos_id()}
  found = {name: i for name, i in (found | {'eos': model.processor.eos_id()}).items() if i >= 0}
  return _Own(model.size, {name: i for i, name in enumerate(model.names)}, found, found.get('bos'), False)


def _of_json(content: bytes) -> _Own:
  described = Description(content)
  unknown = {} if described.unknown is None else {'unknown': described.unknown}
  first = described.reads_first
  return _Own(described.size, described.ids, unknown if first is None else {**unknown, 'bos': first}, first, True)


def _ids_of(path: pathlib.Path, own: _Own) -> SpecialIds:
  folder = path.parent
  if (folder / 'manifest.json').is_file():
    try:
      return SpecialIds.of(_read(folder / 'manifest.json'))
    except ValueError as error:
      raise DataError(f'{folder / "manifest.json"}: {error}.', 'DATA-CORRUPT') from error
  config, generation, tokens = (
    _read(folder / name) for name in ('config.json', 'generation_config.json', 'tokenizer_config.json')
  )
  merged = _given(config) | _given(generation)
  usual = ENCODERS.get(config.get('model_type', ''), {})
  named = _named({**usual, **tokens}, own)
  eos = [own.special.get('eos')] if 'eos' not in merged else merged['eos']
  eos = list(dict.fromkeys(i for i in [named.get('eos'), *eos] if i is not None)) or _sep(named)
  if not eos:
    raise DataError(
      f'{path} has no end of text: neither it nor config.json, generation_config.json or tokenizer_config.json beside '
      'it names one; set eos_token_id in generation_config.json.'
    )
  single = {name: i for name, i in {**own.special, **merged, **named}.items() if name in ('pad', 'unknown', 'bos')}
  pad, bos = single.get('pad'), single.get('bos')
  pad = None if pad is None or pad >= own.pieces else pad  # never read: batches know padding by segment ids
  start = _decoder_start(own, tokens, merged, pad, bos)
  around = {name: named[name] for name in ('cls', 'mask') if name in named}
  found = SpecialIds(pad=pad, eos=tuple(eos), unknown=single.get('unknown'), bos=bos, decoder_start=start, **around)
  _check(path, found, own.pieces)
  return found


def _sep(named: Mapping[str, int]) -> list[int]:
  return [named['sep']] if 'sep' in named else []


def _decoder_start(own: _Own, tokens: Mapping[str, Any], merged: Mapping[str, Any], pad, bos) -> int | None:
  if 'decoder_start' in merged:
    return merged['decoder_start']
  if bos is None:  # T5's decoder reads padding first
    return None if own.is_json else pad
  adds = tokens.get('add_bos_token')
  adds = own.first is not None or not own.is_json if adds is None else adds
  return bos if adds else None


def _given(config: Mapping[str, Any]) -> dict[str, Any]:
  """The ids of a config.json or generation_config.json; `eos` is a list."""
  names = {'pad': 'pad_token_id', 'bos': 'bos_token_id', 'decoder_start': 'decoder_start_token_id'}
  found = {name: config[key] for name, key in names.items() if type(config.get(key)) is int and config[key] >= 0}
  eos = config.get('eos_token_id')
  eos = eos if isinstance(eos, list) else [eos]
  return found | ({'eos': eos} if all(type(i) is int for i in eos) and eos else {})


def _named(tokens: Mapping[str, Any], own: _Own) -> dict[str, int]:
  """The ids of a tokenizer_config.json, whose tokens are text or objects with a `content`."""
  added = {
    token['content']: int(i) for i, token in (tokens.get('added_tokens_decoder') or {}).items() if 'content' in token
  }
  names = {**added, **own.names}
  found = {}
  for name, key in TOKENS.items():
    given = tokens.get(key)
    given = given.get('content') if isinstance(given, Mapping) else given
    if isinstance(given, str) and given in names:
      found[name] = names[given]
  return found


def _check(path: pathlib.Path, ids: SpecialIds, pieces: int) -> None:
  if beyond := {name: i for name, i in ids.used.items() if i >= pieces}:
    name, token = next(iter(beyond.items()))
    raise DataError(
      f'{path} has the ids 0 to {pieces - 1}, and the files beside it give {name} the id {token}; both must be of one '
      'tokenizer.'
    )


def _read(path: pathlib.Path) -> dict[str, Any]:
  """The object in a JSON file, {} if there is no such file."""
  if not path.is_file():
    return {}
  try:
    values = json.loads(path.read_text())
  except ValueError as error:
    raise DataError(f'{path} is not readable ({error}); copy it again.') from error
  return values if isinstance(values, dict) else {}
