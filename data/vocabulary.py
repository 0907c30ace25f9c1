"""Which id means what, and text to ids and back."""

import dataclasses
import functools
import hashlib
import re
from collections.abc import Iterable, Sequence

import sentencepiece

PAD, EOS, UNKNOWN = 0, 1, 2
MODES = ('[NLU]', '[NLG]', '[S2S]')
SPECIAL = re.compile(r'(<extra_id_\d+>|' + '|'.join(re.escape(mode) for mode in MODES) + ')')


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

  @property
  def mode_ids(self) -> tuple[int, int, int]:
    """The ids of [NLU], [NLG] and [S2S]."""
    base = self.pieces + self.sentinels
    return base, base + 1, base + 2

  def special(self, token: int) -> str | None:
    """How people see `token` where it is no text: <extra_id_k>, [NLU], <pad>, </s>; None for text."""
    if token in (PAD, EOS):
      return ('<pad>', '</s>')[token]
    if self.pieces <= token <= self.first_sentinel:
      return f'<extra_id_{self.first_sentinel - token}>'
    return MODES[token - self.mode_ids[0]] if self.mode_ids[0] <= token <= self.mode_ids[2] else None

  def special_id(self, text: str) -> int:
    """The id of <extra_id_k> or of a mode token. Raises ValueError for a sentinel that does not exist."""
    if text in MODES:
      return self.mode_ids[MODES.index(text)]
    k = int(text.removeprefix('<extra_id_').removesuffix('>'))
    if k >= self.sentinels:
      raise ValueError(f'{text} is beyond the {self.sentinels} sentinels of this vocabulary.')
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

  def encode_batch(self, texts: Sequence[str], num_threads: int = 1) -> list[list[int]]:
    return self._processor.encode(list(texts), num_threads=num_threads)

  def decode(self, ids: Iterable[int]) -> str:
    """Ids of text -> text."""
    return self._processor.decode([int(i) for i in ids])

  def encode_prompt(self, text: str) -> list[int]:
    """Text in which <extra_id_k>, [NLU], [NLG] and [S2S] are special tokens -> ids, without EOS."""
    ids: list[int] = []
    for i, part in enumerate(SPECIAL.split(text)):
      ids += [self.vocabulary.special_id(part)] if i % 2 else self.encode(part)
    return ids

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
