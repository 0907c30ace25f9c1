"""Scores of documents for curricula (data/packing/plan.py): cheap numbers that tell plain text from rich text.

The three that helped most in Zhang et al. 2025, arXiv:2506.11300 (compression ratio, lexical diversity, readability).
"""

import re
import zlib
from collections.abc import Sequence
from typing import Literal, assert_never, get_args

Score = Literal['compression', 'lexical_diversity', 'readability']
SCORES: tuple[Score, ...] = get_args(Score)
SCORED = 2**16  # characters: what lies behind them in a document is not looked at
FACTOR = 0.72  # where McCarthy & Jarvis end a stretch

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")
_SENTENCE = re.compile(r'[.!?]+(?=\s|$)')
_VOWELS = re.compile(r'[aeiouy]+')


def score(name: Score, text: str) -> float:
  """A score of a document, of which `text` is the beginning."""
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
  """Bytes of the text over bytes of it compressed (zlib, level 6): high where it repeats itself.

  >>> compression('the same words, ' * 50) > 10 > compression('a few words that come once')
  True
  """
  raw = text.encode()
  return len(raw) / len(zlib.compress(raw, 6))


def lexical_diversity(words: Sequence[str]) -> float:
  """MTLD: how many words go by, on average, until the share of different ones falls to 0.72. High where words differ.

  Source: McCarthy & Jarvis 2010, Behavior Research Methods 42, 381-392: the mean of both directions; the last stretch
  counts by how far it fell. 0 for no words.

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
  """Flesch reading ease: high where words and sentences are short. 0 for no words.

  Source: Flesch 1948, A new readability yardstick: 206.835 - 1.015 words/sentence - 84.6 syllables/word. Syllables are
  groups of vowels, a final silent e not counted: right for English, and at least comparable elsewhere.

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
