"""Which id means what, and text to ids and back."""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece

from data.errors import DataError

PAD, EOS, UNKNOWN = 0, 1, 2
MODES = ('[NLU]', '[NLG]', '[S2S]')
SPECIAL = re.compile(r'(<extra_id_\d+>|' + '|'.join(re.escape(mode) for mode in MODES) + ')')
ALONE = '\ue000'  # for private use, so that no piece of text holds it


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """T5's layout: `pieces` of text, then `sentinels` (<extra_id_0> is the last of them), then UL2's mode tokens.

  >>> v = Vocabulary(32000, 100)
  >>> v.first_sentinel, v.sentinel(99), v.mode_ids, v.size
  (32099, 32000, (32100, 32101, 32102), 32103)
  """

  pieces: int
  sentinels: int

  @property
  def size(self) -> int:
    """How many ids there are; a model's vocabulary may be larger."""
    return self.pieces + self.sentinels + len(MODES)

  @property
  def first_sentinel(self) -> int:
    """The id of <extra_id_0>; the ids of later sentinels descend."""
    return self.pieces + self.sentinels - 1

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
    """How people see `token` where it is no text: <extra_id_k>, [NLU], <pad>, </s>; None for text."""
    if token in (PAD, EOS):
      return ('<pad>', '</s>')[token]
    if self.is_sentinel(token):
      return f'<extra_id_{self.first_sentinel - token}>'
    return MODES[token - self.mode_ids[0]] if self.mode_ids[0] <= token <= self.mode_ids[2] else None

  def special_id(self, text: str) -> int:
    """The id of <extra_id_k> or of a mode token. Raises DataError for a sentinel that does not exist."""
    if text in MODES:
      return self.mode_ids[MODES.index(text)]
    k = int(text.removeprefix('<extra_id_').removesuffix('>'))
    if k >= self.sentinels:
      fix = f'use <extra_id_0> to <extra_id_{self.sentinels - 1}>' if self.sentinels else 'it has none'
      raise DataError(f'{text} is beyond the {self.sentinels} sentinels of this vocabulary (data.sentinels); {fix}.')
    return self.sentinel(k)


class Tokenizer:
  """A SentencePiece model and the special tokens behind its pieces. Picklable."""

  def __init__(self, model: bytes, sentinels: int):
    self.model = model
    self.vocabulary = Vocabulary(self._processor.get_piece_size(), sentinels)

  def __getstate__(self):
    return {'model': self.model, 'vocabulary': self.vocabulary}

  @functools.cached_property
  def _processor(self) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=self.model)

  @property
  def fingerprint(self) -> str:
    """sha256 of the model file."""
    return hashlib.sha256(self.model).hexdigest()

  def encode(self, text: str) -> list[int]:
    """Plain text -> ids, without EOS; text that looks like a special token is text."""
    return self._processor.encode(text)

  def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[np.ndarray]:
    """`encode` of each text: int32[tokens]."""
    return self._processor.encode(list(texts), num_threads=num_threads, return_type='numpy')

  def decode(self, ids: Iterable[int]) -> str:
    """Ids of text -> text."""
    return self._processor.decode([int(i) for i in ids])

  def pieces(self) -> tuple[list[str], list[float], list[str]]:
    """(name, score, kind) of each piece: of 'text', or 'byte' (its name is then in hexadecimal), or 'control'."""
    model, ids = self._processor, list(range(self.vocabulary.pieces))
    special = zip(model.is_control(ids), model.is_unknown(ids), model.is_unused(ids), strict=True)
    kinds = ['control' if any(flags) else 'text' for flags in special]
    kinds = ['byte' if is_byte else kind for is_byte, kind in zip(model.is_byte(ids), kinds, strict=True)]
    names = [name[1:-1] if kind == 'byte' else name for name, kind in zip(model.id_to_piece(ids), kinds, strict=True)]
    return names, model.get_score(ids), kinds

  def encode_prompt(self, text: str) -> list[int]:
    """Text in which <extra_id_k>, [NLU], [NLG] and [S2S] are special tokens -> ids, without EOS.

    The ids of text around a sentinel are those of training, where a sentinel stands for pieces of one text: a space
    belongs to the word after it, and `con<extra_id_0>tion` has no space at all. Raises DataError for a sentinel that
    does not exist.
    """
    parts, ids = SPECIAL.split(text), []
    is_sentinel = lambda i: 0 < i < len(parts) and i % 2 == 1 and parts[i] not in MODES
    for i, part in enumerate(parts):
      if i % 2:
        ids.append(self.vocabulary.special_id(part))
        continue
      part = part.removesuffix(' ') if is_sentinel(i + 1) else part
      ids += self._encode_inside(part) if is_sentinel(i - 1) else self.encode(part.removeprefix(' ') if i else part)
    return ids

  def _encode_inside(self, text: str) -> list[int]:
    """The ids of text that goes on after other text: SentencePiece puts a space only before the first of a text."""
    return self.encode(ALONE + text)[len(self.encode(ALONE)) :]

  def piece(self, token: int) -> str:
    """A piece of text as SentencePiece spells it: ▁the, <0x0A>."""
    return self._processor.id_to_piece(token)

  def render(self, ids: Iterable[int]) -> str:
    """Ids as a person reads them: text, with every special token written out."""
    parts, text = [], []
    for token in [*map(int, ids), None]:
      special = '' if token is None else self.vocabulary.special(token)
      if special is None:
        text.append(token)
        continue
      parts += [self.decode(text)] * bool(text) + [special] * bool(special)
      text = []
    return ' '.join(parts)
