"""An exact beam search: the most likely texts after one prompt, each with its probability."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from models.build import Model
from models.decode.cached import start
from models.layers.attention import Cache
from models.specs import Tree


class Sequences(NamedTuple):
  """Written tokens, the most likely first: `log_probs[i]` belongs to `tokens[i, :lengths[i]]`, -inf to no sequence."""

  log_probs: Array
  tokens: Array
  lengths: Array

  @classmethod
  def none(cls, number: int, max_tokens: int) -> 'Sequences':
    return cls(
      jnp.full(number, -jnp.inf, jnp.float32), jnp.zeros((number, max_tokens), jnp.int32), jnp.zeros(number, jnp.int32)
    )

  def best(self, other: 'Sequences') -> 'Sequences':
    """As many as `self` holds, out of both; of equally likely ones, those of `self` come first."""
    log_probs, chosen = jax.lax.top_k(jnp.concatenate([self.log_probs, other.log_probs]), len(self.log_probs))
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b])[chosen], self[1:], other[1:])
    return Sequences(log_probs, *both)


@functools.partial(jax.jit, static_argnames=('model', 'max_tokens', 'width', 'decoder_start'))
def beam(
  model: Model,
  params: Tree,
  batch: Mapping[str, Array],
  forced: Array,
  allowed: Array,
  ends: Array,
  max_tokens: int,
  width: int,
  *,
  decoder_start: int,
) -> tuple[Sequences, Sequences]:
  """(ended, open): the `width` most likely sequences that a beam search finds after the one prompt of `batch`.

  The decoder first reads `forced` int32[tokens]. It then writes tokens of `allowed` bool[vocab]; a sequence ends where
  any token of `ends` bool[vocab] follows. The probability of an ended sequence is the product of the probabilities of
  its tokens and of the sum over `ends`; `open` ones have `max_tokens` tokens, or are less likely than all `ended` ones,
  and count their tokens alone. The softmax is over the whole vocabulary, as in the loss.

  Source: Sutskever et al. 2014, arXiv:1409.3215, §3.2 (an ended sequence leaves the beam); Huang et al. 2017,
  arXiv:1809.00069, §3 (probabilities only fall, so the search is over when the last of `width` ended sequences is at
  least as likely as the first open one). Ties go to the lower token id and the earlier sequence: no randomness.
  """
  rows = {name: jnp.repeat(jnp.asarray(values), width, axis=0) for name, values in batch.items()}
  step, carry, token = start(model.bind(params), rows, len(forced) + max_tokens, decoder_start)
  carry = _read(step, carry, token, jnp.broadcast_to(forced, (width, len(forced))))
  log_softmax = lambda hidden: jax.nn.log_softmax(model.logits(params, hidden[:, -1]))
  return _search(step, log_softmax, carry, allowed, ends, max_tokens)


def _read(step, carry: tuple[Array, Cache], token: Array | None, forced: Array) -> tuple[Array, Cache]:
  """(hidden of the last token read, cache) once `token`, if there is one, and `forced` have been read."""
  tokens = forced if token is None else jnp.concatenate([token, forced], 1)
  return step(tokens, carry[1]) if tokens.shape[1] else carry


def _search(step, log_softmax, carry, allowed: Array, ends: Array, max_tokens: int) -> tuple[Sequences, Sequences]:
  hidden, cache = carry
  width = hidden.shape[0]
  only = lambda mask: jnp.where(mask, 0.0, -jnp.inf).astype(jnp.float32)

  def ended(hidden, done: Sequences, beam: Sequences) -> Sequences:
    end = jax.nn.logsumexp(log_softmax(hidden) + only(ends), -1)
    return done.best(beam._replace(log_probs=beam.log_probs + end))

  def unfinished(state):
    index, _, _, done, beam = state
    return (index < max_tokens) & (beam.log_probs.max() > done.log_probs[-1])

  def body(state):
    index, hidden, cache, done, beam = state
    done = ended(hidden, done, beam)
    following = beam.log_probs[:, None] + log_softmax(hidden) + only(allowed)
    log_probs, chosen = jax.lax.top_k(following.reshape(-1), width)
    parents, token = chosen // following.shape[1], (chosen % following.shape[1]).astype(jnp.int32)
    beam = Sequences(log_probs, beam.tokens[parents].at[:, index].set(token), beam.lengths[parents] + 1)
    hidden, cache = step(token[:, None], Cache(cache.keys[:, parents], cache.values[:, parents], cache.index))
    return index + 1, hidden[:, -1:], cache, done, beam

  empty = Sequences.none(width, max_tokens)
  first = empty._replace(log_probs=empty.log_probs.at[0].set(0.0))  # all rows hold the same prompt: one may go on
  state = (jnp.zeros((), jnp.int32), hidden[:, -1:], cache, empty, first)
  _, hidden, _, done, beam = jax.lax.while_loop(unfinished, body, state)
  return ended(hidden, done, beam), beam
