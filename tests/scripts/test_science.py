"""The arithmetic of scripts/science: equal tokens, empty prefixes, tables. The study itself is a script."""

import pathlib

import jax
import numpy as np
import pytest

from data.batches.source import open_data
from data.objectives.objectives import CausalLm
from pretrain.evaluation.losses import evaluate
from pretrain.experiment.program import build_program
from pretrain.step.loss import make_eval_step
from tests.data.batches.test_source import opened
from tests.pretrain import tiny

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


def test_differences_are_paired_and_have_a_standard_error():
  """Differences 1, 2, 3 of a mean of 200: their mean 1%, and 1/sqrt(3) of their deviation 1, halved by the mean."""
  from precision import differences

  mean, error = differences([101.0, 202.0, 303.0], [100.0, 200.0, 300.0])
  assert (mean, error) == pytest.approx((1.0, 0.5 / 3**0.5))
  assert np.isnan(differences([1.0], [1.0])[1]), 'one pair has none'


def test_the_table_of_recipes_holds_each_to_its_bar():
  from precision import recipes

  losses = {
    'bf16': (4.0, 4.2),
    'int8': (4.01, 4.21),
    'fp8': (4.02, 4.22),
    'nvfp4_fp8': (4.02, 4.26),
    'nvfp4_fp8, fifth': (4.0, 4.2),
  }
  text = recipes({f'{name}/{seed}': {'loss': own[seed]} for name, own in losses.items() for seed in (0, 1)})
  assert '| int8 | 4.110 ± 0.100 | +0.244% ± 0.000% | 0.3% | yes |' in text
  assert '| fp8 | 4.120 ± 0.100 | +0.488% ± 0.000% | 0.3% | no |' in text
  assert '| nvfp4_fp8 | 4.140 ± 0.120 | +0.976% ± 0.488% | 1.0% | yes |' in text


def test_all_recipes_of_a_seed_have_its_data_and_four_bits_end_in_bf16():
  from precision import BARS, SIZES, sized, trials

  found = {trial.name: trial for trial in trials(1000, (0, 1))}
  for width, layers in SIZES:
    assert f'model.embed={width}' in found.pop(f'{sized(width, layers)}/0').overrides
  assert set(found) == {f'{name}/{seed}' for name in ('bf16', 'outlier_safe', *BARS) for seed in (0, 1)}
  assert all(f'seed={name[-1]}' in trial.overrides for name, trial in found.items())
  (phases,) = (override for override in found['nvfp4_fp8/0'].overrides if override.startswith('phases='))
  assert phases == "phases=[{'start_step': 900, 'set': {'precision.recipe': 'bf16', 'precision.overrides': {}}}]"
  assert "precision.overrides={'attention': 'fp8'}" in found['nvfp4_fp8/0'].overrides
  assert any("'start_step': 800" in override for override in found['nvfp4_fp8, fifth/1'].overrides)


def test_kurtosis_is_that_of_each_tenth_of_a_run(monkeypatch):
  import precision

  rows = [{'step': i, 'kurtosis/decoder/0': float(i), 'kurtosis/decoder/1': 1.0} for i in range(10, 201, 10)]
  monkeypatch.setattr(precision, 'read_metrics', lambda _: [{'step': 5, 'loss': 1.0}, *rows])
  found = precision.curve(pathlib.Path())
  assert [first for first, _ in found] == [15.0, 35.0, 55.0, 75.0, 95.0, 115.0, 135.0, 155.0, 175.0, 195.0]
  assert {second for _, second in found} == {1.0}


@pytest.mark.slow
def test_losses_of_quantized_models_are_those_of_their_recipes(tmp_path):
  """Of the first weights: nvfp4 is that of a run with the recipe; int4 is another number, and both are near bf16."""
  from quantized import losses_on

  cfg = tiny.decoder('mesh.data=1')
  program, nvfp4 = build_program(cfg), build_program(tiny.decoder('mesh.data=1', "precision.recipe='nvfp4'"))
  data = open_data(cfg.data, cfg.objective, seed=0, vocab_size=512, cache_dir=tmp_path)
  batches, params = [data.batch(0, slice(0, cfg.data.batch_size))], program.init().params
  found = losses_on(cfg, params, batches, program.mesh)
  expected = evaluate(jax.jit(make_eval_step(nvfp4.model, cfg.kernels, 512)), params, batches, program.mesh)['loss']
  assert found['nvfp4'] == pytest.approx(expected, rel=1e-6)
  assert len(set(found.values())) == 3
  assert all(abs(loss / found['bf16'] - 1) < 0.05 for loss in found.values())
