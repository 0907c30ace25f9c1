"""The kernels for GPU, interpreted against the definition and lowered for CUDA without a GPU; refusals of cuDNN."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pallas_kernels.attention import cudnn, gpu, reference
from pallas_kernels.attention.api import Visibility, choose, flash_attention
from tests.pallas_kernels.attention_cases import attend, compare, draw, normal, packed, relative, row
from tests.pallas_kernels.test_flash import (
  CASES,
  MORE,
  PREFIX,
  ROW,
  SINKS,
  SLOPES,
  bias,
  define,
  exact_table_gradient,
  slow,
)

BLOCKS = gpu.Blocks(q=64, kv=32, grad_q=32, grad_kv=64)
TALL = gpu.Blocks(q=128, kv=16, grad_q=16, grad_kv=128)
A100 = AbstractDevice(device_kind='NVIDIA A100-SXM4-80GB', num_cores=108, platform='gpu')
H100 = AbstractDevice(device_kind='NVIDIA H100 80GB HBM3', num_cores=132, platform='gpu')
# Newer jax deprecates Triton in favour of Mosaic.
pytestmark = pytest.mark.filterwarnings('ignore:The Pallas Triton backend is deprecated')
ALL = {
  'causal': True, 'softcap': 1.5, 'sink_logits': SINKS, 'window': 90, 'num_sinks': 3, 'alibi': SLOPES,
  **PREFIX, **bias(False),
}  # fmt: skip
FAST = ('full, keys shared', 'bias of both sides')
EVERYTHING = ((256,), {'batch': 2, 'kv_heads': 1}, ALL)


def differences(lengths, sizes, options, blocks=BLOCKS) -> dict[str, float]:
  return compare(draw(*lengths, **sizes), options, blocks, attention=gpu.attention)


def run(q, k, v, **options):
  return attend(gpu.attention, q, k, v, **options, blocks=BLOCKS, interpret=True)


@pytest.mark.parametrize('case', [EVERYTHING, *(CASES[name] for name in FAST), *map(slow, (CASES | MORE).values())])
def test_it_is_the_definition_in_values_and_gradients(case):
  found = differences(*case)
  assert max(found.values()) < 3e-6, found


@pytest.mark.slow
@pytest.mark.parametrize('case', [EVERYTHING, *(CASES | MORE).values()])
def test_blocks_and_odd_head_dims_do_not_change_the_answer(case):
  lengths, sizes, options = case
  found = differences(lengths, sizes | {'head_dim': 20}, options, TALL)
  assert max(found.values()) < 3e-6, found


def everything(function, arrays, weights, options):
  out, back = jax.vjp(jax.jit(lambda *x: function(*x, **options).astype(jnp.float32)), *arrays)
  return [np.asarray(x, np.float32) for x in (out, *back(weights))]


def test_in_bfloat16_it_is_about_as_accurate_as_the_definition():
  arrays, options = draw(128, dtype=jnp.bfloat16), {'causal': True, **packed(ROW[:1, :128])}
  weights = normal(arrays[0].shape, 3)
  truth = everything(define, tuple(x.astype(jnp.float32) for x in arrays), weights, options)
  kernel, definition = (everything(f, arrays, weights, options) for f in (run, define))
  for limit, t, got, own in zip((2, 3, 3, 3), truth, kernel, definition, strict=True):
    assert np.abs(got - t).max() <= limit * np.abs(own - t).max() + 1e-3


def test_values_in_padding_do_not_leak():
  segments = row(60, 40, padding=28)[None]
  q, k, v = draw(128)
  options, hole = {'causal': False, **packed(segments)}, jnp.asarray(segments == 0)[:, :, None, None]
  weights = normal(q.shape, 3)
  clean = everything(run, (q, k, v), weights, options)
  dirty = everything(run, (q, *(jnp.where(hole, jnp.nan, x) for x in (k, v))), weights, options)
  for a, b in zip(clean, dirty, strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize('causal', [True, slow(False)])
def test_the_gradient_of_the_bias_table_is_exact(causal):
  arrays, options = draw(256), bias(not causal)['relative_bias']
  weights = normal(arrays[0].shape, 3)

  def loss(table):
    own = reference.RelativeBias(table, options.bidirectional, options.max_distance)
    return (run(*arrays, causal=causal, relative_bias=own) * weights).sum()

  want = exact_table_gradient(*arrays, weights, options, causal)
  assert relative(np.asarray(jax.jit(jax.grad(loss))(options.table), np.float64), want) < 5e-6


def gradients(**options):
  """A function of q, k, v, the bias table and the sinks, to be lowered."""

  def loss(q, k, v, extra):
    own = {name: x for name, x in extra.items() if x is not None}
    return attend(gpu.attention, q, k, v, **(options | own)).astype(jnp.float32).sum()

  return jax.jit(jax.grad(loss, (0, 1, 2, 3)))


@pytest.mark.parametrize('dtype', [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize('options', [{'causal': True}, {'causal': False}, ALL], ids=['causal', 'full', 'all'])
def test_it_lowers_for_cuda_as_three_triton_kernels(dtype, options):
  batch = 2 if options is ALL else 1
  arrays = draw(256, batch=batch, kv_heads=1, head_dim=80, dtype=dtype)
  extra = {name: options.get(name) for name in ('relative_bias', 'sink_logits')}
  mesh = AbstractMesh((1,), ('data',), axis_types=(AxisType.Auto,), abstract_device=H100)
  with jax.sharding.use_abstract_mesh(mesh):
    traced = gradients(**options).trace(*arrays, extra)
    text = traced.lower(lowering_platforms=('cuda',)).as_text()
  assert re.findall(r'custom_call @([\w$.]+)', text) == ['__gpu$xla.gpu.triton'] * 3
  products = re.findall(r'dot_general\[.*?\n +\]', str(traced.jaxpr), re.DOTALL)
  exact = ['Precision.HIGHEST' in product for product in products]
  assert len(exact) == 9
  assert all(exact) if dtype == jnp.float32 else not any(exact)


@pytest.mark.parametrize('name', ['triton', 'cudnn'])
def test_another_platform_is_refused(name):
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  message = f"kernels.attention='{name}' runs on gpu, this mesh has cpu devices; use 'auto' or 'reference'"
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), pytest.raises(ValueError, match=message):
    flash_attention(*draw(16), causal=True, implementation=name)


def test_arrays_larger_than_an_int32_index_are_refused():
  q = jax.ShapeDtypeStruct((16, 32768, 32, 128), jnp.bfloat16)
  with pytest.raises(ValueError, match='16 x 32 heads, 2147483648 numbers; 65535 heads and 2147483647 numbers fit'):
    jax.eval_shape(lambda q: gpu.attention(q, q, q, Visibility(causal=True)), q)


@pytest.mark.parametrize(
  ('device', 'without', 'chosen'),
  [
    (H100, {}, 'triton'),
    (AbstractDevice(device_kind='NVIDIA H200', num_cores=132, platform='gpu'), {}, 'triton'),
    (H100, {'relative_bias': True}, 'reference'),
    (H100, {'dropout': True}, 'reference'),
    (H100, {'divided': True}, 'ring'),
    (H100, {'position_scores': True}, 'reference'),
    (A100, {}, 'reference'),
    (A100, {'lengths': (4096, 1025)}, 'blockwise'),
    (H100, {'lengths': (4096, 1025), 'relative_bias': True}, 'blockwise'),
    (H100, {'lengths': (4096, 4096), 'dropout': True}, 'reference'),
  ],
)
def test_auto_takes_on_a_gpu_what_has_run_on_one(device, without, chosen):
  mesh = AbstractMesh((1,), ('data',), axis_types=(AxisType.Auto,), abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    assert choose('auto', **{'dropout': False} | without) == chosen


def test_auto_sees_the_relative_bias_of_a_call():
  """The reference multiplies by dot_general, the kernel is a custom call."""
  mesh = AbstractMesh((1,), ('data',), axis_types=(AxisType.Auto,), abstract_device=H100)
  shape = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
  with jax.sharding.use_abstract_mesh(mesh):
    for options, kernels in (({}, 1), (bias(False), 0)):
      run = jax.jit(lambda q, options=options: flash_attention(q, q, q, causal=True, **options))
      assert run.trace(shape).lower(lowering_platforms=('cuda',)).as_text().count('gpu.triton') == kernels


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (bias(False), "kernels.attention='cudnn' has no relative bias, which this model needs; use 'triton' or"),
    ({**PREFIX, 'softcap': 2.0}, r'has no segments \(packed rows\), no positions, no prefixes, no soft-cap, which'),
    ({'sink_logits': SINKS}, 'has no sinks'),
    ({'window': 8, 'num_sinks': 2}, 'has no sinks'),
    ({'causal': False, 'window': 8}, 'has no window without causality'),
    ({'alibi': SLOPES}, r'has no slopes \(alibi\)'),
    ({'return_lse': True}, 'has no log-sum-exp'),
  ],
)
def test_cudnn_refuses_features_that_it_lacks(options, message):
  arrays = draw(256, batch=2, dtype=jnp.bfloat16)
  with pytest.raises(ValueError, match=message):
    flash_attention(*arrays, **({'causal': True} | options), implementation='cudnn')


def test_cudnn_refuses_dtypes_and_head_dims_that_it_lacks():
  with pytest.raises(ValueError, match=r'no float32 \(bfloat16 or float16 only\), no head_dim 20 \(multiples of 8'):
    flash_attention(*draw(16, head_dim=20), causal=True, implementation='cudnn')


def test_cudnn_refuses_queries_without_a_visible_key():
  """They are 0 by definition and undefined in cuDNN. Query 20 is the first past key 15 and its window of 5."""
  q, k, v = draw(21, 16, dtype=jnp.bfloat16)
  assert not np.asarray(define(q, k, v, causal=True, window=5))[:, 20].any()
  with pytest.raises(ValueError, match='no window that leaves queries without a key'):
    cudnn.attention(q, k, v, Visibility(causal=True, window=5))
  with pytest.raises(RuntimeError, match=r'cuDNN|cudnn'):  # reaches jax's own check
    cudnn.attention(q[:, :20], k, v, Visibility(causal=True, window=5))


@pytest.mark.parametrize('options', [{'causal': False, 'scale': 0.3}, {'causal': True, 'window': 5}])
def test_cudnn_gets_the_arguments_that_match_the_definition(options, monkeypatch):
  """The call runs in jax's XLA implementation instead of cuDNN."""
  ask = jax.nn.dot_product_attention

  def stand_in(*arrays, implementation, **more):
    assert implementation == 'cudnn'
    return ask(*arrays, implementation='xla', **more)

  monkeypatch.setattr(jax.nn, 'dot_product_attention', stand_in)
  arrays = draw(40, kv_heads=1, dtype=jnp.bfloat16)
  got, want = (np.asarray(attend(f, *arrays, **options), np.float32) for f in (cudnn.attention, reference.attention))
  np.testing.assert_allclose(got, want, atol=3e-2)
