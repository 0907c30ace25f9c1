"""Scores of documents for curricula (data/mixing/curriculum.py): cheap measures of how simple or rich a text is.

These are the three that helped most in Zhang et al. 2025, arXiv:2506.11300 (compression ratio, lexical diversity,
readability).
"""

import re
import zlib
from collections.abc import Sequence
from typing import Literal, assert_never, get_args

Score = Literal['compression', 'lexical_diversity', 'readability']
SCORES: tuple[Score, ...] = get_args(Score)
SCORED = 2**16  # characters at the beginning of a document; the rest does not affect its score
FACTOR = 0.72  # McCarthy & Jarvis end a factor when the share of different words falls to this

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_SENTENCE = re.compile(r'[.!?]+(?=\s|$)')
_VOWELS = re.compile(r'[aeiouy]+')


def score(name: Score, text: str) -> float:
  """A score of a document that begins with `text`."""
  match name:
    case 'compression':
      return compression(text)
    case 'lexical_diversity':
      return lexical_diversity(_WORD.findall(text.lower()))
    case 'readability':
      return readability(text)
    case _:
      assert_never(name)


def compression(text: str) -> float:
  """The size of the text divided by its compressed size (zlib, level 6): high for repetitive text.

  >>> compression('the same words, ' * 50) > 10 > compression('a few words that come once')
  True
  """
  raw = text.encode()
  return len(raw) / len(zlib.compress(raw, 6))


def lexical_diversity(words: Sequence[str]) -> float:
  """MTLD: the mean number of words until the share of different words falls to 0.72. High for varied words.

  Source: McCarthy & Jarvis 2010, Behavior Research Methods 42, 381-392: the mean of both reading directions; the last,
  incomplete factor counts in proportion to how far the share has fallen. 0 for text without words.

  >>> lexical_diversity('a b a b a b a b a b a b'.split())
  3.0
  """
  return (_mtld(words) + _mtld(words[::-1])) / 2 if words else 0.0


def _mtld(words: Sequence[str]) -> float:
  factors, seen, count = 0.0, set(), 0
  for word in words:
    seen.add(word)
    count += 1
    if len(seen) / count <= FACTOR:
      factors, seen, count = factors + 1, set(), 0
  if count:
    factors += (1 - len(seen) / count) / (1 - FACTOR)
  return len(words) / factors if factors else float(len(words))


def readability(text: str) -> float:
  """Flesch reading ease: high for short words and sentences. 0 for text without words.

  Source: Flesch 1948, A new readability yardstick: 206.835 - 1.015 words/sentence - 84.6 syllables/word. Syllables are
  groups of vowels, without a final silent e: accurate for English, and still comparable within other languages.

  >>> round(readability('The cat sat on the mat. It was warm.'), 1)
  117.7
  """
  words = _WORD.findall(text.lower())
  if not words:
    return 0.0
  sentences = max(len(_SENTENCE.findall(text)), 1)
  return 206.835 - 1.015 * len(words) / sentences - 84.6 * sum(map(_syllables, words)) / len(words)


def _syllables(word: str) -> int:
  count = len(_VOWELS.findall(word))
  silent = word.endswith('e') and not word.endswith('le') and count > 1
  return max(count - silent, 1)
