"""Cross entropy of a linear head in plain JAX: the definition."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int


def linear_cross_entropy(
  x: Float[Array, 'tokens embed'],
  w: Float[Array, 'embed vocab'],
  labels: Int[Array, ' tokens'],
  *,
  bias: Float[Array, ' vocab'] | None = None,
  z_loss: float = 0.0,
  softcap: float | None = None,
  label_smoothing: float = 0.0,
) -> tuple[Float[Array, ' tokens'], Float[Array, ' tokens'], Bool[Array, ' tokens']]:
  """See `api.linear_cross_entropy`."""
  logits = (_product if softcap is None else _matmul)(x, w.astype(x.dtype))
  if bias is not None:
    logits = logits + bias.astype(jnp.float32)
  if softcap is not None:
    logits = softcap * jnp.tanh(logits / softcap)
  top = jax.lax.stop_gradient(logits.max(-1))
  lse = top + jnp.log(jnp.exp(logits - top[:, None]).sum(-1))
  # Compare with the label instead of a gather: the gradient needs no scatter, and a sharded vocabulary stays sharded.
  hit = jax.lax.broadcasted_iota(labels.dtype, logits.shape, 1) == labels[:, None]
  label_logit = jnp.where(hit, logits, 0.0).sum(-1)
  loss = lse - label_logit
  if label_smoothing:
    loss = (1 - label_smoothing) * loss + label_smoothing * (lse - logits.mean(-1))
  return loss + z_loss * jnp.square(lse), lse, label_logit >= top


def _matmul(x: Float[Array, 'tokens embed'], w: Float[Array, 'embed vocab']) -> Float[Array, 'tokens vocab']:
  return jax.lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


@jax.custom_vjp
def _product(x: Array, w: Array) -> Array:
  """`_matmul`. The gradient of x waits for that of w: otherwise the compiler may make the second one after those of all
  layers, and the logits stay in memory until then. Both are made in the dtype of x and w.

  Not for capped logits, whose gradient the compiler holds beside them: with that of w this is more than it spares.
  """
  return _matmul(x, w)


def _gradients(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
  x, w = saved
  dx = jax.lax.dot_general(g, w, (((1,), (1,)), ((), ())), preferred_element_type=x.dtype)
  dw = jax.lax.dot_general(x, g, (((0,), (0,)), ((), ())), preferred_element_type=w.dtype)
  return jax.lax.optimization_barrier((dx, dw))


_product.defvjp(lambda x, w: (_matmul(x, w), (x, w)), _gradients)
