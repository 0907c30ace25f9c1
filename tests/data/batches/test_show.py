"""The readable form of a row: `pretrain data show`."""

import re

import numpy as np
import pytest

from data.batches.show import show_row
from data.batches.source import Synthetic, open_data
from data.errors import DataError
from data.objectives.objectives import CausalLm, MaskedLm, SpanCorruption, Supervised, Ul2, Ul2r
from data.stores.store import open_store
from tests.data.batches.test_source import opened


def test_a_ul2_row_shows_mode_sentinels_and_origin(text_store):
  source = opened(text_store, Ul2())
  shown = [show_row(source, 3, row) for row in range(8)]
  assert any('[NLU]' in text for text in shown)
  assert any('[NLG]' in text for text in shown)
  spans = next(text for text in shown if 'task X(mu=3' in text or 'task R(mu=3' in text)
  assert re.search(r'inputs \(\d+\): \[NL[UG]\] .*<extra_id_0>.*</s>', spans)
  assert re.search(r'targets \(\d+\): <extra_id_0> .*</s>', spans)
  assert re.search(r'segment 1: document \d+, tokens \d+ to \d+ of the store', spans)
  assert re.search(r'encoder: \d+ of 64 positions used \(\d+%\), \d segments', spans)
  assert str(text_store) in spans


def test_inputs_and_targets_together_contain_the_text_of_the_document(text_store):
  source = opened(text_store, SpanCorruption(), 64, 32)
  document, start, length = source.describe_row(0).pieces[0]
  text = source.tokenizer.render(source.sources[0].store.read([(start, length)])[0])
  shown = show_row(source, 0, 0)
  assert f'document {document}, tokens {start} to {start + length - 1}' in shown
  assert text.split()[0] in shown


def test_a_decoders_row_shows_prefix_and_targets(text_store):
  shown = show_row(opened(text_store, Ul2r(), 0, 96), 0, 0)
  assert re.search(r'prefix \(\d+\): \[', shown)
  assert 'encoder' not in shown


def test_a_causal_row_shows_only_its_text(text_store):
  shown = show_row(opened(text_store, CausalLm(), 0, 64), 0, 0)
  assert 'task causal' in shown
  assert 'prefix' not in shown
  assert 'loss on 64 targets' in shown


def test_a_masked_row_shows_its_text_with_masks_and_the_answers(text_store):
  shown = show_row(opened(text_store, MaskedLm(rate=0.3, mask=0.4, random=0.3), 0, 64), 0, 0)
  assert 'task mlm(r=0.3)' in shown
  inputs, answers = re.findall(r'  inputs \(\d+\): (.*)\n  answers \((\d+)\): (.*)', shown), []
  for text, number, listed in inputs:
    own = listed.split(' | ')
    assert len(own) == int(number)
    assert text.count('[MASK]') == sum(not re.search(r'\((kept|reads .+)\)$', answer) for answer in own)
    assert text.endswith('</s>')
    answers += own
  assert any(answer.endswith(' (kept)') for answer in answers)
  assert any(' (reads ' in answer for answer in answers)
  assert f'loss on {len(answers)} targets' in shown
  assert 'encoder: ' in shown
  assert 'decoder' not in shown


@pytest.mark.parametrize(
  ('objective', 'lengths', 'side'),
  [(Supervised(), (12, 20), 'inputs'), (Supervised(inputs_length=12), (0, 32), 'prefix')],
)
def test_a_row_of_pairs_shows_each_pair_and_how_many_are_cut(pair_store, objective, lengths, side):
  source = opened(pair_store, objective, *lengths)
  shown, store = '\n'.join(show_row(source, 0, row) for row in range(8)), open_store(pair_store)
  inputs, targets = np.diff(store.offsets).reshape(-1, 2).T
  cut = (inputs > 12).sum(), (targets > 20).sum()
  assert min(cut) > 0
  cuts = f'{cut[0]} have inputs cut to 12 tokens, {cut[1]} have targets cut to 20 tokens'
  assert f'of its {len(inputs)} pairs, {cuts}' in shown
  found = re.findall(
    rf'segment \d+: pair (\d+), inputs tokens (\d+) to (\d+), targets tokens (\d+) to (\d+) of the store\n'
    rf'  {side} \((\d+)\): (.*)\n  targets \((\d+)\): (.*)\n', shown,
  )  # fmt: skip
  assert len(found) > 8, 'some share a row'
  render = store.tokenizer(32).render
  for pair, a, b, c, d, number, text, count, answer in found:
    assert (int(a), int(c)) == tuple(store.offsets[2 * int(pair) : 2 * int(pair) + 2])
    for first, last, size, words in ((a, b, number, text), (c, d, count, answer)):
      (ids,) = store.read([(int(first), int(size))])
      assert (words, int(last)) == (render(ids), int(first) + int(size) - 1)


def test_synthetic_rows_show_ids():
  cfg = Synthetic(batch_size=2, targets_length=64, sentinels=8)
  source = open_data(cfg, SpanCorruption(), seed=0, vocab_size=300, cache_dir='unused')
  assert re.search(r'targets \(\d+\): <extra_id_0> \d+', show_row(source, 0, 1))


@pytest.mark.parametrize(('step', 'row'), [(0, 8), (0, -1), (-1, 0)])
def test_a_row_that_does_not_exist_is_refused(text_store, step, row):
  with pytest.raises(DataError, match=r'rows are 0 to 7 \(data.batch_size=8\)'):
    show_row(opened(text_store), step, row)


def test_a_step_beyond_the_largest_example_number_is_refused(text_store):
  with pytest.raises(DataError, match='the largest example number is 9007199254740992'):
    show_row(opened(text_store), 10**20, 0)
