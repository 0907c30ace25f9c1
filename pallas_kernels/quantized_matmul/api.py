"""`quantized_matmul`: a product that quantizes its operands, and those of both its gradients, by a recipe."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels import tuned
from pallas_kernels.errors import KernelError
from pallas_kernels.quantized_matmul import reference, sharded, xla
from pallas_kernels.quantized_matmul.formats import FORMATS, Operand, Pair, Recipe
from pallas_kernels.quantized_matmul.rounding import Noise
from pallas_kernels.quantized_matmul.sharded import Division, Parts

__all__ = ['FORMATS', 'IMPLEMENTATIONS', 'Division', 'Operand', 'Recipe', 'check', 'check_recipe', 'quantized_matmul']

# `interpret` runs `tpu` on any platform, slowly: for tests.
IMPLEMENTATIONS = {
  'reference': reference.product,
  'xla': xla.product,
  'tpu': sharded.product,
  'interpret': functools.partial(sharded.product, interpret=True),
}
KERNELS = ('tpu', 'interpret')  # implementations that are told how the mesh divides both matrices
FORWARD_X, FORWARD_W, DGRAD_G, DGRAD_W, WGRAD_X, WGRAD_G = range(6)  # numbers of the operands, for their random bits
DELAYED = ('xla', 'reference')  # implementations that take scales from outside
OP, TUNED = 'quantized_matmul', ('xla', 'tpu')  # of entries in tuning/CHIP.json
# Whether the first and the second matrix are summed over their leading dims -> which product of a weight this is.
LAYOUTS = {(False, True): 'forward', (False, False): 'dgrad', (True, True): 'wgrad'}


def check(implementation: str) -> str:
  """The implementation to run, or 'auto'. Raises KernelError for one that does not exist, or not on this platform.

  The platform is that of the mesh in use: a program may be compiled for devices that this process does not have.
  """
  if implementation == 'auto':
    return 'auto'
  if implementation not in IMPLEMENTATIONS:
    known = ', '.join(repr(name) for name in IMPLEMENTATIONS)
    raise KernelError(f"kernels.quantized_matmul='{implementation}' is not one of 'auto', {known}.")
  if implementation == 'tpu' and (platform := _platform()) not in (None, 'tpu'):
    raise KernelError(f"kernels.quantized_matmul='tpu' runs on tpu, this mesh has {platform} devices; use 'auto'.")
  return implementation


def _platform() -> str | None:
  """That of the mesh in use; None without a mesh, or where it has no devices."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty or mesh.abstract_device is None else mesh.abstract_device.platform


def quantized_matmul(
  x: Array, w: Array, recipe: Recipe, *, axes: tuple[int, ...] | None = None, seed: Array | None = None,
  rows: Array | None = None, amax: Array | None = None, implementation: str = 'auto', division: Division | None = None,
) -> Array:  # fmt: skip
  """x[*tokens, inputs] times w[inputs, *outputs], [*tokens, *outputs] in x's dtype; gradients ignore rounding, and are
  themselves products of quantized operands (the straight-through estimator, Bengio et al. 2013, arXiv:1308.3432).

  `axes`: the dims of x that are summed over, in ascending order, if not the last; the first dim of x is one of tokens.
  w has these dims first. The result is that of x and w with these dims as one, but where blocks lie along the last.

  `seed` (uint32) and `rows` (uint32[*tokens], by default the tokens' indices) choose the random bits of stochastic
  rounding: a number's bits depend on the seed, on its row's number and on its column, and not on its device or tile.

  `amax` float32[3] are the largest sizes that x, w and the gradient of the product had in earlier steps, for delayed
  scales. Its gradient is not a derivative: it is the largest sizes that the three have now.

  `division`: how the mesh in use divides x and w, for kernels; the partitioner of XLA needs none.

  Raises KernelError for shapes that do not fit, blocks that do not divide, stochastic rounding without a seed, and a
  recipe that rounds weights alone.
  """
  if recipe.weights is not None:
    raise KernelError(
      f'quantized_matmul quantizes both operands, and this recipe has weights in {recipe.weights.format} alone; round '
      'them with reference.quantize, and multiply as usual.'
    )
  axes = (x.ndim - 1,) if axes is None else axes
  sizes, tokens = tuple(x.shape[axis] for axis in axes), _others(x, axes)
  if 0 not in tokens or sizes != w.shape[: len(axes)] or w.ndim == len(axes) or tuple(sorted(axes)) != axes:
    own = f', axes={axes}' if len(axes) > 1 else ''
    raise KernelError(
      f'quantized_matmul got x{x.shape}, w{w.shape}{own}; pass x[*tokens, inputs] and w[inputs, outputs].'
    )
  if seed is not None:
    seed = jnp.asarray(seed, jnp.uint32)
    rows = index(tuple(x.shape[axis] for axis in tokens)) if rows is None else rows
  return _matmul(recipe, _chosen(implementation, recipe), axes, division, x, w, seed, rows, amax)


def _others(x: Array, axes: tuple[int, ...]) -> tuple[int, ...]:
  return tuple(axis for axis in range(x.ndim) if axis not in axes)


def _chosen(implementation: str, recipe: Recipe) -> str:
  """`check`, but for delayed scales, which a kernel that finds its own scales cannot use."""
  check_recipe(implementation, recipe)
  return 'xla' if recipe.is_delayed and implementation == 'auto' else check(implementation)


def check_recipe(implementation: str, recipe: Recipe) -> None:
  """Raises KernelError for an implementation without the scales of `recipe`: delayed ones, or those of blocks."""
  if recipe.is_delayed and implementation not in ('auto', *DELAYED):
    raise KernelError(
      f"kernels.quantized_matmul='{implementation}' has no delayed scaling; use 'auto', 'xla' or 'reference', or "
      "precision.recipe='fp8', which computes scales from the tensor itself."
    )
  if implementation in KERNELS:
    for pair in recipe.pairs.values():
      sharded.check_scales(pair, implementation)


def index(shape: tuple[int, ...]) -> Array:
  """uint32 of `shape`: each element's place in row-major order."""
  return jnp.arange(int(np.prod(shape)), dtype=jnp.uint32).reshape(shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _matmul(recipe: Recipe, implementation: str, axes, division, x: Array, w: Array, seed, rows, amax) -> Array:
  return _forward(recipe, implementation, axes, division, x, w, seed, rows, amax)[0]


def _forward(recipe: Recipe, implementation: str, axes, division, x: Array, w: Array, seed, rows, amax):
  (of_x, of_w, _), count = _each(amax), len(axes)
  sides = (x, _noise(x, seed, rows, axes), FORWARD_X, *of_x), (w, _noise_of_weight(w, seed, count), FORWARD_W, *of_w)
  of_x, of_w, _ = _parts(division, axes)
  out = _product(implementation, recipe.forward, *sides, (axes, tuple(range(count))), (of_x, of_w))
  return out.astype(x.dtype), (x, w, seed, rows, amax)


def _backward(recipe: Recipe, implementation: str, axes: tuple[int, ...], division, saved, g: Array):
  x, w, seed, rows, amax = saved
  (of_x, of_w, of_g), tokens, count = _each(amax), _others(x, axes), len(axes)
  of_tokens, outputs = tuple(range(len(tokens))), tuple(range(len(tokens), g.ndim))
  grad = lambda operand: (g, _noise(g, seed, rows, outputs), operand, *of_g)
  weight = w, _noise_of_weight(w, seed, count), DGRAD_W, *of_w
  parts_x, parts_w, parts_g = _parts(division, axes)
  dims = outputs, tuple(range(count, w.ndim))
  dx = _product(implementation, recipe.dgrad, grad(DGRAD_G), weight, dims, (parts_g, parts_w))
  inputs = x, _noise(x, seed, rows, axes), WGRAD_X, *of_x
  dw = _product(implementation, recipe.wgrad, inputs, grad(WGRAD_G), (tokens, of_tokens), (parts_x, parts_g))
  dx = jnp.moveaxis(dx, range(len(tokens), x.ndim), axes)
  zero = lambda x: None if x is None else np.zeros(x.shape, jax.dtypes.float0)
  now = None if amax is None else jnp.stack([_largest(each) for each in (x, w, g)])
  return dx.astype(x.dtype), dw.astype(w.dtype), zero(seed), zero(rows), now


_matmul.defvjp(_forward, _backward)


def _parts(division: Division | None, axes: tuple[int, ...]) -> tuple[Parts | None, ...]:
  """How the mesh divides x, w and the gradient of their product."""
  if division is None:
    return None, None, None
  return Parts(division.x), Parts(division.w, division.stored), Parts(division.of_gradient(axes))


def _each(amax: Array | None) -> tuple[tuple[Array, ...], ...]:
  """(amax,) of x, of w and of the gradient; () for each without."""
  return ((), (), ()) if amax is None else ((amax[0],), (amax[1],), (amax[2],))


def _largest(x: Array) -> Array:
  return reference.largest_size(x.astype(jnp.float32), tuple(range(x.ndim))).reshape(())


def _noise(x: Array, seed, rows, columns: tuple[int, ...]) -> Noise | None:
  """That of an array with a number in `rows` for each place in the dims that are not `columns`."""
  if seed is None:
    return None
  numbers = index(tuple(x.shape[axis] for axis in columns))
  return Noise(seed, jnp.expand_dims(rows, columns), jnp.expand_dims(numbers, _others(x, columns)))


def _noise_of_weight(w: Array, seed, count: int) -> Noise | None:
  """That of a weight whose rows are its first `count` dims."""
  return _noise(w, seed, index(w.shape[:count]), tuple(range(count, w.ndim)))


def kind_of(pair: Pair, dims, parts: tuple[Parts, Parts] | None = None) -> str:
  """The class of a product in tuning/CHIP.json: which of a weight's products, the formats, how they are rounded, and
  with `parts` that it is a part of one on several devices, where the kernel gets weights as codes.
  """
  formats = dict.fromkeys(operand.format for operand in pair)
  random = ('stochastic',) if any(operand.is_random for operand in pair) else ()
  divided = () if parts is None else ('divided',)
  return '_'.join((*divided, LAYOUTS[dims[0][0] == 0, dims[1][0] == 0], *formats, *random))


def fastest(a: Array, b: Array, pair: Pair, dims, parts: tuple[Parts, Parts] | None = None) -> str:
  """What 'auto' runs: the implementation whose schedule was the fastest on this chip in the nearest tuned shape. On
  several devices shapes are those of one device's part.

  'xla' without such an entry of a shape that is not far (`tuned.FAR`), where the kernel lacks the product or has no
  tiles that fit, on several devices without `parts`, and on other platforms.
  """
  if _platform() != 'tpu' or not sharded.fits(a, b, pair, dims, parts):
    return 'xla'
  parts = parts if sharded.on_several() else None
  return tuned.fastest(OP, kind_of(pair, dims, parts), sharded.sizes_of(a, b, dims, parts), TUNED) or 'xla'


def _product(implementation: str, pair: Pair | None, a: Any, b: Any, dims, parts) -> Array:
  """A product over `dims` of two (array, noise, number of the operand), with delayed scales also an amax."""
  if pair is None:
    return jax.lax.dot_general(a[0], b[0], (dims, ((), ())))
  parts = None if None in parts else parts
  if implementation == 'auto':
    implementation = fastest(a[0], b[0], pair, dims, parts)
  sides = ((x, None if noise is None else noise.of(number), *amax) for x, noise, number, *amax in (a, b))
  own = {'parts': parts} if implementation in KERNELS else {}
  return IMPLEMENTATIONS[implementation](*sides, pair, dims, **own)
