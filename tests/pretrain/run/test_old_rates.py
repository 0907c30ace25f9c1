"""A run that an earlier version began, whose config.gin has no train.decay_delay, keeps its learning rates."""

import pytest

from pretrain.cli.main import main
from pretrain.experiment.saved import as_begun, load_saved
from pretrain.records.metrics import read_metrics
from pretrain.tools import weights
from tests.pretrain import tiny

SCHEDULE = ("schedule.name='cosine'", 'schedule.peak=0.01', 'schedule.warmup_steps=3', 'schedule.steps=10')
LINE = 'train.decay_delay = 1\n'


def train(workdir, *overrides):
  keys = (*tiny.SMALL_DECODER, *SCHEDULE, 'checkpoint.every=5', *overrides)
  assert main(['train', f'--gin_file={tiny.DECODER}', f'--workdir={workdir}', *(f'--gin.{key}' for key in keys)]) == 0


def numbers(workdir):
  return [(row['step'], row['loss'], row['learning_rate']) for row in read_metrics(workdir)]


def make_old(workdir):
  """Takes from the saved config what earlier versions did not save."""
  saved = workdir / 'config.gin'
  text = saved.read_text()
  assert LINE in text
  saved.write_text(text.replace(LINE, ''))


@pytest.mark.slow
def test_a_resumed_old_run_keeps_its_rates_and_a_new_run_has_its_peak_once(tmp_path, capsys):
  old, cut, new = (tmp_path / name for name in ('old', 'cut', 'new'))
  train(old, 'train.steps=10', 'train.decay_delay=1')
  train(cut, 'train.steps=5', 'train.decay_delay=1')
  make_old(cut)
  train(cut, 'train.steps=10')
  assert numbers(cut) == numbers(old), 'resumed with the command of any run, bit for bit'
  assert LINE in (cut / 'config.gin').read_text()
  train(new, 'train.steps=10')
  rates = {name: [rate for _, _, rate in numbers(tmp_path / name)] for name in ('old', 'new')}
  assert rates['old'][:4] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01, 0.01])
  assert rates['new'][:4] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01, 0.009554], rel=1e-4)
  make_old(old)
  assert main(['replay', f'--workdir={old}', '--step=7']) == 0, capsys.readouterr().out


def test_tools_read_an_old_config_as_it_was_meant(tmp_path):
  cfg, saved = tiny.decoder(), tmp_path / 'config.gin'
  assert as_begun(cfg, saved) == cfg, 'a new run'
  saved.write_text(f"include '{tiny.DECODER}'\n")
  assert as_begun(cfg, saved).train.decay_delay == load_saved(saved).train.decay_delay == 1
  assert weights.config_of(tmp_path).train.decay_delay == 1
  assert load_saved(saved, ['train.decay_delay=0']).train.decay_delay == 0
  saved.write_text('train.steps = ')
  assert as_begun(cfg, saved) == cfg, 'what cannot be read is reported where the run is resumed'
