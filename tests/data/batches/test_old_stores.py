"""A store of before special ids were saved has T5's: its fingerprint, its batches and its files stay bit-equal.

`tests/data/golden/store` and the digests below were made by the code before that change.
"""

import hashlib
import itertools
import json
import pathlib

import numpy as np
import pytest

from data.batches.source import Source, StoreData, open_data
from data.objectives.objectives import Bart, CausalLm, FillInTheMiddle, MaskedLm, PrefixLm, SpanCorruption, Ul2
from data.packing.packing import BestFit
from data.stores.ngrams import ngram_loss
from data.stores.store import StoreWriter, open_store

STORE = pathlib.Path(__file__).parents[1] / 'golden/store'
FINGERPRINT = 'd8b357b660ba58cf221adf96d6e7c2dbb0f2121758bef33e051990f16506bca8'
RUNS = {
  'causal_lm': (CausalLm(), 0, {}, '79c5db0489c88c24'),
  'best_fit': (CausalLm(), 0, {'packing': BestFit()}, 'f4ea4fa2584bf0f4'),
  'across': (CausalLm(), 0, {'attend_across_documents': True}, '6d4bcf25f3d776b6'),
  'prefix_lm': (PrefixLm(), 0, {}, '2ef3f5e983472cf6'),
  'fim': (FillInTheMiddle(), 0, {}, 'e41e63b62aed7c6f'),
  'mlm': (MaskedLm(), 0, {}, '5ba647268c3ac104'),
  'bart': (Bart(), 64, {}, '81296749604e101e'),
  'span_corruption': (SpanCorruption(), 64, {}, 'a57c5d0c88bacaa0'),
  'ul2': (Ul2(), 64, {}, 'd07d806ca7a3ff74'),
}


def digest(source) -> str:
  """sha256 of the names, shapes, types and values of all fields of two batches."""
  found = hashlib.sha256()
  for step in (0, 5):
    for name, values in sorted(source.batch(step, slice(0, 8)).items()):
      found.update(f'{name} {values.shape} {values.dtype}'.encode() + np.ascontiguousarray(values).tobytes())
  return found.hexdigest()[:16]


@pytest.mark.parametrize('name', RUNS)
def test_batches_are_those_of_before(name):
  objective, inputs, options, wanted = RUNS[name]
  cfg = StoreData(
    sources=(Source(path=str(STORE)),), inputs_length=inputs, targets_length=64, batch_size=8, sentinels=32, **options
  )  # fmt: skip
  source = open_data(cfg, objective, seed=3, vocab_size=400, cache_dir='unused')
  assert source.fingerprint()['stores'] == [FINGERPRINT]
  assert source.fingerprint()['tokenizer'] == open_store(STORE).manifest['tokenizer_sha256']
  assert digest(source) == wanted


def test_losses_of_n_grams_are_those_of_before():
  store = open_store(STORE)
  found = ngram_loss(store, store)
  assert found.num_tokens == 8379
  assert (found.unigram, found.trigram) == pytest.approx((3.5257250920307275, 1.4699363065214626), rel=1e-12)


def test_a_store_written_today_has_the_same_manifest(tmp_path):
  """No new key: another version reads it as before."""
  old = open_store(STORE)
  offsets = old.offsets.tolist()
  ids = old.read([(a, b - a - 1) for a, b in itertools.pairwise(offsets)])
  with StoreWriter(tmp_path / 's', old.tokenizer(32)) as writer:
    writer.add(ids)
    writer.finish(source='LICENSE')
  now, then = (json.loads((path / 'manifest.json').read_text()) for path in (tmp_path / 's', STORE))
  assert {**now, 'versions': None} == {**then, 'versions': None}
  assert list(now) == list(then)
  assert list(now['versions']) == list(then['versions'])
  assert (tmp_path / 's/tokenizer.model').read_bytes() == (STORE / 'tokenizer.model').read_bytes()
  assert open_store(tmp_path / 's').fingerprint == FINGERPRINT
