"""A SentencePiece model: text to ids and back, and what its pieces are."""

import functools
from collections.abc import Iterable, Sequence
from typing import SupportsIndex

import numpy as np
import sentencepiece

LIBRARY = 'sentencepiece'


class SentencePieceModel:
  """One of the two kinds of `vocabulary.TextModel`."""

  file_name, library = 'tokenizer.model', LIBRARY
  adds_space = True

  def __init__(self, content: bytes):
    """Raises RuntimeError for bytes that are not such a model."""
    self.processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    self.size = self.processor.get_piece_size()

  def encode(self, text: str) -> list[int]:
    return self.processor.encode(text)

  def encode_batch(self, texts: Sequence[str], num_threads: int) -> list[np.ndarray]:
    return self.processor.encode(list(texts), num_threads=num_threads, return_type='numpy')

  def decode(self, ids: Iterable[SupportsIndex]) -> str:
    return self.processor.decode([int(i) for i in ids])

  def spans(self, text: str) -> list[tuple[int, int, int]]:
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
