"""What the pieces of a vocabulary are as text: where words begin, where sentences end, how each is cut in two."""

import dataclasses
import functools

import numpy as np

from data.objectives.spelling import Halves, Spelling, spelling_of
from data.stores.vocabulary import Tokenizer, Vocabulary

SPACE = '\u2581'  # SentencePiece's, which stands before the first piece of a word
STOPS = ('.', '!', '?', '。', '！', '？')


@dataclasses.dataclass(frozen=True, eq=False)
class Lexicon:
  """Arrays over the ids of pieces, made on first use. Without `tokenizer` (synthetic data) each piece is a
  word of one character, and no sentence ends.
  """

  vocabulary: Vocabulary
  tokenizer: Tokenizer | None

  @functools.cached_property
  def begins_word(self) -> np.ndarray:
    """bool[pieces]. EOS does, as special tokens do in fairseq."""
    if self.tokenizer is None:
      return np.ones(self.vocabulary.pieces, bool)
    words = np.array([text.startswith(SPACE) for text in self._spelling.texts])
    words[self.vocabulary.ids.end] = True
    return words

  @functools.cached_property
  def ends_sentence(self) -> np.ndarray:
    """bool[pieces]: full stops, and pieces that end with one. EOS does."""
    ends = np.array([text.endswith(STOPS) for text in self._spelling.texts])
    ends[self.vocabulary.ids.end] = True
    return ends

  @functools.cached_property
  def halves(self) -> Halves:
    return Halves(self._spelling)

  @functools.cached_property
  def _spelling(self) -> Spelling:
    return spelling_of(self.vocabulary.pieces, self.tokenizer)
