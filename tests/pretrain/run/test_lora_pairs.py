"""configs/t5/lora_small.gin at the smallest size: adapters of weights that know nothing yet learn from pairs."""

import jax
import numpy as np
import pytest

from pretrain.experiment.program import build_program
from pretrain.experiment.trunk import plain, read_weights
from pretrain.records.metrics import read_metrics
from pretrain.run.train import train
from tests.pretrain import tiny

TINY = (
  *tiny.SMALL, 'model.vocab_size=512', 'model.encoder_layers=1', 'model.decoder_layers=1', "model.dtype='float32'",
  'data.inputs_length=32', 'data.targets_length=32', 'data.sentinels=32', 'mesh.fsdp=1', 'mesh.data=1',
  'train.accumulate=1', 'evaluation.generate=0', 'model.dropout=0.0', 'schedule.warmup_steps=0',
)  # fmt: skip


@pytest.mark.slow
def test_adapters_learn_from_pairs(pair_store, tmp_path):
  over = tiny.over(pair_store)
  trunk = tiny.experiment(
    tiny.ROOT / 'configs/t5/finetune_small.gin', *over, *TINY, 'train.steps=1', 'checkpoint.initial=None'
  )
  train(trunk, tmp_path / 'trunk')
  cfg = tiny.experiment(
    tiny.ROOT / 'configs/t5/lora_small.gin', *over, *TINY, 'train.steps=40', 'schedule.peak=0.02',
    f"checkpoint.initial='{tmp_path}/trunk/1'", "lora.modules=['all']",
  )  # fmt: skip
  train(cfg, tmp_path / 'tuned')
  losses = [row['loss'] for row in read_metrics(tmp_path / 'tuned')]
  assert np.mean(losses[-5:]) < losses[0] - 0.7
  abstract = build_program(plain(cfg)).abstract.params
  before, after = (read_weights(tmp_path / run, step, abstract) for run, step in (('trunk', 1), ('tuned', 40)))
  same = jax.tree.map(lambda x, y: bool((x == y).all()), before, after)
  assert same['embedding']['table']
  assert same['head']['kernel']
  assert not any(jax.tree.leaves(same['decoder']['blocks']['mlp']))
