"""What import and export refuse: one line that lists everything, an exit code, and nothing written."""

import errno
import json
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest

from pretrain.cli.main import main
from pretrain.config import bindings
from pretrain.errors import CheckpointError, ConfigError
from pretrain.interchange.families import family_for
from pretrain.interchange.importing import open_source
from pretrain.interchange.safetensors import INDEX, SINGLE, Tensor, create, open_folder
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


@pytest.mark.parametrize(('name', 'key', 'value'), [('llama', 'num_hidden_layers', -1), ('bert', 'hidden_size', 0)])
def test_a_size_below_one(tmp_path, capsys, name, key, value):
  source = shutil.copytree(GOLDENS / name, tmp_path / 'source')
  change(source, **{key: value})
  assert f'{key}={value} is below 1' in refused_import(capsys, source)


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


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """An imported run."""
  run = tmp_path_factory.mktemp('imported') / 'run'
  assert main(['import', f'--from={GOLDENS / "t5_v1_0"}', f'--workdir={run}']) == 0
  return run


def refused_export(capsys, run, *flags, out, code: int = 64) -> str:
  before = sorted(run.rglob('*'))
  err = refused(capsys, code, 'export', f'--workdir={run}', f'--out={out}', *flags)
  assert not out.with_name(out.name + '.partial').exists()
  assert sorted(run.rglob('*')) == before
  return err


def test_a_run_that_has_not_saved(run, tmp_path, capsys):
  (tmp_path / 'new').mkdir()
  shutil.copy(run / 'config.gin', tmp_path / 'new')
  err = refused_export(capsys, tmp_path / 'new', out=tmp_path / 'out', code=66)
  assert err.startswith('CKPT-NONE')
  assert err.endswith('; let the run reach checkpoint.every.\n')
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
  ('out', 'message'),
  [('run/out', 'is inside of --workdir'), ('run', 'is inside of --workdir'), ('there', 'nothing is overwritten')],
)
def test_a_wrong_place_for_an_export(run, capsys, out, message):
  out = run.parent / out
  (run.parent / 'there').mkdir(exist_ok=True)
  assert message in refused_export(capsys, run, out=out)


@pytest.mark.parametrize(
  ('flag', 'message'),
  [
    ('--max_shard_size=0GB', "'0GB' is not a size; write e.g. 500MB or 5GB"),
    ('--max_shard_size=5', "'5' is not a size"),
    ('--dtype=int8', 'float32'),
  ],
)
def test_a_wrong_flag_of_export(run, tmp_path, capsys, flag, message):
  assert main(['export', f'--workdir={run}', f'--out={tmp_path / "out"}', flag]) == 64
  assert message in capsys.readouterr().err
  assert not (tmp_path / 'out').exists()


def test_a_disk_that_is_too_small(run, source, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr('pretrain.tools.weights.shutil.disk_usage', lambda path: types.SimpleNamespace(free=1000))
  err = refused_export(capsys, run, out=tmp_path / 'out')
  assert '0.0 MB are free' in err
  assert 'Nothing was written' in err
  assert '0.0 MB are free' in refused_import(capsys, source, 64)


def full(*args):
  raise OSError(errno.ENOSPC, 'No space left on device')


def test_a_disk_that_becomes_full(run, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(Tensor, 'write', full)
  err = refused_export(capsys, run, out=tmp_path / 'out')
  assert 'cannot be written (No space left on device). Its remains were removed; free space' in err
  assert not (tmp_path / 'out').exists()


def test_an_import_whose_save_fails_leaves_nothing(source, capsys, monkeypatch):
  monkeypatch.setattr('pretrain.checkpoints.orbax_files.Files.begin', full)
  workdir = source.parent / 'run'
  assert 'CKPT-NOSPACE' in refused(capsys, 66, 'import', f'--from={source}', f'--workdir={workdir}')
  assert not workdir.exists()


@pytest.mark.slow
def test_an_export_that_is_killed_leaves_no_folder_of_that_name(run, tmp_path, capsys):
  out = tmp_path / 'out'
  program = (
    'import os; from pretrain.interchange import exporting; from pretrain.cli.main import main; '
    f'exporting._write_tokenizer = lambda *_: os._exit(9); main(["export", "--workdir={run}", "--out={out}"])'
  )
  assert subprocess.run([sys.executable, '-c', program], check=False).returncode == 9
  assert [path.name for path in tmp_path.iterdir()] == ['out.partial']
  err = refused(capsys, 64, 'export', f'--workdir={run}', f'--out={out}')
  assert f'{out}.partial is left from an export that was interrupted. Nothing was written; remove it' in err


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_a_value_that_is_not_finite(source, capsys, value):
  def edit(arrays):
    arrays['shared.weight'][1, 2] = value

  rewrite(source, edit)
  assert f'element 34 of shared.weight is {value}, and weights are finite' in refused_import(capsys, source)


@pytest.mark.parametrize(
  ('second', 'message'),
  [('b', 'it has b, which model.safetensors.index.json does not list'), ('a', 'it has a, which model.saf')],
)
def test_a_tensor_in_two_shards(tmp_path, second, message):
  for number, names in enumerate(('a', f'c{second}'), 1):
    create(tmp_path, {name: ('F32', (2,)) for name in names})
    (tmp_path / SINGLE).rename(tmp_path / f'{number}.safetensors')
  (tmp_path / INDEX).write_text(json.dumps({'weight_map': {'a': '1.safetensors', 'c': '2.safetensors'}}))
  with pytest.raises(CheckpointError) as error:
    open_folder(tmp_path)
  assert message in str(error.value)
  assert '(first of 1)' in str(error.value)


@pytest.fixture
def llama(tmp_path):
  return shutil.copytree(GOLDENS / 'llama', tmp_path / 'source')


@pytest.mark.parametrize('kind', ['dynamic', 'longrope', 'proportional'])
def test_another_kind_of_rotary_scaling(llama, capsys, kind):
  change(llama, rope_parameters={'rope_type': kind, 'rope_theta': 1e4, 'factor': 2.0}, pretraining_tp=3, flux=1)
  err = refused_import(capsys, llama)
  assert f"rope_type={kind!r} (supported: 'default' or 'linear' or 'llama3' or 'yarn')" in err
  assert 'pretraining_tp=3 (supported: 1 or 2 or 4 or 8)' in err
  assert 'unknown keys: flux' in err


@pytest.mark.parametrize(
  ('name', 'key', 'value'),
  [
    ('qwen2', 'mlp_bias', True),
    ('llama', 'partial_rotary_factor', 0.5),
    ('gpt2', 'scale_attn_by_inverse_layer_idx', True),
    ('bert', 'tie_word_embeddings', False),
    ('mistral', 'attention_bias', True),
    ('gpt_neox', 'rope_theta', 700.0),
    ('gpt_neox', 'partial_rotary_factor', 0.5),
  ],
)
def test_values_that_change_logits_and_have_no_part(tmp_path, capsys, name, key, value):
  source = shutil.copytree(GOLDENS / name, tmp_path / 'source')
  change(source, **{key: value})
  assert key in refused_import(capsys, source)


def test_a_part_of_each_head_where_the_family_rotates_all_of_it(llama, capsys):
  change(llama, rope_parameters={'rope_type': 'default', 'rope_theta': 1e4, 'partial_rotary_factor': 0.5})
  assert 'rope_parameters.partial_rotary_factor=0.5 (supported: 1.0)' in refused_import(capsys, llama)


def test_rotary_keys_are_listed_with_the_rest(llama, capsys):
  change(llama, rope_parameters={'rope_type': 'yarn', 'rope_theta': 'x', 'mscale': 2.0, 'factor': 2.0}, rms_norm_eps=[])
  err = refused_import(capsys, llama)
  assert "rope_type='yarn' with mscale, which change it" in err
  assert 'rope_parameters.original_max_position_embeddings is missing' in err
  assert "rope_parameters.rope_theta='x' is no float" in err
  assert 'rms_norm_eps=[] is no float' in err


def test_the_older_form_of_rotary_scaling_is_read(llama):
  old = json.loads((llama / 'config.json').read_text())
  rope = old.pop('rope_parameters')
  theta = rope.pop('rope_theta')
  (llama / 'config.json').write_text(json.dumps(old | {'rope_theta': theta, 'rope_scaling': rope}))
  assert open_source(llama).model == open_source(GOLDENS / 'llama').model


def test_a_tied_head_that_differs(tmp_path, capsys):
  source = shutil.copytree(GOLDENS / 'qwen2', tmp_path / 'source')
  rewrite(source, lambda arrays: arrays.update({'lm_head.weight': arrays['model.embed_tokens.weight'] + 1}))
  assert 'lm_head.weight and model.embed_tokens.weight' in refused_import(capsys, source)


def test_electra_with_other_positions(tmp_path, capsys):
  source = shutil.copytree(GOLDENS / 'electra', tmp_path / 'source')
  change(source, position_embedding_type='relative_key')
  assert "position_embedding_type='relative_key'" in refused_import(capsys, source)


@pytest.mark.parametrize(
  ('name', 'part', 'value'),
  [
    ('llama', 'parallel', 'one_norm'),
    ('llama', 'head_bias', True),
    ('llama', 'norm_placement', 'inner'),
    ('llama', 'rotary_fraction', 0.5),
    ('llama', 'rope_scaling', {'name': 'truncated', 'original_max_positions': 64}),
    ('llama', 'rope_scaling', {'name': 'clex', 'original_max_positions': 64, 'max_factor': 4}),
    ('gpt_neox', 'bias', 'attention'),
    ('olmo2', 'windows', (4, None)),
    ('gemma2', 'qk_norm', 'all'),
    ('gemma2', 'bias', 'qkv'),
    ('falcon', 'bias', 'qkv'),
    ('gpt2', 'bias', 'none'),
    ('bert', 'head_transform', None),
    ('t5_v1_0', 'logit_softcap', 5.0),
    ('mixtral', 'qk_norm', 'heads'),
    ('mixtral', 'norm_placement', 'post'),
  ],
)
def test_a_model_that_no_family_has_is_refused_with_its_key(name, part, value):
  model = open_source(GOLDENS / name).model
  keys = {f'{part}.{key}': x for key, x in value.items()} if isinstance(value, dict) else {part: value}
  with pytest.raises(ConfigError) as error:
    family_for(bindings.override(model, keys, 'test'))
  assert f'model.{part}' in str(error.value)
  assert 'Nothing was written' in str(error.value)


@pytest.mark.parametrize(
  ('values', 'message'),
  [
    ({'conv_kernel_size': 3, 'conv_act': 'gelu'}, 'conv_kernel_size=3 (supported: 0)'),
    ({'position_biased_input': True}, 'position_biased_input=True (supported: False)'),
    ({'share_att_key': False}, 'share_att_key=False (supported: True)'),
    ({'position_buckets': -1}, 'position_buckets=-1 (supported: logarithmic buckets, 2 or more)'),
    ({'pos_att_type': 'p2c|p2p'}, "pos_att_type='p2c|p2p' (supported: 'c2p' and 'p2c')"),
    ({'norm_rel_ebd': 'layer_norm|x'}, "norm_rel_ebd='layer_norm|x' (supported: 'none' or 'layer_norm')"),
  ],
)
def test_parts_of_deberta_that_are_missing_are_named(tmp_path, capsys, values, message):
  source = shutil.copytree(GOLDENS / 'deberta_v3', tmp_path / 'source')
  change(source, **values)
  assert message in refused_import(capsys, source)


def test_a_head_that_nothing_trains_is_refused(tmp_path, capsys):
  """ELECTRA's discriminator is imported with BERT's dropout; training it is refused before the run has a file."""
  run, more = tmp_path / 'run', tmp_path / 'more'
  assert main(['import', f'--from={GOLDENS / "electra_discriminator"}', f'--workdir={run}']) == 0
  assert "model.dropout_sites = 'bert'" in (run / 'config.gin').read_text()
  capsys.readouterr()
  err = refused(capsys, 64, 'train', f'--gin_file={run / "config.gin"}', f'--workdir={more}')
  assert "model.head='binary' has one logit for each token, and no objective trains it yet" in err
  assert not (more / 'config.gin').exists()
