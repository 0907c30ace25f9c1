"""A tokenizer.json of Hugging Face `tokenizers` (extra `hf`): text to ids and back, and what its pieces are.

`Description` reads the file without the package: how many ids there are, which text is which id, and what its
post-processor puts before a text. `TokenizerJson` reads text.
"""

import functools
import itertools
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, SupportsIndex

import numpy as np

from data.errors import DataError
from data.stores.special_ids import SpecialIds

LIBRARY = 'tokenizers'
SPACE = '▁'
SENTINEL = re.compile(r'<extra_id_(\d+)>')
BYTE = re.compile(r'<0x([0-9A-F]{2})>')


def is_json(content: bytes) -> bool:
  """Whether these are the bytes of a tokenizer.json. A SentencePiece model never begins like this."""
  return content[:64].lstrip()[:1] == b'{'


class Description:
  """The contents of a tokenizer.json. Raises ValueError if it is not a JSON object of this format."""

  def __init__(self, content: bytes):
    try:
      self.values = json.loads(content)
      self.model: Mapping[str, Any] = self.values['model']
      self.added = {int(token['id']): token for token in self.values.get('added_tokens') or ()}
      self.kind = self.model.get('type') or 'BPE'
      pairs = enumerate(name for name, *_ in self.model['vocab']) if self.kind == 'Unigram' else None
      names = dict(pairs) if pairs else {i: name for name, i in self.model['vocab'].items()}
      self.names: dict[int, str] = names | {i: token['content'] for i, token in self.added.items()}
    except (KeyError, TypeError, AttributeError) as error:
      raise ValueError('it has no model with a vocabulary') from error
    if not self.names:
      raise ValueError('it has no pieces')

  @functools.cached_property
  def ids(self) -> dict[str, int]:
    return {name: i for i, name in sorted(self.names.items(), reverse=True)}

  @property
  def size(self) -> int:
    """The number of ids of text. T5's sentinels at the end, <extra_id_0> the last, are not counted."""
    end = max(self.names) + 1
    own = lambda k: SENTINEL.fullmatch(self.names.get(end - 1 - k, ''))
    return end - next(k for k in itertools.count() if not ((found := own(k)) and int(found[1]) == k))

  @property
  def unknown(self) -> int | None:
    if self.kind == 'Unigram':
      return self.model.get('unk_id')
    return self.ids.get(self.model.get('unk_token') or '')

  @property
  def reads_first(self) -> int | None:
    """The id that the post-processor puts before a text, e.g. Llama 3's <|begin_of_text|>, or None."""
    for step in _flat(self.values.get('post_processor')):
      if step.get('type') == 'TemplateProcessing':
        head = (step.get('single') or [{}])[0].get('SpecialToken')
        return self.ids.get(head['id']) if head else None
      if 'cls' in step:  # BertProcessing, RobertaProcessing
        return int(step['cls'][1])
    return None

  @property
  def is_byte_level(self) -> bool:
    return any(step.get('type') == 'ByteLevel' for key in ('pre_tokenizer', 'decoder') for step in self.steps(key))

  def steps(self, key: str) -> list[Mapping[str, Any]]:
    return list(_flat(self.values.get(key)))


def _flat(step: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
  """The steps of a Sequence, in order; a single step; nothing for None."""
  if step is None:
    return
  parts = next((step[key] for key in ('processors', 'pretokenizers', 'decoders', 'normalizers') if key in step), None)
  if parts is None:
    yield step
  else:
    for part in parts:
      yield from _flat(part)


class TokenizerJson:
  """One of the two kinds of `vocabulary.TextModel`."""

  file_name, library = 'tokenizer.json', LIBRARY

  def __init__(self, content: bytes, ids: SpecialIds, read: Collection[str] = ()):
    """Raises DataError without the package, ValueError for a file that it cannot read."""
    self.described = Description(content)
    self.size = self.described.size
    self._fast = _load(self.described, ids, read)

  @property
  def special(self) -> dict[str, int]:
    return {token['content']: i for i, token in sorted(self.described.added.items()) if i < self.size}

  def encode(self, text: str) -> list[int]:
    return self._fast.encode(text, add_special_tokens=False).ids

  def encode_batch(self, texts: Sequence[str], num_threads: int) -> list[np.ndarray]:
    """Several threads are as many as the package starts (RAYON_NUM_THREADS), whatever the number."""
    if num_threads == 1:
      return [np.array(self.encode(text), np.int32) for text in texts]
    found = self._fast.encode_batch(list(texts), add_special_tokens=False)
    return [np.array(own.ids, np.int32) for own in found]

  def decode(self, ids: Iterable[SupportsIndex]) -> str:
    return self._fast.decode([int(i) for i in ids], skip_special_tokens=False)

  def spans(self, text: str) -> list[tuple[int, int, int]]:
    ends = list(itertools.accumulate((len(char.encode()) for char in text), initial=0))
    found = self._fast.encode(text, add_special_tokens=False)
    return [(i, ends[begin], ends[end]) for i, (begin, end) in zip(found.ids, found.offsets, strict=True)]

  @functools.cached_property
  def adds_space(self) -> bool:
    """Whether a text without a space in front gets one, as SentencePiece does."""
    return self.names[self.encode('x')[0]].startswith(SPACE)

  def piece(self, token: int) -> str:
    return self.names[token]

  @functools.cached_property
  def names(self) -> list[str]:
    """The pieces in SentencePiece's notation."""
    return [f'<0x{name}>' if kind in ('byte', 'part') else name for name, kind in self._pieces]

  def pieces(self) -> tuple[list[str], list[float], list[str]]:
    """Scores order pieces by their ids, which is the order of merges; a text in fewer pieces is always better."""
    names, kinds = ([own[k] for own in self._pieces] for k in (0, 1))
    scores = [score for _, score in self.described.model['vocab']] if self.described.kind == 'Unigram' else []
    given = dict(enumerate(scores))
    return names, [given.get(i, -1 - i / self.size) for i in range(self.size)], kinds

  @functools.cached_property
  def _pieces(self) -> list[tuple[str, str]]:
    return [self._piece(i) for i in range(self.size)]

  def _piece(self, token: int) -> tuple[str, str]:
    """(name, kind) of an id."""
    described = self.described
    name, added = described.names.get(token), described.added.get(token)
    if name is None or token == described.unknown or (added and added.get('special')):
      return name or '', 'byte' if name and BYTE.fullmatch(name) else 'control'
    if added:
      return name.replace(' ', SPACE), 'text'
    if described.is_byte_level:
      return _of_bytes(bytes(_BYTES.get(char, 0) for char in name))
    if found := BYTE.fullmatch(name):
      return found[1], 'byte'
    if described.kind == 'WordPiece':
      prefix = described.model.get('continuing_subword_prefix') or '##'
      return name.removeprefix(prefix) if name.startswith(prefix) else SPACE + name, 'text'
    return name, 'text'


def _of_bytes(value: bytes) -> tuple[str, str]:
  """(name, kind) of a piece of bytes: text where they are whole characters; one byte, or a part of text."""
  try:
    return value.decode().replace(' ', SPACE), 'text'
  except UnicodeDecodeError:
    return value.hex().upper(), 'byte' if len(value) == 1 else 'part'


def _load(described: Description, ids: SpecialIds, read: Collection[str]):
  """The package's tokenizer: no text becomes a special token but those of `read`, nothing is added, cut or padded."""
  try:
    import tokenizers
  except ImportError as error:
    raise DataError(
      "a tokenizer.json is read with the package tokenizers, which is not installed; pip install 'pretrain[hf]'."
    ) from error
  special = {i for i, token in described.added.items() if token.get('special')} | set(ids.used.values())
  special -= {i for i, token in described.added.items() if token['content'] in read}
  rename = {i: f'\ue000{i}\ue000' for i in special} if described.kind == 'Unigram' else {}
  added = [
    {**token, 'special': i in special, 'content': rename.get(i, token['content'])}
    for i, token in described.added.items()
  ]
  values = {**described.values, 'added_tokens': added, 'post_processor': None, 'truncation': None, 'padding': None}
  if rename:  # a unigram model finds the names of its special tokens in text, with the best score of all
    vocab = [[rename.get(i, name), score] for i, (name, score) in enumerate(described.model['vocab'])]
    values['model'] = {**described.model, 'vocab': vocab}
  try:
    found = tokenizers.Tokenizer.from_str(json.dumps(values))
  except Exception as error:  # the package raises no other class
    raise ValueError(str(error).splitlines()[0]) from error
  found.encode_special_tokens = True
  return found


def _byte_letters() -> dict[str, int]:
  """The letter that stands for each byte. Source: Radford et al. 2019, gpt-2/src/encoder.py bytes_to_unicode."""
  shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  hidden = [byte for byte in range(256) if byte not in shown]
  return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


_BYTES = _byte_letters()
