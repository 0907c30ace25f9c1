"""Optimizer state in bf16 and in blocks of 8 bits: what is kept, how exactly, how large, and on which mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.specs import count
from pretrain.checkpoints.checkpoints import Checkpoints
from pretrain.experiment.program import build_program
from pretrain.optim.optimizer import Adafactor, AdamW, Lion, Muon, make_optimizer
from pretrain.optim.state import (
  Blocks,
  block_of,
  decode,
  dequantize,
  empty,
  encode,
  quantize,
  round_stochastically,
  stored,
)
from pretrain.testing import assert_resumes_exactly
from tests.pretrain import tiny
from tests.pretrain.optim.optimizing import spec

TALL = spec((2, 32, 4096), ('layers', 'embed', 'mlp'))
CODES = np.arange(256, dtype=np.uint8)


def dynamic_map(signed: bool) -> np.ndarray:
  """The table of bitsandbytes' create_dynamic_map, in ascending order."""
  values = [0.0, 1.0]
  for i in range(7):
    edges = np.linspace(0.1, 1, 2 ** (i + (not signed)) + 1)
    means = 10.0 ** (i - 6) * (edges[1:] + edges[:-1]) / 2
    values += [*means, *(-means if signed else [])]
  return np.sort(values)


@pytest.mark.parametrize('signed', [True, False])
def test_codes_are_the_dynamic_map_and_the_nearest_of_it(signed):
  table = dynamic_map(signed)
  np.testing.assert_allclose(decode(CODES, signed), table, rtol=1e-6)
  rng = np.random.default_rng(0)
  x = np.float32(rng.choice([-1, 1] if signed else [1], 5000) * 10 ** rng.uniform(-8, 0, 5000))
  nearest = np.abs(x[:, None] - table).min(1)
  np.testing.assert_allclose(np.abs(decode(encode(x, signed), signed) - x), nearest, rtol=1e-3, atol=1e-7)


def test_blocks_do_not_share_their_scale():
  x = jnp.ones(TALL.shape).at[:, :, 256:512].set(1e-6).at[1].mul(1e3)
  quantized = jax.jit(lambda x: quantize(x, TALL, True))
  restored = jax.jit(lambda kept: dequantize(kept, TALL, True))
  kept = quantized(x)
  assert (kept.codes.shape, kept.codes.dtype, kept.scale.shape) == (TALL.shape, jnp.uint8, (2, 32, 16))
  np.testing.assert_allclose(restored(kept), x, rtol=1e-6)
  assert np.abs(restored(quantized(x + 1)) / (x + 1) - 1).max() < 0.04


def test_a_second_moment_does_not_vanish_before_the_first():
  """Values a thousand times apart in a block: their squares, a million; kept as they are, they would be 15% off."""
  nu = jnp.square(jnp.ones(TALL.shape).at[:, :, ::2].set(1e-3))
  np.testing.assert_allclose(dequantize(quantize(nu, TALL, False), TALL, False), nu, rtol=0.06)
  tiny_nu = jnp.square(jnp.ones(TALL.shape).at[:, :, ::2].set(2e-6))
  assert dequantize(quantize(tiny_nu, TALL, False), TALL, False).min() > 0
  assert decode(encode(tiny_nu, False), False).min() == 0, 'the mutation: without the root it is lost'


@pytest.mark.parametrize(
  ('shape', 'axes', 'block'),
  [
    ((8, 512, 4096), ('layers', 'embed', 'mlp'), (2, 256)),
    ((8, 4096, 512), ('layers', 'mlp', 'embed'), (1, 256)),
    ((512, 8, 128), ('embed', 'heads', 'head_dim'), (2, 128)),
    ((512, 1024), ('embed', 'mlp'), (1, 64)),  # 16 blocks or more: tensor=16 cuts none of them
    ((512, 32_128), ('embed', 'vocab'), (1, 251)),
    ((512, 50_257), ('embed', 'vocab'), (1, 29)),  # 29 x 1733: nothing better divides it
    ((32_128, 512), ('vocab', 'embed'), None),
    ((8, 8192), ('layers', 'embed'), None),
    ((512, 512), ('length', 'embed'), None),
    ((8, 16, 64), ('layers', 'embed', 'mlp'), None),
  ],
)
def test_blocks_lie_inside_a_device(shape, axes, block):
  """Embeddings, vectors, and what is under 4096 values a layer stay f32."""
  assert block_of(spec(shape, axes)) == block


def test_blocks_are_those_of_a_layer_alone():
  for axes in (('embed', 'mlp'), ('heads', 'head_dim', 'embed')):
    shape = (64, 128, 96)[: len(axes)]
    dim, size = block_of(spec(shape, axes))
    assert block_of(spec((3, *shape), ('layers', *axes))) == (dim + 1, size)


@pytest.mark.parametrize('signed', [True, False])
def test_a_state_starts_as_zeros_would_be_kept(signed):
  for own in (TALL, spec((16,), ('embed',))):
    jax.tree.map(np.testing.assert_array_equal, empty(own, signed, 'int8'), quantize(jnp.zeros(own.shape), own, signed))


def test_stochastic_rounding_keeps_the_mean_and_small_changes():
  x = jnp.full((64, 1024), 1 + 2**-10, jnp.float32)
  rounded = round_stochastically(x, jnp.uint32(3)).astype(jnp.float32)
  assert set(np.unique(rounded)) == {1.0, 1 + 2**-7}
  assert abs(float(rounded.mean()) - (1 + 2**-10)) < 1e-4
  assert np.all(x.astype(jnp.bfloat16) == 1), 'the mutation: to the nearest, the change is lost'
  other = round_stochastically(x, jnp.uint32(4)).astype(jnp.float32)
  assert abs(np.corrcoef(rounded.ravel(), other.ravel())[0, 1]) < 0.02, 'each step rounds anew'
  special = jnp.array([0.0, -0.0, jnp.inf, -jnp.inf, 3.0, -0.5])
  np.testing.assert_array_equal(round_stochastically(special, jnp.uint32(1)).astype(jnp.float32), special)
  assert np.isnan(round_stochastically(jnp.array([jnp.nan]), jnp.uint32(1)).astype(jnp.float32))


BIG = {'up': spec((4, 512, 4096), ('layers', 'embed', 'mlp')), 'norm': spec((4, 512), ('layers', 'embed'))}
F32, BF16, INT8 = 'float32', 'bfloat16', 'int8'


@pytest.mark.parametrize(
  ('cfg', 'size'),
  [
    *((AdamW(state_dtype=dtype), size) for dtype, size in ((F32, 8), (BF16, 4), (INT8, 2 + 8 / 256))),
    *((Lion(state_dtype=dtype), size) for dtype, size in ((F32, 4), (BF16, 2), (INT8, 1 + 4 / 256))),
    *((Muon(state_dtype=dtype), size) for dtype, size in ((F32, 4), (BF16, 2), (INT8, 1 + 4 / 256))),
    (Adafactor(), 8 / 4096 + 4 / 512),
    *((Adafactor(momentum=0.9, state_dtype=dtype), size) for dtype, size in ((BF16, 2.0088), (INT8, 1.0244))),
  ],
  ids=lambda x: f'{x.name}-{x.state_dtype}' if hasattr(x, 'name') else f'{x:.3f}',
)
def test_bytes_of_state_for_each_parameter(cfg, size):
  state = jax.eval_shape(
    make_optimizer(cfg, lambda step: 0.1, BIG).init, jax.tree.map(lambda s: jnp.zeros(s.shape), BIG)
  )
  got = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / count(BIG)
  np.testing.assert_allclose(got, size, rtol=2e-3)


PROBLEM = {
  'a': spec((32, 8, 16), ('embed', 'heads', 'head_dim')),
  'b': spec((8, 16, 32), ('heads', 'head_dim', 'embed')),
}
RATES = {'adamw': 0.01, 'lion': 0.002, 'muon': 0.02, 'adafactor': 0.05}


@functools.cache
def trained(cfg, steps=150) -> float:
  """The loss of a two-layer network on another such network's outputs, after training."""
  draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
  x, teacher = draw(0, 256, 32), {'a': draw(1, 32, 8, 16) / 5, 'b': draw(2, 8, 16, 32) / 11}
  apply = lambda p: jnp.einsum('nhd,hde->ne', jax.nn.relu(jnp.einsum('ne,ehd->nhd', x, p['a'])), p['b'])
  loss = lambda p: jnp.mean(jnp.square(apply(p) - apply(teacher)))
  tx = make_optimizer(cfg, lambda step: RATES[cfg.name] * jnp.maximum(0.0, 1 - step / steps), PROBLEM)

  def step(carry, _):
    params, state = carry
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return (jax.tree.map(jnp.add, params, updates), state), None

  params = {'a': draw(3, 32, 8, 16) / 5, 'b': draw(4, 8, 16, 32) / 11}
  (params, _), _ = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=steps))(params)
  return float(loss(params))


adafactor = lambda **options: Adafactor(momentum=0.9, **options)


@pytest.mark.parametrize(
  'optimizer', [AdamW, *(pytest.param(make, marks=pytest.mark.slow) for make in (Muon, Lion, adafactor))]
)
def test_small_states_train_as_f32_does(optimizer):
  start, f32 = trained(AdamW(weight_decay=0.0), 0), trained(optimizer(weight_decay=0.0))
  assert f32 < 0.1 * start
  for dtype in (BF16, INT8):
    assert trained(optimizer(weight_decay=0.0, state_dtype=dtype)) < 1.25 * f32 + 1e-3 * start, dtype


def test_skipped_steps_leave_small_states_alone():
  specs, params = {'up': TALL}, {'up': jnp.ones(TALL.shape)}
  for dtype in (BF16, INT8):
    tx = make_optimizer(AdamW(state_dtype=dtype), lambda step: 0.1, specs)
    state = tx.init(params)
    _, after = tx.update({'up': jnp.full(TALL.shape, jnp.nan)}, state, params)
    jax.tree.map(np.testing.assert_array_equal, after[0].inner, state[0].inner)


SIZES = ('model.embed=64', 'model.mlp.hidden=128')


@pytest.mark.slow
@pytest.mark.parametrize(
  'overrides',
  [
    ("optimizer.name='muon'", "optimizer.state_dtype='int8'"),
    pytest.param(
      ("optimizer.name='adafactor'", 'optimizer.momentum=0.9', "optimizer.state_dtype='bfloat16'"),
      marks=pytest.mark.slow,
    ),
  ],
  ids=['muon-int8', 'adafactor-bfloat16'],
)
def test_state_is_restored_onto_another_mesh(tmp_path, overrides):
  cfg = tiny.decoder(*SIZES, *overrides, 'mesh.fsdp=2', 'mesh.tensor=2', 'data.batch_size=8')
  source, target = build_program(cfg), build_program(tiny.decoder(*SIZES, *overrides, 'mesh.fsdp=8'))
  fill = lambda x: (np.arange(x.size) % 251).reshape(x.shape).astype(x.dtype)
  state = jax.tree.map(lambda x: jax.device_put(fill(x), x.sharding), source.abstract)
  checkpoints = Checkpoints(tmp_path, cfg.checkpoint)
  checkpoints.save(1, state, {'loader': {}, 'data': {}}, '')
  checkpoints.close()
  restored = Checkpoints(tmp_path, cfg.checkpoint).restore(target.abstract, 1).state
  jax.tree.map(np.testing.assert_array_equal, restored, state)
  assert jax.tree.all(jax.tree.map(lambda x, a: x.sharding == a.sharding, restored, target.abstract))
  kept = jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, Blocks))
  assert any(isinstance(x, Blocks) or x.dtype == jnp.bfloat16 for x in kept), 'something small was in it'


def test_f32_state_is_the_transform_itself():
  tx = make_optimizer(AdamW(), lambda step: 0.1, BIG)
  assert stored(tx, 'float32', BIG) is tx


@pytest.mark.slow
def test_a_run_with_small_state_resumes_exactly(tmp_path):
  cfg = tiny.decoder(*SIZES, "optimizer.name='muon'", "optimizer.state_dtype='int8'", 'mesh.fsdp=4')
  assert_resumes_exactly(cfg, tmp_path, steps=6, stop_at=3)
