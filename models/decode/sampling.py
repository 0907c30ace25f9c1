"""The next token: the most likely one, or one drawn from the probabilities that the filters leave."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

PRNG = 'threefry2x32'  # in any environment: a seed gives the same text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
  """How a token is chosen. `temperature=None` takes the most likely token; then `top_k` and `top_p` change nothing.

  Filters apply in this order, as in `transformers` (generation/logits_process.py): `repetition_penalty` divides the
  positive logits of tokens that were read or written by it and multiplies the negative ones (Keskar et al. 2019,
  arXiv:1909.05858, §4.1); logits are divided by `temperature`; `top_k` keeps the k most likely tokens; `top_p` keeps
  the fewest tokens whose probabilities sum to at least p (Holtzman et al. 2020, arXiv:1904.09751, §3.1). Tokens as
  likely as the last one kept are kept too.
  """

  temperature: float | None = None
  top_k: int | None = None
  top_p: float | None = None
  repetition_penalty: float = 1.0

  def penalized(self, logits: Array, seen: Array | None) -> Array:
    """Logits [batch, vocab] with the penalty on tokens that are `seen` (bool[batch, vocab])."""
    if seen is None:
      return logits
    penalty = self.repetition_penalty
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)

  def filtered(self, logits: Array) -> Array:
    """Logits [batch, vocab] divided by the temperature; -inf for tokens that are not kept."""
    logits = logits / self.temperature
    if self.top_k is not None and self.top_k < logits.shape[-1]:
      logits = _at_least(logits, jax.lax.top_k(logits, self.top_k)[0][..., -1:])
    return logits if self.top_p is None else _at_least(logits, _least_of_top_p(logits, self.top_p))

  def choose(self, logits: Array, seen: Array | None, keys: Array | None) -> Array:
    """int32[batch] tokens; row i draws with `keys[i]`."""
    logits = self.penalized(logits, seen)
    if self.temperature is None:
      return jnp.argmax(logits, -1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, self.filtered(logits)).astype(jnp.int32)


def _at_least(logits: Array, least: Array) -> Array:
  return jnp.where(logits < least, -jnp.inf, logits)


def _least_of_top_p(logits: Array, top_p: float) -> Array:
  """[batch, 1]: the logit of the last token kept. The sum of the probabilities below it is at most 1 - top_p."""
  ascending = jnp.sort(logits, -1)
  kept = jnp.cumsum(jax.nn.softmax(ascending, -1), -1) > 1 - top_p
  kept = kept.at[:, -1].set(True)
  return jnp.min(jnp.where(kept, ascending, jnp.inf), -1, keepdims=True)


def row_keys(seed: Array, numbers: Array) -> Array:
  """A key for each row from the seed and the number of its prompt: the same in a batch of any size."""
  key = jax.random.key(seed, impl=PRNG)
  return jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers)


def step_keys(keys: Array, index: Array) -> Array:
  return jax.vmap(lambda key: jax.random.fold_in(key, index))(keys)
