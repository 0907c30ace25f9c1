"""A training end to end: it learns, resumes bit for bit, refuses the workdir of another run, and writes its files."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from data.batches.source import open_data
from pretrain.config import bindings
from pretrain.errors import CheckpointError, ConfigError, NonFiniteError
from pretrain.run import starting
from pretrain.run.train import train
from pretrain.testing import assert_resumes_exactly, logged_losses
from tests.pretrain import tiny

# One program for the tests that learn and resume.
PROGRAM = ('model.dropout=0.1', 'mesh.fsdp=2', 'schedule.warmup_steps=3')


def rows(workdir):
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(text_store, tmp_path):
  cfg = tiny.ul2(text_store, *PROGRAM, 'checkpoint.every=2')
  assert_resumes_exactly(cfg, tmp_path, steps=7, stop_at=4)


@pytest.mark.slow
def test_a_resumed_run_in_full_rows_is_bit_equal_to_an_uninterrupted_one(text_store, tmp_path):
  cfg = tiny.ul2(text_store, "data.packing.name='full_rows'", 'data.targets_length=44', 'checkpoint.every=2')
  assert_resumes_exactly(cfg, tmp_path, steps=7, stop_at=4)


@pytest.mark.slow
def test_the_resume_check_sees_a_lost_data_position(tmp_path, monkeypatch):
  """A mutation: the check must notice a restore that loses the position in the data."""
  restore = starting.restore_or_initialise
  forget = lambda *args: dataclasses.replace(restore(*args), position={'examples': 0})
  monkeypatch.setattr(starting, 'restore_or_initialise', forget)
  with pytest.raises(AssertionError, match='first difference'):
    assert_resumes_exactly(tiny.decoder('checkpoint.every=2'), tmp_path, steps=6, stop_at=4)


def test_it_learns_and_leaves_metrics_report_and_config(text_store, tmp_path, reports):
  cfg = tiny.ul2(text_store, *PROGRAM, 'train.steps=30', 'checkpoint.every=10', 'evaluation.every=15')
  assert train(cfg, tmp_path) == 0
  steps = logged_losses(tmp_path)
  assert [s for s, _ in steps] == list(range(1, 31))
  assert steps[0][1] == pytest.approx(np.log(512), rel=0.05), 'the first loss is ln(vocabulary)'
  assert steps[-1][1] < steps[0][1] - 0.5
  evals = [row for row in rows(tmp_path) if any(k.startswith('eval/') for k in row)]
  assert [row['step'] for row in evals] == [15, 30]
  assert (tmp_path / 'report.html').exists()
  assert (tmp_path / 'config.gin').exists()
  assert sorted(int(p.name) for p in (tmp_path / 'checkpoints').iterdir()) == [10, 20, 30]


def test_only_the_last_checkpoints_and_the_multiples_are_kept(tmp_path):
  cfg = tiny.decoder('train.steps=10', 'checkpoint.every=1', 'checkpoint.keep=2', 'checkpoint.keep_every=4')
  train(cfg, tmp_path)
  assert sorted(int(p.name) for p in (tmp_path / 'checkpoints').iterdir()) == [4, 8, 9, 10]


@pytest.mark.slow
def test_a_checkpoint_resumes_on_another_mesh(tmp_path):
  cfg = tiny.decoder('train.steps=4', 'checkpoint.every=2', 'mesh.fsdp=4', 'mesh.tensor=2')
  train(cfg, tmp_path / 'moved')
  longer = tiny.decoder('train.steps=8', 'checkpoint.every=2', 'mesh.data=8')
  train(longer, tmp_path / 'moved')
  train(longer, tmp_path / 'whole')
  moved, whole = (np.array([v for _, v in logged_losses(tmp_path / w)]) for w in ('moved', 'whole'))
  np.testing.assert_allclose(moved, whole, rtol=1e-5)


@pytest.mark.parametrize(
  ('override', 'message'),
  [
    ('model.mlp.hidden=128', 'model.mlp.hidden is 64 in .*config.gin, 128 in this command'),
    ('schedule.peak=0.5', 'schedule.peak is .* in .*config.gin, 0.5 in this command'),
    ('seed=3', 'seed is 0 in .*config.gin, 3 in this command'),
  ],
)
def test_the_workdir_of_another_run_is_refused_and_not_changed(tmp_path, override, message):
  train(tiny.decoder('train.steps=2'), tmp_path)
  before = {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()}
  with pytest.raises(ConfigError, match=message):
    train(tiny.decoder('train.steps=4', override), tmp_path)
  assert {p: p.read_bytes() for p in tmp_path.rglob('*') if p.is_file()} == before


def test_a_checkpoint_of_other_shapes_is_refused(tmp_path):
  train(tiny.decoder('train.steps=2'), tmp_path)
  text = (tmp_path / 'config.gin').read_text().replace('model.mlp.hidden = 64', 'model.mlp.hidden = 128')
  (tmp_path / 'config.gin').write_text(text)
  with pytest.raises(CheckpointError, match=r'CKPT-MISMATCH: .*float32\[.*64.*\] in step 2 .*128'):
    train(tiny.decoder('train.steps=4', 'model.mlp.hidden=128'), tmp_path)


def test_nonfinite_gradients_stop_the_run_after_their_limit(tmp_path):
  cfg = tiny.decoder('train.steps=20', 'schedule.peak=1e30', 'optimizer.max_consecutive_nonfinite=3')
  message = r'NONFINITE: grad_norm=.* \(3 of 3 consecutive\). Stopped; no step was saved yet. .* another --workdir'
  with pytest.raises(NonFiniteError, match=message):
    train(dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, log_every=100)), tmp_path)
  assert rows(tmp_path)[-1]['skipped'] >= 3, 'the step that stops a run is recorded'


def test_nonfinite_gradients_name_the_step_that_is_saved(tmp_path):
  cfg = tiny.decoder('train.steps=20', 'schedule.peak=1e30', 'optimizer.max_consecutive_nonfinite=3')
  with pytest.raises(NonFiniteError, match='Stopped; step 2 is saved in'):
    train(dataclasses.replace(cfg, checkpoint=dataclasses.replace(cfg.checkpoint, every=2)), tmp_path)


def test_a_run_whose_checkpoints_are_missing_does_not_start_again_at_step_0(tmp_path):
  cfg = tiny.decoder('train.steps=6', 'checkpoint.every=2')
  train(cfg, tmp_path)
  record = (tmp_path / 'metrics.jsonl').read_bytes()
  shutil.rmtree(tmp_path / 'checkpoints')
  with pytest.raises(CheckpointError, match=r'CKPT-NONE: .* reaches step 6. Not starting from step 0'):
    train(cfg, tmp_path)
  assert (tmp_path / 'metrics.jsonl').read_bytes() == record


def test_the_config_of_a_run_without_a_step_does_not_restrict_the_next_one(tmp_path):
  (tmp_path / 'config.gin').write_text(bindings.render(tiny.decoder('model.mlp.hidden=128')))
  assert train(tiny.decoder('train.steps=1'), tmp_path) == 0


def test_throughput_and_data_wait_are_logged(tmp_path):
  train(tiny.decoder('train.steps=3'), tmp_path)
  last = rows(tmp_path)[-1]
  assert last['tokens_per_second'] > 0
  assert 0 <= last['data_wait'] < 1
  assert last['learning_rate'] == pytest.approx(1e-3)


@pytest.mark.slow
def test_rows_have_the_mean_fill_of_the_steps_since_the_row_before(text_store, tmp_path):
  cfg = tiny.ul2(text_store, 'train.steps=5', 'train.log_every=2')
  train(cfg, tmp_path)
  data = open_data(cfg.data, cfg.objective, seed=cfg.seed, vocab_size=cfg.model.vocab_size, cache_dir='unused')
  batches = [data.batch(step, slice(0, 8)) for step in range(5)]
  for side in ('encoder', 'decoder'):
    used = [np.mean(batch[f'{side}_segment_ids'] != 0) for batch in batches]
    wanted = [np.mean(used[:2]), np.mean(used[2:4]), used[4]]
    assert [row[f'fill/{side}'] for row in rows(tmp_path)] == pytest.approx(wanted, rel=1e-6)
  assert all(0 < row['padding_flops'] < 1 for row in rows(tmp_path))


@pytest.mark.slow
def test_profile_steps_write_a_trace(tmp_path):
  train(tiny.decoder('train.steps=4', 'train.profile_steps=(1, 2)'), tmp_path)
  assert list((tmp_path / 'profile').rglob('*.xplane.pb'))


@pytest.mark.slow
def test_a_trace_to_the_last_step_is_written_too(tmp_path):
  train(tiny.decoder('train.steps=2', 'train.profile_steps=(1, 2)'), tmp_path)
  assert list((tmp_path / 'profile').rglob('*.xplane.pb'))


@pytest.mark.parametrize('steps', [2, 4])
def test_a_run_with_no_step_left_prints_at_which_step_it_is(tmp_path, capsys, steps):
  """Finished, or told to train for fewer steps than it has made: the exit code is 0 and no step changes."""
  assert train(tiny.decoder('train.steps=4'), tmp_path) == 0
  assert 'already at step' not in capsys.readouterr().err
  saved = {path: path.read_bytes() for path in (tmp_path / 'checkpoints').rglob('*') if path.is_file()}
  assert train(tiny.decoder(f'train.steps={steps}'), tmp_path) == 0
  text = (
    f'DONE: already at step 4, and train.steps={steps}: no step is left to train. To train longer, set train.steps to '
    'more than 4.'
  )
  assert text in capsys.readouterr().err.splitlines()
  assert {path: path.read_bytes() for path in (tmp_path / 'checkpoints').rglob('*') if path.is_file()} == saved
  assert [row['step'] for row in rows(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
  'error',
  [
    ValueError('\n$x_{$\n     ^\nexpected "}"'),
    *(pytest.param(e, marks=pytest.mark.slow) for e in (OSError(28, 'No space left'), KeyError())),
  ],
)
def test_a_report_that_cannot_be_drawn_is_a_warning_of_a_finished_run(tmp_path, monkeypatch, capsys, error):
  def fail(workdir):
    raise error

  monkeypatch.setattr('pretrain.run.train.write_report', fail)
  assert train(tiny.decoder('train.steps=2'), tmp_path) == 0
  warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith('REPORT: ')]
  assert len(warned) == 1
  assert warned[0].startswith(f'REPORT: {tmp_path}/report.html could not be drawn ({type(error).__name__}: ')
  assert warned[0].endswith(f'The run is complete and saved; draw it again with pretrain report {tmp_path}.')
  assert json.loads((tmp_path / 'timeline.jsonl').read_text().splitlines()[-1])['phase'] == 'done'


def test_a_source_may_have_any_name(text_store, tmp_path):
  """Names are text: matplotlib would read this one as mathematics that it cannot parse."""
  sources = [{'path': str(text_store), 'name': name} for name in ('$x_{$', 'plain')]
  keys = ("data.name='store'", f'data.sources={sources}', 'data.sentinels=32', 'train.steps=2')
  assert train(tiny.decoder(*keys), tmp_path) == 0
  assert any('/$x_{$' in key for key in rows(tmp_path)[-1])


def test_signal_handlers_are_restored(tmp_path):
  before = signal.getsignal(signal.SIGTERM)
  train(tiny.decoder('train.steps=1'), tmp_path)
  assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize('log_every', [pytest.param(1, marks=pytest.mark.slow), 1000])
def test_sigterm_saves_and_exits_75(tmp_path, log_every):
  """A run that is interrupted saves its step and can resume from it, also before its first row of metrics."""
  code = (
    'import os, sys, pretrain.run.train as t; from pretrain.run import step_numbers; from tests.pretrain import tiny\n'
    'log = step_numbers.log\n'
    'def stop(run, step, *rest):\n'
    '  log(run, step, *rest)\n'
    '  if step == 3: os.kill(os.getpid(), 15)\n'
    'step_numbers.log = stop\n'
    f'sys.exit(t.train(tiny.decoder("train.steps=500", "train.log_every={log_every}"), {str(tmp_path)!r}))'
  )
  done = subprocess.run([sys.executable, '-c', code], cwd=tiny.ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 75, done.stderr[-2000:]
  saved = [int(p.name) for p in (tmp_path / 'checkpoints').iterdir()]
  assert saved
  if log_every == 1:
    assert saved == [logged_losses(tmp_path)[-1][0]]


def test_saving_over_a_step_is_refused(tmp_path):
  from pretrain.checkpoints.checkpoints import Checkpoints
  from pretrain.experiment.program import build_program

  cfg = tiny.decoder()
  state = build_program(cfg).init()
  checkpoints = Checkpoints(tmp_path, dataclasses.replace(cfg.checkpoint, every=1))
  checkpoints.save(1, state, {}, '')
  with pytest.raises(CheckpointError, match='CKPT-EXISTS: step 1 is already in'):
    checkpoints.save(1, state, {}, '')
  checkpoints.close()
