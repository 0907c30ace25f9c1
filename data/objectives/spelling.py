"""How the pieces of a vocabulary are spelt, and how each is cut in two."""

import dataclasses
import functools
import math
from collections.abc import Mapping

import numpy as np

from data.ragged import Ragged, first_of, join, spread, starts, weave
from data.stores.vocabulary import SPACE, Tokenizer

MOST_GROWTH = 4  # tokens; some long pieces fall apart in single characters, and every row would have to hold that


@dataclasses.dataclass(frozen=True, eq=False)
class Spelling:
  """`texts[i]` is piece i as text, '' for control pieces and bytes; `scores` (float[pieces]) are the model's.

  `byte_ids` has the id of each byte, or nothing. `parts` are the bytes of pieces that are no whole characters. `joins`
  (bool[pieces]) are pieces that continue a character.
  """

  texts: tuple[str, ...]
  scores: np.ndarray
  byte_ids: tuple[int, ...]
  parts: Mapping[int, bytes] = dataclasses.field(default_factory=dict)

  @functools.cached_property
  def ids(self) -> dict[str, int]:
    """The piece of each text that is one."""
    return {text: i for i, text in enumerate(self.texts) if text}

  @functools.cached_property
  def lowest(self) -> float:
    return float(self.scores[list(self.ids.values())].min())

  @functools.cached_property
  def joins(self) -> np.ndarray:
    joins = np.zeros(len(self.texts), bool)
    joins[list(self.byte_ids[0x80:0xC0])] = True
    joins[[i for i, part in self.parts.items() if 0x80 <= part[0] < 0xC0]] = True
    return joins


def spelling_of(pieces: int, tokenizer: Tokenizer | None) -> Spelling:
  """The spelling of a tokenizer. Without one (synthetic data) each piece is one character."""
  if tokenizer is None:
    return Spelling(('',) * pieces, np.zeros(pieces), ())
  names, scores, kinds = tokenizer.pieces()
  texts = tuple(name if kind == 'text' else '' for name, kind in zip(names, kinds, strict=True))
  bytes_of = {int(name, 16): i for i, (name, kind) in enumerate(zip(names, kinds, strict=True)) if kind == 'byte'}
  if len(bytes_of) >= 128:  # in a byte-level vocabulary, bytes below 128 are characters
    ascii_of = {text: i for i, text in enumerate(texts) if text == SPACE or (len(text) == 1 and text.isascii())}
    bytes_of = {ord(' ' if text == SPACE else text): i for text, i in ascii_of.items()} | bytes_of
  parts = {i: bytes.fromhex(names[i]) for i, kind in enumerate(kinds) if kind == 'part'}
  byte_ids = tuple(bytes_of[b] for b in range(256)) if len(bytes_of) == 256 else ()
  return Spelling(texts, np.array(scores), byte_ids, parts)


class Halves:
  """Every piece cut at every of its characters, each half spelt in pieces: tables, made once for a vocabulary.

  `chars` (int64[pieces]) are the characters of each. `growth` is the most tokens that a cut adds.
  """

  def __init__(self, spelling: Spelling):
    self.chars = np.array([max(len(text), 1) for text in spelling.texts]) - spelling.joins
    cuts = [halves for i, text in enumerate(spelling.texts) for halves in _cuts(i, text, spelling)]
    self._first = starts(np.maximum(self.chars - 1, 0))
    self._left, self._right = (join(side) for side in (zip(*cuts, strict=True) if cuts else ([], [])))
    self._begins = starts(self._left.lengths), starts(self._right.lengths)
    self.growth = int((self._left.lengths + self._right.lengths).max() - 1) if cuts else 0

  def cut(self, pieces: Ragged, offsets: np.ndarray) -> tuple[Ragged, Ragged]:
    """Each piece of text up to character `offsets[i]` (int64; its end, where it has fewer), and from there on."""
    lengths, begins = pieces.lengths, starts(pieces.lengths)
    sums = np.concatenate([[0], np.cumsum(self.chars[pieces.values])])
    before = sums[:-1] - np.repeat(sums[begins], lengths)
    total = sums[begins + lengths] - sums[begins]
    offsets = np.minimum(offsets, total)  # a cut that moved may have left fewer
    piece = np.repeat(np.arange(len(lengths)), lengths)
    # The last token that begins no later: bytes without a character of their own go with the one before.
    token = np.bincount(piece, before <= offsets[piece], len(lengths)).astype(np.int64) - 1
    token = np.where(offsets == total, lengths, token)
    inside = token < lengths
    at = np.minimum(begins + token, max(len(pieces.values) - 1, 0))
    within = np.where(inside, offsets - before[at], 0) if len(before) else np.zeros_like(offsets)
    left, right = self._of(pieces.values[at] if len(before) else np.zeros_like(at), within)
    skipped = token + (within > 0)
    rest = lengths - skipped
    tail = Ragged(pieces.values[spread(begins + skipped, rest)], rest)
    return weave([first_of(pieces, token), left]), weave([right, tail])

  def _of(self, tokens: np.ndarray, within: np.ndarray) -> tuple[Ragged, Ragged]:
    """Both halves of each token, cut behind character `within`; nothing where that is 0."""
    own = np.where(within > 0, self._first[tokens] + within - 1, 0)
    sides = []
    for half, begins in zip((self._left, self._right), self._begins, strict=True):
      if not len(begins):
        sides.append(Ragged(np.zeros(0, np.int32), np.zeros_like(own)))
        continue
      lengths = np.where(within > 0, half.lengths[own], 0)
      sides.append(Ragged(half.values[spread(begins[own], lengths)], lengths))
    return sides[0], sides[1]


def _cuts(piece: int, text: str, spelling: Spelling) -> list[tuple[list[int], list[int]]]:
  """(left, right) for each cut inside a piece, or for the nearest that adds no more than `MOST_GROWTH` tokens."""
  if len(text) < 2:
    return []
  left, right = _spell(text, spelling, False), _spell(text, spelling, True)
  cuts = {0: ([], [piece]), len(text): ([piece], [])}
  for k, (a, b) in enumerate(zip(left[1:-1], right[1:-1], strict=True), 1):
    if a is not None and b is not None and len(a) + len(b) <= 1 + MOST_GROWTH:
      cuts[k] = a, b
  return [cuts[min(cuts, key=lambda near: (abs(near - k), near))] for k in range(1, len(text))]


def _spell(text: str, spelling: Spelling, ends: bool) -> list[list[int] | None]:
  """The likeliest pieces of text[:k] for each k, of text[k:] if `ends`; None where there are none.

  As SentencePiece's unigram model spells: the highest sum of scores, a character of no piece in bytes.
  """
  size = len(text)
  best: list[tuple[float, list[int] | None]] = [(0.0, [])] + [(-math.inf, None)] * size
  take = (lambda a, b: text[size - b : size - a]) if ends else (lambda a, b: text[a:b])
  for b in range(1, size + 1):
    for a in range(b):
      score, ids = _piece(take(a, b), spelling) if b - a < size else (-math.inf, None)
      if ids is not None and best[a][1] is not None and best[a][0] + score > best[b][0]:
        best[b] = best[a][0] + score, (ids + best[a][1] if ends else best[a][1] + ids)
  found = [ids for _, ids in best]
  return found[::-1] if ends else found


def _piece(text: str, spelling: Spelling) -> tuple[float, list[int] | None]:
  """(score, ids) of text that is one piece, or one character in bytes; None for other text."""
  if text in spelling.ids:
    return float(spelling.scores[spelling.ids[text]]), [spelling.ids[text]]
  if len(text) == 1 and spelling.byte_ids:
    return spelling.lowest - 10, [spelling.byte_ids[b] for b in text.encode()]
  return -math.inf, None
