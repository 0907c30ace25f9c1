"""One product of an activation and a weight, quantized where the weight's metadata says so."""

import contextlib
import contextvars
import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from models.specs import cast
from pallas_kernels.quantized_matmul.api import quantized_matmul
from pallas_kernels.quantized_matmul.formats import Recipe
from pallas_kernels.quantized_matmul.rounding import mix

KEY = 'quantization'  # in the metadata of a weight
KEPT = 'quantized_product'  # the name of results that `model.remat = 'dots'` keeps

_keys: contextvars.ContextVar[Array | None] = contextvars.ContextVar('rounding', default=None)


@dataclasses.dataclass(frozen=True)
class Quantization:
  """How the products of one weight are quantized; `site` is another number for each weight of a model."""

  recipe: Recipe
  site: int
  implementation: str


@contextlib.contextmanager
def rounding(keys: Array | None):
  """Inside, stochastic rounding takes its random bits from `keys`, one for each example of the batch."""
  token = _keys.set(keys)
  try:
    yield
  finally:
    _keys.reset(token)


def contracted(x: Array, w: Array, dims: int) -> Array:
  """`x[..., *c]` times `w[*c, ...]`, summed over the `dims` dims c."""
  own = tuple(range(x.ndim - dims, x.ndim))
  return jax.lax.dot_general(x, w, ((own, tuple(range(dims))), ((), ())))


def product(x: Array, w: nnx.Param, dims: int) -> Array:
  """`contracted` in x's dtype; quantized if `w` has a `Quantization`, with blocks along the dims c as one."""
  own = w.get_metadata().get(KEY)
  return contracted(x, cast(w, x), dims) if own is None else _quantized(x, cast(w, x), dims, own)


def _quantized(x: Array, w: Array, dims: int, own: Quantization) -> Array:
  tokens, outputs = x.shape[: x.ndim - dims], w.shape[dims:]
  inputs = math.prod(w.shape[:dims])
  noise = {} if not own.recipe.is_random else _noise(tokens, own.site)
  out = quantized_matmul(
    x.reshape(*tokens, inputs), w.reshape(inputs, -1), own.recipe, implementation=own.implementation, **noise
  )
  return checkpoint_name(out.reshape(*tokens, *outputs), KEPT)


def _noise(tokens: tuple[int, ...], site: int) -> dict[str, Array]:
  """A number for each token, that depends on its example's key and its position only; none without keys."""
  keys = _keys.get()
  if keys is None:
    return {}
  words = jax.random.key_data(keys)
  example = mix(words[:, 0] ^ mix(words[:, 1]))
  position = mix(jnp.arange(tokens[1], dtype=jnp.uint32))
  return {'seed': jnp.uint32(site), 'rows': mix(example[:, None] ^ position)}
