"""Recipes in models: which products they quantize, on any mesh, in microbatches, under remat and beside adapters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType

from models.build import KernelsConfig, build, check_precision, make_module
from models.decode.cached import teacher_forced
from models.layers.dropout import example_keys, fold
from models.layers.low_rank import LoraConfig
from models.precision import BF16, POST_TRAINING, RECIPES, PrecisionConfig, attach, chosen
from models.product import KEY, Quantization, product, rounding
from models.specs import initialize, param_specs
from pallas_kernels.quantized_matmul import api
from pallas_kernels.quantized_matmul.api import Operand, Recipe
from tests.models import quantized
from tests.models.quantized import SMALL, loss_of, params, placed, rows
from tests.models.small import DEBERTA, LLAMA, T5, batch

QUANTIZED = [name for name in RECIPES if name not in ('bf16', *POST_TRAINING)]

slow = lambda *values: pytest.param(*values, marks=pytest.mark.slow)


def precise(recipe: str, **overrides: str) -> PrecisionConfig:
  return PrecisionConfig(recipe=recipe, overrides={name.replace('__', '.'): own for name, own in overrides.items()})


@functools.cache
def results(precision_name: str, cfg=SMALL):
  """(loss, gradients) of all rows under a recipe."""
  return run_with(build(cfg, precision=PrecisionConfig(recipe=precision_name)))


def run_with(model, given=None, own=None, seed=1):
  run = jax.jit(jax.value_and_grad(lambda p, own, key: loss_of(model, p, own, key)))
  return run(params() if given is None else given, rows() if own is None else own, jax.random.key(seed))


def distance(a, b) -> float:
  """The largest relative distance of two trees' arrays."""
  norms = jax.tree.map(lambda x, y: float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y)), a, b)
  return np.max(jax.tree.leaves(norms))  # NaN if one of them is; `max` may pass over it


@pytest.mark.parametrize('name', [name if name == 'int8' else slow(name) for name in QUANTIZED])
def test_a_recipe_has_the_parameters_of_every_other_and_nearly_its_gradients(name):
  model = build(SMALL, precision=PrecisionConfig(recipe=name))
  assert model.specs == build(SMALL).specs
  (loss, grads), (exact, exact_grads) = results(name), results('bf16')
  assert loss != exact
  most = {'int8': 0.01, 'fp8': 0.03, 'mxfp8': 0.03}.get(name, 0.12)
  assert abs(loss - exact) < most * exact
  blocks, exact_blocks = grads['decoder']['blocks'], exact_grads['decoder']['blocks']
  assert distance(blocks['mlp'], exact_blocks['mlp']) < {'int8': 0.15, 'fp8': 0.4, 'mxfp8': 0.3}.get(name, 1.2)
  assert distance(blocks['mlp'], exact_blocks['mlp']) > 1e-3


def test_nvfp4_fp8_has_four_bits_forward_and_eight_backward():
  """Zhou et al. 2025, arXiv:2502.11458; e4m3 for x and w, e5m2 for the gradient from above."""
  own, eight = RECIPES['nvfp4_fp8'], [Operand(f'fp8_{name}', scale='tensor') for name in ('e4m3', 'e5m2')]
  assert own.forward == (Operand('nvfp4'), Operand('nvfp4'))
  assert own.dgrad == (eight[1], eight[0])
  assert own.wgrad == (eight[0], eight[1])


def test_no_recipe_is_no_change():
  text = lambda model: jax.jit(jax.grad(lambda p, own, key: loss_of(model, p, own, key))).lower(
    params(), rows(), jax.random.key(1)
  ).as_text()  # fmt: skip
  plain, bf16 = build(SMALL), build(SMALL, precision=precise('nvfp4', all='bf16'))
  assert text(plain) == text(bf16)
  assert text(plain) != text(build(SMALL, precision=precise('bf16', mlp__down='int8')))


def test_the_name_that_says_most_chooses_a_recipe():
  cfg = precise('fp8', attention='int8', query='bf16', self_attention__value='mxfp8', decoder__mlp='nvfp4')
  found = chosen(cfg, build(T5).specs)
  own = {'.'.join((path[0], *path[-2:])): name for path, name in found.items()}
  expected = {
    'encoder.self_attention.query': 'bf16', 'encoder.self_attention.key': 'int8',
    'encoder.self_attention.value': 'mxfp8', 'decoder.cross_attention.value': 'int8',
    'decoder.cross_attention.out': 'int8', 'encoder.mlp.up': 'fp8', 'decoder.mlp.up': 'nvfp4',
  }  # fmt: skip
  assert {name: own[name] for name in expected} == expected
  assert len(own) == 4 + 3 + 8 + 3


def test_every_weight_of_a_block_is_quantized_by_its_own_recipe():
  module = make_module(SMALL, KernelsConfig())
  attach(module, precise('int8', attention='fp8'), 'reference')
  block = module.decoder.blocks
  own = lambda weight: weight.get_metadata()[KEY]
  assert own(block.mlp.up).recipe == RECIPES['int8']
  assert own(block.self_attention.out).recipe == RECIPES['fp8']
  assert own(block.mlp.up).implementation == 'reference'
  weights = [block.mlp.up, block.mlp.gate, block.mlp.down, block.self_attention.query, block.self_attention.key]
  assert len({own(weight).site for weight in weights}) == 5
  assert KEY not in module.embedding.table.get_metadata()
  assert KEY not in module.head.kernel.get_metadata()


@pytest.mark.parametrize('remat', ['dots', slow('full')])
@pytest.mark.parametrize('name', [slow('int8'), slow('nvfp4')])
def test_recomputed_products_are_the_same(name, remat):
  loss, grads = results(name, dataclasses.replace(SMALL, remat=remat))
  expected, expected_grads = results(name)
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  assert distance(grads, expected_grads) < 2e-3, 'a rounding may fall on the other side where a sum differs'


def test_dots_keeps_results_and_not_their_accumulators(capsys):
  cfg = dataclasses.replace(SMALL, remat='dots', dtype='bfloat16')
  model = build(cfg, precision=PrecisionConfig(recipe='int8'))
  jax.ad_checkpoint.print_saved_residuals(lambda p: loss_of(model, p, rows(), None), params())
  kept = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
  # Queries, keys, values, what attention adds, and the three products of the MLP, of two layers.
  for shape, number in (('bf16[2,8,32,4,8]', 3), ('bf16[2,8,32,32]', 2), ('bf16[2,8,32,64]', 2)):
    assert kept.count(shape) >= number, kept
  assert not [name for name in kept if name.startswith(('f32[2,8,32', 'i32[2,8,32', 'i8['))], kept


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'axes'),
  [('int8', 'fsdp'), *(slow(*p) for p in [('fp8', 'tensor'), ('int8', 'tensor'), ('fp8', 'fsdp')]),
   *(slow(name, axes) for name in ('mxfp8', 'nvfp4') for axes in ('fsdp', 'tensor'))],
)  # fmt: skip
def test_a_mesh_gives_what_one_device_does(name, axes):
  """The same random bits everywhere; sums in another order move a number over a rounding border now and then."""
  model, put, own = placed(SMALL, PrecisionConfig(recipe=name), axes)
  loss, grads = run_with(model, put, own)
  expected, expected_grads = results(name)
  np.testing.assert_allclose(loss, expected, rtol=2e-4)
  between = distance(grads, expected_grads)
  from_seed = distance(run_with(build(SMALL, precision=PrecisionConfig(recipe=name)), seed=2)[1], expected_grads)
  assert between < 2e-2
  assert from_seed == 0 or between < from_seed / 4


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'axes'), [('int8', 'fsdp'), ('int8', 'tensor'), ('fp8', 'fsdp'), ('fp8', 'tensor')])
def test_the_kernel_on_a_mesh_gives_what_one_device_does(name, axes, monkeypatch):
  """Every product of a model, with the mesh's division of its arrays."""
  used, own = [], api.IMPLEMENTATIONS['interpret']
  run = lambda a, b, pair, dims, parts: used.append(parts) or own(a, b, pair, dims, parts)
  monkeypatch.setitem(api.IMPLEMENTATIONS, 'interpret', run)
  precision = PrecisionConfig(recipe=name)
  model, put, own_rows = placed(SMALL, precision, axes, KernelsConfig(quantized_matmul='interpret'))
  loss, grads = run_with(model, put, own_rows)
  expected, expected_grads = results(name)
  np.testing.assert_allclose(loss, expected, rtol=2e-4)
  assert distance(grads, expected_grads) < 2e-2
  assert len(used) >= 3 * 7
  assert None not in used


@pytest.mark.slow
@pytest.mark.parametrize('name', ['mxfp8', 'mxfp4', 'int8', 'nvfp4'])
def test_microbatches_add_up_to_the_batch(name):
  """Blocks of a row are the same in a microbatch, and so are their random bits. Scales over the tokens of a batch
  (int8's in the gradient of weights, nvfp4's of all blocks) are not: there microbatches differ as much as formats do.
  """
  model = build(SMALL, precision=PrecisionConfig(recipe=name))
  part = lambda i: {key: x[i::2] for key, x in rows().items()}
  (first, a), (second, b) = run_with(model, own=part(0)), run_with(model, own=part(1))
  loss, grads = results(name)
  most = {'mxfp8': 1e-3, 'mxfp4': 1e-3, 'int8': 0.05, 'nvfp4': 0.5}[name]
  np.testing.assert_allclose(first + second, loss, rtol=1e-4 if name != 'nvfp4' else 0.02)
  assert distance(jax.tree.map(jnp.add, a, b), grads) < most


def test_random_bits_differ_between_steps_layers_weights_examples_and_positions():
  """What is equal in all of them is rounded differently in each."""
  random = Operand('int8', rounding='stochastic')
  recipe = Recipe(dgrad=(random, Operand('int8')))
  module = make_module(SMALL, KernelsConfig())
  attach(module, PrecisionConfig(recipe='int8'))
  weight = module.decoder.blocks.mlp.up
  own = dataclasses.replace(weight.get_metadata()[KEY], recipe=recipe)
  one = weight.replace(jnp.asarray(params()['decoder']['blocks']['mlp']['up'][0]))
  one.set_metadata(**{KEY: own})
  from models.product import product

  def gradient(key, layer):
    x = jnp.ones((2, 3, 32))
    with rounding(fold(example_keys(key, jnp.arange(2)), layer)):
      _, back = jax.vjp(lambda x: product(x, one, 1), x)
    return np.asarray(back(jnp.broadcast_to(jnp.linspace(-1, 1, 64), (2, 3, 64)))[0])

  a, again = gradient(jax.random.key(1), 0), gradient(jax.random.key(1), 0)
  np.testing.assert_array_equal(a, again)
  others = [gradient(jax.random.key(2), 0), gradient(jax.random.key(1), 1)]
  assert all((a != other).mean() > 0.5 for other in others)
  one.set_metadata(**{KEY: dataclasses.replace(own, site=own.site + 1)})
  assert (a != gradient(jax.random.key(1), 0)).mean() > 0.5, 'of another weight'
  flat = a.reshape(6, -1)
  assert all((flat[i] != flat[j]).mean() > 0.5 for i in range(6) for j in range(i))


@pytest.mark.slow
def test_adapters_stay_exact_beside_a_quantized_weight():
  lora = LoraConfig(rank=2, modules=('query', 'up'))
  model = build(SMALL, lora=lora, precision=PrecisionConfig(recipe='int8'))
  own = {**params(), **initialize(model.adapters, jax.random.key(3))}
  loss, grads = run_with(model, own)
  np.testing.assert_allclose(loss, results('int8')[0], rtol=1e-6)  # B is zero
  assert all(float(jnp.abs(g).max()) > 0 for path, g in flatten_dict(grads['lora']).items() if path[-1] == 'b')


@pytest.mark.parametrize(('name', 'at_once'), [('int8', 8), slow('fp8', 16), slow('nvfp4', 16)])
def test_cached_decoding_quantizes_as_the_whole_row_does(name, at_once):
  """One token after another where scales of a token are its own; a prompt at once where a matrix has one scale."""
  model = build(SMALL, precision=PrecisionConfig(recipe=name))
  own = {key: x[:1] for key, x in batch([[16]], 16).items()}
  whole = model.logits(params(), model.apply(params(), own)[0])
  cached = teacher_forced(model, params(), own, jnp.asarray(own['decoder_input_tokens']), at_once)
  assert float(jnp.abs(cached - whole).max() / jnp.abs(whole).max()) < 1e-5


DEEP = dataclasses.replace(SMALL, layers=4)


def by_hand(params, data, recipes):
  """Hidden states of a decoder whose layer i is that of a whole model in `recipes[i]`."""
  modules = {name: build(DEEP, precision=PrecisionConfig(recipe=name)).bind(params) for name in {*recipes}}
  x, positions, see = modules[recipes[0]].enter(data, None)
  for layer, name in enumerate(recipes):
    block = jax.tree.map(lambda x, layer=layer: x[layer], modules[name].decoder.blocks)
    x, _, _ = block(x, positions, see, None, None, jnp.uint32(layer), None)
  return modules[recipes[0]].decoder.finish(x)


@pytest.mark.slow
def test_first_and_last_layers_have_their_own_recipe_and_the_same_parameters():
  """One bf16 layer, one in fp8, two in int8 (no random bits without keys in the forward pass), of one stacked tree."""
  edges = PrecisionConfig(recipe='fp8', first_layers=1, last_layers=2, edge_recipe='int8')
  model = build(DEEP, precision=edges)
  assert model.specs == build(DEEP).specs
  own, data = initialize(model.specs, jax.random.key(0)), rows()
  run = jax.jit(lambda own: (model.apply(own, data)[0], by_hand(own, data, ['int8', 'fp8', 'int8', 'int8'])))
  found, expected = run(own)
  close = float(jnp.abs(found - expected).max() / jnp.abs(expected).max())
  assert close < 1e-4
  others = jax.jit(lambda own: [by_hand(own, data, [name] * 4) for name in ('fp8', 'int8')])(own)
  assert all(float(jnp.abs(found - other).max()) > 100 * close for other in others)


@pytest.mark.slow
@pytest.mark.parametrize(('windows', 'edges'), [((), (1, 1)), ((3, None), (2, 0))])
def test_cached_decoding_has_the_same_layers(windows, edges):
  precision = PrecisionConfig(recipe='int8', first_layers=edges[0], last_layers=edges[1])
  model = build(dataclasses.replace(DEEP, windows=windows), precision=precision)
  own, data = initialize(model.specs, jax.random.key(0)), {k: x[:1] for k, x in batch([[12]], 12).items()}
  whole = model.logits(own, model.apply(own, data)[0])
  cached = teacher_forced(model, own, data, jnp.asarray(data['decoder_input_tokens']), 4)
  np.testing.assert_allclose(cached, whole, atol=1e-4 * float(jnp.abs(whole).max()))


@pytest.mark.parametrize(('cfg', 'precision', 'message'), [
  (SMALL, precise('bf16', mpl='fp8'), "precision.overrides has 'mpl', which is not a product of this model; "
   "did you mean 'mlp'?"),
  (SMALL, precise('bf16', zzz='fp8'), "not a product of this model; choose from all, mlp, down, decoder, gate, up, a"),
  (SMALL, precise('bf16', cross_attention='fp8'), "precision.overrides has 'cross_attention', which is not a product"),
  (SMALL, precise('bf16', mlp='fp9'), "precision.overrides['mlp']='fp9' is not one of 'bf16', 'int8', 'fp8', 'fp8_d"),
  (SMALL, PrecisionConfig(overrides={'mlp': ['fp8']}), "precision.overrides['mlp']=['fp8'] is not one of 'bf16'"),
  (LLAMA, precise('mxfp8'), "precision: recipe 'mxfp8' of decoder.mlp.down has blocks of 32, which do not divide mlp=48"
   "; use a multiple of 32, e.g. 64, or precision.overrides = {'decoder.mlp.down': 'bf16'}."),
])  # fmt: skip
def test_what_does_not_fit_the_model_is_refused(cfg, precision, message):
  with pytest.raises(ValueError, match='precision') as caught:
    check_precision(cfg, precision, {'data.targets_length': 32})
  assert message in str(caught.value)


def test_recipes_without_gradients_are_for_trained_models():
  """There blocks divide what the product sums over, and nothing else."""
  assert POST_TRAINING == ('int4', 'int8_weights', 'int4_weights')
  message = "precision: recipe 'int4_weights' is for trained models: it has no gradients, and no float32 copy of the we"
  for cfg in (precise('int4_weights'), precise('bf16', mlp='int4_weights')):
    with pytest.raises(ValueError, match='for trained models') as caught:
      check_precision(SMALL, cfg, {'data.targets_length': 32})
    assert str(caught.value).startswith(message)
  check_precision(SMALL, precise('int8_weights'), {}, forward_only=True)
  check_precision(SMALL, precise('fp8_delayed'), {}, forward_only=True)  # scales of the tensor itself: no history
  check_precision(dataclasses.replace(SMALL, embed=30), precise('bf16', down='mxfp8'), {}, forward_only=True)
  with pytest.raises(ValueError, match='has blocks of 128, which do not divide'):
    check_precision(SMALL, precise('int4_weights'), {}, forward_only=True)


def test_weights_alone_are_the_numbers_of_their_codes():
  """x is not rounded; dims that are summed over are one space, with blocks of 128 along it."""
  rng = np.random.default_rng(0)
  x, w = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 3, 8, 32), (8, 32, 6)))
  for name, groups, largest in (('int4_weights', 2, 7), ('int8_weights', 1, 127)):
    split = w.reshape(groups, -1, 6)
    scale = np.abs(split).max(1, keepdims=True) / largest
    numbers = (np.rint(split / scale) * scale).reshape(w.shape)
    own = nnx.Param(jnp.asarray(w), **{KEY: Quantization(RECIPES[name], 0, 'auto')})
    found = jax.jit(lambda x, own=own: product(x, own, 2))(jnp.asarray(x))
    np.testing.assert_allclose(found, np.einsum('abij,ijk->abk', x, numbers), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('recipe', ['fp8', 'int8'])
def test_products_of_a_table_that_all_examples_share_are_quantized_on_a_mesh_too(recipe):
  """DeBERTa multiplies the vectors of its distances with the weights of keys and queries: [distances, embed]."""
  axes = quantized.AXES
  auto = (AxisType.Auto,) * len(axes)
  mesh = jax.make_mesh((1, 1, 2, 1, 1, 1, 1), axes, axis_types=auto, devices=jax.devices()[:2])
  found, data = {}, batch()
  for name, own, precision in (('one', None, recipe), ('mesh', mesh, recipe), ('bf16', None, 'bf16')):
    model = build(DEBERTA, mesh=own, precision=PrecisionConfig(recipe=precision))
    params = initialize(model.specs, jax.random.key(0))
    apply = jax.jit(lambda params, key, model=model: model.apply(params, data, key)[0])
    found[name] = np.asarray(apply(params, jax.random.key(1)))
  np.testing.assert_allclose(found['mesh'], found['one'], atol=1e-4)
  assert np.abs(found['one'] - found['bf16']).max() > 1e-3


def test_rows_that_blocks_do_not_divide_are_refused():
  check_precision(SMALL, precise('mxfp8'), {'data.targets_length': 64})
  check_precision(SMALL, precise('int8'), {'data.targets_length': 40})
  with pytest.raises(ValueError, match=r'blocks of 32, which do not divide data\.targets_length=40') as caught:
    check_precision(SMALL, precise('mxfp8'), {'data.targets_length': 40})
  assert 'use a multiple of 32, e.g. 64' in str(caught.value)


def test_the_default_is_bf16_and_chooses_nothing():
  specs = param_specs(make_module(SMALL, KernelsConfig()))
  assert set(chosen(BF16, specs).values()) == {'bf16'}
