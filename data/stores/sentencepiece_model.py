"""A SentencePiece model: text to ids and back, and what its pieces are."""

import functools
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import SupportsIndex

import numpy as np
import sentencepiece

LIBRARY = 'sentencepiece'
PRIVATE_USE = tuple(map(chr, range(0xE000, 0xF900)))
CONTROL, USER_DEFINED = 3, 4  # ModelProto.SentencePiece.Type of sentencepiece_model.proto


class SentencePieceModel:
  """One of the two kinds of `vocabulary.TextModel`. Text between special tokens gets no space in front."""

  file_name, library = 'tokenizer.model', LIBRARY
  adds_space = True

  def __init__(self, content: bytes, read: Collection[str] = ()):
    """Raises RuntimeError for bytes that are not such a model."""
    self.processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    self.size = self.processor.get_piece_size()
    self._content = content
    self._read = re.compile('(' + '|'.join(map(re.escape, sorted(read, key=len, reverse=True))) + ')') if read else None

  @functools.cached_property
  def special(self) -> dict[str, int]:
    kinds = [_field(piece, 3, 1) for piece in _messages(self._content, 1)]
    return {self.names[i]: i for i, kind in enumerate(kinds) if kind in (CONTROL, USER_DEFINED)}

  def encode(self, text: str) -> list[int]:
    return self.processor.encode(text) if self._read is None else [token for token, _, _ in self.spans(text)]

  def encode_batch(self, texts: Sequence[str], num_threads: int) -> list[np.ndarray]:
    if self._read is not None:
      return [np.array(self.encode(text), np.int32) for text in texts]
    return self.processor.encode(list(texts), num_threads=num_threads, return_type='numpy')

  def decode(self, ids: Iterable[SupportsIndex]) -> str:
    return self.processor.decode([int(i) for i in ids])

  def spans(self, text: str) -> list[tuple[int, int, int]]:
    if self._read is None:
      return self._spans(text)
    found, begin = [], 0
    for i, part in enumerate(self._read.split(text)):
      end = begin + len(part.encode())
      own = [(self.special[part], 0, end - begin)] if i % 2 else self._spans(part) if i == 0 else self._behind(part)
      found += [(token, begin + first, begin + stop) for token, first, stop in own]
      begin = end
    return found

  def _behind(self, text: str) -> list[tuple[int, int, int]]:
    """The spans of text that follows a special token: a character in front keeps the added space away."""
    size = len(self._guard.encode())
    own = ((token, max(first - size, 0), stop - size) for token, first, stop in self._spans(self._guard + text))
    return [span for span in own if span[2] > 0]

  @functools.cached_property
  def _guard(self) -> str:
    """A character that no piece contains."""
    used = set().union(*self.names)
    return next(char for char in PRIVATE_USE if char not in used)

  def _spans(self, text: str) -> list[tuple[int, int, int]]:
    pieces = self.processor.encode(text, return_type='proto').pieces
    return [(piece.id, piece.begin, piece.end) for piece in pieces]

  def piece(self, token: int) -> str:
    return self.processor.id_to_piece(token)

  @functools.cached_property
  def names(self) -> list[str]:
    return self.processor.id_to_piece(list(range(self.size)))

  def pieces(self) -> tuple[list[str], list[float], list[str]]:
    model, ids = self.processor, list(range(self.size))
    special = zip(model.is_control(ids), model.is_unknown(ids), model.is_unused(ids), strict=True)
    kinds = ['control' if any(flags) else 'text' for flags in special]
    kinds = ['byte' if is_byte else kind for is_byte, kind in zip(model.is_byte(ids), kinds, strict=True)]
    names = [name[1:-1] if kind == 'byte' else name for name, kind in zip(self.names, kinds, strict=True)]
    return names, model.get_score(ids), kinds


def _messages(content: bytes, number: int) -> Iterator[bytes]:
  """The length-delimited fields with this number, in protobuf's wire format."""
  return (value for field, value in _fields(content) if field == number and isinstance(value, bytes))


def _field(content: bytes, number: int, default: int) -> int:
  return next((value for field, value in _fields(content) if field == number and isinstance(value, int)), default)


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
  """(number, value) of each field of a protobuf message. Source: protobuf.dev, programming-guides/encoding."""
  at = 0
  while at < len(content):
    tag, at = _varint(content, at)
    match tag & 7:
      case 0:
        value, at = _varint(content, at)
      case 2:
        size, at = _varint(content, at)
        value, at = content[at : at + size], at + size
      case kind:
        size = 8 if kind == 1 else 4
        value, at = content[at : at + size], at + size
    yield tag >> 3, value


def _varint(content: bytes, at: int) -> tuple[int, int]:
  value = shift = 0
  while True:
    byte = content[at]
    value, shift, at = value | (byte & 0x7F) << shift, shift + 7, at + 1
    if byte < 0x80:
      return value, at
