"""Weights of 4 and 8 bits: read as compressed-tensors packs them, exported with the same names, values and config."""

import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from models.build import build
from models.product import stored
from pallas_kernels.quantized_matmul.formats import Operand
from pretrain.cli.main import main
from pretrain.errors import CheckpointError
from pretrain.interchange.importing import open_source, placed
from pretrain.interchange.packed import codes, writing
from pretrain.interchange.packed.codes import Scheme
from pretrain.interchange.packed.reading import KEY
from pretrain.interchange.safetensors import allocate, open_folder
from tests.pretrain.interchange import goldens

LLAMA, INT4, INT8 = (goldens.GOLDENS / name for name in ('llama', 'llama_int4', 'llama_int8'))


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """The golden `llama`, imported."""
  workdir = tmp_path_factory.mktemp('packed') / 'run'
  assert main(['import', f'--from={LLAMA}', f'--workdir={workdir}']) == 0
  return workdir


@pytest.fixture(scope='module')
def int4(run):
  """Its export in int4, a scale for 16 inputs, written in many parts."""
  out = run.parent / 'int4'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(writing, 'BLOCK', 100)
    assert main(['export', f'--workdir={run}', f'--out={out}', '--quantize=int4', '--group_size=16']) == 0
  return out


def layout(folder):
  return {name: (tensor.dtype, tensor.shape) for name, tensor in open_folder(folder).items()}


@pytest.mark.parametrize('folder', [INT4, pytest.param(INT8, marks=pytest.mark.slow)], ids=lambda path: path.name)
def test_weights_that_compressed_tensors_packed_have_its_logits(folder):
  source, params = goldens.load(folder)
  golden = goldens.expected(folder.name)
  model, own = build(source.model), goldens.rows([[golden['short']]], 'decoder')
  run = jax.jit(lambda params: model.logits(params, model.apply(params, own)[0]))
  found, wanted = np.asarray(run(params))[0, : len(golden['short'])], golden['short_logits']
  assert np.abs(found - wanted).max() < 3e-6 * np.abs(wanted).max()
  assert np.abs(wanted - goldens.expected('llama')['short_logits']).max() > 1e-3 * np.abs(wanted).max()


def test_an_export_has_the_tensors_and_the_config_of_compressed_tensors(int4):
  assert layout(int4) == layout(INT4)
  ours, theirs = (json.loads((path / 'config.json').read_text()) for path in (int4, INT4))
  group, wanted = (values[KEY]['config_groups']['group_0'] for values in (ours, theirs))
  assert group['targets'] == wanted['targets']
  assert {key: group['weights'][key] for key in ('num_bits', 'type', 'symmetric', 'strategy', 'group_size')} == {
    key: wanted['weights'][key] for key in ('num_bits', 'type', 'symmetric', 'strategy', 'group_size')
  }
  for key in ('quant_method', 'format', 'quantization_status', 'kv_cache_scheme'):
    assert ours[KEY][key] == theirs[KEY][key]
  assert set(ours[KEY]['ignore']) == {'lm_head', 'model.embed_tokens'}
  assert {key: ours[key] for key in ours if key != KEY} == {key: theirs[key] for key in theirs if key != KEY}


def test_its_values_are_those_that_the_recipe_rounds_to(int4):
  before, after = open_source(LLAMA), open_source(int4)
  count, recipe = 0, jax.jit(lambda x: stored(x, 1, Operand('int4', scale='block', block=16)))
  for entry, spec in placed(before.family, before.model, before.values):
    for name in entry.names(spec).values():
      x, found = before.tensors[name].values(), after.tensors[name].values()
      if '_proj.' in name:
        split = x.reshape(len(x), -1, 16)
        scale = np.abs(split).max(-1, keepdims=True) / np.float32(7)
        np.testing.assert_allclose(found, (np.rint(split / scale) * scale).reshape(x.shape), rtol=1e-6)
        if name == 'model.layers.0.mlp.down_proj.weight':
          np.testing.assert_allclose(found, recipe(jnp.asarray(x.T)).T, rtol=1e-6)
        count += 1
      else:
        np.testing.assert_array_equal(found, x)
  assert count == 14
  part = after.tensors[name := 'model.layers.1.mlp.down_proj.weight']
  np.testing.assert_array_equal(part.read(50, 555), part.values().reshape(-1)[50:555], name)


def test_it_becomes_a_run_whose_export_is_not_packed(int4, tmp_path):
  run, out = tmp_path / 'run', tmp_path / 'out'
  assert main(['import', f'--from={int4}', f'--workdir={run}']) == 0
  assert main(['export', f'--workdir={run}', f'--out={out}']) == 0
  assert json.loads((out / 'config.json').read_text()) == json.loads((LLAMA / 'config.json').read_text())
  wanted, found = open_source(int4).tensors, open_folder(out)
  assert layout(out) == layout(LLAMA)
  assert all(np.array_equal(found[name].values(), wanted[name].values()) for name in wanted)


@pytest.mark.slow
def test_an_export_in_shards_of_bfloat16_packs_in_parts(run, tmp_path, monkeypatch):
  monkeypatch.setattr('pretrain.interchange.packed.writing.BLOCK', 100)
  flags = ['--quantize=int8', '--dtype=bfloat16', '--max_shard_size=20KB']
  assert main(['export', f'--workdir={run}', f'--out={tmp_path / "out"}', *flags]) == 0
  found = open_source(tmp_path / 'out').tensors['model.layers.0.self_attn.q_proj.weight']
  x = open_folder(LLAMA)[found.name].values()
  assert (found.scales.dtype, found.scales.shape, found.scheme) == ('BF16', (64, 1), Scheme(8, 0))
  bound = 0.51 * np.abs(x).max(1, keepdims=True) / 127  # half a step of a scale that is rounded to bfloat16
  error = np.abs(found.values() - x.astype(ml_dtypes.bfloat16).astype(np.float32))
  assert (error < bound + 0.005 * np.abs(x)).all()
  assert not list((tmp_path / 'out').glob(writing.WHOLE))


@pytest.mark.slow
@pytest.mark.parametrize('name', ['gpt_neox', 'gemma2', 'mixtral', 't5_v1_1', 'bert'])
def test_other_families_are_packed_to_the_nearest_codes(name, tmp_path):
  """One tensor may hold three products; experts, tables and heads are not packed."""
  run, out = tmp_path / 'run', tmp_path / 'out'
  assert main(['import', f'--from={goldens.GOLDENS / name}', f'--workdir={run}']) == 0
  assert main(['export', f'--workdir={run}', f'--out={out}', '--quantize=int8']) == 0
  packed = [part for part in open_folder(out) if part.endswith('weight_packed')]
  assert packed
  assert not [part for part in packed if 'expert' in part or 'embed' in part or 'head' in part]
  (_, given), (_, read) = goldens.load(goldens.GOLDENS / name), goldens.load(out)
  errors = jax.tree.leaves(jax.tree.map(lambda x, y: float(jnp.abs(x - y).max() / jnp.abs(x).max()), given, read))
  assert 0.25 / 127 < np.max(errors) <= 0.5001 / 127  # half a step between codes
  assert sum(error > 0 for error in errors) < len(errors)


def test_codes_are_the_nearest_and_zeros_stay_zeros():
  x = np.array([[-7, 3.4, 0.5, 0], [0, 0, 0, 0], [1.2e-3, -0.5e-3, 0, 2e-3]], np.float32)
  found, scales = codes.quantized(x, Scheme(4, 0))
  np.testing.assert_array_equal(found, [[-7, 3, 0, 0], [0, 0, 0, 0], [4, -2, 0, 7]])
  np.testing.assert_allclose(scales, [[1], [1], [2e-3 / 7]])
  for scheme in (Scheme(4, 0), Scheme(8, 0)):  # rows end with a part of a word
    own = np.random.default_rng(0).integers(-(2 ** (scheme.bits - 1)), 2 ** (scheme.bits - 1), (3, 13)).astype(np.int8)
    words = codes.packed(own, scheme)
    assert words.shape == (3, scheme.words(13))
    np.testing.assert_array_equal(codes.unpacked(words, scheme, 13), own)
    first, second = (int(words[0, 0]) >> scheme.bits * i & 2**scheme.bits - 1 for i in range(2))
    assert [first - 2 ** (scheme.bits - 1), second - 2 ** (scheme.bits - 1)] == own[0, :2].tolist()


def test_values_without_a_code_are_refused(tmp_path):
  made = allocate(tmp_path, {'a.weight': ('F32', (2, 4)), **writing._parts('b.weight', 'F32', (2, 4), Scheme(4, 0))})
  made['a.weight'].write(0, np.array([1, 2, np.nan, 0, 1, 1, 1, 1], np.float32))
  parts = [made[f'b.weight_{part}'] for part in ('packed', 'scale', 'shape')]
  with pytest.raises(CheckpointError, match=r'a\.weight has values that are not finite, for which int4 has no codes'):
    writing._pack_one(made['a.weight'], *parts, Scheme(4, 0))


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--quantize=int4'], 'CONFIG: --group_size=128 (the default) does not divide the '),
    (
      ['--quantize=int4', '--group_size=32'],
      'CONFIG: --group_size=32 does not divide the 48 inputs of model.layers.0.mlp.down_proj.weight (first of 2). '
      'Nothing was written; use --group_size=16, or --group_size=0 for one scale for each output.',
    ),
    (['--quantize=int8', '--group_size=-1'], 'CONFIG: --group_size=-1; it must be at least 1, or 0 for one scale'),
    (
      ['--group_size=16'],
      'CONFIG: --group_size=16 needs --quantize. Nothing was written; add --quantize=int4 or int8.',
    ),
    (['--quantize=int8', '--adapter'], 'CONFIG: --adapter writes float32 alone. Nothing was written; leave --quantize'),
  ],
)
def test_what_cannot_be_packed_is_refused(run, tmp_path, capsys, flags, message):
  assert main(['export', f'--workdir={run}', f'--out={tmp_path / "out"}', *flags]) == 64
  assert capsys.readouterr().err.startswith(message)
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_transposed_weights_are_refused(tmp_path, capsys):
  run = tmp_path / 'run'
  assert main(['import', f'--from={goldens.GOLDENS / "gpt2"}', f'--workdir={run}']) == 0
  assert main(['export', f'--workdir={run}', f'--out={tmp_path / "out"}', '--quantize=int8']) == 64
  assert (
    'CONFIG: --quantize: gpt2 stores transformer.h.0.mlp.c_proj.weight as [inputs, outputs]' in capsys.readouterr().err
  )
  assert not (tmp_path / 'out').exists()


GROUP = {'weights': {'num_bits': 4, 'strategy': 'group', 'group_size': 16}}


def weights(**values):
  return {'config_groups': {'group_0': {'weights': GROUP['weights'] | values}}}


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'quant_method': 'gptq', 'bits': 4}, "quant_method='gptq' (supported: 'compressed-tensors')"),
    ({'format': 'int-quantized'}, "format='int-quantized' (supported: 'pack-quantized')"),
    ({'config_groups': {}}, 'quantization_config has no config_groups; read are weights of 4 or 8 bits, symmetric, '),
    (weights(num_bits=3), 'group_0: weights.num_bits=3'),
    (weights(symmetric=False, actorder='static'), "weights.symmetric=False, group_0: weights.actorder='static'"),
    (weights(strategy='tensor'), "group_0: weights.strategy='tensor'"),
    (weights(group_size='16'), "group_0: weights.group_size='16'"),
    ({'config_groups': {'a': GROUP | {'input_activations': {'num_bits': 8}}}}, "a: input_activations={'num_bits': 8}"),
    (weights(group_size=8), 'scales [32, 4], which fit none of the groups of config.json'),
  ],
)  # fmt: skip
def test_other_layouts_are_refused_by_name(change, message, tmp_path, capsys):
  folder = shutil.copytree(INT4, tmp_path / 'from')
  values = json.loads((folder / 'config.json').read_text())
  values[KEY] |= change
  (folder / 'config.json').write_text(json.dumps(values))
  assert main(['import', f'--from={folder}', f'--workdir={tmp_path / "run"}']) == 66
  err = capsys.readouterr().err
  assert err.startswith(f'IMPORT: {folder} has quantized weights that Pretrain does not read: ')
  assert message in err
  assert 'Nothing was written' in err
  assert err.count('\n') == 1


def test_generation_from_a_folder_needs_a_model_that_writes(capsys):
  folder = goldens.GOLDENS / 'bert'
  assert main(['generate', '--text=a', f'--from={folder}']) == 64
  message = f'CONFIG: {folder}/config.json: bert is an encoder and writes no text; pretrain eval measures it.'
  assert capsys.readouterr().err.startswith(message)
  for flags in ([], [f'--from={folder}', '--workdir=x']):
    assert main(['generate', '--text=a', *flags]) == 64
    assert (
      capsys.readouterr().err == 'CONFIG: pretrain generate needs a model: --workdir=RUN, or --from=DIR; not both.\n'
    )


def test_a_packed_weight_without_its_scales_is_refused(tmp_path, capsys):
  folder, gone = shutil.copytree(INT4, tmp_path / 'from'), 'model.layers.0.mlp.up_proj.weight_scale'
  found = open_folder(INT4)
  kept = {name: (tensor.dtype, tensor.shape) for name, tensor in found.items() if name != gone}
  for name, tensor in allocate(folder, kept).items():
    tensor.write(0, found[name].raw())
  assert main(['eval', f'--from={folder}', f'--text={LLAMA / "config.json"}']) == 66
  err = capsys.readouterr().err
  assert 'model.layers.0.mlp.up_proj.weight has weight_packed and no weight_scale. Nothing was written; both' in err
