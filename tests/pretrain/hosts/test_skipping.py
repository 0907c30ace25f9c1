"""Skipped examples: the same ones after any number of resumes, and no other example changes."""

import json
import types

import pytest

import pretrain.run.train
from pretrain.errors import ConfigError
from pretrain.hosts.skipping import add_skip, check_skips, read_rewinds
from pretrain.records.metrics import read_metrics
from pretrain.records.timeline import Timeline
from pretrain.run import rewinding
from pretrain.run.starting import start
from pretrain.run.train import train
from tests.pretrain import tiny


def checksums(workdir) -> list[int]:
  return [row['batch_checksum'] for row in read_metrics(workdir)]


@pytest.mark.slow
def test_a_resume_of_a_run_with_skipped_examples_is_exact(tmp_path, monkeypatch):
  monkeypatch.setattr(pretrain.run.train, 'write_report', lambda _: None)
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


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    (
      '[[20, 36]]',
      r'skipped.json leaves out examples from 20 on, and with data.batch_size=8 no step begins there: one ',
    ),
    ('[[36, 24]]', r'skipped.json is not a list of ranges of examples \(a range is two integers, the first one small'),
    ('[24, 36]', r'skipped.json is not a list of ranges of examples .*; write e.g. \[\[240, 420\]\], or remove it.'),
    ('[[24, 36', r'skipped.json is not a list of ranges of examples .*; write e.g.'),
  ],
)
def test_ranges_that_cannot_be_left_out_are_refused_before_the_run_waits_for_them(tmp_path, text, message):
  (tmp_path / 'skipped.json').write_text(text)
  with pytest.raises(ConfigError, match=message):
    start(tiny.decoder('train.steps=8', 'mesh.data=1'), tmp_path, Timeline())
  assert [path.name for path in tmp_path.iterdir()] == ['skipped.json']


def test_a_cut_off_line_of_rewinds_is_ignored(tmp_path):
  rewound = lambda end: rewinding._leave(tmp_path, types.SimpleNamespace(directory=tmp_path), 9, 4, (end - 8, end))
  rewound(48)
  with (tmp_path / 'rewinds.jsonl').open('a') as file:
    file.write('{"time": 17')
  rewound(64)
  assert [line['examples'] for line in read_rewinds(tmp_path)] == [[40, 48], [56, 64]]


def test_ranges_written_by_a_rewind_are_never_refused():
  """A range that contains an older one, a range after it, and a range before the current position."""
  check_skips([(32, 120), (48, 80), (120, 128)], 0, 8)
  check_skips([(3, 5), (32, 48)], 8, 8)
  with pytest.raises(ConfigError, match=r'examples from 61 on, .* one begins at 56'):
    check_skips([(24, 40), (61, 70)], 0, 8)
