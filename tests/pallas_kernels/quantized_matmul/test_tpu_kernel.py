"""The kernel for TPU in the interpreter against the definition, on any tiling; compiled ahead of time for chips."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec

from pallas_kernels.errors import KernelError
from pallas_kernels.quantized_matmul import blocks
from pallas_kernels.quantized_matmul.api import check, quantized_matmul
from pallas_kernels.quantized_matmul.blocks import Blocks
from pallas_kernels.quantized_matmul.formats import Operand, Recipe
from pretrain.tools.plan import compile_for, tpu_devices

INT8, RANDOM = Operand('int8'), Operand('int8', rounding='stochastic')
E4M3, E5M2 = Operand('fp8_e4m3', scale='tensor'), Operand('fp8_e5m2', scale='tensor', rounding='stochastic')
RECIPES = {
  'int8': Recipe(forward=(INT8, INT8), dgrad=(RANDOM, INT8), wgrad=(INT8, RANDOM)),
  'fp8': Recipe(forward=(E4M3, E4M3), dgrad=(E5M2, E4M3), wgrad=(E4M3, E5M2)),
}


@functools.cache
def arrays():
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
  return draw(2, 128, 256), draw(256, 384), draw(2, 128, 384)


@functools.cache
def results(name: str, implementation: str, block: int | None = None):
  x, w, g = arrays()
  with pytest.MonkeyPatch.context() as patch:
    if block is not None:
      patch.setattr(blocks, 'choose', lambda of, *_: Blocks(block, block, block))

    @jax.jit
    def run(x, w, g):
      own = {'seed': jnp.uint32(5), 'implementation': implementation}
      out, back = jax.vjp(lambda x, w: quantized_matmul(x, w, RECIPES[name], **own), x, w)
      return out, *back(g)

    return tuple(np.asarray(a.astype(jnp.float32)) for a in run(x, w, g))


@pytest.mark.parametrize(
  ('name', 'block'),
  [('int8', None), ('fp8', 128), *(pytest.param(*p, marks=pytest.mark.slow) for p in (('int8', 128), ('fp8', None)))],
)
def test_the_kernel_is_the_definition_on_any_tiling(name, block):
  """Three orientations, with random bits. Integers are equal to the last bit; sums of fp8 in another order are near."""
  for found, expected in zip(results(name, 'interpret', block), results(name, 'reference'), strict=True):
    if name == 'int8':
      np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(found, expected, rtol=2**-7, atol=1e-3)
    assert np.mean(found != expected) < 0.02


@pytest.mark.parametrize(
  ('x', 'w'), [((2, 3, 4, 256), (256, 384)), ((8, 256), (256, 2, 3, 128)), ((2, 128, 256), (256, 8, 384))]
)
def test_any_number_of_dims_of_tokens_and_outputs(x, w):
  """Three dims of tokens; a matrix times one with three dims of outputs; heads of 384, which no tile is made of."""
  rng = np.random.default_rng(0)
  a, b = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in (x, w))
  by = lambda name: quantized_matmul(a, b, Recipe(forward=(INT8, INT8)), implementation=name)
  np.testing.assert_array_equal(*(np.asarray(by(name), np.float32) for name in ('interpret', 'reference')))


@pytest.mark.parametrize('implementation', ['reference', 'xla', 'interpret'])
def test_dims_of_heads_are_summed_as_one_dim(implementation):
  """x[batch, heads, length, head_dim] and w[heads, head_dim, …], to the last bit, with random bits and gradients."""
  x, w, g = arrays()
  heads = lambda x: jnp.swapaxes(x.reshape(2, 128, 2, 128), 1, 2)
  joined = lambda x: jnp.swapaxes(x, 1, 2).reshape(2, 128, 256)

  @jax.jit
  def run(x, w, g):
    own = {'seed': jnp.uint32(5), 'implementation': implementation, 'axes': (1, 3)}
    out, back = jax.vjp(lambda x, w: quantized_matmul(x, w, RECIPES['int8'], **own), x, w)
    return out, *back(g)

  out, dx, dw = run(heads(x), w.reshape(2, 128, 3, 128), g.reshape(2, 128, 3, 128))
  found = out.reshape(2, 128, 384), joined(dx), dw.reshape(256, 384)
  for one, other in zip(found, results('int8', 'reference'), strict=True):
    np.testing.assert_array_equal(np.asarray(one.astype(jnp.float32)), other)


def test_a_number_that_is_not_finite_is_seen():
  x, w, _ = arrays()
  run = jax.jit(lambda x, w: quantized_matmul(x, w, Recipe(forward=(INT8, INT8)), implementation='interpret'))
  out = np.asarray(run(x.at[0, 3, 5].set(jnp.nan), w).astype(jnp.float32))
  assert not np.isfinite(out[0, 3]).any()
  assert np.isfinite(out[1]).all()


@pytest.mark.parametrize(('make', 'message'), [
  (
    lambda x, w: quantized_matmul(
      x, w, Recipe(forward=(Operand('nvfp4'), Operand('mxfp8'))), implementation='interpret'),
    "kernels.quantized_matmul='interpret' has no nvfp4 with scales of blocks and mxfp8 with scales of blocks; it has"
  ),
  (
    lambda x, w: quantized_matmul(
      x, w, Recipe(forward=(Operand('int8', scale='block', block=32),) * 2), implementation='interpret'),
    "kernels.quantized_matmul='interpret' has no int8 with scales of blocks; it has int8, int4 and fp8 with scales of"
  ),
  (
    lambda x, w: quantized_matmul(x, w, Recipe(forward=(E4M3, INT8)), implementation='interpret'),
    "kernels.quantized_matmul='interpret' has no products of integers and fp8; it has int8",
  ),
  (
    lambda x, w: jax.eval_shape(
      jax.grad(lambda w: quantized_matmul(
        jnp.zeros((2**18, 1)), w, Recipe(wgrad=(INT8, INT8)), implementation='interpret').sum()), jnp.zeros((1, 1))),
    "kernels.quantized_matmul='tpu' sums 262144 products of int8 in an int32, which may overflow; use 'auto' or 'xla'",
  ),
])  # fmt: skip
def test_what_the_kernel_lacks_is_refused_by_name(make, message):
  with pytest.raises(KernelError) as caught:
    make(*arrays()[:2])
  assert message in str(caught.value)


def test_a_product_without_tiles_that_fit_is_refused_before_it_is_compiled():
  """A sum of 100,001 is one tile, for no multiple of 128 divides it: 128 * 100,001 numbers of bfloat16 and as many
  codes of w, both twice, and codes of x; the result twice in bfloat16 and in float32.
  """
  mesh = AbstractMesh((1,), ('x',), abstract_device=AbstractDevice(device_kind='TPU v5p', num_cores=2, platform='tpu'))
  x, w = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((256, 100_001), (100_001, 128)))
  run = lambda x, w: quantized_matmul(x, w, Recipe(forward=(INT8, INT8)), implementation='tpu')
  with jax.sharding.use_abstract_mesh(mesh), pytest.raises(KernelError) as caught:
    jax.eval_shape(run, x, w)
  mib = (128 * 100_001 * (2 * 2 + 2 * 1 + 1) + 128 * 128 * (2 * 2 + 2 * 4)) / 2**20
  assert str(caught.value) == (
    "CONFIG: kernels.quantized_matmul='tpu' has no tiles for [256, 100001] x [100001, 128] on one device in int8: the "
    f"smallest take {mib:.1f} MiB of the 50.4 MiB that tiles may have of this chip's limit of 56.0 MiB of VMEM. Use "
    "kernels.quantized_matmul='auto' or 'xla', or a smaller batch where tokens are summed."
  )


def test_the_kernel_is_refused_on_other_platforms():
  one = jax.make_mesh((1,), ('x',), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
  with jax.sharding.use_abstract_mesh(one.abstract_mesh):
    assert [check(name) for name in ('auto', 'xla', 'reference', 'interpret')] == [
      'auto', 'xla', 'reference', 'interpret',
    ]  # fmt: skip
    with pytest.raises(KernelError, match="'tpu' runs on tpu, this mesh has cpu devices; use 'auto'"):
      check('tpu')


@pytest.mark.aot
@pytest.mark.parametrize(('chip', 'name'), [
  pytest.param('v5e:2x4', 'int8', marks=pytest.mark.slow),
  pytest.param('v5p:2x2x1', 'int8', marks=pytest.mark.slow),
  pytest.param('v6e:2x4', 'int8', marks=pytest.mark.slow),
  pytest.param('tpu7x:2x2x1', 'fp8', marks=pytest.mark.slow),
])  # fmt: skip
def test_all_three_products_compile_and_keep_their_codes_in_fast_memory(chip, name):
  """The temporaries hold scales and sums in float32, and no codes of the operands."""
  mesh = jax.make_mesh((1,), ('x',), axis_types=(AxisType.Auto,), devices=tpu_devices(chip)[:1])
  place = NamedSharding(mesh, PartitionSpec())
  shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.bfloat16, sharding=place)

  def run(x, w, g):
    own = {'seed': jnp.uint32(5), 'implementation': 'tpu'}
    out, back = jax.vjp(lambda x, w: quantized_matmul(x, w, RECIPES[name], **own), x, w)
    return out, *back(g)

  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    memory, compiled = compile_for(jax.jit(run), (shape(1024, 1024), shape(1024, 2048), shape(1024, 2048)))
  assert compiled.as_text().count('tpu_custom_call') >= 3
  assert memory.temporaries < 4 * (1024 * 2048 * 2 + 1024 * 1024) + 2**20
