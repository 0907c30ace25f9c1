"""What a model computes does not depend on packing, scanning, rematerialisation, mesh or microbatch."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import specs
from models.decode.cached import teacher_forced
from models.decode.writing import greedy
from models.flops import flops_per_step
from models.layers.attention import Visibility
from models.partition import check_divisible, shardings
from pretrain.devices.mesh import MeshConfig, make_mesh
from tests.models.small import (
  ALIBI,
  BERT,
  CLEX,
  DEBERTA,
  ENCODER,
  EXPERTS,
  FAR_SINKS,
  IDS,
  LEARNED,
  LLAMA,
  SAFE,
  SINKS,
  T5,
  T5_1_0,
  T5_ALIBI,
  T5_FAR_SINKS,
  T5_ROTARY,
  T5_SAFE,
  alone,
  batch,
  model_and_params,
  shaken,
  side,
)

FAMILIES = pytest.mark.parametrize('cfg', [T5, LLAMA, ENCODER], ids=['encoder_decoder', 'decoder', 'encoder'])
WRITERS = {
  't5': T5,
  't5_1_0': T5_1_0,
  't5_alibi': pytest.param(T5_ALIBI, marks=pytest.mark.slow),
  't5_rotary': pytest.param(T5_ROTARY, marks=pytest.mark.slow),
  'llama': LLAMA,
  'alibi': ALIBI,
  'learned': LEARNED,
  'experts': EXPERTS,
  'sinks': SINKS,
  'far_sinks': FAR_SINKS,
  't5_far_sinks': pytest.param(T5_FAR_SINKS, marks=pytest.mark.slow),
  'clex': CLEX,
  'safe': pytest.param(SAFE, marks=pytest.mark.slow),
  't5_safe': pytest.param(T5_SAFE, marks=pytest.mark.slow),
}
VARIANTS = WRITERS | {'encoder': ENCODER, 'bert': BERT, 'deberta': DEBERTA}
ALL = pytest.mark.parametrize('cfg', VARIANTS.values(), ids=VARIANTS.keys())
CACHED = pytest.mark.parametrize('cfg', WRITERS.values(), ids=WRITERS.keys())
DECODERS = pytest.mark.parametrize('cfg', [LLAMA, ALIBI, LEARNED], ids=['llama', 'alibi', 'learned'])


@functools.cache
def compiled(model):
  return jax.jit(model.apply)


def hidden(model, params, data, key=None):
  return np.asarray(compiled(model)(params, data, key)[0])


def prefix_batch(prefix: int):
  data = batch()
  ends = np.where(data['decoder_segment_ids'] > 0, prefix, 0).astype(np.int32)
  return data | {'decoder_prefix_end': ends}


@ALL
def test_packed_and_unpacked_logits_agree(cfg):
  assert_packing_changes_nothing(cfg, batch())


@DECODERS
def test_packed_and_unpacked_logits_agree_with_a_prefix(cfg):
  assert_packing_changes_nothing(cfg, prefix_batch(3))


def assert_packing_changes_nothing(cfg, data):
  model, params = model_and_params(cfg)
  params = shaken(params)
  packed = hidden(model, params, data)
  segments = [(0, 1), (0, 2), (1, 1), (1, 2)]
  for (row, segment), single in zip(segments, hidden(model, params, one_a_row(data, segments)), strict=True):
    own = packed[row][data['decoder_segment_ids'][row] == segment]
    np.testing.assert_allclose(own, single[: len(own)], atol=2e-5)


def one_a_row(data, segments):
  """Each segment in a row of its own, as long as the longest: one program for all."""
  rows = [alone(data, row, segment) for row, segment in segments]
  width = max(row['decoder_segment_ids'].shape[1] for row in rows)
  pad = lambda x: np.pad(x, ((0, 0), (0, width - x.shape[1]))) if x.ndim == 2 else x
  return {name: np.concatenate([pad(row[name]) for row in rows]) for name in rows[0]}


@FAMILIES
def test_the_packing_test_detects_a_missing_segment_mask(cfg):
  """The mutation: with a single segment per row, packed rows must differ."""
  model, params = model_and_params(cfg)
  data = batch()
  merged = {k: np.minimum(v, 1) if k.endswith('segment_ids') else v for k, v in data.items()}
  assert np.abs(hidden(model, params, data) - hidden(model, params, merged))[0, 6:12].max() > 1e-2


@DECODERS
def test_scanned_layers_are_a_loop_over_layers(cfg):
  model, params = model_and_params(cfg)
  params, data = shaken(params), batch()
  module = model.bind(params)
  segments, positions = data['decoder_segment_ids'], data['decoder_positions']
  x = module.embedding(data['decoder_input_tokens'], positions, jnp.float32, None)
  see = Visibility(causal=True, q_segment_ids=segments, kv_segment_ids=segments, **module.decoder_bias())

  @jax.jit
  def step(blocks, y, layer):
    block = jax.tree.map(lambda a: a[layer], blocks)
    return block(y, positions, see, None, None, layer, None)[0]

  def loop(order):
    y = x
    for layer in order:
      y = step(module.decoder.blocks, y, jnp.uint32(layer))
    return module.decoder.finish(y)

  np.testing.assert_allclose(loop([0, 1]), hidden(model, params, data), atol=2e-5)
  assert np.abs(loop([1, 0]) - hidden(model, params, data)).max() > 1e-2, 'swapped layers must show'


@pytest.mark.slow
@pytest.mark.parametrize('remat', ['dots', 'full'])
def test_rematerialisation_changes_no_gradient(remat):
  data = batch()

  def gradient(how):
    model, params = model_and_params(T5, remat=how)
    return jax.jit(jax.grad(lambda p: jnp.square(model.apply(p, data)[0]).sum()))(params)

  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), gradient(remat), gradient('none'))


def test_prefix_zero_is_causal_and_a_full_prefix_sees_the_future():
  model, params = model_and_params(LLAMA)
  causal = hidden(model, params, batch())
  np.testing.assert_allclose(hidden(model, params, prefix_batch(0)), causal, atol=2e-5)
  full = hidden(model, params, prefix_batch(14))
  assert np.abs(full - causal)[0, 0].max() > 1e-3, 'the first token sees those after it'


def test_every_token_of_an_encoder_sees_its_whole_segment_and_nothing_else():
  """A row of segments of 5 and 7 tokens: a changed token changes the outputs of its segment, and of no other."""
  model, params = model_and_params(BERT)
  for changed, (own, other) in {4: (0, 5), 11: (5, 0), 0: (4, 11)}.items():
    data = batch()
    before = hidden(model, params, data)[0]
    data['encoder_input_tokens'][0, changed] = 3 + (data['encoder_input_tokens'][0, changed] - 2) % 60
    after = hidden(model, params, data)[0]
    assert np.abs(after - before)[own].max() > 1e-3
    np.testing.assert_array_equal(after[other], before[other])


def test_shared_keys_equal_repeated_keys():
  model, params = model_and_params(LLAMA)
  many, _ = model_and_params(LLAMA, kv_heads=4)
  own = params['decoder']['blocks']['self_attention']
  repeated = own | {name: jnp.repeat(own[name], 2, axis=2) for name in ('key', 'value')}
  wide = jax.tree.map(lambda x: x, params)
  wide['decoder']['blocks']['self_attention'] = repeated
  np.testing.assert_allclose(hidden(many, wide, batch()), hidden(model, params, batch()), atol=2e-5)


@FAMILIES
def test_dropout_masks_belong_to_examples(cfg):
  """A row's masks are the same at any place in any batch; another step has other masks.

  One model sees a batch of another size, too: for each size a program is compiled.
  """
  model, params = model_and_params(cfg, dropout=0.5)
  key, data = jax.random.key(1), batch()
  whole = hidden(model, params, data, key)
  turned = hidden(model, params, {k: v[::-1] for k, v in data.items()}, key)
  np.testing.assert_allclose(turned[::-1], whole, atol=2e-5)
  rows = [1] if cfg is LLAMA else [1, 1]
  np.testing.assert_allclose(hidden(model, params, {k: v[rows] for k, v in data.items()}, key)[0], whole[1], atol=2e-5)
  assert np.abs(hidden(model, params, data, jax.random.key(2)) - whole).max() > 1e-2
  moved = data | {'example_index': data['example_index'] + 1}
  assert np.abs(hidden(model, params, moved, key) - whole).max() > 1e-2, 'the mutation: another index, another mask'


@pytest.mark.parametrize(
  ('cfg', 'mesh'),
  [
    *itertools.product([T5, LLAMA, T5_1_0], [{'fsdp': 2, 'tensor': 2}]),
    (LLAMA, {'data': 2}),
    *(pytest.param(T5, mesh, marks=pytest.mark.slow) for mesh in ({'data': 2}, {'fsdp': 2})),
    pytest.param(LLAMA, {'fsdp': 2}, marks=pytest.mark.slow),
    *(pytest.param(cfg, {'fsdp': 2, 'tensor': 2}, marks=pytest.mark.slow) for cfg in (ALIBI, LEARNED)),
  ],
)
def test_meshes_agree(cfg, mesh):
  one, params = model_and_params(cfg)
  params = shaken(params)
  placed = make_mesh(MeshConfig(**mesh))
  model, _ = model_and_params(cfg, mesh=placed)
  on_mesh = jax.device_put(params, shardings(model.specs, placed))
  np.testing.assert_allclose(hidden(model, on_mesh, batch()), hidden(one, params, batch()), atol=2e-5)


@CACHED
def test_cached_decoding_equals_the_full_forward_pass(cfg):
  model, params = model_and_params(cfg)
  # The encoder's rows have another length, so that its positions cannot stand in for the decoder's.
  params, data = shaken(params), batch(((8,), (8,)), 8) | side('encoder', [[6], [6]], 6, seed=2)
  full = model.logits(params, compiled(model)(params, data)[0])
  cached = teacher_forced(model, params, data, jnp.asarray(data['decoder_input_tokens']))
  np.testing.assert_allclose(cached, full, atol=4e-5)


@pytest.mark.parametrize('cfg', [T5, LLAMA], ids=['encoder_decoder', 'decoder'])
def test_greedy_takes_the_most_likely_token_of_the_full_forward_pass(cfg):
  model, params = model_and_params(cfg)
  data = batch(((6,), (6,)), 6)
  data['decoder_input_tokens'][:, 0] = 0
  prompt = data['decoder_input_tokens'] if cfg is LLAMA else np.zeros((2, 1), np.int32)
  generated = np.asarray(greedy(model, params, data, 5, **IDS))
  tokens = np.concatenate([prompt, generated[:, :-1]], 1)
  width = tokens.shape[1]
  decoder = {
    'decoder_input_tokens': tokens,
    'decoder_segment_ids': np.ones_like(tokens),
    'decoder_positions': np.tile(np.arange(width, dtype=np.int32), (2, 1)),
  }
  logits = np.asarray(model.logits(params, compiled(model)(params, data | decoder)[0]))
  expected = logits[:, prompt.shape[1] - 1 :].argmax(-1)
  for row in range(2):
    ends = np.flatnonzero(generated[row] == 1)
    stop = ends[0] + 1 if len(ends) else 5
    np.testing.assert_array_equal(generated[row, :stop], expected[row, :stop])


@pytest.mark.parametrize(
  ('cfg', 'prefix'),
  [
    (LLAMA, False),
    *(pytest.param(cfg, False, marks=pytest.mark.slow) for cfg in (ALIBI, LEARNED)),
    (LLAMA, True),
    *(pytest.param(cfg, True, marks=pytest.mark.slow) for cfg in (ALIBI, LEARNED)),
    *(pytest.param(cfg, False, marks=pytest.mark.slow) for cfg in (SINKS, FAR_SINKS, CLEX)),
  ],
  ids=['rotary', 'alibi', 'learned', 'rotary-prefix', 'alibi-prefix', 'learned-prefix', 'sinks', 'far_sinks', 'clex'],
)
def test_prompts_of_unequal_lengths_are_continued_as_each_alone(cfg, prefix):
  """They stand at the end of their rows; without segment ids the padding would be read."""
  model, params = model_and_params(cfg)
  params, data = shaken(params), side('decoder', [[5], [8], [5]], 8, seed=3)
  lengths = (data['decoder_segment_ids'] > 0).sum(1)
  data['decoder_prefix_end'] = np.where(data['decoder_segment_ids'], lengths[:, None] if prefix else 0, 0)
  moved = {name: np.stack([np.roll(v, 8 - n) for v, n in zip(x, lengths, strict=True)]) for name, x in data.items()}
  together = np.asarray(greedy(model, params, moved, 6, **IDS))
  for row, length in enumerate(lengths):
    own = {name: values[row : row + 1, :length] for name, values in data.items()}
    np.testing.assert_array_equal(np.asarray(greedy(model, params, own, 6, **IDS))[0], together[row])
  del moved['decoder_segment_ids']
  assert (np.asarray(greedy(model, params, moved, 6, **IDS)) != together).any(), 'the mutation'


EXPECTED_STD = {
  # T5X examples/t5/layers.py: query scaled by 1/sqrt(head_dim) at init, the rest fan-in.
  'encoder/blocks/self_attention/query': 1 / np.sqrt(32 * 8),
  'encoder/blocks/self_attention/key': 1 / np.sqrt(32),
  'decoder/blocks/cross_attention/value': 1 / np.sqrt(32),
  'decoder/blocks/self_attention/out': 1 / np.sqrt(32),
  'decoder/blocks/mlp/gate': 1 / np.sqrt(32),
  'decoder/blocks/mlp/down': 1 / np.sqrt(48),
  'embedding/table': 1.0,
  'head/kernel': 1 / np.sqrt(32),
  # fan_avg over (32 buckets, 4 heads)
  'decoder_bias/table': np.sqrt(2 / 36),
}


def test_every_parameter_has_its_source_std():
  _, params = model_and_params(T5)
  found = {'/'.join(p.key for p in path): x for path, x in jax.tree_util.tree_flatten_with_path(params)[0]}
  for path, std in EXPECTED_STD.items():
    assert found[path].std() == pytest.approx(std, rel=0.2 if found[path].size < 500 else 0.08), path
  assert all((x == 1).all() for path, x in found.items() if path.endswith('scale'))


def test_a_parameter_is_drawn_from_its_path_alone():
  """A deeper decoder does not change the values of the encoder."""
  _, deep = model_and_params(T5, decoder_layers=4)
  _, shallow = model_and_params(T5)
  jax.tree.map(np.testing.assert_array_equal, deep['encoder'], shallow['encoder'])
  assert not np.array_equal(shallow['encoder']['blocks']['mlp']['up'], shallow['encoder']['blocks']['mlp']['gate'])


def test_bf16_activations_keep_f32_parameters():
  model, params = model_and_params(T5, dtype='bfloat16')
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype('float32')}
  assert model.apply(params, batch())[0].dtype == jnp.bfloat16


def test_a_mesh_that_does_not_divide_is_named():
  model, _ = model_and_params(LLAMA)
  with pytest.raises(ValueError, match=r'kv_heads=2 of parameter .* does not divide over mesh.tensor=4'):
    check_divisible(model.specs, make_mesh(MeshConfig(tensor=4)))


@pytest.mark.parametrize(
  'cfg',
  [T5, LLAMA, *(pytest.param(cfg, marks=pytest.mark.slow) for cfg in (BERT, T5_1_0, LEARNED))],
  ids=['t5', 'llama', 'bert', 't5_1_0', 'learned'],
)
def test_flops_equal_the_compilers_count(cfg):
  """One layer a stack (the compiler counts a scan's body once), a dense batch, products only within ten percent."""
  encodes = cfg.name == 'encoder_decoder'
  layers = {'encoder_layers': 1, 'decoder_layers': 1} if encodes else {'layers': 1}
  places = {'max_positions': 64} if cfg.positions == 'learned' else {}
  model, _ = model_and_params(dataclasses.replace(cfg, embed=256, head_dim=64, vocab_size=512), **layers, **places)
  model_params = specs.initialize(model.specs, jax.random.key(0))
  data = batch(((64,),), 64)

  def loss(p):
    return jnp.square(model.logits(p, model.apply(p, data)[0])).sum()

  counted = jax.jit(jax.grad(loss)).lower(model_params).compile().cost_analysis()['flops']
  inputs = 64 if encodes else 0
  assert flops_per_step(model.cfg, inputs_length=inputs, targets_length=64) == pytest.approx(counted, rel=0.1)


@DECODERS
def test_an_empty_prefix_is_no_prefix(cfg):
  """Causal rows of a mixture, beside rows with a prefix."""
  model, params = model_and_params(cfg)
  params, data = shaken(params), prefix_batch(0)
  causal = hidden(model, params, {name: values for name, values in data.items() if name != 'decoder_prefix_end'})
  np.testing.assert_array_equal(hidden(model, params, data), causal)
  assert (hidden(model, params, prefix_batch(3)) != causal).any(), 'the mutation'
