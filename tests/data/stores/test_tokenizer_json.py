"""A tokenizer.json behind the interface of a SentencePiece model: round trips, places, special tokens as text."""

import hashlib
import json
import pickle
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.objectives.corrupt import example as example_of
from data.objectives.lexicon import Lexicon
from data.objectives.objectives import SpanCorruption, tasks_of
from data.objectives.spelling import spelling_of
from data.stores.special_ids import SpecialIds
from data.stores.vocabulary import Tokenizer
from tests.conftest import paragraphs
from tests.tokenizers_json import SPECIAL, content

IDS = {
  'byte_level': SpecialIds(pad=None, eos=(400, 401), unknown=None, decoder_start=None),
  'byte_fallback': SpecialIds(pad=None, eos=(2,), unknown=0, bos=1, decoder_start=1),
  'unigram': SpecialIds(),
}
EXACT = ('byte_level', 'byte_fallback')  # their decoders give every text back
TEXTS = st.text(st.characters(exclude_categories=['Cs']), max_size=40)


def tokenizer_of(kind: str, sentinels: int = 32) -> Tokenizer:
  return Tokenizer(content(kind), sentinels, IDS[kind])


@pytest.fixture(scope='module', params=EXACT)
def exact(request) -> Tokenizer:
  return tokenizer_of(request.param)


@given(text=TEXTS)
@example(text='the  Licensor 中文 🙂\n\t"x"')
@example(text='<s>a</s> <unk> <|endoftext|><|im_end|> <extra_id_0> [NLU] <0x41>')
@settings(max_examples=60, deadline=None)
def test_every_text_comes_back_and_no_id_is_special(exact, text):
  ids = exact.encode(text)
  assert exact.decode(ids) == text
  assert not set(ids) & set(exact.vocabulary.ids.not_text)
  assert all(i < exact.vocabulary.pieces for i in ids)
  assert [own.tolist() for own in exact.encode_batch([text, 'a b'], 2)] == [ids, exact.encode('a b')]
  assert [own.tolist() for own in exact.encode_batch([text], 1)] == [ids]


@given(text=TEXTS)
@example(text='é🙂 the work')
@settings(max_examples=60, deadline=None)
def test_places_cover_the_bytes_of_the_text_in_order(exact, text):
  """A token that is a part of a character has the place of the whole, so neighbours may share one."""
  spans = exact.spans(text)
  assert [token for token, _, _ in spans] == exact.encode(text)
  data, reached = text.encode(), 0
  for _, begin, end in spans:
    assert begin <= reached <= end
    data[begin:end].decode()  # whole characters
    reached = end
  assert reached == len(data)


def test_a_place_is_that_of_the_text_of_its_token():
  tokenizer = tokenizer_of('byte_level')
  text = 'Licensed under the Apache License'
  for token, begin, end in tokenizer.spans(text):
    assert tokenizer.decode([token]) == text[begin:end]


def test_special_tokens_of_a_unigram_model_are_text_in_a_text():
  """Its pieces include </s> with the best score of all."""
  tokenizer = tokenizer_of('unigram')
  ids = tokenizer.encode('terms</s> of <pad> use')
  assert not {0, 1} & set(ids)
  assert tokenizer.decode(ids).replace('<unk>', '?').startswith('terms')


def test_sentinels_at_the_end_are_those_of_the_vocabulary():
  tokenizer = tokenizer_of('unigram', 4)
  v, last = tokenizer.vocabulary, max(token['id'] for token in added(content('unigram')))
  assert (v.first_sentinel, v.pieces) == (last, last - 3)
  assert tokenizer.render([v.sentinel(2)]) == '<extra_id_2>'


def added(raw: bytes) -> list[dict]:
  return json.loads(raw)['added_tokens']


def test_the_fingerprint_is_the_hash_of_the_file_and_a_copy_is_equal(exact):
  assert exact.fingerprint == hashlib.sha256(exact.model).hexdigest()
  copy = pickle.loads(pickle.dumps(exact))
  assert copy.vocabulary == exact.vocabulary
  assert copy.encode('a <s></s><|endoftext|> b') == exact.encode('a <s></s><|endoftext|> b')


@pytest.mark.parametrize('kind', EXACT)
def test_special_tokens_are_written_with_their_own_names(kind):
  tokenizer = tokenizer_of(kind)
  end = tokenizer.vocabulary.ids.end
  assert tokenizer.render([*tokenizer.encode('the work'), end]) == f'the work {SPECIAL[kind][0 if end == 400 else 2]}'


@pytest.mark.parametrize('kind', EXACT)
def test_span_corruption_gives_the_text_back(kind):
  """Sentinels follow the pieces; inputs with their blanks filled from the targets are the ids of the text."""
  tokenizer, rng = tokenizer_of(kind), np.random.default_rng(0)
  v, (task,) = tokenizer.vocabulary, tasks_of(SpanCorruption())
  for text in paragraphs()[:20]:
    ids = tokenizer.encode(text)
    got = example_of(ids, task, v, rng, Lexicon(v, tokenizer))
    inputs, targets = got['inputs'].tolist(), got['targets'].tolist()
    assert (inputs.pop(), targets.pop()) == (v.ids.end, v.ids.end)
    blanks, current = {}, None
    for token in targets:
      if v.is_sentinel(token):
        current = blanks.setdefault(token, [])
      else:
        current.append(token)
    filled = [own for token in inputs for own in blanks.get(token, [token])]
    assert filled == ids
    assert tokenizer.decode(filled) == text


@pytest.mark.parametrize('kind', EXACT)
def test_text_around_a_sentinel_has_the_pieces_of_training(kind):
  """Any one word hidden: what is written around the blank has the same ids as in the whole text."""
  tokenizer, v = tokenizer_of(kind), tokenizer_of(kind).vocabulary
  words = ['subject', 'to', 'the', 'terms,', 'each', "Contributor's", 'grant', '(perpetual)']
  for hidden in range(1, len(words) - 1):
    before, after = ' '.join(words[:hidden]), ' ' + ' '.join(words[hidden + 1 :])
    whole = tokenizer.encode(' '.join(words))
    got = tokenizer.encode_prompt(f'{before} <extra_id_0>{after}')
    at = got.index(v.first_sentinel)
    assert whole[:at] == got[:at] == tokenizer.encode(before)
    assert whole[at - len(got) + 1 :] == got[at + 1 :]


def test_a_blank_has_no_effect_on_the_pieces_behind_it():
  """'s directly behind a blank is one piece, as behind a word."""
  tokenizer = tokenizer_of('byte_level')
  (of_it,) = tokenizer.encode("'s")
  assert tokenizer.encode_prompt("each <extra_id_0>'s grant")[-len(tokenizer.encode(' grant')) - 1] == of_it


@pytest.mark.parametrize('kind', EXACT)
def test_pieces_have_names_in_one_notation_and_all_bytes(kind):
  tokenizer = tokenizer_of(kind)
  lexicon = Lexicon(tokenizer.vocabulary, tokenizer)
  names, scores, kinds = tokenizer.pieces()
  assert len(names) == len(scores) == len(kinds) == tokenizer.vocabulary.pieces
  assert {kinds[i] for i in IDS[kind].not_text} == {'control'}
  spelling = spelling_of(tokenizer.vocabulary.pieces, tokenizer)
  assert [tokenizer.decode([i]) for i in spelling.byte_ids[0x21:0x7F]] == [chr(b) for b in range(0x21, 0x7F)]
  assert spelling.joins[spelling.byte_ids[0x80]]
  assert lexicon.begins_word[tokenizer.encode('of the')[-1]]


def test_without_the_package_one_line_names_the_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, 'tokenizers', None)
  with pytest.raises(DataError, match=r"pip install 'pretrain\[hf\]'"):
    tokenizer_of('byte_level')


def test_an_id_that_the_tokenizer_lacks_is_refused():
  with pytest.raises(DataError, match=r'eos\[1\] has id 402, the tokenizer has the ids 0 to 401'):
    Tokenizer(content('byte_level'), 0, SpecialIds(pad=None, eos=(400, 402), unknown=None, decoder_start=None))
