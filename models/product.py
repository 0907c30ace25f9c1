"""One product of an activation and a weight, quantized where the weight's metadata says so."""

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from models.partition import PARAMETER_RULES, divides, entries_of
from models.specs import cast, is_variable
from pallas_kernels.quantized_matmul.api import Division, quantized_matmul
from pallas_kernels.quantized_matmul.formats import Operand, Recipe
from pallas_kernels.quantized_matmul.reference import quantize
from pallas_kernels.quantized_matmul.rounding import mix

KEY = 'quantization'  # in the metadata of a weight
KEPT = 'quantized_product'  # the name of results that `model.remat = 'dots'` keeps


class Around(NamedTuple):
  """What a product depends on besides its operands: the keys of the examples, whether the layer is one of the first or
  last, and for delayed scales the amax of earlier steps, f32[layers, 3] or in a layer f32[3] by the weight's name.
  """

  keys: Array | None = None
  edge: bool = False
  amax: Mapping[str, Array] | None = None


NOTHING = Around()
_around: contextvars.ContextVar[Around] = contextvars.ContextVar('around', default=NOTHING)


@dataclasses.dataclass(frozen=True)
class Quantization:
  """How the products of one weight are quantized; None: not. `site` is another number for each weight of a model.

  `edge` is the recipe in the first and last layers, `name` the path of the weight.
  """

  recipe: Recipe | None
  site: int
  implementation: str
  edge: Recipe | None = None
  name: str = ''


@contextlib.contextmanager
def within(**changes):
  """Inside, these fields of `Around` are changed; a scan or jit must be traced as a whole inside or outside."""
  token = _around.set(_around.get()._replace(**changes))
  try:
    yield
  finally:
    _around.reset(token)


def rounding(keys: Array | None):
  """Inside, stochastic rounding takes its random bits from `keys`, one for each example of the batch."""
  return within(keys=keys)


def amax_of(module: nnx.Module) -> dict[str, Array]:
  """What the weights of `module` have in `Around.amax`."""
  amax = _around.get().amax or {}
  leaves = jax.tree.leaves(nnx.state(module), is_leaf=is_variable) if amax else []
  own = [leaf.get_metadata()[KEY].name for leaf in leaves if KEY in leaf.get_metadata()]
  return {name: amax[name] for name in own if name in amax}


def contracted(x: Array, w: Array, dims: int) -> Array:
  """`x[..., *c]` times `w[*c, ...]`, summed over the `dims` dims c."""
  own = tuple(range(x.ndim - dims, x.ndim))
  return jax.lax.dot_general(x, w, ((own, tuple(range(dims))), ((), ())))


def product_of_heads(x: Array, w: nnx.Param) -> Array:
  """`x[batch, heads, length, head_dim]` times `w[heads, head_dim, embed]`: [batch, length, embed], in x's dtype.

  The weight is turned to [embed, heads, head_dim], as those of queries are. With it the compiler for TPU reads x, and
  writes its gradient, in the order that x has; with the weight as it is, it copies both. The barrier keeps it turned:
  a device turns its own shard, before it is gathered.
  """
  own, recipe = _recipe_of(w)
  if own is not None and recipe is not None:
    if recipe.weights is not None:
      return product(jnp.swapaxes(x, 1, 2), w, 2)
    return _quantized(x, w, (1, 3), own, recipe)
  turned = jax.lax.optimization_barrier(jnp.moveaxis(cast(w, x), 2, 0))
  return jax.lax.dot_general(x, turned, (((1, 3), (1, 2)), ((), ())))


def product(x: Array, w: nnx.Param, dims: int) -> Array:
  """`contracted` in x's dtype; quantized if `w` has a `Quantization`, with blocks along the dims c as one."""
  own, recipe = _recipe_of(w)
  if own is None or recipe is None:
    return contracted(x, cast(w, x), dims)
  if recipe.weights is not None:
    return contracted(x, stored(w[...], dims, recipe.weights).astype(x.dtype), dims)
  return _quantized(x, w, tuple(range(x.ndim - dims, x.ndim)), own, recipe)


def _recipe_of(w: nnx.Param) -> tuple[Quantization | None, Recipe | None]:
  """How the products of `w` are quantized, and the recipe in this layer; None where they are not."""
  own = w.get_metadata().get(KEY)
  return own, None if own is None else own.edge if _around.get().edge else own.recipe


def stored(w: Array, dims: int, operand: Operand) -> Array:
  """f32: the numbers that the codes of `w` stand for; its first `dims` dims are summed over."""
  inputs = math.prod(w.shape[:dims])
  found = quantize(w.reshape(inputs, -1), (0,), operand)
  return (found.values * found.scale).reshape(w.shape)


def _quantized(x: Array, param: nnx.Param, axes: tuple[int, ...], own: Quantization, recipe: Recipe) -> Array:
  """x times the weight, summed over `axes` of x and its first dims. Blocks lie along all of the dims as one."""
  w = cast(param, x)
  tokens, outputs = [axis for axis in range(x.ndim) if axis not in axes], w.shape[len(axes) :]
  sizes = tuple(x.shape[axis] for axis in tokens)
  beside = _noise(sizes, own.site) if recipe.is_random else {}
  if recipe.is_delayed:
    beside |= {'amax': (_around.get().amax or {}).get(own.name)}
  division = None  # formats in blocks have no kernel, which alone needs it
  if any(recipe.block(name) > 1 for name in recipe.pairs):
    inputs = math.prod(w.shape[: len(axes)])
    x, w, axes = jnp.transpose(x, (*tokens, *axes)).reshape(*sizes, inputs), w.reshape(inputs, -1), (len(sizes),)
  else:
    division = _division(x, param, axes)
  out = quantized_matmul(x, w, recipe, axes=axes, implementation=own.implementation, division=division, **beside)
  return checkpoint_name(out.reshape(*sizes, *outputs), KEPT)


def _division(x: Array, w: nnx.Param, axes: tuple[int, ...]) -> Division | None:
  """How the mesh in use divides w and x[batch, …, length, …], whose dims `axes` are the first ones of the weight; None
  without a mesh, where stages of a pipeline share a product, and for other x (a table of positions).
  """
  if jax.sharding.get_abstract_mesh().empty or divides('stages') or x.ndim != len(axes) + 2:
    return None
  names = w.get_metadata()['axes'][-w[...].ndim :]  # a layer of a stack is without the axis `layers`
  inputs, tokens = iter(names[: len(axes)]), iter(('batch', 'length'))
  of_x = tuple(next(inputs if axis in axes else tokens) for axis in range(x.ndim))
  return Division(entries_of(of_x), entries_of(names), entries_of(names, PARAMETER_RULES))


def _noise(tokens: tuple[int, ...], site: int) -> dict[str, Array]:
  """A number for each token, that depends on its example's key and its position only; none without keys. `tokens` is
  [batch, length], or the length of a table that all examples share, whose numbers depend on all keys.
  """
  keys = _around.get().keys
  if keys is None:
    return {}
  words = jax.random.key_data(keys)
  example = mix(words[:, 0] ^ mix(words[:, 1]))
  position = mix(jnp.arange(tokens[-1], dtype=jnp.uint32))
  if len(tokens) == 1:
    shared = jax.lax.reduce(example, jnp.uint32(0), jax.lax.bitwise_xor, (0,))
    return {'seed': jnp.uint32(site), 'rows': mix(shared ^ position)}
  return {'seed': jnp.uint32(site), 'rows': mix(example[:, None] ^ position)}
