"""Low-rank adapters against their formula, x W + (alpha / rank) x A B (Hu et al. 2021, §4.1), in numpy."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from models.build import build, check_lora
from models.decode.cached import teacher_forced
from models.layers.linear import linear
from models.layers.low_rank import LoraConfig, LowRank, merged, pairs, update
from models.specs import count, initialize
from tests.models import small

ALL = LoraConfig(rank=4, alpha=12.0, modules=('all',))


@functools.cache
def adapted(cfg, lora):
  model = build(cfg, lora=lora)
  return model, initialize(model.specs, jax.random.key(0))


@functools.cache
def compiled(model):
  return jax.jit(lambda params, batch: model.logits(params, model.apply(params, batch)[0]))


def shaken(model, params):
  """`params` with adapters that are not zero."""
  rng = np.random.default_rng(1)
  own, frozen = model.split(params)
  return frozen | jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), own)


def logits(model, params, batch):
  return np.asarray(compiled(model)(params, batch))


@pytest.mark.parametrize(('inputs', 'shape'), [(1, (6, 2, 5)), (2, (2, 3, 7))])
def test_the_product_is_the_papers(inputs, shape):
  rng = np.random.default_rng(0)
  w, a = rng.normal(size=shape), rng.normal(size=(*shape[:inputs], 4))
  b, x = rng.normal(size=(4, *shape[inputs:])), rng.normal(size=(3, 8, *shape[:inputs]))
  own = LowRank(*(nnx.Param(y.astype(np.float32)) for y in (w, a, b)), LoraConfig(rank=4, alpha=12.0).scale, inputs)
  rows, matrix = x.reshape(24, 6), w.reshape(6, -1)
  formula = lambda factor, a: rows @ matrix + factor * (rows @ a.reshape(6, 4)) @ b.reshape(4, -1)
  ours = np.asarray(linear(x.astype(np.float32), own, None, inputs)).reshape(24, -1)
  np.testing.assert_allclose(ours, formula(12 / 4, a), atol=3e-6 * np.abs(ours).max() * 4)
  assert not np.allclose(ours, formula(1, a), atol=0.1), 'without alpha / rank'
  assert not np.allclose(ours, formula(12 / 2, a), atol=0.1), 'alpha / sqrt(rank)'
  assert LoraConfig(rank=4, alpha=12.0, scaling='sqrt_rank').scale == 12 / 2


@pytest.mark.parametrize('cfg', [pytest.param(small.T5, marks=pytest.mark.slow), small.LLAMA], ids=['t5', 'llama'])
def test_at_first_the_function_is_that_of_the_weights_to_the_bit(cfg):
  model, params = adapted(cfg, ALL)
  ours, theirs = logits(model, params, small.batch()), logits(build(cfg), model.split(params)[1], small.batch())
  assert ours.tobytes() == theirs.tobytes()
  assert np.abs(logits(model, shaken(model, params), small.batch()) - theirs).max() > 0.02 * np.abs(theirs).max()


@pytest.mark.parametrize(
  'cfg',
  [pytest.param(small.T5, marks=pytest.mark.slow), small.LLAMA, small.BERT],
  ids=['t5', 'llama', 'bert'],
)
def test_merged_weights_compute_the_same(cfg):
  model, params = adapted(cfg, ALL)
  params, batch, plain = shaken(model, params), small.batch(), build(cfg)
  ours = logits(model, params, batch)
  scale = np.abs(ours).max()
  assert np.abs(ours - logits(plain, merged(params, ALL), batch)).max() < 3e-6 * scale
  wrong = merged(params, dataclasses.replace(ALL, alpha=ALL.rank * 1.0))  # A B without alpha / rank
  assert np.abs(ours - logits(plain, wrong, batch)).max() > 1e-3 * scale


def test_a_stacked_update_is_a_matrix_product_in_each_layer():
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(4, 2, 3, 4)).astype(np.float32), rng.normal(size=(4, 4, 5)).astype(np.float32)
  ours = update(a, b, 4, ALL)
  for layer in range(4):
    np.testing.assert_allclose(ours[layer], 3 * np.tensordot(a[layer], b[layer], 1), rtol=1e-5, atol=1e-5)


def test_cached_decoding_reads_the_adapters():
  model, params = adapted(small.LLAMA, ALL)
  params, tokens = shaken(model, params), np.arange(3, 12, dtype=np.int32)[None]
  ones = np.ones_like(tokens)
  batch = {
    'decoder_input_tokens': tokens, 'decoder_segment_ids': ones, 'decoder_positions': np.arange(9)[None],
    'example_index': np.zeros(1, np.int32),
  }  # fmt: skip
  whole = logits(model, params, batch)
  cached = np.asarray(teacher_forced(model, params, {'decoder_input_tokens': tokens}, tokens, at_once=4))
  assert np.abs(whole - cached).max() < 1e-4 * np.abs(whole).max()
  alone = logits(build(small.LLAMA), model.split(params)[1], batch)
  assert np.abs(whole - alone).max() > 0.02 * np.abs(whole).max()


@pytest.mark.parametrize(
  ('modules', 'names'),
  [
    (('query', 'value'), {'query', 'value'}),
    (('mlp',), {'up', 'gate', 'down'}),
    (('cross_attention',), {'query', 'key', 'value', 'out'}),
    (('all',), {'query', 'key', 'value', 'out', 'up', 'gate', 'down'}),
  ],
)
def test_words_choose_products(modules, names):
  lora = LoraConfig(rank=2, modules=modules)
  found = pairs(build(small.T5, lora=lora).adapters)
  assert {path[-1] for path in found} == names
  if modules == ('cross_attention',):
    assert {path[:-1] for path in found} == {('decoder', 'blocks', 'cross_attention')}


def test_only_low_rank_factors_are_added():
  own = build(small.LLAMA, lora=LoraConfig(rank=2, modules=('query', 'down'))).adapters
  query, down = 2 * (32 + 4 * 8), 2 * (48 + 32)
  assert count(own) == small.LLAMA.layers * (query + down)


def test_a_name_of_no_product_lists_the_names():
  with pytest.raises(ValueError, match=r"lora\.modules=\['query', 'q_proj'\] has 'q_proj'.*attention, down.*, value"):
    check_lora(small.LLAMA, LoraConfig(rank=1, modules=('query', 'q_proj')))
  with pytest.raises(ValueError, match='has no name; choose from all'):
    check_lora(small.LLAMA, LoraConfig(rank=1, modules=()))
  ungated = small.BERT
  with pytest.raises(ValueError, match="'gate'"):
    check_lora(ungated, LoraConfig(rank=1, modules=('gate',)))
