"""Keys and values of padding are 0 before positions enter: a weight of 0 does not silence a NaN."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from models import partition
from models.build import KernelsConfig, build
from models.layers.attention import Attention, AttentionConfig, Visibility
from models.layers.dropout import Dropout
from models.layers.linear import Projections
from models.layers.positions import rotary
from models.layers.positions.rotary import Rope
from models.specs import as_function, initialize, param_specs
from pallas_kernels import rotation
from pretrain.planner import hlo
from pretrain.tools.plan import compile_for, tpu_devices
from tests.models import small

SEGMENTS = np.int32([[1, 1, 2, 2, 2, 0, 0], [0, 3, 3, 3, 3, 3, 0]])
POSITIONS = np.int32([[0, 1, 0, 1, 2, 5, 6], [0, 0, 1, 2, 3, 4, 9]])
THETA, EPS = 100.0, 1e-6
AXES = ('replica', 'data', 'fsdp', 'sequence', 'tensor', 'expert', 'stage')


def turned(x, sign=1):
  """`x[batch, heads, length, head_dim]` as complex numbers, turned by position * theta^(-i / half), or back."""
  half = x.shape[-1] // 2
  angle = POSITIONS[:, None, :, None] * THETA ** (-np.arange(half) / half)
  y = (x[..., :half] + 1j * x[..., half:]) * np.exp(sign * 1j * angle)
  return np.concatenate([y.real, y.imag], -1)


def normed(x, scale, norm):
  """[batch, heads, length, head_dim]: x / rms(x) * scale of each head, or of all heads together."""
  if norm == 'none':
    return x
  over = 3 if norm == 'heads' else (1, 3)
  scale = scale if norm == 'heads' else scale[:, None]
  return x / np.sqrt((x**2).mean(over, keepdims=True) + EPS) * scale


def made(norm: str, rope: bool):
  """(keys and values of (params, x) with padding silenced, params)."""
  cfg = AttentionConfig(
    heads=4, kv_heads=2, head_dim=8, t5_scale=False, rope=Rope(theta=THETA, dims=8) if rope else None, qk_norm=norm,
    qk_norm_eps=EPS, softcap=None, sink_distance=None, dropout=Dropout(rate=0.0), implementation='reference',
  )  # fmt: skip
  module = Attention(16, cfg, Projections(bias='qkv'))
  see = Visibility(causal=True, q_segment_ids=jnp.asarray(SEGMENTS), kv_segment_ids=jnp.asarray(SEGMENTS))
  params = small.shaken(initialize(param_specs(module), jax.random.key(0)))
  return lambda params, x: as_function(module)(params).keys_values(x, jnp.asarray(POSITIONS), see), params


@pytest.mark.parametrize(('norm', 'rope'), [('none', True), ('heads', True), ('all', True), ('none', False)])
def test_keys_and_values_of_padding_are_0(norm, rope):
  """All others by the formula in float64, though padding is NaN; the gradient is that of the formula, without padding.

  Dropping `silence_padding` from `keys_values` leaves NaN.
  """
  run, params = made(norm, rope)
  wide = {name: jax.tree.map(np.float64, x) for name, x in params.items()}
  rng, given = np.random.default_rng(0), SEGMENTS != 0
  x, dk, dv = rng.normal(size=(2, 7, 16)), rng.normal(size=(2, 2, 7, 8)), rng.normal(size=(2, 2, 7, 8))

  def formula(x):
    made = lambda name: np.einsum('ble,ehd->bhld', x, wide[name]) + wide[f'{name}_bias'][:, None]
    key = normed(made('key'), wide.get('key_norm', {}).get('scale'), norm)
    seen = lambda y: np.where(given[:, None, :, None], y, 0)
    return seen(turned(key) if rope else key), seen(made('value'))

  dirty = jnp.asarray(np.where(given[..., None], x, np.nan), jnp.float32)
  for got, expected in zip(jax.jit(run)(params, dirty), formula(x), strict=True):
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5)

  gradient = lambda x: jax.vjp(lambda x: run(params, x), x)[1](tuple(jnp.asarray(g, jnp.float32) for g in (dk, dv)))[0]
  found = np.asarray(jax.jit(gradient)(jnp.asarray(x, jnp.float32)))
  value = lambda x: sum((y * g).sum() for y, g in zip(formula(x), (dk, dv), strict=True))
  step = 1e-6
  for at in [(0, 2, 3), (0, 4, 0), (1, 3, 15), (1, 1, 7), (0, 5, 1), (1, 0, 2)]:
    moved = np.zeros_like(x)
    moved[at] = step
    np.testing.assert_allclose(found[at], (value(x + moved) - value(x - moved)) / (2 * step), rtol=1e-4, atol=1e-4)
  assert not found[~given].any()


@pytest.mark.parametrize('kernel', ['reference', 'interpret', 'blockwise'])
def test_padding_that_is_nan_has_no_effect_on_a_model(kernel, monkeypatch):
  """Its rotary kernel too. A block that says `silenced` of keys that are not leaves NaN in every row with padding."""
  cfg = dataclasses.replace(small.LLAMA, head_dim=128, layers=1, dtype='bfloat16')
  monkeypatch.setattr(rotary, 'mesh_platform', lambda: 'tpu')
  rotate, called = rotation.rotate, []
  monkeypatch.setattr(rotation, 'rotate', lambda *args: called.append('rotary') or rotate(*args[:3], True))
  model = build(cfg, KernelsConfig(attention=kernel), None)
  params = initialize(model.specs, jax.random.key(0))
  batch = small.batch(((100, 20), (128,)), 128)
  seen = batch['decoder_segment_ids'] != 0
  batch['decoder_input_tokens'] = np.where(seen, batch['decoder_input_tokens'] % 63, 63)
  broken = {**params, 'embedding': {'table': params['embedding']['table'].at[63].set(jnp.nan)}}
  run = jax.jit(lambda params: model.apply(params, batch)[0])
  clean, dirty = (np.asarray(run(own), np.float32) for own in (params, broken))
  assert called
  assert np.isnan(dirty[~seen]).all()
  np.testing.assert_array_equal(dirty[seen], clean[seen])


FAMILIES = {
  'cross-attention': (small.T5, 1),
  'cross-attention, far sinks': (small.T5_FAR_SINKS, 1),
  'far sinks': (small.FAR_SINKS, 1),
  'experts': (small.EXPERTS, 1),
  'frequencies of the length': (small.CLEX, 1),
  'on a ring': (small.LLAMA, 2),
}


@pytest.mark.parametrize('family', FAMILIES)
def test_padding_that_is_nan_has_no_effect_on_other_tokens(family):
  """Of encoder and decoder. Handing the block's `silenced` on to cross-attention leaves NaN in all that T5 decodes."""
  cfg, devices = FAMILIES[family]
  shape = [devices if name == 'sequence' else 1 for name in AXES]
  mesh = jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=jax.devices()[:devices])
  model = build(cfg, KernelsConfig(), mesh if devices > 1 else None)
  params = jax.device_put(initialize(model.specs, jax.random.key(0)), partition.shardings(model.specs, mesh))
  batch = small.batch(width=16)
  for side in ('encoder', 'decoder'):
    seen = batch[f'{side}_segment_ids'] != 0
    batch[f'{side}_input_tokens'] = np.where(seen, batch[f'{side}_input_tokens'] % 63, 63)
  broken = {**params, 'embedding': {'table': params['embedding']['table'].at[63].set(jnp.nan)}}
  run = jax.jit(lambda params, batch: model.apply(params, batch)[0])
  clean, dirty = (np.asarray(run(own, batch)) for own in (params, broken))
  assert np.isnan(dirty[~seen]).all()
  np.testing.assert_array_equal(dirty[seen], clean[seen])


@pytest.mark.aot
@pytest.mark.slow
def test_nothing_stands_between_the_rotary_kernel_and_attention():
  """For v6e, forward and backward: attention reads what the rotary kernel wrote, and that turns back its gradients.

  With `silence_padding` behind the rotation, a fusion stands between them.
  """
  cfg = dataclasses.replace(small.LLAMA, embed=256, head_dim=128, layers=2, dtype='bfloat16', remat='full')
  mesh = jax.make_mesh((1,) * 7, AXES, axis_types=(AxisType.Auto,) * 7, devices=tpu_devices('v6e:2x2')[:1])
  model = build(cfg, KernelsConfig(), mesh)
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
  batch = {name: shape(x) for name, x in small.batch(((512,),), 512).items()}
  loss = lambda params, batch: model.apply(params, batch)[0].astype(jnp.float32).sum()
  _, compiled = compile_for(
    jax.jit(jax.grad(loss)),
    (jax.tree.map(shape, jax.eval_shape(lambda: initialize(model.specs, jax.random.key(0)))), batch),
  )
  computations = [*hlo.parse(compiled.as_text()).computations.values()]
  attention, rotations = ([n for lines in computations for n in count(lines)] for count in (rotated, of_kernels))
  assert attention == [2] * len(attention), 'queries and keys of each kernel of attention'
  assert len(attention) >= 3, 'forward, and two kernels backward'
  assert sum(rotations) == 2, 'the gradients of queries and keys'


def kernels(lines) -> tuple[list, list]:
  """(rotary kernels, other kernels) of a computation, each as the instructions that fill its operands."""
  by_name = {one.name: one for one in lines}

  def filled(name):
    one = by_name[name]
    return filled(one.operands[0]) if one.op in hlo.VIEWS else one

  found = [one for one in lines if 'tpu_custom_call' in one.rest]
  inputs = lambda kind: [[filled(name) for name in one.operands] for one in found if is_rotary(one) == kind]
  return inputs(True), inputs(False)


def is_rotary(one) -> bool:
  return 'tpu_custom_call' in one.rest and one.name.startswith('rotary')


def rotated(lines) -> list[int]:
  """How many inputs of each kernel of attention the rotary kernel wrote."""
  return [sum(is_rotary(one) for one in inputs) for inputs in kernels(lines)[1]]


def of_kernels(lines) -> list[int]:
  """How many inputs of each rotary kernel a kernel of attention wrote."""
  other = lambda one: 'tpu_custom_call' in one.rest and not is_rotary(one)
  return [sum(other(one) for one in inputs) for inputs in kernels(lines)[0]]
