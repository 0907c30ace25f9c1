"""Cross entropy of a linear head in chunks of tokens: logits are held for one chunk at a time.

`weighed` knows the weights of the sum, so the forward pass makes the gradient of a chunk while it has its logits: they
are made once, and neither they nor their gradient are kept. Both functions run on one device's part of the tokens; with
`axis`, a mesh axis of a shard_map, also of the vocabulary.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array

CHUNK = 1 << 27  # logits of a chunk, 512 MiB in f32
LEAST = 1024  # tokens: smaller products leave the matrix units waiting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
  """What does not change along the tokens; `vocab` is the whole vocabulary, of which `axis` has parts."""

  vocab: int
  axis: str | None
  chunks: int
  z_loss: float
  softcap: float | None
  label_smoothing: float


def count_chunks(tokens: int, vocab: int) -> int:
  """The number of chunks: each has at most CHUNK logits, but at least LEAST tokens.

  >>> count_chunks(8192, 262144), count_chunks(512, 262144)
  (8, 1)
  """
  return max(1, min(-(-tokens * vocab // CHUNK), tokens // LEAST))


def _specify(x: Array, w: Array, axis: str | None, chunks: int | None, options: dict) -> Spec:
  tokens = x.size // x.shape[-1]
  chunks = count_chunks(tokens, w.shape[1]) if chunks is None else min(chunks, tokens)
  vocab = w.shape[1] if axis is None else w.shape[1] * jax.lax.axis_size(axis)
  return Spec(vocab=vocab, axis=axis, chunks=chunks, **options)


def _split(x: Array, chunks: int, width: tuple[int, ...] = ()) -> Array:
  """[..., *width] -> [chunks, tokens of a chunk, *width], padded with 0."""
  x = x.reshape(-1, *width)
  size = -(-x.shape[0] // chunks)
  return jnp.pad(x, [(0, size * chunks - x.shape[0])] + [(0, 0)] * len(width)).reshape(chunks, size, *width)


def _chunks(spec: Spec, x: Array, *of_tokens: Array) -> tuple[Array, ...]:
  return _split(x, spec.chunks, x.shape[-1:]), *(_split(each, spec.chunks) for each in of_tokens)


def _over(axis: str | None, x: Array) -> Array:
  return x if axis is None else jax.lax.psum(x, axis)


def _logits(spec: Spec, x: Array, w: Array, bias: Array | None) -> Array:
  logits = jax.lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
  logits = logits if bias is None else logits + bias
  return logits if spec.softcap is None else spec.softcap * jnp.tanh(logits / spec.softcap)


def _hits(spec: Spec, logits: Array, labels: Array) -> Array:
  """bool[tokens, vocab]: where the label is."""
  first = 0 if spec.axis is None else jax.lax.axis_index(spec.axis) * logits.shape[1]
  return jax.lax.broadcasted_iota(labels.dtype, logits.shape, 1) == (labels - first)[:, None]


def _losses(spec: Spec, logits: Array, labels: Array) -> tuple[Array, Array, Array]:
  """(loss, lse, correct) of each token, as `reference.linear_cross_entropy` has them."""
  top = jax.lax.stop_gradient(logits.max(-1))
  top = top if spec.axis is None else jax.lax.pmax(top, spec.axis)
  lse = top + jnp.log(_over(spec.axis, jnp.exp(logits - top[:, None]).sum(-1)))
  label_logit = _over(spec.axis, jnp.where(_hits(spec, logits, labels), logits, 0.0).sum(-1))
  loss = lse - label_logit
  if spec.label_smoothing:
    mean = _over(spec.axis, logits.sum(-1)) / spec.vocab
    loss = (1 - spec.label_smoothing) * loss + spec.label_smoothing * (lse - mean)
  return loss + spec.z_loss * jnp.square(lse), lse, label_logit >= top


def _by_logits(spec: Spec, logits: Array, labels: Array, lse: Array, weights: Array) -> Array:
  """f32[tokens, vocab]: the gradient of sum(weights * loss) to x w + bias."""
  own = (1 + 2 * spec.z_loss * lse)[:, None] * jnp.exp(logits - lse[:, None])
  own = own - jnp.where(_hits(spec, logits, labels), 1 - spec.label_smoothing, 0.0) - spec.label_smoothing / spec.vocab
  own = own if spec.softcap is None else own * (1 - jnp.square(logits / spec.softcap))
  return own * weights[:, None]


def linear_cross_entropy(
  x: Array,
  w: Array,
  labels: Array,
  *,
  bias: Array | None = None,
  axis: str | None = None,
  chunks: int | None = None,
  **options,
) -> tuple[Array, Array, Array]:
  """`reference.linear_cross_entropy`; the backward pass makes the logits of each chunk again."""
  spec = _specify(x, w, axis, chunks, options)
  w, bias = w.astype(x.dtype), None if bias is None else bias.astype(jnp.float32)
  one = lambda chunk: _losses(spec, _logits(spec, chunk[0], w, bias), chunk[1])
  return _join(jax.lax.map(jax.checkpoint(one, prevent_cse=False), _chunks(spec, x, labels)), labels)


def _join(parts, labels: Array):
  return jax.tree.map(lambda part: part.reshape(-1)[: labels.size].reshape(labels.shape), parts)


def weighed(
  x: Array,
  w: Array,
  labels: Array,
  weights: Array,
  *,
  bias: Array | None = None,
  axis: str | None = None,
  chunks: int | None = None,
  **options,
) -> tuple[Array, tuple[Array, Array, Array]]:
  """(sum(weights * loss) of this device's tokens, what `linear_cross_entropy` returns).

  The sum has a gradient to x, w and bias; weights have none, and neither have the other results.
  """
  spec = _specify(x, w, axis, chunks, options)
  bias = None if bias is None else bias.astype(jnp.float32)
  return _weighed(spec, x, w.astype(x.dtype), bias, labels, weights.astype(jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighed(spec: Spec, x: Array, w: Array, bias: Array | None, labels: Array, weights: Array):
  one = lambda chunk: _losses(spec, _logits(spec, chunk[0], w, bias), chunk[1])
  found = _join(jax.lax.map(one, _chunks(spec, x, labels)), labels)
  return (found[0] * weights).sum(), found


def _forward(spec: Spec, x: Array, w: Array, bias: Array | None, labels: Array, weights: Array):
  def visit(carry, chunk):
    own_x, own_labels, own_weights = chunk
    logits = _logits(spec, own_x, w, bias)
    losses = _losses(spec, logits, own_labels)
    by_logits = _by_logits(spec, logits, own_labels, losses[1], own_weights)
    low = by_logits.astype(x.dtype)
    by_x = jax.lax.dot_general(low, w, (((1,), (1,)), ((), ())), preferred_element_type=x.dtype)
    by_w = jax.lax.dot_general(own_x, low, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    by_bias = None if bias is None else carry[1] + by_logits.sum(0)
    return (carry[0] + by_w, by_bias), (losses, by_x)

  start = jnp.zeros(w.shape, jnp.float32), None if bias is None else jnp.zeros_like(bias)
  (by_w, by_bias), (losses, by_x) = jax.lax.scan(visit, start, _chunks(spec, x, labels, weights))
  losses = _join(losses, labels)
  by_x = by_x.reshape(-1, x.shape[-1])[: labels.size].reshape(x.shape)
  return ((losses[0] * weights).sum(), losses), (by_x, by_w.astype(w.dtype), by_bias)


def _backward(spec: Spec, saved, gradients):
  """The gradient of x is here a part, of this device's vocabulary: shard_map adds parts of what is not divided, and
  gives each device along `axis` its share of the sum's gradient.
  """
  scale = _over(spec.axis, gradients[0])
  by_x, by_w, by_bias = (None if part is None else (part * scale.astype(part.dtype)) for part in saved)
  return by_x, by_w, by_bias, None, None


_weighed.defvjp(_forward, _backward)
