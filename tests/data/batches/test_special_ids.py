"""Batches with other ids than T5's: expected fields are written by hand."""

import itertools
import json

import numpy as np
import pytest

from data.batches.source import Source, StoreData, open_data
from data.errors import DataError
from data.objectives.objectives import CausalLm, PrefixLm, SpanCorruption, Ul2
from data.packing.packing import BestFit
from data.prepare.prepare import prepare
from data.prepare.text import Reading
from data.stores.ngrams import ngram_loss
from data.stores.special_ids import T5_IDS, SpecialIds
from data.stores.store import StoreWriter, open_store
from data.stores.verify import verify
from data.stores.vocabulary import Tokenizer
from tests.conftest import paragraphs
from tests.tokenizers_json import content, publish

LLAMA = SpecialIds(pad=None, eos=(2,), unknown=0, bos=1, decoder_start=1)
QWEN = SpecialIds(pad=None, eos=(400, 401), unknown=None, bos=None, decoder_start=None)


def store(path, ids: SpecialIds, kind: str, documents: list[list[int]]):
  with StoreWriter(path, Tokenizer(content(kind), 8, ids)) as writer:
    writer.add(documents)
    writer.finish()
  return path


def batch(path, objective, length: int, rows: int = 1, vocab_size: int = 520, **options):
  cfg = StoreData(
    sources=(Source(path=str(path)),), inputs_length=options.pop('inputs', 0), targets_length=length, batch_size=rows,
    sentinels=options.pop('sentinels', 8), **options,
  )  # fmt: skip
  return open_data(cfg, objective, seed=0, vocab_size=vocab_size, cache_dir='unused').batch(0, slice(0, rows))


def test_segments_begin_with_bos_documents_end_with_eos_and_id_0_is_text(tmp_path):
  """Two documents, one of them with unknown pieces (id 0), in one row of 9 places."""
  path = store(tmp_path / 's', LLAMA, 'byte_fallback', [[300, 0, 301], [0, 302]])
  got = batch(path, CausalLm(), 9, packing=BestFit())
  order = got['decoder_target_tokens'][0].tolist()
  wanted = {
    'decoder_input_tokens': [1, 300, 0, 301, 1, 0, 302, 0, 0],
    'decoder_target_tokens': [300, 0, 301, 2, 0, 302, 2, 0, 0],
    'decoder_segment_ids': [1, 1, 1, 1, 2, 2, 2, 0, 0],
    'decoder_positions': [0, 1, 2, 3, 0, 1, 2, 0, 0],
    'decoder_loss_weights': [1, 1, 1, 1, 1, 1, 1, 0, 0],
  }
  if order[0] == 0:  # the order of the documents in a row is random
    wanted |= {
      'decoder_input_tokens': [1, 0, 302, 1, 300, 0, 301, 0, 0],
      'decoder_target_tokens': [0, 302, 2, 300, 0, 301, 2, 0, 0],
      'decoder_segment_ids': [1, 1, 1, 2, 2, 2, 2, 0, 0],
      'decoder_positions': [0, 1, 2, 0, 1, 2, 3, 0, 0],
    }
  assert {name: got[name][0].tolist() for name in wanted} == wanted


def test_without_bos_a_segment_begins_with_the_end_of_the_text_before(tmp_path):
  path = store(tmp_path / 's', QWEN, 'byte_level', [[300, 301, 302]])
  got = batch(path, CausalLm(), 4)
  assert got['decoder_input_tokens'].tolist() == [[400, 300, 301, 302]]
  assert got['decoder_target_tokens'].tolist() == [[300, 301, 302, 400]]


def test_a_prefix_and_noise_have_the_ids_too(tmp_path):
  path = store(tmp_path / 's', LLAMA, 'byte_fallback', [list(range(300, 340))])
  prefix = batch(path, PrefixLm(), 48)
  used = prefix['decoder_segment_ids'][0] > 0
  end = prefix['decoder_prefix_end'][0, 0] - 1
  assert prefix['decoder_input_tokens'][0, 0] == 1
  assert prefix['decoder_target_tokens'][0][used].tolist() == [*range(300, 300 + end - 1), 2, *range(299 + end, 340), 2]
  noise = batch(path, SpanCorruption(), 32, inputs=64)
  targets = noise['decoder_target_tokens'][0][noise['decoder_segment_ids'][0] > 0].tolist()
  inputs = noise['encoder_input_tokens'][0][noise['encoder_segment_ids'][0] > 0].tolist()
  assert (inputs[-1], targets[-1], noise['decoder_input_tokens'][0, 0]) == (2, 2, 1)
  assert {0, 1, 2} & set(inputs[:-1] + targets[:-1]) == set()


def test_ids_are_saved_with_the_store_and_change_its_fingerprint(tmp_path):
  a = open_store(store(tmp_path / 'a', QWEN, 'byte_level', [[300]]))
  other = SpecialIds(pad=None, eos=(400,), unknown=None, bos=400, decoder_start=400)
  b = open_store(store(tmp_path / 'b', other, 'byte_level', [[300]]))
  assert (a.special_ids, a.tokenizer(8).vocabulary.ids) == (QWEN, QWEN)
  assert a.manifest['tokenizer'] == 'tokenizer.json'
  assert 'tokenizers' in a.manifest['versions']
  assert (tmp_path / 'a/tokenizer.json').read_bytes() == content('byte_level')
  assert a.fingerprint != b.fingerprint
  assert list(verify(str(tmp_path / 'a'))) == []
  cfg = StoreData(
    sources=(Source(path=a.path), Source(path=b.path)), targets_length=8, batch_size=1, sentinels=0
  )  # fmt: skip
  with pytest.raises(DataError, match=r"a has the special ids .*'eos': 400, 'eos\[1\]': 401.*prepare one with"):
    open_data(cfg, CausalLm(), seed=0, vocab_size=520, cache_dir='unused')


@pytest.mark.parametrize('damage', [{'eos': []}, {'eos': [1, 'x']}, {'pad': -1}, {'bos': True}, {'new': 1}])
def test_damaged_ids_are_refused(tmp_path, damage):
  path = store(tmp_path / 's', LLAMA, 'byte_fallback', [[300]])
  manifest = json.loads((path / 'manifest.json').read_text())
  manifest['special_ids'] |= damage
  (path / 'manifest.json').write_text(json.dumps(manifest))
  with pytest.raises(DataError, match=r'DATA-CORRUPT: .*manifest.json: special_ids'):
    open_store(path)


def test_ids_survive_json():
  for ids in (T5_IDS, LLAMA, QWEN):
    assert SpecialIds.from_json(json.loads(json.dumps(ids.to_json()))) == ids


def test_rows_are_needed_for_the_ids_of_the_objective_alone(tmp_path):
  """An embedding as large as the vocabulary of its tokenizer is enough for text; sentinels and modes are more."""
  path = store(tmp_path / 's', QWEN, 'byte_level', [list(range(300, 360))])
  assert batch(path, CausalLm(), 8, vocab_size=402, sentinels=0)['decoder_input_tokens'].shape == (1, 8)
  with pytest.raises(DataError, match=r'vocab_size=402 but .* needs 410 ids \(402 pieces \+ data.sentinels=8 \+ 0 '):
    batch(path, CausalLm(), 8, vocab_size=402)
  with pytest.raises(DataError, match=r'needs 433 ids .* 3 modes\); set model.vocab_size >= 433'):
    batch(path, Ul2(), 16, vocab_size=432, inputs=16, sentinels=28)
  with pytest.raises(ValueError, match=r'data.sentinels=0 but denoiser .* set data.sentinels >= \d+'):
    batch(path, SpanCorruption(), 32, inputs=64, sentinels=0)


def test_n_grams_leave_out_the_ids_that_are_not_text(tmp_path):
  """Llama's id 0 is text, its 2 is not."""
  path = store(tmp_path / 's', LLAMA, 'byte_fallback', [[300, 0, 0], [0, 302]])
  assert ngram_loss(open_store(path), open_store(path)).num_tokens == 5


def test_a_mask_is_never_replaced_by_a_special_token():
  v = Tokenizer(content('byte_level'), 8, QWEN).vocabulary
  assert set(range(402)) - set(v.text_ids.tolist()) == {400, 401}
  assert v.is_text(np.array([0, 399, 400, 401, 402])).tolist() == [True, True, False, False, False]


@pytest.mark.parametrize('given', ['folder', 'file'])
def test_prepare_takes_a_published_tokenizer_and_text_comes_back(tmp_path, given):
  folder = publish(tmp_path / 'model', 'byte_level', tokenizer_config={'eos_token': '<|endoftext|>'})
  (tmp_path / 't.txt').write_text('\n\n'.join(paragraphs()[:5]))
  path = folder if given == 'folder' else folder / 'tokenizer.json'
  prepare([tmp_path / 't.txt'], tmp_path / 's', tokenizer=path, sentinels=0, reading=Reading(documents='paragraph'))
  found = open_store(tmp_path / 's')
  assert found.special_ids == SpecialIds(pad=None, eos=(400,), unknown=None, decoder_start=None)
  offsets, tokenizer = found.offsets.tolist(), found.tokenizer(0)
  documents = found.read([(a, b - a) for a, b in itertools.pairwise(offsets)])
  assert [own[-1] for own in documents] == [400] * 5
  assert [tokenizer.decode(own[:-1]).removesuffix('\n') for own in documents] == paragraphs()[:5]


def test_a_store_is_prepared_with_the_tokenizer_of_another(tmp_path):
  store(tmp_path / 'a', LLAMA, 'byte_fallback', [[300]])
  (tmp_path / 't.txt').write_text('the work')
  prepare([tmp_path / 't.txt'], tmp_path / 'b', tokenizer=tmp_path / 'a')
  assert open_store(tmp_path / 'b').special_ids == LLAMA
