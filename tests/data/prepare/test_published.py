"""Which ids a published tokenizer has: the order of its files."""

import io
import re
import sys

import pytest
import sentencepiece

from data.errors import DataError
from data.prepare.prepare import prepare
from data.prepare.published import published, tokenizer_in
from data.stores.special_ids import T5_IDS, SpecialIds
from tests.conftest import paragraphs
from tests.tokenizers_json import publish


@pytest.fixture(scope='module')
def llama_model() -> bytes:
  """SentencePiece with Llama's ids: unknown 0, bos 1, eos 2, no padding."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(paragraphs()), model_writer=model, vocab_size=400, byte_fallback=True, model_type='bpe',
    unk_id=0, bos_id=1, eos_id=2, pad_id=-1, num_threads=1, minloglevel=2,
  )  # fmt: skip
  return model.getvalue()


def beside(folder, **files):
  publish(folder, 'byte_level', **files)
  (folder / 'tokenizer.json').unlink()
  return folder


LLAMA = SpecialIds(pad=None, eos=(2,), unknown=0, bos=1, decoder_start=1)


def test_a_sentencepiece_model_alone_has_its_own_ids(tmp_path, llama_model, tokenizer_model):
  (tmp_path / 'llama.model').write_bytes(llama_model)
  (tmp_path / 't5.model').write_bytes(tokenizer_model)
  assert published(tmp_path / 'llama.model').ids == LLAMA
  assert published(tmp_path / 't5.model').ids == T5_IDS


def test_t5s_files_make_t5s_ids(tmp_path, tokenizer_model):
  ids = {'pad_token_id': 0, 'eos_token_id': 1, 'decoder_start_token_id': 0}
  tokens = {'eos_token': '</s>', 'pad_token': '<pad>', 'unk_token': '<unk>'}
  folder = beside(tmp_path / 'm', config=ids, generation_config=ids, tokenizer_config=tokens)
  (folder / 'spiece.model').write_bytes(tokenizer_model)
  assert published(folder).ids == T5_IDS


def test_later_files_replace_earlier_ones(tmp_path, llama_model):
  folder = beside(tmp_path / 'm', config={'bos_token_id': 5, 'eos_token_id': 6, 'pad_token_id': 9999})
  (folder / 'tokenizer.model').write_bytes(llama_model)
  assert published(folder).ids == SpecialIds(pad=None, eos=(6,), unknown=0, bos=5, decoder_start=5)
  beside(folder, generation_config={'eos_token_id': [7, 8], 'decoder_start_token_id': 3, 'pad_token_id': 4})
  assert published(folder).ids == SpecialIds(pad=4, eos=(7, 8), unknown=0, bos=5, decoder_start=3)
  beside(folder, generation_config={}, tokenizer_config={'bos_token': {'content': '<s>'}, 'eos_token': '</s>'})
  assert published(folder).ids == SpecialIds(pad=None, eos=(2, 6), unknown=0, bos=1, decoder_start=1)
  beside(folder, tokenizer_config={'bos_token': '<s>', 'add_bos_token': False})
  assert published(folder).ids == SpecialIds(pad=None, eos=(6,), unknown=0, bos=1, decoder_start=None)


@pytest.mark.parametrize(
  'files',
  [
    {'config': {'model_type': 'bert'}, 'tokenizer_config': {'do_lower_case': True}},
    {'tokenizer_config': {
      'cls_token': '[CLS]', 'sep_token': '[SEP]', 'mask_token': {'content': '[MASK]'}, 'pad_token': '[PAD]',
    }},
  ],
  ids=['as bert-base-uncased', 'named'],
)  # fmt: skip
def test_bert_has_ids_around_a_text_and_a_mask(tmp_path, files):
  """bert-base-uncased's tokenizer_config.json names no token; `transformers` has their names."""
  found = published(publish(tmp_path / 'm', 'wordpiece', **files)).ids
  assert (found.pad, found.eos, found.cls, found.mask) == (0, (3,), 2, 4)
  assert SpecialIds.from_json(found.to_json()) == found


def test_ids_of_encoders_are_written_only_where_there_are_some():
  """So manifests and fingerprints of other stores are unchanged."""
  assert T5_IDS.to_json().keys() == {'pad', 'eos', 'unknown', 'bos', 'decoder_start'}
  assert SpecialIds.from_json(T5_IDS.to_json()) == T5_IDS
  with pytest.raises(ValueError, match='lacks some of the keys'):
    SpecialIds.from_json({**T5_IDS.to_json(), 'other': 3})


def test_qwen_has_no_first_token_and_two_ends(tmp_path):
  folder = publish(
    tmp_path / 'm', 'byte_level', config={'bos_token_id': 400, 'eos_token_id': 401},
    generation_config={'eos_token_id': [401, 400]},
    tokenizer_config={'bos_token': None, 'eos_token': '<|endoftext|>', 'add_bos_token': False},
  )  # fmt: skip
  found = published(folder).ids
  assert found == SpecialIds(pad=None, eos=(400, 401), unknown=None, bos=400, decoder_start=None)
  assert (found.end, found.first_input) == (400, 400)


def test_a_post_processor_decides_whether_bos_is_read(tmp_path):
  folder = publish(tmp_path / 'm', 'byte_fallback', config={'eos_token_id': 2})
  assert published(folder).ids == LLAMA
  publish(folder, 'byte_fallback', config={'eos_token_id': 2}, tokenizer_config={'add_bos_token': False})
  assert published(folder).ids.decoder_start is None


def test_sentencepiece_comes_first_unless_it_lacks_an_id(tmp_path, llama_model):
  folder = publish(tmp_path / 'm', 'byte_fallback', config={'eos_token_id': 2})
  (folder / 'tokenizer.model').write_bytes(llama_model)
  assert tokenizer_in(folder) == folder / 'tokenizer.model'
  publish(folder, 'byte_fallback', config={'eos_token_id': 479})
  assert tokenizer_in(folder) == folder / 'tokenizer.json'


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda folder: folder.mkdir(), 'has none of spiece.model, tokenizer.model, .*tokenizer.json; check --tokenizer'),
    (lambda folder: publish(folder, 'byte_level'), r'tokenizer.json has no end of text: .*; set eos_token_id in'),
    (
      lambda folder: publish(folder, 'byte_level', config={'eos_token_id': 402}),
      r'tokenizer.json has the ids 0 to 401, and the files beside it give eos the id 402; both must be of one',
    ),
    (
      lambda folder: (publish(folder, 'byte_level') / 'tokenizer.json').write_text('{"model": 3}'),
      r'm/tokenizer.json is not a tokenizer.json \(it has no model with a vocabulary\); copy it again',
    ),
    (
      lambda folder: (publish(folder, 'byte_level') / 'config.json').write_text('{'),
      r'config.json is not readable .*; copy it again',
    ),
    (
      lambda folder: (publish(folder, 'byte_level', config={'eos_token_id': 0}) / 'tokenizer.json').write_text(
        '{"model": {"type": "Nothing", "vocab": {"a": 0}}}'
      ),
      r'tokenizer.json: it cannot be read: .*',
    ),
  ],
)  # fmt: skip
def test_the_error_names_the_file_and_nothing_is_left(tmp_path, make, message):
  make(tmp_path / 'm')
  (tmp_path / 't.txt').write_text('the work')
  with pytest.raises(DataError, match=message):
    prepare([tmp_path / 't.txt'], tmp_path / 'out', tokenizer=tmp_path / 'm')
  assert not list(tmp_path.glob('*out*'))


def test_without_the_package_ids_are_read_and_text_is_refused(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'tokenizers', None)
  folder = publish(tmp_path / 'm', 'byte_fallback', config={'eos_token_id': 2})
  assert (published(folder).ids, published(folder).pieces) == (LLAMA, 480)
  (tmp_path / 't.txt').write_text('the work')
  with pytest.raises(DataError, match=re.escape('m/tokenizer.json: a tokenizer.json is read with the package')):
    prepare([tmp_path / 't.txt'], tmp_path / 'out', tokenizer=folder)
  assert not list(tmp_path.glob('*out*'))
