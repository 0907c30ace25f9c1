"""pretrain import, then pretrain export: the files are those that `save_pretrained` wrote, byte for byte."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest

from models.specs import ParamSpec
from pretrain.cli.main import main
from pretrain.interchange.layout import Entry
from pretrain.interchange.safetensors import INDEX, create, open_folder
from tests.pretrain.interchange import goldens

# A family of each layout of tensors; `make test-all` tests all of them.
LAYOUTS = (
  't5_v1_0', 'umt5', 'llama', 'qwen2', 'olmo2', 'gemma2', 'gpt2', 'gpt_neox', 'falcon_40b', 'bert', 'roberta',
  'electra_discriminator', 'deberta_v3', 'mixtral',
)  # fmt: skip


@pytest.mark.parametrize('name', [name if name in LAYOUTS else goldens.slow(name) for name in goldens.ALL])
def test_round_trip_gives_the_same_files(name, tmp_path):
  source, run, out = goldens.GOLDENS / name, tmp_path / 'run', tmp_path / 'out'
  assert main(['import', f'--from={source}', f'--workdir={run}']) == 0
  assert main(['export', f'--workdir={run}', f'--out={out}']) == 0
  assert (out / 'model.safetensors').read_bytes() == (source / 'model.safetensors').read_bytes()
  assert json.loads((out / 'config.json').read_text()) == json.loads((source / 'config.json').read_text())
  assert sorted(path.name for path in out.iterdir()) == ['config.json', 'generation_config.json', 'model.safetensors']


@pytest.mark.parametrize('name', ['falcon', 'gpt_neox', 'mixtral', *map(goldens.slow, ('gemma2', 'gpt2', 'roberta'))])
def test_an_export_in_small_blocks_has_the_same_values(name, tmp_path, monkeypatch):
  """Where a tensor has many blocks, and an array many parts."""
  source, run, out = goldens.GOLDENS / name, tmp_path / 'run', tmp_path / 'out'
  assert main(['import', f'--from={source}', f'--workdir={run}']) == 0
  monkeypatch.setattr('pretrain.interchange.placing.BLOCK', 100)
  monkeypatch.setattr('pretrain.checkpoints.stored.PART', 1000)
  assert main(['export', f'--workdir={run}', f'--out={out}', '--max_shard_size=60KB']) == 0
  assert (out / INDEX).exists()
  found, wanted = open_folder(out), open_folder(source)
  assert found.keys() == wanted.keys()
  for key, tensor in wanted.items():
    assert tensor.values().tobytes() == found[key].values().tobytes(), key


def test_an_export_in_bfloat16(tmp_path):
  source, run, out = goldens.GOLDENS / 'llama', tmp_path / 'run', tmp_path / 'out'
  assert main(['import', f'--from={source}', f'--workdir={run}']) == 0
  assert main(['export', f'--workdir={run}', f'--out={out}', '--dtype=bfloat16']) == 0
  found = open_folder(out)
  for name, tensor in open_folder(source).items():
    wanted = tensor.values().astype(ml_dtypes.bfloat16)
    assert found[name].dtype == 'BF16'
    assert found[name].values().tobytes() == wanted.tobytes()
  assert json.loads((out / 'config.json').read_text())['dtype'] == 'bfloat16'


def test_old_names_and_other_heads_come_back(tmp_path):
  """As bert-base-uncased: gamma and beta, a pooler, a head for sentence pairs, and a second name of a bias."""
  source = shutil.copytree(goldens.GOLDENS / 'bert', tmp_path / 'source')
  found = {name: tensor.values() for name, tensor in open_folder(source).items()}
  old = {name.replace('LayerNorm.weight', 'LayerNorm.gamma').replace('LayerNorm.bias', 'LayerNorm.beta'): x
         for name, x in found.items()}  # fmt: skip
  old['bert.pooler.dense.weight'] = np.linspace(0, 1, 32 * 32, dtype=np.float32).reshape(32, 32)
  old['cls.seq_relationship.bias'] = np.array([0.5, -1], np.float32)
  old['cls.predictions.decoder.bias'] = found['cls.predictions.bias']
  for name, array in create(source, {name: ('F32', x.shape) for name, x in old.items()}).items():
    array[...] = old[name]
  run, out = tmp_path / 'run', tmp_path / 'out'
  assert main(['import', f'--from={source}', f'--workdir={run}']) == 0
  assert main(['export', f'--workdir={run}', f'--out={out}']) == 0
  assert (out / 'model.safetensors').read_bytes() == (source / 'model.safetensors').read_bytes()


def test_names_of_the_published_deberta_v3_come_back(tmp_path):
  """As microsoft/deberta-v3-base: no `legacy`, scores in one string, and a head for replaced tokens."""
  source = shutil.copytree(goldens.GOLDENS / 'deberta_v3', tmp_path / 'source')
  values = json.loads((source / 'config.json').read_text())
  values |= {'pos_att_type': 'p2c|c2p', 'max_relative_positions': -1, 'max_position_embeddings': 70}
  del values['legacy']
  (source / 'config.json').write_text(json.dumps(values))
  found = {name: tensor.values() for name, tensor in open_folder(source).items()}
  assert 'lm_predictions.lm_head.dense.weight' in found
  found['mask_predictions.classifier.weight'] = np.linspace(0, 1, 32, dtype=np.float32).reshape(1, 32)
  for name, array in create(source, {name: ('F32', x.shape) for name, x in found.items()}).items():
    array[...] = found[name]
  assert goldens.load(source)[0].model == goldens.read_source('deberta_v3').model
  run, out = tmp_path / 'run', tmp_path / 'out'
  assert main(['import', f'--from={source}', f'--workdir={run}']) == 0
  assert main(['export', f'--workdir={run}', f'--out={out}']) == 0
  assert (out / 'model.safetensors').read_bytes() == (source / 'model.safetensors').read_bytes()
  assert json.loads((out / 'config.json').read_text()) == values


@pytest.mark.parametrize(('scale', 'shift'), [(3.7, 0.0), (1.0, 1.0)])
def test_a_fold_keeps_the_bits_of_values_that_did_not_change(scale, shift):
  entry = Entry('x', 'x', 'embed', scale=scale, shift=shift)
  spec = ParamSpec((4096,), np.float32, ('embed',), None)
  before = np.random.default_rng(0).normal(size=4096).astype(np.float32)
  ours = entry.read(before, spec)
  assert (entry.unfold(ours, None) != before).any(), 'the inverse alone would do'
  ours[:8] += 0.5
  out = np.zeros_like(before)
  entry.write(out, spec, next(entry.blocks(spec, [range(4096)], 4096)), ours, before, None)
  np.testing.assert_array_equal(out[8:], before[8:])
  np.testing.assert_allclose(out[:8], before[:8] + 0.5 / scale, atol=1e-6)
