"""Examples that are left out: the same ones however often the run is resumed, and nothing else moves."""

import json

import pretrain.train
from pretrain.metrics import read_metrics
from pretrain.skipping import add_skip
from pretrain.train import train
from tests.pretrain import tiny


def checksums(workdir) -> list[int]:
  return [row['batch_checksum'] for row in read_metrics(workdir)]


def test_a_resume_of_a_run_with_skipped_examples_is_exact(tmp_path, monkeypatch):
  monkeypatch.setattr(pretrain.train, 'write_report', lambda _: None)
  cfg = tiny.decoder('train.steps=8', 'checkpoint.every=2', 'mesh.data=1')
  longer = tiny.decoder('train.steps=10', 'checkpoint.every=10', 'mesh.data=1')
  train(longer, tmp_path / 'whole')
  for name in ('skipped', 'resumed'):
    (tmp_path / name).mkdir()
    add_skip(tmp_path / name, 24, 40)  # the fourth and fifth batch of 8
  train(cfg, tmp_path / 'skipped')
  whole = checksums(tmp_path / 'whole')
  assert checksums(tmp_path / 'skipped') == whole[:3] + whole[5:]
  for steps in (3, 4, 8):  # before the skipped ones, at them, behind them
    train(tiny.decoder(f'train.steps={steps}', 'checkpoint.every=2', 'mesh.data=1'), tmp_path / 'resumed')
  numbers = [[(r['loss'], r['grad_norm']) for r in read_metrics(tmp_path / n)] for n in ('skipped', 'resumed')]
  assert numbers[0] == numbers[1]
  place = json.loads((tmp_path / 'resumed/checkpoints/8/position/metadata').read_text())['loader']
  assert (place['examples'], place['skipped']) == (80, [[24, 40]])
