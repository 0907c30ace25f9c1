"""Pieces cut in two: the text stays, no cut adds more than was said, no character is parted."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.objectives.lexicon import SPACE, Lexicon
from data.objectives.spelling import MOST_GROWTH
from data.ragged import join
from data.stores.vocabulary import EOS, Tokenizer, Vocabulary


@pytest.fixture(scope='module')
def tokenizer(tokenizer_model) -> Tokenizer:
  return Tokenizer(tokenizer_model, 32)


@pytest.fixture(scope='module')
def lexicon(tokenizer) -> Lexicon:
  return Lexicon(tokenizer.vocabulary, tokenizer)


def written(ids, lexicon) -> str:
  """The pieces' own characters, bytes as such: nothing that a decoder would put right."""
  names = lexicon.tokenizer.pieces()[0]
  return ''.join(f'<{names[i]}>' if not lexicon._spelling.texts[i] else names[i] for i in ids)


def test_every_cut_of_every_piece_is_spelt_as_sentencepiece_does_or_moves_to_the_nearest_that_fits(lexicon, tokenizer):
  """Compared for the pieces that begin a word: SentencePiece puts a space before a text."""
  checked = moved = 0
  for piece, text in enumerate(lexicon._spelling.texts):
    for k in range(1, len(text)):
      left, right = (side.values.tolist() for side in lexicon.halves.cut(join([np.int32([piece])]), np.array([k])))
      assert len(left) + len(right) - 1 <= lexicon.halves.growth <= MOST_GROWTH
      assert written(left + right, lexicon) == text
      half = text[:k].removeprefix(SPACE)
      if not text.startswith(SPACE) or not half:
        continue
      own = tokenizer.encode(half), tokenizer._encode_part(text[k:], after=True, before=False)
      fits = sum(map(len, own)) <= 1 + MOST_GROWTH
      assert (written(left, lexicon) == text[:k]) == fits
      assert not fits or (left, right) == own
      checked, moved = checked + fits, moved + (not fits)
  assert checked > 50
  assert moved > 5


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
  texts=st.lists(st.text(max_size=20) | st.sampled_from(['the license', 'é', '漢字 and 𝄞', 'works']), max_size=5),
  data=st.data(),
)
def test_a_text_is_cut_at_its_characters_and_nothing_is_lost(texts, data, tokenizer, lexicon):
  halves = lexicon.halves
  pieces = join([np.int32(tokenizer.encode(text)) for text in texts])
  sizes = [int(halves.chars[ids].sum()) for ids in pieces.split()]
  offsets = np.array([data.draw(st.integers(0, size)) for size in sizes], np.int64)
  left, right = (side.split() for side in halves.cut(pieces, offsets))
  for whole, a, b, offset, size in zip(pieces.split(), left, right, offsets, sizes, strict=True):
    text = tokenizer.decode(whole)
    assert tokenizer.decode([*a, *b]) == text
    assert len(a) + len(b) <= len(whole) + halves.growth
    if EOS not in whole and '\ufffd' not in text and ' \u2047' not in text:
      assert '\ufffd' not in tokenizer.decode(a) + tokenizer.decode(b), 'a character was parted'
    assert offset != size or (a.tolist(), b.tolist()) == (whole.tolist(), [])
    assert offset != 0 or (a.tolist(), b.tolist()) == ([], whole.tolist())


def test_without_a_tokenizer_each_piece_is_a_character_and_a_word():
  lexicon = Lexicon(Vocabulary(100, 4), None)
  left, right = lexicon.halves.cut(join([np.int32([5, 6, 7]), np.int32([])]), np.array([2, 0]))
  assert (left.values.tolist(), right.values.tolist()) == ([5, 6], [7])
  assert lexicon.halves.growth == 0
  assert lexicon.begins_word.all()


def test_words_begin_with_a_space_and_sentences_end_with_a_stop(lexicon):
  names = lexicon.tokenizer.pieces()[0]
  shown = lambda flags: {names[i] for i in np.flatnonzero(flags)}
  assert '\u2581the' in shown(lexicon.begins_word)
  assert 'the' not in shown(lexicon.begins_word)
  assert '.' in shown(lexicon.ends_sentence)
  assert lexicon.begins_word[EOS]
  assert lexicon.ends_sentence[EOS]
