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
  logits = jax.lax.dot_general(x, w.astype(x.dtype), (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
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
