"""The kernel on several devices, in the interpreter, against the definition on one."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pallas_kernels.errors import KernelError
from pallas_kernels.quantized_matmul import api, blocks, sharded, tpu
from pallas_kernels.quantized_matmul.api import Division, quantized_matmul
from pallas_kernels.quantized_matmul.blocks import Blocks
from pretrain.devices import chips
from pretrain.tools.plan import compile_for, tpu_devices
from tests.pallas_kernels.quantized_matmul.test_tpu_kernel import INT8, RECIPES

WHOLE, FSDP, TENSOR = (), ('fsdp',), ('tensor',)
# Logical places -> what divides them: tokens over fsdp, and weights where they are kept; features over tensor.
FLAT = (4, 128, 256), (256, 384), (4, 128, 384)
CASES = {
  'up': (FLAT, (2,), (FSDP, WHOLE, WHOLE), (WHOLE, TENSOR), (FSDP, TENSOR)),
  'down': (FLAT, (2,), (FSDP, WHOLE, TENSOR), (TENSOR, WHOLE), (TENSOR, FSDP)),
  'query': (
    ((4, 128, 256), (256, 2, 128), (4, 128, 2, 128)), (2,),
    (FSDP, WHOLE, WHOLE), (WHOLE, TENSOR, WHOLE), (FSDP, TENSOR, WHOLE),
  ),
  'out': (
    ((4, 2, 128, 128), (2, 128, 384), (4, 128, 384)), (1, 3),
    (FSDP, TENSOR, WHOLE, WHOLE), (TENSOR, WHOLE, WHOLE), (TENSOR, WHOLE, FSDP),
  ),
}  # fmt: skip
slow = lambda *values: pytest.param(*values, marks=pytest.mark.slow)


def mesh_of(fsdp: int, tensor: int):
  devices = jax.devices()[: fsdp * tensor]
  return jax.make_mesh((fsdp, tensor), ('fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 2, devices=devices)


@functools.cache
def arrays(case: str):
  rng = np.random.default_rng(0)
  # Sizes of channels differ by a factor of ten, so that a wrong scale is seen.
  draw = lambda shape: jnp.asarray(rng.normal(size=shape) * rng.uniform(0.1, 1, size=(*shape[:-1], 1)), jnp.bfloat16)
  return tuple(draw(shape) for shape in CASES[case][0])


def results(case: str, name: str, implementation: str, mesh=None, tiles: int | None = None):
  """The product and both gradients, float32."""
  (x, w, g), (_, axes, of_x, of_w, stored) = arrays(case), CASES[case]
  division = None if mesh is None else Division(of_x, of_w, stored)

  def run(x, w, g):
    own = {'seed': jnp.uint32(5), 'implementation': implementation, 'division': division, 'axes': axes}
    out, back = jax.vjp(lambda x, w: quantized_matmul(x, w, RECIPES[name], **own), x, w)
    return out, *back(g)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(tpu, 'COLUMNS', 128)
    if tiles is not None:
      patch.setattr(blocks, 'choose', lambda of, *_: Blocks(tiles, math.gcd(tiles, of.k), tiles))
    if mesh is None:
      found = jax.jit(run)(x, w, g)
    else:
      spec = lambda entries: NamedSharding(mesh, PartitionSpec(*(names or None for names in entries)))
      places = (of_x, stored, division.of_gradient(axes))
      put = (jax.device_put(array, spec(own)) for array, own in zip((x, w, g), places, strict=True))
      with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        found = jax.jit(run)(*put)
  return tuple(np.asarray(array.astype(jnp.float32)) for array in found)


@functools.cache
def expected(case: str, name: str):
  return results(case, name, 'reference')


@pytest.mark.parametrize(
  ('case', 'name', 'fsdp', 'tensor', 'tiles'),
  [
    ('out', 'int8', 2, 2, 128), slow('query', 'int8', 4, 2, None),
    slow('down', 'int8', 2, 2, None), slow('down', 'int8', 4, 1, 128), slow('out', 'int8', 1, 2, None),
    slow('query', 'int8', 2, 2, 128), slow('up', 'int8', 1, 2, 128), slow('up', 'fp8', 2, 2, None),
    slow('down', 'fp8', 1, 2, 128), slow('query', 'fp8', 4, 1, None), slow('out', 'fp8', 2, 2, None),
  ],
)  # fmt: skip
def test_a_mesh_gives_what_one_device_does(case, name, fsdp, tensor, tiles):
  """Forward and both gradients with random bits: integers to the last bit, sums of fp8 in another order nearly."""
  found = results(case, name, 'interpret', mesh_of(fsdp, tensor), tiles)
  for one, other in zip(found, expected(case, name), strict=True):
    if name == 'int8':
      np.testing.assert_array_equal(one, other)
    np.testing.assert_allclose(one, other, rtol=2**-7, atol=1e-3)
    assert np.mean(one != other) < 0.02


@functools.cache
def on_mesh(case: str):
  """The product and both gradients in int8 of arrays as they lie on 2 x 2 devices, in one compiled program."""
  _, axes, of_x, of_w, stored = CASES[case]
  mesh, division = mesh_of(2, 2), Division(of_x, of_w, stored)
  own = {'seed': jnp.uint32(5), 'implementation': 'interpret', 'division': division, 'axes': axes}
  place = lambda entries: NamedSharding(mesh, PartitionSpec(*(names or None for names in entries)))

  def run(x, w, g):
    out, back = jax.vjp(lambda x, w: quantized_matmul(x, w, RECIPES['int8'], **own), x, w)
    return out, *back(g)

  compiled = jax.jit(run, in_shardings=tuple(map(place, (of_x, stored, division.of_gradient(axes)))))

  def found(*given):
    with pytest.MonkeyPatch.context() as patch, jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      patch.setattr(tpu, 'COLUMNS', 128)
      return tuple(np.asarray(array.astype(jnp.float32)) for array in compiled(*given))

  return found


def test_arrays_that_lie_on_a_mesh_give_what_one_device_does():
  for one, other in zip(on_mesh('up')(*arrays('up')), expected('up', 'int8'), strict=True):
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize('value', [math.nan, -math.inf])
@pytest.mark.parametrize('place', [(0, (3, 7, 5)), (1, (200, 380)), (2, (1, 100, 11))], ids=['x', 'w', 'gradient'])
def test_a_number_that_is_not_finite_is_seen_on_a_mesh_where_it_belongs(place, value):
  """With sums over devices in both gradients, of raw integers: numbers are not finite where the product in float64 has
  none that are, and all others are those without it, to the last bit.
  """
  given, clean = list(arrays('up')), on_mesh('up')(*arrays('up'))
  given[place[0]] = given[place[0]].at[place[1]].set(value)
  found = on_mesh('up')(*given)
  x, w, g = (np.asarray(array, np.float64) for array in given)
  with np.errstate(invalid='ignore'):
    expected = x @ w, g @ w.T, x.reshape(-1, 256).T @ g.reshape(-1, 384)
  assert [int((~np.isfinite(one)).sum()) for one in expected] == {
    0: [384, 0, 384], 1: [512, 512, 0], 2: [0, 256, 256]}[place[0]]  # fmt: skip
  for one, before, exact in zip(found, clean, expected, strict=True):
    np.testing.assert_array_equal(np.isfinite(one), np.isfinite(exact))
    np.testing.assert_array_equal(one[np.isfinite(exact)], before[np.isfinite(exact)])


def test_a_weight_is_gathered_as_codes():
  """The forward product and the gradient of x each all-gather the weight, in int8."""
  (x, w, g), (_, axes, of_x, of_w, stored) = arrays('up'), CASES['up']
  mesh = mesh_of(4, 1)
  own = {'seed': jnp.uint32(5), 'implementation': 'interpret', 'division': Division(of_x, of_w, stored), 'axes': axes}
  spec = lambda entries: NamedSharding(mesh, PartitionSpec(*(names or None for names in entries)))
  shape = lambda array, entries: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=spec(entries))

  def run(x, w, g):
    out, back = jax.vjp(lambda x, w: quantized_matmul(x, w, RECIPES['int8'], **own), x, w)
    return out, *back(g)

  given = shape(x, of_x), shape(w, stored), shape(g, (FSDP, WHOLE, WHOLE))
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    text = jax.jit(run).lower(*given).compile().as_text()
  gathered = [line for line in text.splitlines() if ' all-gather(' in line and '256,384' in line.split('=')[1]]
  assert len(gathered) == 2, gathered
  assert all('s8[256,384]' in line.split('=')[1] for line in gathered), gathered


def test_sums_that_one_int32_may_not_hold_are_added_in_float32(monkeypatch):
  """Over devices; what one device sums has to fit."""
  monkeypatch.setattr(sharded, 'EXACT_SUM', 127 * 127 * 384)  # less than the 512 tokens
  found = results('up', 'int8', 'interpret', mesh_of(2, 1))
  np.testing.assert_allclose(found[2], expected('up', 'int8')[2], rtol=2**-7, atol=1e-3)
  with pytest.raises(KernelError, match="'tpu' sums 512 products of int8 in an int32, which may overflow"):
    results('up', 'int8', 'interpret', mesh_of(1, 2))


@pytest.mark.parametrize(
  ('division', 'message'),
  [
    (None, r"'tpu' does not know how this mesh of 8 devices divides a product .*; use 'auto' or 'xla'"),
    (
      Division((FSDP, WHOLE, WHOLE), (WHOLE, WHOLE), (FSDP, WHOLE)),
      r"'tpu' cannot divide a dim of 4 in \(4, 128, 256\) over mesh.fsdp=8; use 'auto' or 'xla', or make it a mult",
    ),
  ],
)  # fmt: skip
def test_a_product_that_a_mesh_does_not_divide_is_refused_with_the_fix(division, message):
  from pallas_kernels.quantized_matmul.formats import Recipe

  x, w, _ = arrays('up')
  with jax.sharding.use_abstract_mesh(mesh_of(8, 1).abstract_mesh), pytest.raises(KernelError, match=message):
    quantized_matmul(x, w, Recipe(forward=(INT8, INT8)), implementation='interpret', division=division)


@pytest.mark.parametrize(
  ('case', 'shape'), [*((case, (2, 2)) for case in CASES), ('query', (1, 1)), ('out', (1, 1))], ids=str
)
def test_auto_asks_for_tiles_of_what_the_kernel_is_given(case, shape, monkeypatch):
  """The shapes, bytes and heads of all three products."""
  asked, ran, own, product = [], [], tpu.Call.run, sharded.product

  def both(a, b, pair, dims, parts=None, **options):
    asked.append(sharded.shape_in_kernel(a[0], b[0], pair, dims, parts, options.get('dtype') or a[0].dtype))
    return product(a, b, pair, dims, parts, **options)

  monkeypatch.setitem(api.IMPLEMENTATIONS, 'interpret', functools.partial(both, interpret=True))
  monkeypatch.setattr(tpu.Call, 'run', lambda self, *rest: ran.append(self.of) or own(self, *rest))
  (x, w, g), (_, axes, of_x, of_w, stored) = arrays(case), CASES[case]
  division = Division(of_x, of_w, stored)

  def run(x, w, g):
    own = {'seed': jnp.uint32(5), 'implementation': 'interpret', 'division': division, 'axes': axes}
    out, back = jax.vjp(lambda x, w: quantized_matmul(x, w, RECIPES['int8'], **own), x, w)
    return out, *back(g)

  with jax.sharding.use_abstract_mesh(mesh_of(*shape).abstract_mesh):
    jax.eval_shape(run, x, w, g)
  assert len(ran) == 3
  assert asked == ran


def test_a_part_of_the_mesh_may_be_divided_around_the_product():
  """As replicas are, each with its own sums and scales: two halves of the rows, as if there was no other half."""
  x, w, _ = arrays('up')
  mesh = jax.make_mesh((2, 2), ('replica', 'fsdp'), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
  division = Division((FSDP, WHOLE, WHOLE), (WHOLE, WHOLE), (FSDP, WHOLE))

  def run(x, w, division=None, implementation='reference'):
    own = {'seed': jnp.uint32(5), 'implementation': implementation, 'division': division}
    out, back = jax.vjp(lambda x, w: quantized_matmul(x, w, RECIPES['int8'], **own), x, w)
    return out, back(out)[1][None]

  each = jax.shard_map(
    functools.partial(run, division=division, implementation='interpret'), axis_names={'replica'}, check_vma=False,
    in_specs=(PartitionSpec('replica'), PartitionSpec()), out_specs=PartitionSpec('replica'),
  )  # fmt: skip
  with jax.set_mesh(mesh):
    found = jax.jit(each)(x, w)
  halves = [jax.jit(run)(half, w) for half in (x[:2], x[2:])]
  for one, others in zip(found, zip(*halves, strict=True), strict=True):
    np.testing.assert_array_equal(
      np.asarray(one, np.float32), np.concatenate([np.asarray(y, np.float32) for y in others])
    )


@pytest.mark.aot
@pytest.mark.slow
@pytest.mark.parametrize('case', ['query', 'out'])
def test_all_three_products_compile_for_a_slice(case):
  """Three kernels, and weights gathered as codes."""
  (x, w, g), (_, axes, of_x, of_w, stored) = arrays(case), CASES[case]
  mesh = jax.make_mesh((4, 2), ('fsdp', 'tensor'), axis_types=(AxisType.Auto,) * 2, devices=tpu_devices('v6e:2x4'))
  division = Division(of_x, of_w, stored)
  spec = lambda entries: NamedSharding(mesh, PartitionSpec(*(names or None for names in entries)))

  def run(x, w, g):
    own = {'seed': jnp.uint32(5), 'implementation': 'tpu', 'division': division, 'axes': axes}
    out, back = jax.vjp(lambda x, w: quantized_matmul(x, w, RECIPES['int8'], **own), x, w)
    return out, *back(g)

  places = zip((x, w, g), (of_x, stored, division.of_gradient(axes)), strict=True)
  given = [jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=spec(own)) for array, own in places]
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    _, compiled = compile_for(jax.jit(run), given)
  text = compiled.as_text()
  assert text.count('custom_call_target="tpu_custom_call"') == 3
  gathered = [line for line in text.splitlines() if re.search(r' all-gather(-start)?\(', line)]
  assert any('s8[' in line for line in gathered)
  assert not any('bf16[' in line for line in gathered), gathered


@pytest.mark.parametrize('chip', chips.CHIPS.values(), ids=lambda chip: chip.name)
def test_blocks_have_the_rates_of_the_planners_chips(chip):
  """Of a device: memory, and products of 8 bits, which are twice those of bfloat16."""
  own = blocks.CHIPS[chip.name]
  assert own.rate * chip.clock / 1e9 == pytest.approx(chip.hbm_rate / chip.devices / 1e9, rel=0.01)
  assert 2 * own.products * chip.clock == pytest.approx(2 * chip.flops / chip.devices, rel=0.01)
