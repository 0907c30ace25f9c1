"""Cross entropy of a linear head in chunks of tokens: f32 logits are held for one chunk at a time.

`weighed` knows the weights of the sum, so the forward pass makes the gradient of a chunk's logits while it has them:
logits are made once. Their gradient is held in the dtype of `x` for a part of the tokens, which has many chunks, and is
then multiplied twice, for the gradients of x and w. One part for all tokens takes the fewest cycles: a product that
adds to an earlier one takes longer than one that does not, and so does a product of few tokens.

Both functions run on one device's part of the tokens; with `axis`, a mesh axis of a shard_map, also of the vocabulary.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array

CHUNK = 1 << 27  # logits of a chunk, 512 MiB in f32
PART = 1 << 31  # logits of a part, whose gradient is 4 GiB in bfloat16
LEAST = 1024  # tokens: smaller products leave the matrix units waiting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
  """What does not change along the tokens; `vocab` is the whole vocabulary, of which `axis` has shares. Each of `parts`
  has `chunks`.
  """

  vocab: int
  axis: str | None
  parts: int
  chunks: int
  z_loss: float
  softcap: float | None
  label_smoothing: float


def split(tokens: int, vocab: int) -> tuple[int, int]:
  """(parts, chunks of a part): at most PART and CHUNK logits, but at least LEAST tokens.

  >>> split(32768, 65536), split(65536, 65536), split(512, 262144)
  ((1, 16), (2, 16), (1, 1))
  """
  number = lambda tokens, logits: max(1, min(-(-tokens * vocab // logits), tokens // LEAST))
  parts = number(tokens, PART)
  return parts, number(-(-tokens // parts), CHUNK)


def _specify(x: Array, w: Array, axis: str | None, number: tuple[int, int] | None, options: dict) -> Spec:
  parts, chunks = split(x.size // x.shape[-1], w.shape[1]) if number is None else number
  vocab = w.shape[1] if axis is None else w.shape[1] * jax.lax.axis_size(axis)
  return Spec(vocab=vocab, axis=axis, parts=parts, chunks=chunks, **options)


def _split(number: int, x: Array, *of_tokens: Array) -> tuple[Array, ...]:
  """x[..., embed] and others [...] -> [number, tokens, embed] and [number, tokens], padded with 0."""
  tokens = x.size // x.shape[-1]
  size = -(-tokens // number)

  def one(each: Array, *width: int) -> Array:
    padding = [(0, size * number - tokens)] + [(0, 0)] * len(width)
    return jnp.pad(each.reshape(tokens, *width), padding).reshape(number, size, *width)

  return one(x, x.shape[-1]), *map(one, of_tokens)


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
  number: tuple[int, int] | None = None,
  **options,
) -> tuple[Array, Array, Array]:
  """`reference.linear_cross_entropy`; the backward pass makes the logits of each chunk again."""
  spec = _specify(x, w, axis, number, options)
  w, bias = w.astype(x.dtype), None if bias is None else bias.astype(jnp.float32)
  one = lambda chunk: _losses(spec, _logits(spec, chunk[0], w, bias), chunk[1])
  return _join(jax.lax.map(jax.checkpoint(one, prevent_cse=False), _split(spec.parts * spec.chunks, x, labels)), labels)


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
  number: tuple[int, int] | None = None,
  **options,
) -> tuple[Array, tuple[Array, Array, Array]]:
  """(sum(weights * loss) of this device's tokens, what `linear_cross_entropy` returns); `number`: as `split` returns.

  The sum has a gradient to x, w and bias; weights have none, and neither have the other results.
  """
  spec = _specify(x, w, axis, number, options)
  bias = None if bias is None else bias.astype(jnp.float32)
  return _weighed(spec, x, w.astype(x.dtype), bias, labels, weights.astype(jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighed(spec: Spec, x: Array, w: Array, bias: Array | None, labels: Array, weights: Array):
  one = lambda chunk: _losses(spec, _logits(spec, chunk[0], w, bias), chunk[1])
  found = _join(jax.lax.map(one, _split(spec.parts * spec.chunks, x, labels)), labels)
  return (found[0] * weights).sum(), found


def _forward(spec: Spec, x: Array, w: Array, bias: Array | None, labels: Array, weights: Array):
  parts = _split(spec.parts, x, labels, weights)
  size = -(-parts[0].shape[1] // spec.chunks) * spec.chunks
  held = jax.lax.empty((size, w.shape[1]), x.dtype)  # not zeros: filling it takes as long as writing it twice
  one = functools.partial(_part, spec, w, bias)
  if spec.parts == 1:
    _, by_w, by_bias, found = one(held, tuple(each[0] for each in parts))
  else:

    def visit(carry, part):
      held, by_w, by_bias = carry
      held, own_w, own_bias, found = one(held, part)
      return (held, by_w + own_w, None if bias is None else by_bias + own_bias), found

    start = held, jnp.zeros(w.shape, jnp.float32), None if bias is None else jnp.zeros_like(bias)
    (_, by_w, by_bias), found = jax.lax.scan(visit, start, parts)
  *losses, by_x = found
  losses = _join(tuple(losses), labels)
  by_x = by_x.reshape(-1, x.shape[-1])[: labels.size].reshape(x.shape)
  return ((losses[0] * weights).sum(), losses), (by_x, by_w.astype(w.dtype), by_bias)


def _part(spec: Spec, w: Array, bias: Array | None, held: Array, part: tuple[Array, ...]):
  """(held, gradients of w in f32 and of bias, (loss, lse, correct, gradient of x)) of the part's tokens.

  `held` is a buffer for the gradient of the part's logits.
  """
  x, labels, _ = part

  def visit(carry, chunk):
    held, by_bias = carry
    at, own_x, own_labels, own_weights = chunk
    logits = _logits(spec, own_x, w, bias)
    losses = _losses(spec, logits, own_labels)
    by_logits = _by_logits(spec, logits, own_labels, losses[1], own_weights)
    held = jax.lax.dynamic_update_slice_in_dim(held, by_logits.astype(held.dtype), at * own_x.shape[0], 0)
    return (held, None if bias is None else by_bias + by_logits.sum(0)), losses

  start = held, None if bias is None else jnp.zeros_like(bias)
  chunks = jnp.arange(spec.chunks), *_split(spec.chunks, *part)
  (held, by_bias), losses = jax.lax.scan(visit, start, chunks)
  own = held[: x.shape[0]]
  by_x = jax.lax.dot_general(own, w, (((1,), (1,)), ((), ())), preferred_element_type=x.dtype)
  by_w = jax.lax.dot_general(x, own, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
  return held, by_w, by_bias, (*_join(losses, labels), by_x)


def _backward(spec: Spec, saved, gradients):
  """The gradient of x is here a part, of this device's vocabulary: shard_map adds parts of what is not divided, and
  gives each device along `axis` its share of the sum's gradient.
  """
  scale = _over(spec.axis, gradients[0])
  by_x, by_w, by_bias = (None if part is None else (part * scale.astype(part.dtype)) for part in saved)
  return by_x, by_w, by_bias, None, None


_weighed.defvjp(_forward, _backward)
