"""A filled prompt is the prompt, character by character, with each blank replaced; whatever the tokenizer is."""

import functools
import io
import itertools
import random

import pytest
import sentencepiece

from data.errors import DataError
from data.stores.vocabulary import EOS, SPECIAL, UNKNOWN, Tokenizer
from pretrain.evaluation.texts import filled
from tests.conftest import paragraphs

TOKENIZERS = {
  'unigram': {'vocab_size': 200},
  'unigram, bytes': {'vocab_size': 448, 'byte_fallback': True},
  'bpe': {'vocab_size': 200, 'model_type': 'bpe'},
  'bpe, bytes': {'vocab_size': 448, 'model_type': 'bpe', 'byte_fallback': True},
  'characters': {'vocab_size': 80, 'model_type': 'char'},
  'suffix spaces': {'vocab_size': 200, 'treat_whitespace_as_suffix': True},
  'suffix spaces, bytes': {'vocab_size': 448, 'treat_whitespace_as_suffix': True, 'byte_fallback': True},
  'suffix spaces, bpe': {'vocab_size': 200, 'treat_whitespace_as_suffix': True, 'model_type': 'bpe'},
  'no dummy prefix': {'vocab_size': 200, 'add_dummy_prefix': False},
  'nfkc': {'vocab_size': 200, 'normalization_rule_name': 'nfkc'},
  'nmt_nfkc_cf, bytes': {'vocab_size': 448, 'normalization_rule_name': 'nmt_nfkc_cf', 'byte_fallback': True},
  'identity, extra spaces': {
    'vocab_size': 448, 'normalization_rule_name': 'identity', 'remove_extra_whitespaces': False, 'byte_fallback': True,
  },
  'a piece for private use': {'vocab_size': 200, 'user_defined_symbols': ['\ue000t', '\ue001']},
}  # fmt: skip
EVERY = pytest.mark.parametrize('name', TOKENIZERS)
# Characters without a piece, that normalisation changes, or that our code or SentencePiece could take for its own.
WORDS = [
  'the',
  'Work',
  'of',
  'a',
  '☃',
  '☃☃',
  '½',
  'ﬁ',
  'Ａ',
  'é',
  'e\u0301',
  '\ue000',
  '\ue000t',
  '▁',
  '⁇',
  '</s>',
  '<pad>',
]
WORDS += ['<extra_id_>', '<extra_id_٣>', '[nlu]', '<', '\u3000', '\u200b', '\n', '\t', '👩\u200d🚀', '字', '.', ',']


@functools.cache
def tokenizer_of(name: str) -> Tokenizer:
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(paragraphs()), model_writer=model, hard_vocab_limit=False, pad_id=0, eos_id=EOS,
    unk_id=UNKNOWN, bos_id=-1, num_threads=1, minloglevel=2, **TOKENIZERS[name],
  )  # fmt: skip
  return Tokenizer(model.getvalue(), sentinels=8)


def prompts(seed: int, number: int = 150):
  """Random texts of words and spaces with one to three blanks; every word directly beside a blank too."""
  rng = random.Random(seed)
  for word in WORDS:
    yield from (f'A<extra_id_0>{word}', f'{word}<extra_id_0>A', f'a {word} <extra_id_0> {word}')
  for _ in range(number):
    parts = [rng.choice([*WORDS, ' ', ' ', '  ', '']) for _ in range(rng.randint(1, 9))]
    for k in range(rng.randint(1, 3)):
      parts.insert(rng.randint(0, len(parts)), f'<extra_id_{k}>')
    yield ''.join(parts)


@EVERY
def test_each_blank_is_replaced_and_nothing_else_changes(name):
  tokenizer, v = tokenizer_of(name), tokenizer_of(name).vocabulary
  answers = ['Work', 'the Work', 'a b c']
  output = [token for k, answer in enumerate(answers) for token in (v.sentinel(k), *tokenizer.encode(answer))]
  # What the tokenizer makes of the answer alone: nmt_nfkc_cf has small letters.
  written = [tokenizer.decode(tokenizer.encode(answer)).strip(' ') for answer in answers]
  for prompt in prompts(seed=0):
    inputs = [v.mode_ids[0], *tokenizer.encode_prompt(prompt), EOS]
    expected = prompt
    for k, answer in enumerate(written):
      expected = expected.replace(f'<extra_id_{k}>', answer)
    assert filled(prompt, inputs, output, tokenizer) == expected
    assert filled(prompt, inputs, [], tokenizer) == prompt, 'without answers every blank stays'


@EVERY
def test_the_model_reads_all_text_around_a_blank(name):
  """The ids of a part are those of its text: decoded, they are what the tokenizer makes of the text by itself."""
  tokenizer, v = tokenizer_of(name), tokenizer_of(name).vocabulary
  for prompt in prompts(seed=1):
    ids, parts = tokenizer.encode_prompt(prompt), SPECIAL.split(prompt)
    cuts = [-1, *(i for i, token in enumerate(ids) if v.is_sentinel(token)), len(ids)]
    found = [ids[a + 1 : b] for a, b in itertools.pairwise(cuts)]
    assert len(found) == len(parts[::2]), prompt
    for own, text in zip(found, parts[::2], strict=True):
      alone = tokenizer.decode(tokenizer.encode(text))
      assert ''.join(tokenizer.decode(own).split()) == ''.join(alone.split()), (prompt, text)


@pytest.mark.parametrize('name', ['unigram', 'bpe', 'suffix spaces', 'suffix spaces, bpe', 'suffix spaces, bytes'])
def test_parts_are_spelt_as_in_training(name):
  """Any one piece of a text hidden: what is written around the blank has the pieces' characters, spaces among them."""
  tokenizer, text = tokenizer_of(name), 'subject to the terms, each Contributor hereby grants redistributions.'
  ids = tokenizer.encode(text)
  spell = lambda tokens: ''.join(map(tokenizer.piece, tokens))
  for hidden in range(len(ids)):
    before, piece, after = spell(ids[:hidden]), tokenizer.piece(ids[hidden]), spell(ids[hidden + 1 :])
    if '▁' in (tokenizer.piece(ids[hidden - 1]), piece, tokenizer.piece(ids[min(hidden + 1, len(ids) - 1)])):
      continue  # a space of its own belongs to the blank in a prompt
    left, right = (' ' if piece.startswith('▁') else ''), (' ' if piece.endswith('▁') else '')
    prompt = f'{before}{left}<extra_id_0>{right}{after}'.replace('▁', ' ').strip(' ')
    got = tokenizer.encode_prompt(prompt)
    at = got.index(tokenizer.vocabulary.first_sentinel)
    assert [spell(got[:at]), spell(got[at + 1 :])] == [before, after], prompt


@EVERY
def test_a_continued_prompt_begins_with_the_prompt(name):
  tokenizer = tokenizer_of(name)
  for prompt in ('the', 'the ', 'a ☃', 'the  Work\n', 'ﬁ', ''):
    inputs = tokenizer.encode_prompt(prompt)
    text = filled(prompt, inputs, tokenizer.encode('Work'), tokenizer)
    assert text.startswith(prompt)
    assert text[len(prompt) :].strip(' ') == tokenizer.decode(tokenizer.encode('Work')).strip(' ')


def test_fillings_may_be_missing_repeated_or_out_of_order():
  tokenizer, v = tokenizer_of('unigram'), tokenizer_of('unigram').vocabulary
  work, the = tokenizer.encode('Work'), tokenizer.encode('the')
  of = lambda prompt, *output: filled(prompt, tokenizer.encode_prompt(prompt), list(output), tokenizer)
  first, second = v.sentinel(0), v.sentinel(1)
  assert of('a <extra_id_0> b <extra_id_1>', second, *the, first, *work) == 'a Work b the'
  assert of('a <extra_id_1> b <extra_id_0>', first, *work, second, *the) == 'a the b Work'
  assert of('a <extra_id_0> b <extra_id_0>', first, *work) == 'a Work b Work'
  assert of('a <extra_id_0> b', first, *work, first, *the) == 'a Work b', 'the first answer counts'
  assert of('a <extra_id_0> b', *work) == 'a <extra_id_0> b'
  assert of('a <extra_id_0> b', second, *work) == 'a <extra_id_0> b'
  assert of('a <extra_id_00> b', first, *work) == 'a Work b'
  assert of('[NLG] a <extra_id_0> b', first, *work) == 'a Work b'


@pytest.mark.parametrize('digits', ['8', '99', '9' * 5000])
def test_a_sentinel_beyond_the_vocabulary_is_refused_in_one_short_line(digits):
  with pytest.raises(DataError, match=r'is beyond the 8 sentinels') as caught:
    tokenizer_of('unigram').encode_prompt(f'a <extra_id_{digits}>')
  assert len(str(caught.value)) < 200
