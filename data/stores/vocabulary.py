"""The vocabulary (the meaning of each id) and the tokenizer (text to ids and back)."""

import dataclasses
import functools
import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from typing import Protocol, SupportsIndex, runtime_checkable

import numpy as np

from data.errors import DataError
from data.stores.sentencepiece_model import PRIVATE_USE, SentencePieceModel
from data.stores.special_ids import T5_IDS, SpecialIds
from data.stores.tokenizer_json import TokenizerJson, is_json

PAD, EOS, UNKNOWN = 0, 1, 2  # T5's, which a tokenizer that is trained here has; others are in `SpecialIds`
MODES = ('[NLU]', '[NLG]', '[S2S]')
SPECIAL = re.compile(r'(<extra_id_[0-9]+>|' + '|'.join(re.escape(mode) for mode in MODES) + ')')
SPACE = '▁'  # SentencePiece's


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """T5's layout of ids: `pieces` of text, then `sentinels` (<extra_id_0> is the last), then UL2's mode tokens.

  >>> v = Vocabulary(32000, 100)
  >>> v.first_sentinel, v.sentinel(99), v.mode_ids, v.size
  (32099, 32000, (32100, 32101, 32102), 32103)
  """

  pieces: int
  sentinels: int
  ids: SpecialIds = T5_IDS

  @property
  def size(self) -> int:
    """The number of ids; a model's vocabulary may be larger."""
    return self.pieces + self.sentinels + len(MODES)

  @functools.cached_property
  def text_ids(self) -> np.ndarray:
    """int64: the ids of pieces of text, without the unknown one."""
    return np.setdiff1d(np.arange(self.pieces), [*self.ids.used.values()])

  def is_text(self, tokens: np.ndarray) -> np.ndarray:
    """bool: which of `tokens` are pieces of text: no padding, beginning or end, no sentinel, no mode token."""
    return ~np.isin(tokens, self.ids.not_text) & (tokens < self.pieces)

  @property
  def first_sentinel(self) -> int:
    """The id of <extra_id_0>; the ids of later sentinels descend."""
    return self.pieces + self.sentinels - 1

  @property
  def mask(self) -> int:
    """What an encoder reads in place of a token that it predicts: the tokenizer's own mask token, or <extra_id_0>."""
    return self.first_sentinel if self.ids.mask is None else self.ids.mask

  def sentinel(self, k: int) -> int:
    return self.first_sentinel - k

  def is_sentinel(self, token: int) -> bool:
    return self.pieces <= token <= self.first_sentinel

  @property
  def mode_ids(self) -> tuple[int, int, int]:
    """The ids of [NLU], [NLG] and [S2S]."""
    base = self.pieces + self.sentinels
    return base, base + 1, base + 2

  def special(self, token: int) -> str | None:
    """The written form of a special token: <extra_id_k>, [NLU], <pad>, <s>, </s>, [CLS], [MASK]; None for text."""
    if token in self.ids.not_text:
      if token in (self.ids.cls, self.ids.mask):
        return '[CLS]' if token == self.ids.cls else '[MASK]'
      return '</s>' if token in self.ids.eos else '<s>' if token == self.ids.bos else '<pad>'
    if self.is_sentinel(token):
      return f'<extra_id_{self.first_sentinel - token}>'
    return MODES[token - self.mode_ids[0]] if self.mode_ids[0] <= token <= self.mode_ids[2] else None

  def special_id(self, text: str) -> int:
    """The id of <extra_id_k> or of a mode token. Raises DataError for a sentinel that does not exist."""
    if text in MODES:
      return self.mode_ids[MODES.index(text)]
    digits = text.removeprefix('<extra_id_').removesuffix('>').lstrip('0') or '0'
    if len(digits) > 9 or int(digits) >= self.sentinels:  # int() raises for thousands of digits
      fix = f'use <extra_id_0> to <extra_id_{self.sentinels - 1}>' if self.sentinels else 'it has none'
      shown = text if len(text) < 40 else f'{text[:30]}…>'
      raise DataError(f'{shown} is beyond the {self.sentinels} sentinels of this vocabulary (data.sentinels); {fix}.')
    return self.sentinel(int(digits))


@runtime_checkable
class TextModel(Protocol):
  """Text to ids and back, without special tokens: SentencePiece's or that of `tokenizers`.

  `file_name` is that of the model in a store, `library` the package that reads it. `size` counts the pieces, `names`
  are in SentencePiece's notation. With `adds_space`, text gets a space at one end. `special` are the tokens whose names
  can be read as tokens in text: control and user-defined symbols, added tokens.
  """

  file_name: str
  library: str
  size: int

  @property
  def adds_space(self) -> bool: ...
  @property
  def names(self) -> list[str]: ...
  @property
  def special(self) -> dict[str, int]: ...
  def encode(self, text: str) -> list[int]: ...
  def encode_batch(self, texts: Sequence[str], num_threads: int) -> list[np.ndarray]: ...
  def decode(self, ids: Iterable[SupportsIndex]) -> str: ...
  def spans(self, text: str) -> list[tuple[int, int, int]]: ...
  def piece(self, token: int) -> str: ...
  def pieces(self) -> tuple[list[str], list[float], list[str]]: ...


class Tokenizer:
  """A text model, its special ids, and the sentinels and mode tokens whose ids follow its pieces. Picklable.

  `model` has the bytes of a SentencePiece model or of a tokenizer.json. Raises DataError for a tokenizer.json without
  the package `tokenizers`, and for special ids that are not among the pieces; ValueError or RuntimeError for bytes that
  are no model. The names in `read` are tokens wherever they stand in a text: see `reading`.
  """

  def __init__(self, model: bytes, sentinels: int, ids: SpecialIds = T5_IDS, read: frozenset[str] = frozenset()):
    self.model, self._ids, self.read = model, ids, read
    pieces = self._text_model.size
    if beyond := {name: token for name, token in ids.used.items() if token >= pieces}:
      name, token = next(iter(beyond.items()))
      raise DataError(
        f'{name} has id {token}, the tokenizer has the ids 0 to {pieces - 1}; give the tokenizer that has this id.'
      )
    self.vocabulary = Vocabulary(pieces, sentinels, ids)

  def __getstate__(self):
    return {'model': self.model, 'vocabulary': self.vocabulary, '_ids': self._ids, 'read': self.read}

  @functools.cached_property
  def _text_model(self) -> TextModel:
    if is_json(self.model):
      return TokenizerJson(self.model, self._ids, self.read)
    return SentencePieceModel(self.model, self.read)

  @property
  def special(self) -> dict[str, int]:
    """The ids of special tokens, by the names that `reading` takes."""
    return self._text_model.special

  def check_special(self, names: Iterable[str]) -> None:
    """Raises DataError, with the names that exist, for a name of no special token."""
    if wrong := [name for name in names if name not in self.special]:
      raise DataError(f'{wrong[0]!r} is not a special token of this tokenizer; it has {_listed(self.special)}.')

  def reading(self, names: Iterable[str]) -> 'Tokenizer':
    """This tokenizer, for which the special tokens `names` are tokens in a text; without it, names are text.

    Raises the error of `check_special`.
    """
    names = tuple(names)
    self.check_special(names)
    return Tokenizer(self.model, self.vocabulary.sentinels, self._ids, frozenset(names))

  @property
  def fingerprint(self) -> str:
    """sha256 of the model file."""
    return hashlib.sha256(self.model).hexdigest()

  @property
  def file_name(self) -> str:
    """tokenizer.model or tokenizer.json."""
    return self._text_model.file_name

  @property
  def library(self) -> str:
    """The package that reads the model."""
    return self._text_model.library

  def encode(self, text: str) -> list[int]:
    """Plain text -> ids, without EOS. Text that looks like a special token is encoded as text."""
    return self._text_model.encode(text)

  def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[np.ndarray]:
    """`encode` of each text: int32[tokens]."""
    return self._text_model.encode_batch(texts, num_threads)

  def decode(self, ids: Iterable[SupportsIndex]) -> str:
    """Ids of text -> text."""
    return self._text_model.decode(ids)

  def spans(self, text: str) -> list[tuple[int, int, int]]:
    """(id, begin, end) of each token of `encode(text)`: its place in the UTF-8 bytes of `text`.

    Tokens that are parts of one character have the place of the whole character.
    """
    return self._text_model.spans(text)

  def pieces(self) -> tuple[list[str], list[float], list[str]]:
    """(names, scores, kinds) of all pieces. A kind is 'text', 'byte' or 'part' (the name has one or several bytes, in
    hexadecimal, that are no characters) or 'control'."""
    return self._text_model.pieces()

  @functools.cached_property
  def byte_lengths(self) -> np.ndarray:
    """int64[pieces]: how many UTF-8 bytes each id adds to a text. A space in front of a text: see `spaces_before`."""
    names, _, kinds = self.pieces()
    sizes = {'text': lambda name: len(name.replace(SPACE, ' ').encode()), 'byte': lambda _: 1}
    sizes |= {'part': lambda name: len(name) // 2, 'control': lambda _: 0}
    found = np.array([sizes[kind](name) for name, kind in zip(names, kinds, strict=True)])
    if self._ids.unknown is not None:
      found[self._ids.unknown] = len(self.decode([self._ids.unknown]).encode())
    return found

  def spaces_before(self, token: int) -> int:
    """How many spaces of `token`, as the first of a text, are not in the text: 1 where the tokenizer has added one."""
    name = self.piece(token)
    return len(name) - len(name.lstrip(SPACE)) and int(not self.decode([token]).startswith(' '))

  def encode_prompt(self, text: str) -> list[int]:
    """Text in which <extra_id_k>, [NLU], [NLG] and [S2S] are special tokens -> ids, without EOS.

    Text around a sentinel gets the same ids as in training, where a sentinel replaces pieces of a longer text: a space
    belongs to the word after it (or before it, if the tokenizer treats spaces as suffixes), and `con<extra_id_0>tion`
    contains no space. Raises DataError for a sentinel that does not exist.
    """
    parts, ids = SPECIAL.split(text), []
    is_sentinel = lambda i: 0 < i < len(parts) and i % 2 == 1 and parts[i] not in MODES
    for i, part in enumerate(parts):
      if i % 2:
        ids.append(self.vocabulary.special_id(part))
      else:
        after, before = is_sentinel(i - 1), is_sentinel(i + 1)
        part = part.removeprefix(' ') if i and not after else part
        ids += self._encode_part(part, after, before)
    return ids

  def _encode_part(self, text: str, after: bool, before: bool) -> list[int]:
    """The ids of text `after` and/or `before` a sentinel, without the space that belongs to the sentinel."""
    if self._spaces_are_suffixes:
      text = text.removeprefix(' ') if after else text
    else:
      text = text.removesuffix(' ') if before else text
    # SentencePiece adds a space at one end of its input. A guard character at that end keeps it away from `text`.
    left = self._guard if after and self._text_model.adds_space else ''
    right = self._guard if before and self._spaces_are_suffixes else ''
    return self._encode_between(left, text, right) if text else []

  def _encode_between(self, left: str, text: str, right: str) -> list[int]:
    """The ids of `text` within left + text + right, selected by their places."""
    begin = len(left.encode())
    end = begin + len(text.encode()) if right else math.inf
    # Without byte fallback, consecutive unknown characters form one piece, which may span `left` and `text`.
    shared = lambda token, first, stop: token == self._ids.unknown and first < begin < stop
    return [own[0] for own in self.spans(left + text + right) if begin <= own[1] < end or shared(*own)]

  @functools.cached_property
  def _guard(self) -> str:
    """A character that no piece contains, so that no piece merges it with text."""
    used = set().union(*self._names)
    return next(character for character in PRIVATE_USE if character not in used)

  @functools.cached_property
  def _spaces_are_suffixes(self) -> bool:
    """Whether pieces include the space after a word (treat_whitespace_as_suffix), judged by the majority of pieces."""
    words = [name for name in self._names if len(name) > 1]
    return sum(name.endswith(SPACE) for name in words) > sum(name.startswith(SPACE) for name in words)

  @functools.cached_property
  def _names(self) -> list[str]:
    return self._text_model.names

  def decode_after(self, before: Sequence[int], ids: Iterable[int]) -> str:
    """The text that `ids` add after the ids `before`, including the space between two words if there is one."""
    before, ids = [int(i) for i in before], [int(i) for i in ids]
    whole, known = self.decode([*before, *ids]), self.decode(before)
    return whole[len(known) :] if whole.startswith(known) else self.decode(ids)

  def piece(self, token: int) -> str:
    """A text piece in SentencePiece's notation: ▁the, <0x0A>."""
    return self._text_model.piece(token)

  def render(self, ids: Iterable[int]) -> str:
    """Ids in readable form: text, with every special token written out."""
    parts, text = [], []
    for token in [*map(int, ids), None]:
      special = '' if token is None else self._written(token)
      if special is None:
        text.append(token)
        continue
      parts += [self.decode(text)] * bool(text) + [special] * bool(special)
      text = []
    return ' '.join(parts)

  def _written(self, token: int) -> str | None:
    """`Vocabulary.special`; a tokenizer.json has its own names, such as <|endoftext|>."""
    own = is_json(self.model) and token in self.vocabulary.ids.not_text
    return self.piece(token) if own else self.vocabulary.special(token)


def _listed(names: Iterable[str], most: int = 40) -> str:
  shown = list(names)
  return ', '.join(shown[:most]) + (f' and {len(shown) - most} more' if shown[most:] else '') or 'none'
