"""How far the experts of tokens are chosen as at another step."""

import json
import re

import numpy as np
import pytest

from pretrain.benchmarks.pathways import _means, matches
from pretrain.cli.main import main
from pretrain.run.train import train
from tests.pretrain.evaluation.test_generate import config_of


def test_agreement_is_the_share_of_the_choices_of_tokens_that_both_steps_have():
  """Against sets of Python, in two layers, over two batches of different numbers of tokens."""
  rng = np.random.default_rng(0)
  draw = lambda: np.argsort(rng.random((2, 3, 5, 6)))[..., :2].astype(np.int32)
  shares, whole, parts = [[], []], [[], []], []
  for filled in (3, 5):
    segments = np.broadcast_to(np.arange(5) < filled, (3, 5)).astype(np.int32)
    one, other = draw(), draw()
    other[1, :, ::2] = one[1, :, ::2, ::-1]  # the same experts in another order
    parts.append(matches(lambda own, batch: {'decoder': own}, one, other, {'decoder_segment_ids': segments}))
    for layer, row, token in np.ndindex(2, 3, filled):
      both = len({*one[layer, row, token].tolist()} & {*other[layer, row, token].tolist()})
      shares[layer].append(both / 2)
      whole[layer].append(both == 2)
  found = _means(parts)
  assert found['tokens'] == 3 * (3 + 5)
  np.testing.assert_allclose([found['decoder/0'], found['decoder/1']], np.mean(shares, 1), rtol=1e-6)
  np.testing.assert_allclose([found['agreement'], found['same']], [np.mean(shares), np.mean(whole)], rtol=1e-6)
  assert found['decoder/1'] > found['decoder/0'] + 0.2


@pytest.mark.slow
def test_a_run_has_its_own_pathways_and_other_ones_at_another_step(text_store, tmp_path, capsys):
  heldout = f"data.heldout=[{{'path': '{text_store}'}}]"
  routed = ('model.experts=4', 'model.vocab_size=512', 'schedule.peak=0.01', 'evaluation.batches=2', heldout)
  train(config_of(text_store, 'causal_lm', 'train.steps=6', 'checkpoint.every=3', *routed), tmp_path)
  assert main(['eval', f'--workdir={tmp_path}', '--pathways=3,6']) == 0
  found = json.loads((tmp_path / 'eval.json').read_text())['pathways']
  (early, late) = found.values()
  assert [name.partition(', ')[2] for name in found] == ['step 3', 'step 6']
  assert late['agreement'] == late['same'] == 1
  assert 0.3 < early['agreement'] < 1
  assert early['same'] < early['agreement']
  assert early['decoder/0'] > 0
  assert 'choices that are the same' in (tmp_path / 'report.html').read_text()
  assert capsys.readouterr().out.startswith('pathways/')
  assert main(['eval', f'--workdir={tmp_path}', '--pathways=3', '--gin.mesh.data=3']) == 64
  message = r'^CONFIG: --pathways reads batches of the run, data.batch_size=\d+, which mesh.* does not divide into 3;'
  assert re.match(message, capsys.readouterr().err.splitlines()[-1])
