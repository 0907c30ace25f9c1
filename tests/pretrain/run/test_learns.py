"""Shipped configs learn what they say. Minutes: `make test-all`; hours: `make test-configs`."""

import json
import math
import os
import subprocess
import sys

import pytest

from pretrain.records.metrics import read_metrics
from tests.pretrain import tiny


def run(name, workdir):
  """(metrics, baselines) of configs/NAME trained to its end, as a user would; on the user's cache."""
  env = {k: v for k, v in os.environ.items() if k not in ('PRETRAIN_CACHE', 'XLA_FLAGS')}
  pretrain = [sys.executable, '-m', 'pretrain', 'train', f'--gin_file=configs/{name}.gin', f'--workdir={workdir}']
  for command in (pretrain, [sys.executable, 'scripts/baselines.py', str(workdir)]):
    subprocess.run(command, cwd=tiny.ROOT, env=env, check=True)
  return read_metrics(workdir), json.loads((workdir / 'baselines.json').read_text())


@pytest.mark.slow
def test_the_quickstart_is_a_nat_below_the_unigram(tmp_path):
  rows, baselines = run('ul2/quickstart', tmp_path)
  assert rows[0]['step'] == 1
  assert rows[0]['loss'] == pytest.approx(math.log(4096), rel=0.05)
  assert rows[-1]['eval/builtin/text_loss'] < baselines['unigram'] - 1.0
  seconds = [row['step_seconds'] for row in rows]
  waited = sum(row['data_wait'] * s for row, s in zip(rows, seconds, strict=True))
  assert waited < 0.02 * sum(seconds)


@pytest.mark.hours
def test_tiny_beats_the_bigram(tmp_path):
  rows, baselines = run('ul2/tiny', tmp_path)
  assert rows[-1]['eval/builtin/text_loss'] < baselines['bigram']


@pytest.mark.hours
def test_an_encoder_is_a_nat_and_a_half_below_the_unigram(tmp_path):
  rows, baselines = run('encoder/tiny', tmp_path)
  assert rows[-1]['eval/builtin/text_loss'] < baselines['unigram'] - 1.5
