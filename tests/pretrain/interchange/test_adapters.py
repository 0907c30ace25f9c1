"""Adapters in peft's layout: what a run with lora exports, added to imported weights, gives the merged weights."""

import json
import shutil

import numpy as np
import pytest

from pretrain.cli.main import main
from pretrain.interchange.adapters import CONFIG, PREFIX, WEIGHTS
from pretrain.interchange.safetensors import SINGLE, create, open_file, open_folder
from tests.pretrain.interchange.goldens import GOLDENS

RANK, ALPHA = 2, 6.0
KEYS = ['lora.rank=2', 'lora.alpha=6.0', 'train.steps=2', 'schedule.peak=0.05', 'data.targets_length=32', 'mesh.data=1']
MODULES = {'t5_v1_0': "['query', 'down']", 'gpt2': "['out', 'mlp']"}


def run(*argv) -> None:
  assert main([str(arg) for arg in argv]) == 0


@pytest.fixture(scope='module', params=[pytest.param('t5_v1_0', marks=pytest.mark.slow), 'gpt2'])
def folder(request, tmp_path_factory):
  """An imported run, one of two steps with its adapters, its merged export `out` and its `adapter`."""
  folder, name = tmp_path_factory.mktemp('adapters'), request.param
  shutil.copytree(GOLDENS / name, folder / 'source')
  run('import', f'--from={folder}/source', f'--workdir={folder}/trunk')
  keys = [*KEYS, *(['data.inputs_length=32'] if name == 't5_v1_0' else []), f'lora.modules={MODULES[name]}']
  flags = [f'--gin.{key}' for key in [*keys, f"checkpoint.initial='{folder}/trunk/0'"]]
  run('train', f'--gin_file={folder}/trunk/config.gin', f'--workdir={folder}/tuned', *flags)
  run('export', f'--workdir={folder}/tuned', f'--out={folder}/out')
  run('export', f'--workdir={folder}/tuned', f'--out={folder}/adapter', '--adapter')
  return folder


def values(path) -> dict[str, np.ndarray]:
  return {name: tensor.values().astype(np.float32) for name, tensor in open_folder(path).items()}


def test_a_merged_export_has_the_weights_plus_the_product(folder):
  before, after = values(folder / 'source'), values(folder / 'out')
  factors = {name: tensor.values() for name, tensor in open_file(folder / 'adapter' / WEIGHTS).items()}
  assert before.keys() == after.keys()
  adapted = {name.removeprefix(PREFIX).removesuffix('.lora_A.weight') for name in factors if '.lora_A.' in name}
  for name, old in before.items():
    module = name.removesuffix('.weight')
    if module not in adapted:
      np.testing.assert_array_equal(after[name], old)
      continue
    a, b = (factors[f'{PREFIX}{module}.lora_{letter}.weight'] for letter in 'AB')
    update = b @ a if old.shape == (len(b), a.shape[1]) and 'c_' not in module else (b @ a).T
    assert np.abs(update).max() > 0
    np.testing.assert_allclose(after[name], old + ALPHA / RANK * update, rtol=1e-5, atol=1e-6)


def test_the_config_is_pefts(folder):
  config = json.loads((folder / 'adapter' / CONFIG).read_text())
  assert (config['peft_type'], config['r'], config['lora_alpha'], config['bias']) == ('LORA', RANK, ALPHA, 'none')
  t5 = config['task_type'] == 'SEQ_2_SEQ_LM'
  assert config['target_modules'] == (['q', 'wo'] if t5 else ['c_fc', 'c_proj'])
  assert config['fan_in_fan_out'] is not t5


def test_an_adapter_is_added_at_import(folder, tmp_path):
  run('import', f'--from={folder}/source', f'--adapter={folder}/adapter', f'--workdir={tmp_path}/run')
  run('export', f'--workdir={tmp_path}/run', f'--out={tmp_path}/out')
  ours, theirs = values(tmp_path / 'out'), values(folder / 'out')
  for name, own in ours.items():
    np.testing.assert_allclose(own, theirs[name], rtol=1e-5, atol=1e-6)


def test_a_scale_by_the_root_of_the_rank_is_that_of_rslora(folder, tmp_path):
  """Kalajdzievski 2023, arXiv:2312.03732: alpha / sqrt(rank) in place of alpha / rank, as peft's `use_rslora`."""
  shutil.copytree(folder / 'adapter', tmp_path / 'adapter')
  change(tmp_path / 'adapter', use_rslora=True)
  run('import', f'--from={folder}/source', f'--adapter={tmp_path}/adapter', f'--workdir={tmp_path}/run')
  run('export', f'--workdir={tmp_path}/run', f'--out={tmp_path}/out')
  before, plain, found = values(folder / 'source'), values(folder / 'out'), values(tmp_path / 'out')
  for name, old in before.items():
    np.testing.assert_allclose(found[name] - old, np.sqrt(RANK) * (plain[name] - old), rtol=1e-4, atol=2e-6)


def refused(capsys, tmp_path, *argv, code: int = 66) -> str:
  assert main([str(arg) for arg in argv]) == code
  err = capsys.readouterr().err
  assert err.count('\n') == 1
  assert 'othing was written' in err
  assert not (tmp_path / 'new').exists()
  return err


def change(folder, **values) -> None:
  config = json.loads((folder / CONFIG).read_text())
  (folder / CONFIG).write_text(json.dumps(config | values))


def test_what_is_no_plain_lora_is_refused(folder, tmp_path, capsys):
  def attempt() -> str:
    return refused(
      capsys, tmp_path, 'import', f'--from={folder}/source', f'--adapter={tmp_path}/a', f'--workdir={tmp_path}/new'
    )

  shutil.copytree(folder / 'adapter', tmp_path / 'a')
  change(tmp_path / 'a', use_dora=True, rank_pattern={'q': 4}, bias='all', init_lora_weights='pissa')
  err = attempt()
  for part in ('use_dora=True', "rank_pattern={'q': 4}", "bias='all'", "init_lora_weights='pissa'"):
    assert part in err
  change(tmp_path / 'a', use_dora=False, rank_pattern={}, bias='none', init_lora_weights=True, r=3)
  assert 'do not form pairs of lora_A [3, in] and lora_B [out, 3]' in attempt()
  change(tmp_path / 'a', r=RANK)
  rename(tmp_path / 'a', lambda name: name.replace('.0.', '.9.'))
  assert 'is not in the model' in attempt()
  (tmp_path / 'a' / CONFIG).unlink()
  assert f'{CONFIG} is not readable' in attempt()


def rename(folder, names) -> None:
  found = {names(name): tensor.values().copy() for name, tensor in open_file(folder / WEIGHTS).items()}
  for name, array in create(folder, {name: ('F32', x.shape) for name, x in found.items()}).items():
    array[...] = found[name]
  (folder / SINGLE).rename(folder / WEIGHTS)


def test_a_run_without_adapters_has_none_to_export(folder, tmp_path, capsys):
  flags = ['export', f'--workdir={folder}/trunk', f'--out={tmp_path}/new', '--adapter']
  assert 'has no adapters' in refused(capsys, tmp_path, *flags, code=64)


def test_a_part_of_a_tensor_has_no_adapter_in_peft(tmp_path, capsys):
  run('import', f'--from={GOLDENS}/gpt2', f'--workdir={tmp_path}/trunk')
  keys = [*KEYS, "lora.modules=['query']", f"checkpoint.initial='{tmp_path}/trunk/0'", 'train.steps=1']
  flags = [f'--gin.{key}' for key in keys]
  run('train', f'--gin_file={tmp_path}/trunk/config.gin', f'--workdir={tmp_path}/tuned', *flags)
  capsys.readouterr()
  err = refused(
    capsys, tmp_path, 'export', f'--workdir={tmp_path}/tuned', f'--out={tmp_path}/new', '--adapter', code=64
  )
  assert 'query is a part of' in err
  run('export', f'--workdir={tmp_path}/tuned', f'--out={tmp_path}/merged')
