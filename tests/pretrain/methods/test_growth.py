"""Larger models from smaller ones: which arrays are copies of which, and what the grown model computes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from models.build import build
from models.layers.attention import Visibility
from models.layers.rows import Cross
from models.specs import initialize
from pretrain.checkpoints.checkpoints import Checkpoints
from pretrain.checkpoints.config import CheckpointConfig
from pretrain.cli.main import main
from pretrain.config import bindings
from pretrain.experiment.saved import load_saved
from pretrain.growth.depth import interleaved, stacked, upscaled
from pretrain.testing import assert_resumes_exactly
from tests.models import plain, small
from tests.pretrain import tiny

SYNTHETIC = ("data.name='synthetic'", 'evaluation.every=0')
SMALL = {  # models in which every stack has arrays of its own for each layer, and others that all layers share
  'decoder': (tiny.DECODER, (*tiny.SMALL_DECODER, 'model.layers=3')),
  'encoder': (tiny.ENCODER, (*tiny.SMALL_ENCODER, *SYNTHETIC, "model.bias='all'")),
  'encoder_decoder': (
    tiny.UL2,
    (*tiny.SMALL_UL2, *SYNTHETIC, "model.relative_layers='each'", 'model.encoder_layers=3'),
  ),
  'shared_bias': (tiny.UL2, (*tiny.SMALL_UL2, *SYNTHETIC, 'model.encoder_layers=3')),
  'windows': (tiny.DECODER, (*tiny.SMALL_DECODER, 'model.windows=(4, None)')),
  'routed': (tiny.DECODER, (*tiny.SMALL_DECODER, 'model.experts=4')),
}


@functools.cache
def config(name: str):
  file, keys = SMALL[name]
  return tiny.experiment(file, *keys)


@functools.cache
def parameters(name: str):
  """Random numbers also where all layers begin with the same, of another size in each: no two layers are alike."""
  specs = build(config(name).model).specs
  params = flatten_dict(small.shaken(initialize(specs, jax.random.key(1))))
  of_layers = {path: spec.shape for path, spec in flatten_dict(dict(specs)).items() if spec.axes[:1] == ('layers',)}
  sizes = lambda shape: 1 + np.arange(shape[0], dtype=np.float32).reshape(-1, *[1] * (len(shape) - 1)) / 2
  return unflatten_dict({path: x * sizes(of_layers[path]) if path in of_layers else x for path, x in params.items()})


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """A run with one step, 0, and the config `NAME.gin` of each small model."""
  folder = tmp_path_factory.mktemp('small')
  for name in SMALL:
    checkpoints = Checkpoints(folder / name, CheckpointConfig())
    checkpoints.save_params(0, parameters(name), {'data': {'tokenizer': 'f' * 64}}, '')
    checkpoints.close()
    text = bindings.render(config(name))
    for path in (folder / name / 'config.gin', folder / f'{name}.gin'):
      path.write_text(text)
  return folder


def grow(runs, name: str, to, *flags: str) -> int:
  own = ['checkpoints', 'grow', f'--gin_file={runs}/{name}.gin', f'--input={runs}/{name}', f'--to={to}']
  return main([*own, *flags])


def values(run) -> dict[str, np.ndarray]:
  """Every array of step 0: the run holds nothing but parameters."""
  checkpoints = Checkpoints(run, CheckpointConfig(), read_only=True)
  found = {key: np.asarray(x) for key, x in checkpoints.arrays(0, checkpoints.shapes(0)).items()}
  checkpoints.close()
  assert all(key.startswith('params/') for key in found)
  return {key.removeprefix('params/'): x for key, x in found.items()}


def source(name: str) -> dict[str, np.ndarray]:
  return {'/'.join(path): np.asarray(x) for path, x in flatten_dict(parameters(name)).items()}


def tree(flat: dict[str, np.ndarray]):
  return unflatten_dict({tuple(key.split('/')): jnp.asarray(x) for key, x in flat.items()})


@pytest.mark.parametrize(
  ('found', 'published'),
  [
    (stacked(6, 24), [0, 1, 2, 3, 4, 5] * 4),  # prts_configs/stacking_6L_24L.json
    (interleaved(3, 9), [0, 0, 0, 1, 1, 1, 2, 2, 2]),
    (upscaled(32, 48), [*range(24), *range(8, 32)]),  # SOLAR, figure 1: n = 32, m = 8, s = 48
    (upscaled(32, 48, first=12), [*range(12), *range(12, 28), *range(12, 28), *range(28, 32)]),  # Yi-9B
  ],
)
def test_the_layers_are_those_of_the_papers(found, published):
  assert found == published


GROWN = {
  'stack': ('decoder', ['--method=stack', '--gin.model.layers=6'], {'decoder': [0, 1, 2, 0, 1, 2]}),
  'interleave': ('decoder', ['--method=interleave', '--gin.model.layers=6'], {'decoder': [0, 0, 1, 1, 2, 2]}),
  'upscale': ('decoder', ['--method=upscale', '--gin.model.layers=4'], {'decoder': [0, 1, 1, 2]}),
  'first': ('decoder', ['--method=upscale', '--first=0', '--gin.model.layers=4'], {'decoder': [0, 0, 1, 2]}),
  'encoder': ('encoder', ['--method=stack', '--gin.model.layers=4'], {'encoder': [0, 1, 0, 1]}),
  'both': (
    'encoder_decoder',
    ['--method=stack', '--gin.model.encoder_layers=6', '--gin.model.decoder_layers=4'],
    {'encoder': [0, 1, 2, 0, 1, 2], 'decoder': [0, 1, 0, 1]},
  ),
  'one': (
    'encoder_decoder',
    ['--method=upscale', '--first=1', '--gin.model.encoder_layers=4'],
    {'encoder': [0, 1, 1, 2], 'decoder': [0, 1]},
  ),
  'windows': ('windows', ['--method=stack', '--gin.model.layers=4'], {'decoder': [0, 1, 0, 1]}),
  'routed': ('routed', ['--method=stack', '--gin.model.layers=4'], {'decoder': [0, 1, 0, 1]}),
  'pipeline': (
    'decoder',
    [
      '--method=stack', '--gin.model.layers=12', '--gin.mesh.stage=2', '--gin.model.pipeline_microbatches=2',
      '--gin.model.pipeline_repeats=3', "--gin.model.remat='full'",
    ],
    {'decoder': [0, 1, 2] * 4},
  ),
}  # fmt: skip


@pytest.mark.parametrize(('name', 'flags', 'lists'), GROWN.values(), ids=GROWN)
def test_each_layer_is_a_copy_of_its_layer_and_the_rest_is_as_it_was(runs, tmp_path, capsys, name, flags, lists):
  assert grow(runs, name, tmp_path / 'new', *flags) == 0, capsys.readouterr().err
  own, old = values(tmp_path / 'new'), source(name)
  assert own.keys() == old.keys()
  for key, x in own.items():
    stack, part = key.split('/')[:2]
    each = part == 'blocks' or (stack.endswith('_bias') and name == 'encoder_decoder')
    if each:
      places = lists[stack.removesuffix('_bias')]
      assert len(x) == len(places)
      for i, place in enumerate(places):
        np.testing.assert_array_equal(x[i], old[key][place], key)
    else:
      np.testing.assert_array_equal(x, old[key], key)
  specs = flatten_dict(dict(build(load_saved(tmp_path / 'new/config.gin').model).specs))
  assert {key: x.shape for key, x in own.items()} == {'/'.join(path): spec.shape for path, spec in specs.items()}
  assert ', '.join(map(str, lists.get('decoder') or lists['encoder'])) in capsys.readouterr().out


def by_hand(name: str, tokens, order):
  """float64 logits of one document: the blocks of a small decoder in `order`, as tests/models/plain.py has them."""
  cfg, params = config(name).model, jax.tree.map(lambda x: np.asarray(x, np.float64), parameters(name))
  x = params['embedding']['table'][tokens]
  for layer in order:
    p = plain.take(params['decoder']['blocks'], layer)
    x = plain.sublayer(cfg, lambda y, p=p: plain.attention(cfg, p['self_attention'], y), p, 'self', x)
    x = plain.sublayer(cfg, lambda y, p=p: plain.mlp(cfg, p['mlp'], y), p, 'mlp', x)
  return plain.norm(cfg, params['decoder']['norm'], x) @ params['head']['kernel']


def logits(run, batch):
  cfg = load_saved(run / 'config.gin').model
  assert cfg.dtype == 'float32'
  model, params = build(cfg), tree(values(run))
  return np.asarray(jax.jit(lambda p, b: model.logits(p, model.apply(p, b)[0]))(params, batch))


def check_logits(found, expected):
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize('method', ['stack', 'interleave', 'upscale'])
def test_a_grown_decoder_computes_the_blocks_of_the_small_one_in_that_order(runs, tmp_path, method):
  name, flags, lists = GROWN[method]
  assert grow(runs, name, tmp_path / 'new', *flags) == 0
  batch = small.alone(small.batch(), 0, 2)
  expected = by_hand(name, batch['decoder_input_tokens'][0], lists['decoder'])
  check_logits(logits(tmp_path / 'new', batch)[0], expected)


def both_by_hand(batch, encoder, decoder):
  """Hidden states of the small encoder-decoder with a shared bias, its blocks called one after the other."""
  model = build(config('shared_bias').model).bind(parameters('shared_bias'))
  block = lambda stack, i: jax.tree.map(lambda x: x[i], stack.blocks)
  fields = lambda side: [batch[f'{side}_{kind}'] for kind in ('input_tokens', 'positions', 'segment_ids')]
  tokens, positions, inputs = fields('encoder')
  see = Visibility(causal=False, q_segment_ids=inputs, kv_segment_ids=inputs, **model.encoder_bias())
  x = model.embedding(tokens, positions, jnp.dtype('float32'), None)
  for i in encoder:
    x = block(model.encoder, i)(x, positions, see, None, None, i, None)[0]
  memory = model.encoder.norm(x)
  tokens, positions, segments = fields('decoder')
  see = Visibility(causal=True, q_segment_ids=segments, kv_segment_ids=segments, **model.decoder_bias())
  across = Visibility(causal=False, q_segment_ids=segments, kv_segment_ids=inputs)
  x = model.embedding(tokens, positions, jnp.dtype('float32'), None)
  for i in decoder:
    x = block(model.decoder, i)(x, positions, see, Cross(see=across, memory=memory), None, i, None)[0]
  return model.decoder.norm(x)


def test_a_grown_encoder_decoder_computes_the_blocks_of_both_stacks_in_that_order(runs, tmp_path):
  flags = ['--method=stack', '--gin.model.encoder_layers=6', '--gin.model.decoder_layers=4']
  assert grow(runs, 'shared_bias', tmp_path / 'new', *flags) == 0
  batch = small.batch()
  expected = jax.jit(lambda b: both_by_hand(b, [0, 1, 2, 0, 1, 2], [0, 1, 0, 1]))(batch)
  own = build(load_saved(tmp_path / 'new/config.gin').model)
  found = jax.jit(lambda p, b: own.apply(p, b)[0])(tree(values(tmp_path / 'new')), batch)
  real = batch['decoder_segment_ids'] > 0
  check_logits(np.asarray(found)[real], np.asarray(expected)[real])


UPCYCLE = ['--method=upcycle', '--gin.model.experts=4', '--gin.model.experts_per_token=2']


def test_every_expert_is_a_copy_of_the_mlp_and_the_router_is_new(runs, tmp_path, capsys):
  for to, seed in (('one', 5), ('same', 5), ('other', 6)):
    assert grow(runs, 'decoder', tmp_path / to, *UPCYCLE, f'--gin.seed={seed}') == 0
  own, same, other = (values(tmp_path / to) for to in ('one', 'same', 'other'))
  old, router = source('decoder'), 'decoder/blocks/mlp/router'
  assert own.keys() == {*old, router}
  for key, x in old.items():
    copies = np.stack([x] * 4, 1) if '/mlp/' in key else x
    np.testing.assert_array_equal(own[key], copies, key)
  assert own[router].shape == (3, 32, 4)
  np.testing.assert_allclose(own[router].std(), 32**-0.5, rtol=0.15)  # as in a new model: 1 / sqrt(embed)
  np.testing.assert_array_equal(own[router], same[router])
  assert (own[router] != other[router]).all()
  assert f'{router} is drawn: Normal(' in capsys.readouterr().out


def test_experts_compute_what_the_mlp_did(runs, tmp_path):
  assert grow(runs, 'decoder', tmp_path / 'new', *UPCYCLE) == 0
  batch = small.alone(small.batch(), 0, 2)
  expected = by_hand('decoder', batch['decoder_input_tokens'][0], [0, 1, 2])
  check_logits(logits(tmp_path / 'new', batch)[0], expected)


def test_noise_is_a_share_of_the_spread_of_each_matrix_and_of_its_own_for_each_expert(runs, tmp_path):
  assert grow(runs, 'decoder', tmp_path / 'new', *UPCYCLE, '--noise=0.5') == 0
  own, old = values(tmp_path / 'new'), source('decoder')
  for name in ('up', 'gate', 'down'):
    key = f'decoder/blocks/mlp/{name}'
    added = own[key] - old[key][:, None]
    np.testing.assert_allclose(added.std((2, 3)), 0.5 * old[key].std((1, 2))[:, None].repeat(4, 1), rtol=0.1)
    np.testing.assert_allclose(added.mean((2, 3)), 0, atol=0.1 * old[key].std())
    pairs = np.corrcoef(added.reshape(12, -1))
    np.testing.assert_allclose(pairs, np.eye(12), atol=0.15)
  for key, x in old.items():
    if '/mlp/' not in key:
      np.testing.assert_array_equal(own[key], x, key)


MISTAKES = {
  'another size': ('decoder', ['--method=stack', '--gin.model.layers=6', '--gin.model.embed=64'], (
    'model.embed is 32 in ', '/decoder/config.gin, 64 in --gin_file (first of 1); --method=stack changes model.layers '
    'alone. Nothing was written; set it as it is there.',
  )),
  'other ids': ('decoder', ['--method=stack', '--gin.model.layers=6', '--gin.data.sentinels=32'], (
    'data.sentinels is ', '32 in --gin_file',
  )),
  'another base': ('decoder', ['--method=stack', '--gin.model.layers=6', '--gin.model.rope_theta=1e6'], (
    'model.rope_theta is 10000.0 in ', '1000000.0 in --gin_file',
  )),
  'experts and layers': ('decoder', [*UPCYCLE, '--gin.model.layers=6'], (
    'model.layers is 3 in ', '6 in --gin_file (first of 1); --method=upcycle changes model.experts, '
    'model.experts_per_token alone.',
  )),
  'layers and experts': ('decoder', ['--method=stack', '--gin.model.layers=6', '--gin.model.experts=4'], (
    'model.experts is None in ', '4 in --gin_file',
  )),
  'the same depth': ('encoder_decoder', ['--method=stack'], (
    'model.encoder_layers=3, model.decoder_layers=2 in --gin_file is the depth that the weights have already. Nothing '
    'was written; set more layers.',
  )),
  'fewer': ('decoder', ['--method=upscale', '--gin.model.layers=2'], (
    'model.layers is 3 in the weights, 2 in --gin_file; growth removes no layers. Nothing was written; set '
    'model.layers >= 3.',
  )),
  'not a multiple': ('decoder', ['--method=stack', '--gin.model.layers=7'], (
    'model.layers is 3 in the weights, 7 in --gin_file; --method=stack repeats every layer equally often. Nothing was '
    'written; set model.layers=9.',
  )),
  'interleave: not a multiple': ('decoder', ['--method=interleave', '--gin.model.layers=5'], (
    '--method=interleave repeats every layer equally often. Nothing was written; set model.layers=6, or use '
    '--method=upscale.',
  )),
  'three times': ('decoder', ['--method=upscale', '--gin.model.layers=8'], (
    'model.layers is 3 in the weights, 8 in --gin_file; --method=upscale has a layer at most twice. Nothing was '
    'written; set model.layers <= 6, or use --method=stack.',
  )),
  'odd': ('decoder', ['--method=upscale', '--gin.model.layers=5'], (
    'model.layers is 3 in the weights, 5 in --gin_file; --method=upscale leaves out equally many layers of both '
    'copies, so the depth is even. Nothing was written; set model.layers=6, or say with --first=N which layer comes '
    'twice.',
  )),
  'first beyond': ('decoder', ['--method=upscale', '--gin.model.layers=5', '--first=2'], (
    'model.layers is 3 in the weights, 5 in --gin_file; with --first=2 the layers 2 to 3 would come twice, and the '
    'last one is 2. Nothing was written; use --first <= 1.',
  )),
  'windows': ('windows', ['--method=interleave', '--gin.model.layers=4'], (
    '--method=interleave with model.windows=(4, None): copies of a layer would get the windows of others. Nothing was '
    'written; use --method=stack or upscale, which keep them.',
  )),
  'already routed': ('routed', ['--method=upcycle'], (
    'model.experts is 4 in the weights; --method=upcycle makes experts of an MLP. Nothing was written; choose a run '
    'without experts.',
  )),
  'no experts': ('decoder', ['--method=upcycle'], (
    'model.experts is None in --gin_file; --method=upcycle needs it. Nothing was written; set it.',
  )),
  'first of stack': ('decoder', ['--method=stack', '--gin.model.layers=6', '--first=0'], (
    '--first belongs to --method=upscale, and this is --method=stack. Nothing was written; remove it.',
  )),
  'noise of stack': ('decoder', ['--method=stack', '--gin.model.layers=6', '--noise=0.1'], (
    '--noise belongs to --method=upcycle, and this is --method=stack. Nothing was written; remove it.',
  )),
  'negative noise': ('decoder', [*UPCYCLE, '--noise=-1'], (
    '--noise=-1; it is a share of the std of each matrix, a finite number >= 0.',
  )),
  'noise that is no number': ('decoder', [*UPCYCLE, '--noise=nan'], ('--noise=nan; it is a share',)),
  'negative first': ('decoder', ['--method=upscale', '--first=-1'], ("'-1' is not an integer >= 0",)),
}  # fmt: skip


@pytest.mark.parametrize(('name', 'flags', 'parts'), MISTAKES.values(), ids=MISTAKES)
def test_a_model_that_is_no_extension_is_one_line(runs, tmp_path, monkeypatch, capsys, name, flags, parts):
  """Before a parameter is read: reading is an error here."""
  monkeypatch.setattr('pretrain.tools.weights.Step.read', lambda *_: pytest.fail('the weights were read'))
  assert grow(runs, name, tmp_path / 'new', *flags) == 64
  err = capsys.readouterr().err
  assert err.count('\n') == 1
  assert [part for part in parts if part not in err] == [], err
  assert not (tmp_path / 'new').exists()


def test_another_family_is_one_line(runs, tmp_path, capsys):
  own = [f'--gin_file={runs}/encoder.gin', f'--input={runs}/decoder', f'--to={tmp_path}/new', '--method=stack']
  assert main(['checkpoints', 'grow', *own]) == 64
  assert "model.name is 'decoder' in" in capsys.readouterr().err


def test_a_run_that_exists_is_not_overwritten(runs, tmp_path, capsys):
  assert grow(runs, 'decoder', tmp_path, '--method=stack', '--gin.model.layers=6') == 64
  assert f'--to={tmp_path} exists; nothing is overwritten.' in capsys.readouterr().err


def test_the_new_run_says_how_it_was_made_and_keeps_the_tokenizer(runs, tmp_path):
  flags = ['--method=upscale', '--first=0', '--gin.model.layers=4', "--gin.checkpoint.initial='x/3'"]
  assert grow(runs, 'decoder', tmp_path / 'new', *flags) == 0
  text = (tmp_path / 'new/config.gin').read_text()
  made = f'pretrain checkpoints grow --gin_file={runs}/decoder.gin --input={runs}/decoder --method=upscale --first=0'
  assert text.startswith(f'# Parameters made by: {made}\n')
  assert load_saved(tmp_path / 'new/config.gin').checkpoint.initial is None
  checkpoints = Checkpoints(tmp_path / 'new', CheckpointConfig(), read_only=True)
  assert checkpoints.position(0)['data'] == {'tokenizer': 'f' * 64}
  checkpoints.close()


@pytest.mark.slow
@pytest.mark.parametrize(
  ('flags', 'keys'),
  [
    (['--method=stack', '--gin.model.layers=6'], ('mesh.fsdp=2', 'mesh.stage=2', 'train.accumulate=2')),
    (UPCYCLE, ('mesh.data=2', 'mesh.expert=2', 'loss.load_balance=0.01')),
  ],
  ids=['stack', 'upcycle'],
)
def test_a_run_starts_from_grown_weights_and_resumes_exactly(runs, tmp_path, flags, keys):
  assert grow(runs, 'decoder', tmp_path / 'new', *flags) == 0
  cfg = load_saved(tmp_path / 'new/config.gin', [*keys, f"checkpoint.initial='{tmp_path}/new/0'", 'checkpoint.every=2'])
  cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, steps=4))
  assert_resumes_exactly(cfg, tmp_path, steps=4, stop_at=2)
