"""Bytes of the text that held-out rows ask for, against the text that their documents decode to."""

import numpy as np
import pytest

from data.batches.batches import DataSource
from data.batches.rows import StoreRows
from data.batches.text_bytes import text_bytes
from data.examples.make import RowSpec
from data.mixing.mixture import Mixture, Stage
from data.objectives.objectives import CausalLm, PrefixLm
from data.objectives.tasks import Budget
from data.packing.packing import ConcatSplit
from data.stores.special_ids import SpecialIds
from data.stores.store import StoreWriter, open_store
from data.stores.vocabulary import Tokenizer
from tests.tokenizers_json import content

TEXTS = ['The Licensor grants a License — ½ of it, naïvely.', 'a', 'You may 中文 🙂\n\tcopy  the Work. ' * 9, 'x y z']
IDS = {
  'byte_level': SpecialIds(pad=None, eos=(400, 401), unknown=None, decoder_start=None),
  'byte_fallback': SpecialIds(pad=None, eos=(2,), unknown=0, bos=1, decoder_start=1),
}


@pytest.fixture(scope='module', params=['sentencepiece', *IDS])
def tokenizer(request, tokenizer_model):
  if request.param == 'sentencepiece':
    return Tokenizer(tokenizer_model, 32)
  return Tokenizer(content(request.param), 32, IDS[request.param])


def rows_of(store, tokenizer, objective, length: int, across: bool = False) -> StoreRows:
  spec = RowSpec(
    objective=objective, budget=Budget(0, length), vocabulary=tokenizer.vocabulary, tokenizer=tokenizer,
    attend_across_documents=across,
  )  # fmt: skip
  return StoreRows(store, spec, ConcatSplit(), seed=0, purpose='heldout')


@pytest.fixture
def store(tokenizer, tmp_path):
  with StoreWriter(tmp_path / 'store', tokenizer) as writer:
    writer.add([tokenizer.encode(text) for text in TEXTS])
    writer.finish()
  return open_store(tmp_path / 'store')


def test_bytes_of_ids_are_those_of_their_text(tokenizer):
  for text in TEXTS:
    ids = tokenizer.encode(text)
    found = tokenizer.byte_lengths[ids].sum() - tokenizer.spaces_before(ids[0])
    assert found == len(tokenizer.decode(ids).encode()), text


@pytest.mark.parametrize('across', [False, True])
def test_all_rows_have_the_bytes_of_all_documents(tokenizer, store, across):
  """Rows cut documents, and characters in them; each byte is counted once."""
  rows = rows_of(store, tokenizer, CausalLm(), 24, across)
  assert rows.num_rows(0) > 3
  decoded = [tokenizer.decode(tokenizer.encode(text)) for text in TEXTS]
  assert text_bytes(rows, rows.num_rows(0), tokenizer) == sum(len(text.encode()) for text in decoded)
  parts = [text_bytes(rows, n, tokenizer) for n in range(1, rows.num_rows(0) + 1)]
  assert np.all(np.diff(parts) > 0)


def test_targets_that_are_not_the_text_have_no_bytes(store, tokenizer):
  assert text_bytes(rows_of(store, tokenizer, PrefixLm(), 24), 3, tokenizer) is None


def test_a_source_has_the_bytes_of_its_held_out_rows(store, tokenizer):
  class Cfg:
    batch_size = 2

  rows = {'held': rows_of(store, tokenizer, CausalLm(), 24), 'other': rows_of(store, tokenizer, PrefixLm(), 24)}
  source = DataSource(Cfg, tokenizer.vocabulary, tokenizer, {}, Mixture([Stage(0, (1.0,))], 0), rows)
  assert source.heldout_bytes(1) == {'held': text_bytes(rows['held'], 2, tokenizer)}
