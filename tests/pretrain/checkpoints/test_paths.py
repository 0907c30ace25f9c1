"""A run's folder may have any legal name: its checkpoints are in it, and are read from it."""

import os

import pytest

from pretrain.records.metrics import read_metrics
from pretrain.run.train import train
from tests.pretrain import tiny


@pytest.mark.parametrize(
  'name', ['50%off #a?b|c', *(pytest.param(name, marks=pytest.mark.slow) for name in ('a\\b', 'x.__lock'))]
)
def test_a_run_in_a_folder_of_any_name_resumes(tmp_path, name):
  run = tmp_path / name / 'run'
  for steps in (2, 3):
    assert train(tiny.decoder(f'train.steps={steps}', 'checkpoint.every=2'), run) == 0
  assert [row['step'] for row in read_metrics(run)] == [1, 2, 3]
  assert sorted(path.name for path in (run / 'checkpoints').iterdir()) == ['2', '3']
  assert os.listdir(tmp_path) == [name], 'nothing is left beside it'
