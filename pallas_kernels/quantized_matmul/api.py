"""`quantized_matmul`: a product that quantizes its operands, and those of both its gradients, by a recipe."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels import tuned
from pallas_kernels.errors import KernelError
from pallas_kernels.quantized_matmul import reference, tpu, xla
from pallas_kernels.quantized_matmul.formats import FORMATS, Operand, Pair, Recipe
from pallas_kernels.quantized_matmul.rounding import Noise

__all__ = ['FORMATS', 'IMPLEMENTATIONS', 'Operand', 'Recipe', 'check', 'check_delayed', 'quantized_matmul']

# `interpret` runs `tpu` on any platform, slowly: for tests.
IMPLEMENTATIONS = {
  'reference': reference.product,
  'xla': xla.product,
  'tpu': tpu.product,
  'interpret': functools.partial(tpu.product, interpret=True),
}
FORWARD_X, FORWARD_W, DGRAD_G, DGRAD_W, WGRAD_X, WGRAD_G = range(6)  # numbers of the operands, for their random bits
DELAYED = ('xla', 'reference')  # implementations that take scales from outside
OP, TUNED = 'quantized_matmul', ('xla', 'tpu')  # of entries in tuning/CHIP.json
# Whether the first and the second matrix are summed over their leading dims -> which product of a weight this is.
LAYOUTS = {(False, True): 'forward', (False, False): 'dgrad', (True, True): 'wgrad'}


def check(implementation: str) -> str:
  """The implementation to run, or 'auto'. Raises KernelError for one that does not exist, or not on this mesh.

  The platform is that of the mesh in use: a program may be compiled for devices that this process does not have.
  """
  if implementation == 'auto':
    return 'auto'
  if implementation not in IMPLEMENTATIONS:
    known = ', '.join(repr(name) for name in IMPLEMENTATIONS)
    raise KernelError(f"kernels.quantized_matmul='{implementation}' is not one of 'auto', {known}.")
  mesh, kernel = jax.sharding.get_abstract_mesh(), implementation in ('tpu', 'interpret')
  platform = None if mesh.empty or mesh.abstract_device is None else mesh.abstract_device.platform
  if implementation == 'tpu' and platform not in (None, 'tpu'):
    raise KernelError(f"kernels.quantized_matmul='tpu' runs on tpu, this mesh has {platform} devices; use 'auto'.")
  if kernel and not mesh.empty and mesh.size > 1:
    raise KernelError(
      f"kernels.quantized_matmul='{implementation}' runs on one device, this mesh has {mesh.size}; use 'auto' or "
      "'xla', whose products the partitioner divides."
    )
  return implementation


def quantized_matmul(
  x: Array, w: Array, recipe: Recipe, *, seed: Array | None = None, rows: Array | None = None,
  amax: Array | None = None, implementation: str = 'auto',
) -> Array:  # fmt: skip
  """x[*tokens, inputs] times w[inputs, outputs] in x's dtype; gradients ignore rounding, and are
  themselves products of quantized operands (the straight-through estimator, Bengio et al. 2013, arXiv:1308.3432).

  `seed` (uint32) and `rows` (uint32[*tokens], by default the tokens' indices) choose the random bits of stochastic
  rounding: a number's bits depend on the seed, on its row's number and on its column, and not on its device or tile.

  `amax` float32[3] are the largest sizes that x, w and the gradient of the product had in earlier steps, for delayed
  scales. Its gradient is not a derivative: it is the largest sizes that the three have now.

  Raises KernelError for shapes that do not fit, blocks that do not divide, and stochastic rounding without a seed.
  """
  if w.ndim != 2 or x.ndim < 2 or x.shape[-1] != w.shape[0]:
    raise KernelError(f'quantized_matmul got x{x.shape}, w{w.shape}; pass x[*tokens, inputs] and w[inputs, outputs].')
  if seed is not None:
    seed = jnp.asarray(seed, jnp.uint32)
    rows = index(x.shape[:-1]) if rows is None else rows
  return _matmul(recipe, _chosen(implementation, recipe), x, w, seed, rows, amax)


def _chosen(implementation: str, recipe: Recipe) -> str:
  """`check`, but for delayed scales, which a kernel that finds its own scales cannot use."""
  if not recipe.is_delayed:
    return check(implementation)
  check_delayed(implementation)
  return 'xla' if implementation == 'auto' else check(implementation)


def check_delayed(implementation: str) -> None:
  """Raises KernelError for an implementation without delayed scales."""
  if implementation not in ('auto', *DELAYED):
    raise KernelError(
      f"kernels.quantized_matmul='{implementation}' has no delayed scaling; use 'auto', 'xla' or 'reference', or "
      "precision.recipe='fp8', which computes scales from the tensor itself."
    )


def index(shape: tuple[int, ...]) -> Array:
  """uint32 of `shape`: each element's place in row-major order."""
  return jnp.arange(int(np.prod(shape)), dtype=jnp.uint32).reshape(shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(recipe: Recipe, implementation: str, x: Array, w: Array, seed, rows, amax) -> Array:
  return _forward(recipe, implementation, x, w, seed, rows, amax)[0]


def _forward(recipe: Recipe, implementation: str, x: Array, w: Array, seed, rows, amax):
  noise, (of_x, of_w, _) = _noises(w, seed, rows), _each(amax)
  sides = (x, noise['tokens'], FORWARD_X, *of_x), (w, noise['w'], FORWARD_W, *of_w)
  out = _product(implementation, recipe.forward, *sides, ((x.ndim - 1,), (0,)))
  return out.astype(x.dtype), (x, w, seed, rows, amax)


def _backward(recipe: Recipe, implementation: str, saved, g: Array):
  x, w, seed, rows, amax = saved
  noise, (of_x, of_w, of_g) = _noises(w, seed, rows), _each(amax)
  tokens = tuple(range(x.ndim - 1))
  grad = lambda operand: (g, noise['tokens'], operand, *of_g)
  dx = _product(implementation, recipe.dgrad, grad(DGRAD_G), (w, noise['w'], DGRAD_W, *of_w), ((g.ndim - 1,), (1,)))
  dw = _product(implementation, recipe.wgrad, (x, noise['tokens'], WGRAD_X, *of_x), grad(WGRAD_G), (tokens, tokens))
  zero = lambda x: None if x is None else np.zeros(x.shape, jax.dtypes.float0)
  now = None if amax is None else jnp.stack([_largest(each) for each in (x, w, g)])
  return dx.astype(x.dtype), dw.astype(w.dtype), zero(seed), zero(rows), now


_matmul.defvjp(_forward, _backward)


def _each(amax: Array | None) -> tuple[tuple[Array, ...], ...]:
  """(amax,) of x, of w and of the gradient; () for each without."""
  return ((), (), ()) if amax is None else ((amax[0],), (amax[1],), (amax[2],))


def _largest(x: Array) -> Array:
  return reference.largest_size(x.astype(jnp.float32), tuple(range(x.ndim))).reshape(())


def _noises(w: Array, seed, rows) -> dict[str, Noise | None]:
  if seed is None:
    return {'tokens': None, 'w': None}
  return {'tokens': Noise(seed, rows), 'w': Noise(seed, index(w.shape[:1]))}


def kind_of(pair: Pair, dims) -> str:
  """The class of a product in tuning/CHIP.json: which of a weight's products, the formats, how they are rounded."""
  formats = dict.fromkeys(operand.format for operand in pair)
  random = ('stochastic',) if any(operand.is_random for operand in pair) else ()
  return '_'.join((LAYOUTS[dims[0][0] == 0, dims[1][0] == 0], *formats, *random))


def fastest(a: Array, b: Array, pair: Pair, dims) -> str:
  """What 'auto' runs: the implementation whose schedule was the fastest on this chip in the nearest tuned shape.

  'xla' without such an entry, on several devices, and where the kernel lacks the product.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if (not mesh.empty and mesh.size > 1) or not tpu.fits(a, pair, dims):
    return 'xla'
  own = lambda x, axes: math.prod(n for axis, n in enumerate(x.shape) if axis not in axes)
  sizes = own(a, dims[0]), math.prod(a.shape[axis] for axis in dims[0]), own(b, dims[1])
  return tuned.fastest(OP, kind_of(pair, dims), sizes, TUNED) or 'xla'


def _product(implementation: str, pair: Pair | None, a: Any, b: Any, dims) -> Array:
  """A product over `dims` of two (array, noise, number of the operand), with delayed scales also an amax."""
  if pair is None:
    return jax.lax.dot_general(a[0], b[0], (dims, ((), ())))
  if implementation == 'auto':
    implementation = fastest(a[0], b[0], pair, dims)
  sides = ((x, None if noise is None else noise.of(number), *amax) for x, noise, number, *amax in (a, b))
  return IMPLEMENTATIONS[implementation](*sides, pair, dims)
