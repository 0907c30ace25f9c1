"""What import and export refuse: one line that lists everything, an exit code, and nothing written."""

import json
import shutil

import numpy as np
import pytest

from pretrain.cli.main import main
from pretrain.interchange.safetensors import SINGLE, create, open_folder
from tests.pretrain.interchange.goldens import GOLDENS


@pytest.fixture
def source(tmp_path):
  return shutil.copytree(GOLDENS / 't5_v1_0', tmp_path / 'source')


def refused(capsys, code: int, *argv) -> str:
  assert main([str(arg) for arg in argv]) == code
  err = capsys.readouterr().err
  assert err.count('\n') == 1, err
  return err


def refused_import(capsys, source, code: int = 66) -> str:
  workdir = source.parent / 'run'
  err = refused(capsys, code, 'import', f'--from={source}', f'--workdir={workdir}')
  assert not workdir.exists()
  assert 'othing was written' in err
  return err


def change(source, **values) -> None:
  path = source / 'config.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rewrite(source, edit) -> None:
  """The weights again, with names and arrays as `edit` leaves them."""
  arrays = {name: np.array(tensor.values()) for name, tensor in open_folder(source).items()}
  edit(arrays)
  for name, array in create(source, {name: ('F32', x.shape) for name, x in arrays.items()}).items():
    array[...] = arrays[name]


def test_a_folder_without_weights(source, capsys):
  (source / SINGLE).rename(source / 'pytorch_model.bin')
  err = refused_import(capsys, source)
  assert f'{source} has no {SINGLE}' in err
  assert 'it has pytorch_model.bin' in err
  assert 'safe_serialization' in err


def test_a_folder_without_config(source, capsys):
  (source / 'config.json').unlink()
  assert 'has no config.json' in refused_import(capsys, source)


@pytest.mark.parametrize(('text', 'message'), [('{', 'not readable'), ('[1]', 'holds no object')])
def test_a_config_that_is_no_object(source, capsys, text, message):
  (source / 'config.json').write_text(text)
  assert message in refused_import(capsys, source)


def test_a_truncated_shard(source, capsys):
  (source / SINGLE).write_bytes((source / SINGLE).read_bytes()[:-5])
  assert 'truncated' in refused_import(capsys, source)


def test_another_family(source, capsys):
  change(source, model_type='mamba')
  err = refused_import(capsys, source)
  assert "model_type='mamba'" in err
  assert 'llama' in err
  assert 't5' in err


def test_config_keys_are_listed_in_one_line(source, capsys):
  change(source, wormhole=3, flux=1, feed_forward_proj='gated-tan', d_ff='48', layer_norm_epsilon=None, num_heads=True)
  err = refused_import(capsys, source)
  for part in ('unknown keys: flux, wormhole', "feed_forward_proj='gated-tan'", "d_ff='48'", 'layer_norm_epsilon=None'):
    assert part in err
  assert 'num_heads=True' in err


def test_a_key_that_is_missing(source, capsys):
  path = source / 'config.json'
  path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != 'd_model'}))
  assert 'd_model is missing' in refused_import(capsys, source)


def test_tensors_are_listed_in_one_line(source, capsys):
  def edit(arrays):
    arrays['extra.weight'] = arrays.pop('encoder.final_layer_norm.weight')
    arrays['shared.weight'] = arrays['shared.weight'][:-1]

  rewrite(source, edit)
  err = refused_import(capsys, source)
  assert 'missing: encoder.final_layer_norm.weight' in err
  assert 'unknown: extra.weight' in err
  assert 'shared.weight is [95, 32], config.json makes it [96, 32]' in err


def test_tables_that_differ(source, capsys):
  rewrite(source, lambda arrays: arrays.update({'encoder.embed_tokens.weight': arrays['shared.weight'] + 1}))
  assert 'encoder.embed_tokens.weight and shared.weight' in refused_import(capsys, source)


def test_a_table_under_its_other_name(source, capsys):
  """As google/madlad400: `decoder.embed_tokens` stands for `shared`."""
  from pretrain.interchange.importing import open_source

  rewrite(source, lambda arrays: arrays.update({'decoder.embed_tokens.weight': arrays.pop('shared.weight')}))
  assert open_source(source).tensors['shared.weight'].name == 'decoder.embed_tokens.weight'


def test_a_key_of_the_model_on_the_command_line(source, capsys):
  workdir = source.parent / 'run'
  err = refused(capsys, 64, 'import', f'--from={source}', f'--workdir={workdir}', '--gin.model.embed=64')
  assert '--gin.model.embed is set by' in err
  assert not workdir.exists()


def test_a_workdir_that_exists(source, capsys):
  (source.parent / 'run').mkdir()
  err = refused(capsys, 64, 'import', f'--from={source}', f'--workdir={source.parent / "run"}')
  assert '--workdir=' in err
  assert 'exists' in err


def test_a_run_without_a_checkpoint(tmp_path, capsys):
  err = refused(capsys, 66, 'export', f'--workdir={tmp_path}', f'--out={tmp_path / "out"}')
  assert 'CKPT-NONE' in err
  assert not (tmp_path / 'out').exists()
