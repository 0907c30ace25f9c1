"""`pretrain import` of T5X's checkpoints: the goldens of `transformers` in T5X's names, and what is refused."""

import dataclasses
import json
import pathlib

import jax
import ml_dtypes
import numpy as np
import pytest

from models import partition
from models.build import build
from pretrain.cli.main import main
from pretrain.config import bindings
from pretrain.devices.mesh import MeshConfig, make_mesh
from pretrain.errors import CheckpointError, ConfigError
from pretrain.evaluation.imported import FOLDER, tokenizer_of
from pretrain.experiment.experiment import Experiment
from pretrain.interchange import t5x, zarr
from pretrain.interchange.importing import TENSORS, flat, parameters
from pretrain.interchange.published.t5x import Form, entries
from pretrain.interchange.published.t5x import read as read_shapes
from tests.pretrain.interchange import goldens
from tests.pretrain.interchange import t5x_folders as folders
from tests.tokenizers_json import publish

ROOT = pathlib.Path(__file__).parents[3]
TOLERANCE = 3e-6
SET = ['model.norm.eps=0.001', 'model.relative_max_distance=50', 'model.relative_buckets=16']  # of the goldens
ACTIVATIONS = {'t5_v1_0': 'relu', 'ul2': 'silu', 'umt5': 'gelu_tanh'}


def arrays_of(name: str) -> dict[str, np.ndarray]:
  """T5 1.0 with an array for each layer; UL2 scanned, as Flaxformer; umT5 as scalable_t5."""
  arrays = folders.unscanned(name)
  if name == 'umt5':
    return folders.scanned(arrays, heads=4)
  return folders.shared(arrays) if name == 't5_v1_0' else folders.scanned(folders.shared(arrays))


def overrides(name: str) -> list[str]:
  return [*SET, f"model.mlp.activation='{ACTIVATIONS[name]}'"]


def written(tmp_path, name: str, edit=lambda arrays: None):
  arrays = arrays_of(name)
  edit(arrays)
  (tmp_path / 'checkpoint_3').mkdir()
  return folders.write(tmp_path / 'checkpoint_3', arrays, rows=30)


def read(folder, shardings=None):
  source = t5x.open_source(folder, None)
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shardings = shardings or dict.fromkeys(flat(build(source.model).specs), device)
  return source, parameters(source, shardings)


@pytest.fixture(scope='module', params=ACTIVATIONS)
def checkpoint(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp(request.param)
  return request.param, folders.write(folder, arrays_of(request.param))


def test_logits_are_those_of_transformers(checkpoint):
  name, folder = checkpoint
  source, params = read(folder)
  cfg = t5x.experiment(source, [], overrides(name))
  assert goldens.worst(cfg.model, params, goldens.expected(name), [goldens.PADDED]) < TOLERANCE
  assert source.others == ['state']


def test_each_device_reads_its_part_of_the_chunks(checkpoint):
  """Chunks of 7 end in the middle of heads and of shards."""
  name, folder = checkpoint
  mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
  shardings = flat(partition.shardings(build(t5x.open_source(folder, None).model).specs, mesh))
  whole = flat(goldens.read(name)[1])
  for path, found in flat(read(folder, shardings)[1]).items():
    np.testing.assert_array_equal(found, whole[path], err_msg=path)
    assert found.sharding == shardings[path]


def test_a_chunk_is_read_once(tmp_path, monkeypatch):
  reads, plain = [], zarr.Array.read
  monkeypatch.setattr(zarr.Array, 'read', lambda self, box: reads.append((self.name, str(box))) or plain(self, box))
  folder = written(tmp_path, 'ul2')
  source, _ = read(folder)
  chunks = sum(np.prod(np.ceil(np.divide(a.shape, a.chunks))) for a in source.tensors.values())
  assert len(reads) == len(set(reads))
  assert len(reads) <= chunks


def test_bfloat16_is_read_exactly(tmp_path):
  def halve(arrays):
    arrays |= {name: values.astype(ml_dtypes.bfloat16) for name, values in arrays.items()}

  _, params = read(written(tmp_path, 't5_v1_0', halve))
  whole = flat(goldens.read('t5_v1_0')[1])
  for path, found in flat(params).items():
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.asarray(whole[path]).astype(ml_dtypes.bfloat16).astype(np.float32))


@pytest.mark.slow
def test_swapped_gates_change_the_logits(tmp_path):
  def swap(arrays):
    for stack in ('encoder', 'decoder'):
      one, other = (f'{stack}/{stack}/mlp/wi_{i}/kernel' for i in (0, 1))
      arrays[one], arrays[other] = arrays[other], arrays[one]

  source, params = read(written(tmp_path, 'ul2', swap))
  cfg = t5x.experiment(source, [], overrides('ul2'))
  assert goldens.worst(cfg.model, params, goldens.expected('ul2'), [goldens.PADDED]) > TOLERANCE


def imported(capsys, folder, *flags) -> tuple[int, str]:
  workdir = folder.parent / 'run'
  code = main(['import', f'--from={folder}', f'--workdir={workdir}', *flags])
  out = capsys.readouterr()
  assert workdir.exists() == (code == 0)
  return code, out.err if code else out.out


def grow(arrays):
  """576 tokens: room for a tokenizer."""
  arrays['token_embedder/embedding'] = np.tile(arrays['token_embedder/embedding'], (6, 1))
  if 'decoder/logits_dense/kernel' in arrays:
    arrays['decoder/logits_dense/kernel'] = np.tile(arrays['decoder/logits_dense/kernel'], (1, 6))


TOKENIZER = {'generation_config': {'eos_token_id': 2}}


@pytest.mark.parametrize('where', ['checkpoint_3', '.'])
def test_the_tokenizer_lies_in_the_folder_or_beside_it(where, tmp_path):
  folder = written(tmp_path, 't5_v1_0', grow)
  publish(tmp_path / where, 'byte_fallback', **TOKENIZER)
  assert t5x.open_source(folder, None).tokenizer.path.parent == (tmp_path / where).absolute()


def test_a_tokenizer_with_too_many_pieces(tmp_path, capsys):
  folder, given = written(tmp_path, 't5_v1_0'), tmp_path / 'tokenizer/tokenizer.json'
  publish(given.parent, 'byte_fallback', **TOKENIZER)
  err = refused(capsys, folder, 66, *flags_of('t5_v1_0'), f'--tokenizer={given}')
  assert f'{given} has 480 pieces, the embedding in {folder} has 96 rows' in err


def flags_of(name: str) -> list[str]:
  return [f'--gin.{override}' for override in overrides(name)]


def test_an_import_is_exported_as_the_tensors_of_transformers(tmp_path, capsys):
  """With the tokenizer that was given, and its end of text. The optimizer's state is left out; the output says so."""
  given, run, out = tmp_path / 'tokenizer/tokenizer.json', tmp_path / 'run', tmp_path / 'out'
  publish(given.parent, 'byte_fallback', **TOKENIZER)
  code, text = imported(capsys, written(tmp_path, 'ul2', grow), *flags_of('ul2'), f'--tokenizer={given}')
  assert code == 0, text
  assert 'checkpoint_3: state left out' in text
  assert set(json.loads((run / FOLDER / TENSORS).read_text())['types'].values()) == {'F32'}
  assert tokenizer_of(run).content == given.read_bytes()
  assert (tokenizer_of(run).ids.end, tokenizer_of(run).ids.first_input) == (2, 0)
  assert main(['export', f'--workdir={run}', f'--out={out}']) == 0
  found, whole = goldens.open_source(out), goldens.read_source('ul2')
  assert found.model == dataclasses.replace(whole.model, vocab_size=576)
  assert found.tensors.keys() == whole.tensors.keys()
  for name, tensor in whole.tensors.items():
    values = found.tensors[name].values()
    np.testing.assert_array_equal(values[:96] if 'block' not in name else values, tensor.values(), err_msg=name)


def refused(capsys, folder, code: int, *flags) -> str:
  found, err = imported(capsys, folder, *flags)
  assert found == code, err
  assert err.count('\n') == 1, err
  assert 'othing was written' in err
  return err


def drop(*names):
  def edit(arrays):
    for name in names:
      del arrays[name]

  return edit


def test_missing_arrays_are_all_listed(tmp_path, capsys):
  lost = 'encoder/layers_1/mlp/wo/kernel', 'decoder/layers_2/self_attention/key/kernel', 'encoder/encoder_norm/scale'
  err = refused(capsys, written(tmp_path, 't5_v1_0', drop(*lost)), 66, *flags_of('t5_v1_0'))
  assert err.count('missing: ') == 1
  assert all(f'target.{name.replace("/", ".")}' in err for name in lost)
  assert 'unknown' not in err


def test_a_missing_array_that_shows_a_size_is_listed_without_others(tmp_path, capsys):
  err = refused(capsys, written(tmp_path, 't5_v1_0', drop('token_embedder/embedding')), 66, *flags_of('t5_v1_0'))
  assert 'missing: target.token_embedder.embedding. Nothing' in err


def test_unknown_arrays_and_types_are_listed(tmp_path, capsys):
  def edit(arrays):
    arrays['encoder/adapter/kernel'] = np.ones((2, 2), np.float32)
    arrays['encoder/layers_0/mlp/wi/kernel'] = arrays['encoder/layers_0/mlp/wi/kernel'].astype(np.float64)

  err = refused(capsys, written(tmp_path, 't5_v1_0', edit), 66, *flags_of('t5_v1_0'))
  assert 'unknown: target.encoder.adapter.kernel' in err
  assert 'target.encoder.layers_0.mlp.wi.kernel has type <f8' in err


@pytest.mark.parametrize('form', [Form(False, True, False), Form(True, True, False), Form(True, False, True)])
def test_the_sizes_of_ul2_are_read_from_its_shapes(form):
  """In all forms that T5X's code writes; no array is needed for it."""
  model = bindings.load(Experiment, [str(ROOT / 'configs/ul2/20b.gin')], []).model
  model = dataclasses.replace(model, relative_layers='each' if form.each else 'shared')
  specs, shapes = flat(build(model).specs), {}
  for entry in (entry for entry in entries(model, form) if entry.ours in specs):
    shapes |= dict.fromkeys(entry.names(specs[entry.ours]).values(), entry.shape(specs[entry.ours]))
  found = read_shapes(shapes)
  assert (found.form, found.complete, found.problems) == (form, True, [])
  ours, theirs = (bindings.flatten(own, 'model.') for own in (model, found.model))
  assert {key for key in ours if ours[key] != theirs[key]} <= set(t5x.FREE)
  assert len(shapes) == (23 if form.scanned else 23 * 32) + 6  # 9 in a layer of the encoder, 14 in one of the decoder


def test_layers_on_another_axis_are_refused(tmp_path, capsys):
  arrays = folders.scanned(folders.shared(folders.unscanned('ul2')), axis=0)
  (tmp_path / 'c').mkdir()
  err = refused(capsys, folders.write(tmp_path / 'c', arrays, rows=30), 66, *flags_of('ul2'))
  assert 'target.encoder.encoder.attention.query.kernel is [2, 32, 48]' in err


def turn(arrays):
  for table in [table for table in arrays if 'rel_embedding' in table]:
    arrays[table] = np.swapaxes(arrays[table], 0, -1)


def test_a_transposed_table_of_distances_is_refused(tmp_path, capsys):
  """Its buckets, read as heads, divide the kernels too: no shape is wrong, but T5X has no 4 buckets."""
  folder, flags = written(tmp_path, 't5_v1_0', turn), flags_of('t5_v1_0')
  err = refused(capsys, folder, 64, *[flag for flag in flags if 'buckets' not in flag])
  assert 'encoder.relpos_bias.rel_embedding is [16, 4], heads first, then 4 buckets, and T5X has 32' in err
  err = refused(capsys, folder, 64, *flags)
  assert 'model.relative_buckets=16, but target.encoder.relpos_bias.rel_embedding, [16, 4], makes it 4' in err


def test_a_transposed_table_of_each_layer_is_refused(tmp_path, capsys):
  err = refused(capsys, written(tmp_path, 'umt5', turn), 66, *flags_of('umt5'))
  assert 'encoder.attention.query.kernel is [32, 2, 4, 12], the other arrays make it [32, 2, 16, 12]' in err


def test_heads_that_do_not_divide_the_kernels_are_refused(tmp_path, capsys):
  def widen(arrays):
    for stack in ('encoder', 'decoder'):
      arrays[f'{stack}/relpos_bias/rel_embedding'] = np.ones((5, 16), np.float32)

  err = refused(capsys, written(tmp_path, 't5_v1_0', widen), 66, *flags_of('t5_v1_0'))
  assert 'query.kernel is [32, 48], whose last axis 5 heads (of target.encoder.relpos_bias.rel_embedding)' in err


def test_keys_that_differ_from_the_shapes_are_refused(tmp_path, capsys):
  flags = [*flags_of('t5_v1_0'), '--gin.model.heads=8', "--gin.model.parallel='attention_mlp'"]
  (tmp_path / 'given.gin').write_text('model.mlp.hidden = 64\n')
  source = written(tmp_path, 't5_v1_0')
  with pytest.raises(ConfigError) as error:
    t5x.experiment(t5x.open_source(source, None), [], [*overrides('t5_v1_0'), 'model.heads=8', 'model.embed=64'])
  assert 'model.embed=64, but target.token_embedder.embedding, [96, 32], makes it 32; model.heads=8, but' in str(
    error.value
  )
  err = refused(capsys, source, 64, *flags[:-1], f'--gin_file={tmp_path / "given.gin"}', *TRAINING)
  assert 'model.heads=8, but target.encoder.relpos_bias.rel_embedding, [4, 16], makes it 4' in err
  assert 'model.mlp.hidden=64, but target.encoder.layers_0.mlp.wi.kernel, [32, 48], makes it 48' in err


TRAINING = [
  "--gin.objective.name='span_corruption'", "--gin.data.name='synthetic'", '--gin.data.batch_size=8',
  '--gin.data.targets_length=16', '--gin.data.inputs_length=16', '--gin.data.sentinels=10',
  "--gin.schedule.name='constant'", '--gin.schedule.peak=1e-4', '--gin.train.steps=10',
]  # fmt: skip


def test_values_of_a_gin_file_count(tmp_path):
  text = '\n'.join(value.removeprefix('--gin.').replace('=', ' = ', 1) for value in [*TRAINING, *SET])
  (tmp_path / 'given.gin').write_text(f"{text}\nmodel.heads = 4\nmodel.dropout = 0.1\nmodel.mlp.activation = 'silu'\n")
  source = t5x.open_source(written(tmp_path, 't5_v1_0'), None)
  cfg = t5x.experiment(source, [str(tmp_path / 'given.gin')], ["model.head='tied'"])
  assert (cfg.model.dropout, cfg.model.mlp.activation, cfg.model.head, cfg.model.heads) == (0.1, 'silu', 'tied', 4)
  assert (cfg.model.mlp.gated, cfg.model.mlp.hidden, cfg.model.encoder_layers) == (False, 48, 2)


def test_a_config_without_an_activation_is_refused(tmp_path, capsys):
  err = refused(capsys, written(tmp_path, 't5_v1_0'), 64)
  assert 'set --gin.model.mlp.activation="\'relu\'" for T5 1.0' in err
  assert 'set --gin.model.relative_buckets=16' in err


def chunk(folder, name: str = 'target.encoder.layers_0.mlp.wi.kernel'):
  return folder / name / '0.1'


def test_a_truncated_chunk(tmp_path, capsys):
  folder = written(tmp_path, 't5_v1_0')
  raw = chunk(folder).read_bytes()
  chunk(folder).write_bytes(raw[: len(raw) // 2])
  err = refused(capsys, folder, 66, *flags_of('t5_v1_0'))
  assert 'target.encoder.layers_0.mlp.wi.kernel: it cannot be read (' in err
  assert '0.1' in err


def test_a_missing_chunk_and_a_missing_folder(tmp_path, capsys):
  folder = written(tmp_path, 't5_v1_0')
  chunk(folder).rename(folder / 'elsewhere')
  (folder / 'target.token_embedder.embedding').rename(folder / 'embedding')
  err = refused(capsys, folder, 66, *flags_of('t5_v1_0'))
  assert 'target.encoder.layers_0.mlp.wi.kernel (1 of 4 chunks are missing)' in err
  assert 'target.token_embedder.embedding (the folder target.token_embedder.embedding' in err


def test_a_placeholder_outside_of_the_folder(tmp_path):
  place = {'driver': 'zarr', 'kvstore': {'driver': 'file', 'path': '../x/'}, 'metadata': {'shape': [1]}}
  target = {'a': place, 'b': place | {'driver': 'n5'}, 'c': 3}
  (tmp_path / 'checkpoint').write_bytes(folders.serialization.msgpack_serialize({'target': target}))
  with pytest.raises(CheckpointError) as error:
    t5x.open_source(tmp_path, None)
  assert "target.a (its path '../x' is not a folder beside checkpoint)" in str(error.value)
  assert "target.b (driver 'n5'; zarr is read), target.c (it is int and no array)" in str(error.value)


@pytest.mark.parametrize('content', [b'model_checkpoint_path: "model.ckpt-0"\n', b'\x93', b'\x01', b'\x80'])
def test_a_file_that_is_no_checkpoint(content, tmp_path, capsys):
  (tmp_path / 'c').mkdir()
  (tmp_path / 'c/checkpoint').write_bytes(content)
  assert f'{tmp_path / "c/checkpoint"}: it ' in refused(capsys, tmp_path / 'c', 66)


def test_the_folder_around_checkpoints(tmp_path, capsys):
  for step in (1, 2):
    (tmp_path / f'm/checkpoint_{step}').mkdir(parents=True)
    (tmp_path / f'm/checkpoint_{step}/checkpoint').write_bytes(b'\x80')
  assert 'has checkpoint_1, checkpoint_2. Nothing' in refused(capsys, tmp_path / 'm', 66)
  (tmp_path / 'm/checkpoint_2/checkpoint').unlink()
  assert 'checkpoint_1/checkpoint: it has no "target"' in refused(capsys, tmp_path / 'm', 66)


def test_flags_of_the_other_layout(tmp_path, capsys):
  folder = written(tmp_path, 't5_v1_0')
  assert 'names tensors of transformers' in refused(capsys, folder, 64, '--adapter=x')
  found = main(['import', f'--from={goldens.GOLDENS / "t5_v1_0"}', f'--workdir={tmp_path / "r"}', '--tokenizer=x'])
  assert found == 64
  assert 'is for checkpoints of T5X' in capsys.readouterr().err
  with pytest.raises(ConfigError, match='is a checkpoint of T5X'):
    goldens.open_source(folder)
