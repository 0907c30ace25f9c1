"""`quantized_matmul`: a product that quantizes its operands, and those of both its gradients, by a recipe."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.errors import KernelError
from pallas_kernels.quantized_matmul import reference, tpu, xla
from pallas_kernels.quantized_matmul.formats import FORMATS, Operand, Pair, Recipe
from pallas_kernels.quantized_matmul.rounding import Noise

__all__ = ['FORMATS', 'IMPLEMENTATIONS', 'Operand', 'Recipe', 'check', 'quantized_matmul']

# `interpret` runs `tpu` on any platform, slowly: for tests.
IMPLEMENTATIONS = {
  'reference': reference.product,
  'xla': xla.product,
  'tpu': tpu.product,
  'interpret': functools.partial(tpu.product, interpret=True),
}
FORWARD_X, FORWARD_W, DGRAD_G, DGRAD_W, WGRAD_X, WGRAD_G = range(6)  # numbers of the operands, for their random bits


def check(implementation: str) -> str:
  """The implementation to run: 'xla' for 'auto'. Raises KernelError for one that does not exist, or not on this mesh.

  The platform is that of the mesh in use: a program may be compiled for devices that this process does not have.
  """
  if implementation == 'auto':
    return 'xla'
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
  implementation: str = 'auto',
) -> Array:  # fmt: skip
  """x[*tokens, inputs] times w[inputs, outputs] in x's dtype; gradients are those of the product without rounding,
  themselves products of quantized operands (the straight-through estimator, Bengio et al. 2013, arXiv:1308.3432).

  `seed` (uint32) and `rows` (uint32[*tokens], by default the tokens' indices) choose the random bits of stochastic
  rounding: a number's bits depend on the seed, on its row's number and on its column, and not on its device or tile.

  Raises KernelError for shapes that do not fit, blocks that do not divide, and stochastic rounding without a seed.
  """
  if w.ndim != 2 or x.ndim < 2 or x.shape[-1] != w.shape[0]:
    raise KernelError(f'quantized_matmul got x{x.shape}, w{w.shape}; pass x[*tokens, inputs] and w[inputs, outputs].')
  if seed is not None:
    seed = jnp.asarray(seed, jnp.uint32)
    rows = index(x.shape[:-1]) if rows is None else rows
  return _matmul(recipe, check(implementation), x, w, seed, rows)


def index(shape: tuple[int, ...]) -> Array:
  """uint32 of `shape`: each element's place in row-major order."""
  return jnp.arange(int(np.prod(shape)), dtype=jnp.uint32).reshape(shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(recipe: Recipe, implementation: str, x: Array, w: Array, seed, rows) -> Array:
  return _forward(recipe, implementation, x, w, seed, rows)[0]


def _forward(recipe: Recipe, implementation: str, x: Array, w: Array, seed, rows):
  noise = _noises(w, seed, rows)
  sides = (x, noise['tokens'], FORWARD_X), (w, noise['w'], FORWARD_W)
  out = _product(implementation, recipe.forward, *sides, ((x.ndim - 1,), (0,)))
  return out.astype(x.dtype), (x, w, seed, rows)


def _backward(recipe: Recipe, implementation: str, saved, g: Array):
  x, w, seed, rows = saved
  noise, tokens = _noises(w, seed, rows), tuple(range(x.ndim - 1))
  of_g = lambda operand: (g, noise['tokens'], operand)
  dx = _product(implementation, recipe.dgrad, of_g(DGRAD_G), (w, noise['w'], DGRAD_W), ((g.ndim - 1,), (1,)))
  dw = _product(implementation, recipe.wgrad, (x, noise['tokens'], WGRAD_X), of_g(WGRAD_G), (tokens, tokens))
  zero = lambda x: None if x is None else np.zeros(x.shape, jax.dtypes.float0)
  return dx.astype(x.dtype), dw.astype(w.dtype), zero(seed), zero(rows)


_matmul.defvjp(_forward, _backward)


def _noises(w: Array, seed, rows) -> dict[str, Noise | None]:
  if seed is None:
    return {'tokens': None, 'w': None}
  return {'tokens': Noise(seed, rows), 'w': Noise(seed, index(w.shape[:1]))}


def _product(implementation: str, pair: Pair | None, a: Any, b: Any, dims) -> Array:
  """A product over `dims` of two (array, noise, number of the operand)."""
  if pair is None:
    return jax.lax.dot_general(a[0], b[0], (dims, ((), ())))
  sides = ((x, None if noise is None else noise.of(number)) for x, noise, number in (a, b))
  return IMPLEMENTATIONS[implementation](*sides, pair, dims)
