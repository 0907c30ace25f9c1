"""The arithmetic of scripts/science: equal tokens, empty prefixes, tables. The study itself is a script."""

import pathlib

import numpy as np
import pytest

from data.objectives import CausalLm
from tests.data.test_source import opened

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
  monkeypatch.syspath_prepend(str(ROOT / 'scripts/science'))


def test_an_empty_prefix_stands_once_for_each_document(text_store):
  from score import with_empty_inputs

  batch = opened(text_store, CausalLm(), 0, 64).batch(0, slice(0, 8))
  full = with_empty_inputs(batch, [7, 1], 32)
  segments, tokens = full['encoder_segment_ids'], full['encoder_input_tokens']
  for row, decoder in enumerate(batch['decoder_segment_ids']):
    for k in range(1, decoder.max() + 1):
      assert tokens[row][segments[row] == k].tolist() == [7, 1]
    assert segments[row].max() == decoder.max()
  assert (tokens[segments == 0] == 0).all()
  assert {full['encoder_positions'][segments > 0].max(), full['encoder_positions'].min()} == {0, 1}
  assert batch['decoder_segment_ids'].max() > 1, 'otherwise packing shows nothing'


def test_trials_have_equal_tokens_and_shares_of_steps(monkeypatch):
  import objectives
  from sections import DECODER, SCHEDULES, Scale

  monkeypatch.setattr(objectives, 'tokens_per_step', lambda *_: 1000.0)
  trial = objectives.at_scale('x', DECODER, SCHEDULES['WSD, last fifth linear'], Scale(50_400, (0,)), seed=2)
  assert trial.name == 'x/2'
  assert set(trial.overrides) >= {
    'train.steps=50', 'schedule.steps=50', 'schedule.decay_steps=10', 'schedule.warmup_steps=2', 'seed=2'
  }  # fmt: skip


def test_what_is_written_by_hand_is_kept(tmp_path):
  from objectives import READING, reading

  document = tmp_path / 'doc.md'
  assert reading(document) == ''
  document.write_text(f'tables\n\n{READING}\nModes help.\n')
  assert reading(document) == f'{READING}\nModes help.\n'


def test_summaries_show_mean_and_half_the_range():
  from trials import group, summary, table

  results = {'a/0': {'loss': 1.0}, 'a/1': {'loss': 2.0}, 'b/0': {'loss': 1.2}}
  assert summary(group(results, 'a', 'loss')) == '1.500 ± 0.500'
  assert summary([1.0]) == '1.000'
  assert table(['x', 'y'], [['1', '2']]) == '| x | y |\n| --- | --- |\n| 1 | 2 |'
  assert np.isfinite(group(results, 'b', 'loss')).all()
