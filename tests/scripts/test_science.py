"""The arithmetic of scripts/science: equal tokens, empty prefixes, tables. The study itself is a script."""

import pathlib

import numpy as np
import pytest

from data.objectives.objectives import CausalLm
from tests.data.batches.test_source import opened

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def on_path(monkeypatch):
  monkeypatch.syspath_prepend(str(ROOT / 'scripts/science'))


def test_each_document_gets_one_empty_prefix(text_store):
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
  import study
  from sections import DECODER, SCHEDULES

  monkeypatch.setattr(study, 'tokens_per_step', lambda *_: 1000.0)
  trial = study.at_scale('x', DECODER, SCHEDULES['WSD, last fifth linear'], study.Scale(50_400, (0,)), seed=2)
  assert trial.name == 'x/2'
  assert set(trial.overrides) >= {
    'train.steps=50', 'schedule.steps=50', 'schedule.decay_steps=10', 'schedule.warmup_steps=2', 'seed=2'
  }  # fmt: skip


def test_text_written_by_hand_is_kept(tmp_path):
  from study import READING, reading

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


def steps_of(*lengths):
  """Metrics of a run with rows of these lengths; None: the run has one length. Step 3 takes 3 s."""
  return [{'step': i, 'step_seconds': float(i)} | ({'row_length': n} if n else {}) for i, n in enumerate(lengths, 1)]


def test_a_loss_is_plotted_at_the_cost_of_the_steps_before_it():
  from steps import LOSS, curve

  rows = steps_of(64, 512, 64, 512)
  rows[1] |= {LOSS: 5.0}
  rows[3] |= {LOSS: 4.0}
  spent, losses = curve(rows, {64: 1.0, 512: 3.0})
  assert (spent.tolist(), losses.tolist()) == ([4.0, 8.0], [5.0, 4.0])
  plain = steps_of(None, None)
  plain[1] |= {LOSS: 5.0}
  assert curve(plain, {64: 1.0, 512: 3.0})[0].tolist() == [6.0], 'a run of one length has the longest'


def test_steps_that_were_not_logged_are_reported():
  from steps import row_lengths

  with pytest.raises(ValueError, match=r'1 rows do not cover all of 2 steps; set train.log_every=1'):
    row_lengths(steps_of(64, 64)[1:], 512)


def test_step_seconds_are_grouped_by_length_without_compilation():
  from steps import logged_seconds

  found = logged_seconds(steps_of(512, 512, 64, 512, 64, 512, 128), 512)
  assert found == {512: [4.0], 64: [5.0]}, 'steps 1, 3 and 7 are compiled for, 2 and 6 wait for that'


def test_the_tokens_of_a_step_are_counted_over_rows_of_all_lengths(text_store):
  from study import tokens_per_step

  size = 4 * 64
  overrides = (
    "data.name='store'", f"data.sources=[{{'path': '{text_store}'}}]", 'data.packing.min_length=16',
    'data.targets_length=64', 'data.batch_size=4', 'data.sentinels=0',
  )  # fmt: skip
  assert 0.8 * size < tokens_per_step('configs/decoder/tiny_dd.gin', overrides) <= size
