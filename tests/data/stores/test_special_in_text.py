"""Names of special tokens in a text: text, unless they are asked for; then the ids of the reference libraries."""

import io
import pickle

import numpy as np
import pytest
import sentencepiece
import tokenizers

from data.errors import DataError
from data.stores.special_ids import SpecialIds
from data.stores.vocabulary import Tokenizer
from tests.conftest import paragraphs
from tests.data.stores.test_tokenizer_json import IDS, tokenizer_of
from tests.tokenizers_json import content

NAMES = {
  'byte_level': ('<|endoftext|>', '<|im_end|>'),
  'byte_fallback': ('<unk>', '<s>', '</s>'),
  'unigram': ('<pad>', '</s>', '<unk>'),
}
TEXT = '{0}the Work{1} of <|other|> the{0}{1} License 中 {1}'


def chat_model(*, user: str = '<|im_start|>,<|im_end|>', control: str = '<tool>') -> bytes:
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(paragraphs()), model_writer=model, vocab_size=420, byte_fallback=True, pad_id=0, eos_id=1,
    unk_id=2, bos_id=3, num_threads=1, minloglevel=2, user_defined_symbols=user, control_symbols=control,
  )  # fmt: skip
  return model.getvalue()


@pytest.fixture(scope='module')
def chat() -> Tokenizer:
  return Tokenizer(chat_model(), 32, SpecialIds(bos=3, decoder_start=3))


@pytest.mark.parametrize('kind', NAMES)
def test_all_names_have_the_ids_of_the_package(kind):
  """`tokenizers` reads the names of added tokens in text by itself."""
  text = TEXT.format(*NAMES[kind][-2:])
  expected = tokenizers.Tokenizer.from_str(content(kind).decode()).encode(text, add_special_tokens=False)
  plain = tokenizer_of(kind)
  own = plain.reading(plain.special)
  assert own.encode(text) == expected.ids
  assert set(own.encode(text)) & {plain.special[name] for name in NAMES[kind][-2:]}
  assert [token for token, _, _ in own.spans(text)] == expected.ids
  assert pickle.loads(pickle.dumps(own)).encode(text) == expected.ids
  assert not set(plain.encode(text)) & set(IDS[kind].eos), 'text, where nothing is asked for'


def test_a_name_that_is_not_asked_for_is_text():
  own = tokenizer_of('byte_level').reading(['<|im_end|>'])
  ids = own.encode('a<|im_end|>b<|endoftext|>')
  assert ids.count(401) == 1
  assert 400 not in ids
  assert own.decode(ids) == 'a<|im_end|>b<|endoftext|>'


def test_symbols_of_a_sentencepiece_model(chat):
  """Text behind a symbol gets no space in front; that at the beginning has SentencePiece's."""
  assert set(chat.special) == {'<pad>', '</s>', '<s>', '<|im_start|>', '<|im_end|>', '<tool>'}
  own, plain = chat.reading(['<|im_start|>', '<|im_end|>', '<s>', '<tool>']), sentencepiece.SentencePieceProcessor
  pieces = plain(model_proto=chat.model)
  text = '<s><|im_start|>user the Work 中<|im_end|> of<tool>'
  names = [pieces.id_to_piece(token) for token in own.encode(text)]
  assert names[:2] == ['<s>', '<|im_start|>']
  assert names[-1] == '<tool>'
  between = names[2 : names.index('<|im_end|>')]
  assert pieces.decode([pieces.piece_to_id(name) for name in between]) == 'user the Work 中'
  assert not between[0].startswith('▁')
  assert names[names.index('<|im_end|>') + 1].startswith('▁'), 'the space of the text'
  assert own.encode('the Work') == chat.encode('the Work') == pieces.encode('the Work')
  assert pieces.piece_to_id('<tool>') not in chat.encode('a <tool>'), 'text, where nothing is asked for'
  data = text.encode()
  for token, begin, end in own.spans(text):
    if token in chat.special.values():
      assert data[begin:end].decode() == pieces.id_to_piece(token)
  assert [list(ids) for ids in own.encode_batch([text, 'a'], 1)] == [own.encode(text), own.encode('a')]
  assert all(isinstance(ids, np.ndarray) for ids in own.encode_batch([text], 2))


def test_blanks_and_special_tokens_stand_in_one_prompt(chat):
  own = chat.reading(['<tool>'])
  tool, blank = chat.special['<tool>'], chat.vocabulary.first_sentinel
  ids = own.encode_prompt('the <extra_id_0> of<tool>Work')
  assert ids[ids.index(tool) + 1 :] == own.encode('<tool>Work')[1:]
  assert ids[: ids.index(tool)] == [*chat.encode('the'), blank, *chat.encode('of')]


def test_an_unknown_name_lists_those_that_exist(chat):
  with pytest.raises(DataError) as found:
    chat.reading(['<|im_end|>', '<|im_strat|>'])
  assert found.value.message == (
    "'<|im_strat|>' is not a special token of this tokenizer; it has <pad>, </s>, <s>, <tool>, "
    '<|im_start|>, <|im_end|>.'
  )


def test_many_names_are_cut():
  many = Tokenizer(chat_model(user=','.join(f'<u{k}>' for k in range(41))), 0, SpecialIds(bos=3, decoder_start=3))
  with pytest.raises(DataError, match=r'<u35> and 5 more\.$'):
    many.reading(['x'])
