"""The loop's bits per byte of a held-out store are those of `pretrain eval --text` of the same store and step."""

import json
import math

import pytest

from data.stores.store import StoreWriter, open_store
from pretrain.benchmarks.evaluate import Measurements, evaluate
from pretrain.evaluation.losses import check_best_of
from pretrain.evaluation.writer import open_writer
from pretrain.run.train import train
from tests.conftest import paragraphs
from tests.pretrain.evaluation.test_generate import config_of


@pytest.fixture(scope='module')
def stores(text_store, tmp_path_factory):
  """Three documents that share a row of 64, and one document of several rows; another text than that of training."""
  folder, tokenizer = tmp_path_factory.mktemp('heldout'), open_store(text_store).tokenizer(32)
  texts = {'short': ['The Work — ½ of it.', 'naïvely', 'You may copy.'], 'long': [' '.join(paragraphs()[3:9])]}
  for name, documents in texts.items():
    with StoreWriter(folder / name, tokenizer) as writer:
      writer.add([tokenizer.encode(text) for text in documents])
      writer.finish()
  assert open_store(folder / 'short').num_tokens <= 64 < 3 * 64 < open_store(folder / 'long').num_tokens
  return {name: folder / name for name in texts}


def test_the_loop_and_the_command_have_one_definition(text_store, stores, tmp_path):
  """Windows that do not overlap are the rows of a store of one document, so that contexts are equal."""
  heldout = [{'path': str(path)} for path in stores.values()]
  changes = ('train.steps=2', 'checkpoint.every=2', 'evaluation.every=2', 'evaluation.batches=50')
  train(config_of(text_store, 'causal_lm', *changes, f'data.heldout={heldout}', 'model.vocab_size=512'), tmp_path)
  rows = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  (row,) = [row for row in rows if 'eval/short/loss' in row]
  wanted = Measurements(text=tuple(stores.items()), context=64, stride=64)
  found = evaluate(open_writer(tmp_path, row['step']), wanted)['text']
  for name in stores:
    assert row[f'eval/{name}/targets'] == found[name]['tokens']
    assert row[f'eval/{name}/bits_per_byte'] == pytest.approx(found[name]['bits_per_byte'], rel=1e-5)
    assert row[f'eval/{name}/perplexity'] == pytest.approx(found[name]['perplexity'], rel=1e-4)
    nats = row[f'eval/{name}/loss'] * row[f'eval/{name}/targets']
    assert row[f'eval/{name}/bits_per_byte'] == pytest.approx(nats / math.log(2) / found[name]['bytes'], rel=1e-6)


@pytest.mark.slow
def test_a_run_whose_targets_are_no_text_has_no_such_key(text_store, tmp_path):
  heldout = f"data.heldout=[{{'path': '{text_store}'}}]"
  changes = ('train.steps=1', 'checkpoint.every=1', 'evaluation.every=1', 'evaluation.batches=1', heldout)
  train(config_of(text_store, 'prefix_lm', *changes, 'model.vocab_size=512'), tmp_path)
  (row,) = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
  assert [key for key in row if key.endswith('/loss')] != []
  assert [key for key in row if 'bits_per_byte' in key] == []


def test_the_best_step_may_be_chosen_by_it():
  check_best_of('eval/short/bits_per_byte', ['short'])
