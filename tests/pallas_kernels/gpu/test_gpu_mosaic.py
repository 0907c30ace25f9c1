"""The kernel for Hopper, lowered for CUDA without a GPU, and interpreted against the definition."""

import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax.experimental.mosaic.gpu import core
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import tuned
from pallas_kernels.attention import gpu_mosaic, gpu_mosaic_kernel
from pallas_kernels.attention.api import Visibility, flash_attention
from pallas_kernels.attention.gpu_mosaic import Blocks
from tests.pallas_kernels.attention_cases import attend, draw, normal, row
from tests.pallas_kernels.test_flash import PREFIX, SINKS, SLOPES, bias, define, packed, slow

H100 = AbstractDevice(device_kind='NVIDIA H100 80GB HBM3', num_cores=132, platform='gpu')
A100 = AbstractDevice(device_kind='NVIDIA A100-SXM4-80GB', num_cores=108, platform='gpu')
SMALL = Blocks(q=128, kv=64, stages=2)
races = importlib.import_module('jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call')
# Newer jax deprecates Triton in favour of Mosaic.
pytestmark = pytest.mark.filterwarnings('ignore:The Pallas Triton backend is deprecated')


def on(device: AbstractDevice, devices: int = 1):
  mesh = AbstractMesh((devices,), ('data',), axis_types=(AxisType.Auto,), abstract_device=device)
  return jax.sharding.use_abstract_mesh(mesh)


def shapes(head_dim: int, length: int = 512, batch: int = 1, dtype=jnp.bfloat16):
  kv = jax.ShapeDtypeStruct((batch, length, 2, head_dim), dtype)
  return jax.ShapeDtypeStruct((batch, length, 4, head_dim), dtype), kv, kv


def lowered(function, arrays, devices: int = 1) -> str:
  with on(H100, devices):
    return jax.jit(function).trace(*arrays).lower(lowering_platforms=('cuda',)).as_text()


def flash(**options):
  return lambda q, k, v: flash_attention(q, k, v, **options, implementation='mosaic_gpu')


def calls(text: str) -> list[str]:
  return re.findall(r'custom_call @([\w$.]+)', text)


@pytest.mark.parametrize(('head_dim', 'causal'), [(64, True), (128, True), (128, False), (256, True)])
def test_it_lowers_for_cuda_as_one_mosaic_kernel_with_wgmma_and_tma(head_dim, causal):
  text = lowered(flash(causal=causal), shapes(head_dim))
  assert calls(text) == ['mosaic_gpu_v2']
  assert 'dot_general' not in text
  tile = gpu_mosaic.DEFAULTS[head_dim].kv
  for columns in (tile, head_dim):  # of scores, of values
    assert f'wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16' in text
  assert re.search(r'cp\.async\.bulk\.tensor\.(shared\.cluster\.global|\dd\.shared)', text)


def test_its_gradient_is_two_triton_kernels():
  loss = lambda q, k, v: flash(causal=True, return_lse=True)(q, k, v)[0].astype(jnp.float32).sum()
  text = lowered(jax.grad(loss, (0, 1, 2)), shapes(128))
  assert calls(text) == ['mosaic_gpu_v2', *['__gpu$xla.gpu.triton'] * 2]


def test_each_device_of_a_mesh_runs_it_on_its_rows():
  own = jax.shard_map(flash(causal=True), in_specs=P('data'), out_specs=P('data'), check_vma=False)
  assert calls(lowered(own, shapes(64, batch=8), devices=8)) == ['mosaic_gpu_v2']


def interpreted(*arrays, **options):
  """In the interpreter, which raises for a read or write that no barrier orders; a GPU fails there only sometimes."""
  params = InterpretGPUParams(detect_races=True, uninitialized_memory='nan')
  with jax.numpy_dtype_promotion('standard'):  # jax's own code promotes
    found = attend(gpu_mosaic.attention, *arrays, **{'blocks': SMALL, 'interpret': params} | options)
  assert not isinstance(found, jax.core.Tracer)
  assert not races.get_races().races_found
  return found


def everything(function, arrays, weights, options) -> dict[str, np.ndarray]:
  """Output, log-sum-exp and gradients of both."""
  (out, lse), back = jax.vjp(lambda *x: function(*x, **options, return_lse=True), *arrays)
  names, found = ('out', 'lse', 'dq', 'dk', 'dv'), (out, lse, *back((weights[0].astype(out.dtype), weights[1])))
  return {name: np.asarray(x, np.float64) for name, x in zip(names, found, strict=True)}


@pytest.mark.parametrize(
  ('lengths', 'sizes', 'options'),
  [
    slow((128,), {'heads': 2, 'kv_heads': 2}, {'causal': True, 'blocks': Blocks(q=128, kv=64, stages=1)}),
    slow((256, 384), {'batch': 2, 'heads': 4, 'kv_heads': 2}, {'causal': True}),
    slow((384, 128), {'heads': 4, 'kv_heads': 1}, {'causal': True, 'scale': 0.3}),
    slow((256, 320), {'heads': 2, 'kv_heads': 2}, {'causal': False}),
    slow((128, 512), {'head_dim': 128}, {'causal': False, 'blocks': Blocks(q=128, kv=128, stages=1)}),
    slow((256,), {}, {'causal': True, 'blocks': Blocks(q=256, kv=64, stages=2)}),
  ],
)
def test_it_is_about_as_accurate_as_the_definition(lengths, sizes, options):
  """Values, log-sum-exp and gradients, in bfloat16."""
  arrays = draw(*lengths, **{'head_dim': 64, 'dtype': jnp.bfloat16} | sizes)
  weights = [normal(arrays[0].shape, 3), normal(arrays[0].shape[:3], 4)]
  plain = {name: x for name, x in options.items() if name != 'blocks'}
  compiled = lambda *x, **options: jax.jit(lambda *x: define(*x, **options))(*x)
  truth = everything(compiled, tuple(x.astype(jnp.float32) for x in arrays), weights, plain)
  own = everything(compiled, arrays, weights, plain)
  for name, got in everything(interpreted, arrays, weights, options).items():
    assert np.abs(got - truth[name]).max() <= 2 * np.abs(own[name] - truth[name]).max() + 1e-3, name


def test_a_warpgroup_never_multiplies_a_tile_that_it_does_not_see():
  """Each warpgroup has 64 queries, each tile 64 keys: a weight of 0 would not silence a NaN of the second tile."""
  q, k, v = draw(128, heads=1, kv_heads=1, head_dim=64, dtype=jnp.bfloat16)
  dirty = v.at[:, 64:].set(jnp.nan)
  out = np.asarray(interpreted(q, k, dirty, causal=True), np.float32)
  want = np.asarray(define(*(x.astype(jnp.float32) for x in (q, k, v)), causal=True))
  np.testing.assert_allclose(out[:, :64], want[:, :64], atol=2e-2)
  assert np.isnan(out[:, 64:]).all()


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('kv', [64, 128, 192])
def test_tiles_counts_what_some_query_sees_and_clear_what_all_see(kv, causal):
  spec = gpu_mosaic_kernel.Spec(
    batch=1, heads=1, group=1, q_length=1024, kv_length=576 // kv * kv, head_dim=64, dtype=jnp.bfloat16, q=128, kv=kv,
    stages=2, causal=causal, scale=1.0,
  )  # fmt: skip
  for first in range(0, 1024, 64):
    seen = (np.arange(spec.kv_length) <= np.arange(first, first + 64)[:, None]) | (not causal)
    tiles = seen.reshape(64, -1, kv)
    assert spec.tiles(jnp.int32(first + 64)) == tiles.any((0, 2)).sum()
    assert spec.clear(jnp.int32(first)) == tiles.all((0, 2)).sum()


@pytest.mark.parametrize(('head_dim', 'blocks'), [*gpu_mosaic.DEFAULTS.items(), (64, Blocks(q=256, kv=64, stages=3))])
def test_the_counted_shared_memory_is_what_mosaic_allocates(head_dim, blocks):
  size = gpu_mosaic.shared_bytes(blocks, head_dim)
  with core.artificial_shared_memory_limit(1), pytest.raises(ValueError, match=f'smem_bytes={size} > max_smem_bytes=1'):
    lowered(lambda *x: gpu_mosaic.attention(*x, Visibility(causal=True), blocks=blocks), shapes(head_dim))


@pytest.mark.parametrize(
  ('blocks', 'message'),
  [
    (Blocks(q=128, kv=128, stages=4), 'takes 297112 bytes of shared memory, of 232448; use fewer stages'),
    (Blocks(q=256, kv=128, stages=1), 'takes 320 registers of a thread, of 208; use a smaller q or kv'),
    (
      Blocks(q=192, kv=128, stages=2),
      r'got Blocks\(q=192, kv=128, stages=2\); q is a multiple of 128, kv 64, 128, 192',
    ),
    (Blocks(q=128, kv=96, stages=2), 'kv=96'),
    (Blocks(q=128, kv=64, stages=0), 'stages=0'),
    (Blocks(q=128, kv=192, stages=1), 'cannot run 512 queries and 512 keys, which blocks of 128 and 192 do not'),
  ],
)
def test_invalid_blocks_are_refused_with_the_fix(blocks, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(lambda *x: gpu_mosaic.attention(*x, Visibility(causal=True), blocks=blocks), *shapes(128))


def test_defaults_fit_and_tiles_shrink_to_a_divisor_of_the_keys():
  for head_dim, blocks in gpu_mosaic.DEFAULTS.items():
    gpu_mosaic.check_blocks(blocks, head_dim, 1024, 1024)
  assert gpu_mosaic.choose_blocks(1024, 192, 128, 'bfloat16') == Blocks(q=128, kv=64, stages=2)
  assert gpu_mosaic.choose_blocks(128, 128, 64, 'bfloat16') == Blocks(q=128, kv=128, stages=1)


def test_tuned_blocks_belong_to_this_chip_and_kernel(tmp_path, monkeypatch):
  monkeypatch.setattr(tuned, 'FOLDER', tmp_path)
  (tmp_path / 'h100.json').write_text('{"attention": {"mosaic_d128_bfloat16": {"q": 256, "kv": 64, "stages": 3}}}')
  with on(H100):
    assert gpu_mosaic.choose_blocks(1024, 1024, 128, jnp.bfloat16) == Blocks(q=256, kv=64, stages=3)
    assert gpu_mosaic.choose_blocks(1152, 1024, 128, jnp.bfloat16) == Blocks(q=128, kv=64, stages=3)
    assert gpu_mosaic.choose_blocks(1024, 1024, 64, jnp.bfloat16) == gpu_mosaic.DEFAULTS[64]


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (bias(False), "kernels.attention='mosaic_gpu' has no relative bias, which this model needs; use 'triton' or"),
    ({**PREFIX, 'softcap': 2.0}, r'has no segments \(packed rows\), no positions, no prefixes, no soft-cap, which'),
    (packed(row(512)[None]), r'has no segments \(packed rows\), which'),
    ({'sink_logits': SINKS}, 'has no sinks'),
    ({'window': 8, 'num_sinks': 2}, 'has no window'),
    ({'alibi': SLOPES}, r'has no slopes \(alibi\)'),
    ({'scale': -0.5}, r'has no scale -0.5 \(positive only\)'),
    ({'dropout': (0.1, None)}, 'has no attention dropout'),
  ],
)
def test_it_refuses_features_that_it_lacks(options, message):
  with pytest.raises(ValueError, match=message):
    flash(**{'causal': True} | options)(*draw(512, head_dim=64, dtype=jnp.bfloat16))


@pytest.mark.parametrize(
  ('arrays', 'message'),
  [
    (shapes(128, dtype=jnp.float32), r'no float32 \(bfloat16 or float16 only\), which'),
    (shapes(80), r'no head_dim 80 \(64, 128 or 256 only\), which'),
    (
      shapes(128, 320),
      'cannot run 320 queries and 320 keys, which blocks of 128 and 64 do not divide; use lengths',
    ),
    (shapes(128, 100), "multiples of these, 'triton' or 'reference'"),
  ],
)
def test_it_refuses_dtypes_head_dims_and_lengths_that_it_lacks(arrays, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(flash(causal=True), *arrays)


def test_gpus_before_and_after_hopper_are_refused():
  message = r"runs on Hopper GPUs \(H100, H200\), this mesh has NVIDIA A100-SXM4-80GB devices; use 'triton' or"
  with on(A100), pytest.raises(ValueError, match=message):
    jax.eval_shape(flash(causal=True), *shapes(128))
