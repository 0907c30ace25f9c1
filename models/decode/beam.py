"""Beam search with a length penalty, for a batch of prompts; the same outputs as `transformers`."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from models.build import Model
from models.decode.cached import repeated, start
from models.decode.writing import is_any, on_several
from models.layers.attention import Cache
from models.specs import Tree

NEVER = -1e9  # a score that no sequence has


class _Beams(NamedTuple):
  """Sequences of each prompt: scores f32[batch, beams], tokens int32[batch, beams, max_tokens], bool[batch, beams]."""

  scores: Array
  tokens: Array
  done: Array

  def take(self, chosen: Array) -> '_Beams':
    rows = jnp.arange(chosen.shape[0])[:, None]
    return _Beams(*(values[rows, chosen] for values in self))

  def best(self, number: int) -> '_Beams':
    return self.take(jax.lax.top_k(self.scores, number)[1])


@functools.partial(
  jax.jit, static_argnames=('model', 'max_tokens', 'vocab_size', 'beams', 'eos', 'pad', 'decoder_start')
)
def beam_search(
  model: Model, params: Tree, batch: Mapping[str, Array], max_tokens: int, vocab_size: int | None, beams: int,
  length_penalty: float | Array = 1.0, rooms: Array | None = None,
  *, eos: tuple[int, ...], pad: int, decoder_start: int,
) -> tuple[Array, Array]:  # fmt: skip
  """(tokens int32[batch, beams, max_tokens], scores f32[batch, beams]): the best outputs of each prompt, best first.

  A score is the sum of the log-probabilities of the tokens, EOS included, divided by their number to the power of
  `length_penalty`. An output ends with a token of `eos`, or after `rooms` (int32[batch]; None: `max_tokens`) tokens;
  the rest is `pad`. The search for a prompt ends when the best open sequence, scored at its length, is worse than
  the worst of `beams` ended ones. `batch`: see `models.decode.cached.start`.

  Source: transformers 5.24, generation/utils.py _beam_search with num_beams=beams and early_stopping=False.
  """
  rows = repeated(batch, beams)
  rooms = None if rooms is None else rooms[:, None]
  with on_several(model):
    step, carry, token = start(model.bind(params), rows, max_tokens, decoder_start)
    hidden, cache = carry if token is None else step(token, carry[1])
    log_probs = lambda hidden: jax.nn.log_softmax(model.logits(params, hidden[:, -1]))[:, :vocab_size]
    search = functools.partial(_grow, beams=beams, eos=eos, rooms=rooms, length_penalty=length_penalty)

    def alive(state):
      index, _, _, _, _, better, open_ = state
      return (index < max_tokens) & better.any() & open_

    def body(state):
      index, hidden, cache, running, ended, better, _ = state
      running, ended, better, parents, open_ = search(log_probs(hidden), index, running, ended, better)
      cache = Cache(cache.keys[:, parents], cache.values[:, parents], cache.index)
      token = jax.lax.dynamic_index_in_dim(running.tokens, index, 2)
      hidden, cache = step(token.reshape(-1, 1), cache)
      return index + 1, hidden[:, -1:], cache, running, ended, better, open_

    shape = (hidden.shape[0] // beams, beams)
    empty = jnp.full((*shape, max_tokens), pad, jnp.int32)
    first = jnp.full(shape, NEVER, jnp.float32).at[:, 0].set(0.0)  # all rows of a prompt are equal: one may go on
    running = _Beams(first, empty, jnp.zeros(shape, bool))
    ended = _Beams(jnp.full(shape, NEVER, jnp.float32), empty, jnp.zeros(shape, bool))
    better = jnp.ones((shape[0], 1), bool)
    state = (jnp.zeros((), jnp.int32), hidden[:, -1:], cache, running, ended, better, jnp.ones((), bool))
    ended = jax.lax.while_loop(alive, body, state)[4]
    return ended.tokens, ended.scores


def _grow(
  log_probs: Array, index: Array, running: _Beams, ended: _Beams, better: Array,
  *, beams: int, eos: tuple[int, ...], rooms: Array | None, length_penalty: float | Array,
):  # fmt: skip
  """One token more: (running, ended, which prompts can still improve, rows to continue, whether any can)."""
  never = lambda which: jnp.where(which, NEVER, 0.0)
  batch, vocab = running.scores.shape[0], log_probs.shape[-1]
  total = (running.scores[:, :, None] + log_probs.reshape(batch, beams, vocab)).reshape(batch, -1)
  scores, chosen = jax.lax.top_k(total, min(max(2, 1 + len(eos)) * beams, total.shape[1]))
  parents, token = chosen // vocab, (chosen % vocab).astype(jnp.int32)
  tokens = running.take(parents).tokens.at[:, :, index].set(token)
  last = index + 1 >= (tokens.shape[2] if rooms is None else rooms)
  hits = is_any(token, eos) | last
  # A sequence beyond the best `beams` ones stands by to continue; it does not count as ended.
  counts = hits & (jnp.arange(scores.shape[1]) < beams)
  length = (index + 1).astype(jnp.float32) ** length_penalty
  new = _Beams(scores / length + never(~better) + never(~counts), tokens, counts)
  ended = _Beams(*(jnp.concatenate(both, 1) for both in zip(ended, new, strict=True))).best(beams)
  scores = scores + never(hits)
  going = jax.lax.top_k(scores, beams)[1]
  running = _Beams(scores, tokens, hits).take(going)
  worst = jnp.where(ended.done, ended.scores.min(1, keepdims=True), NEVER)
  better = better & (running.scores[:, :1] / length > worst).any(1, keepdims=True)
  rows = (jnp.take_along_axis(parents, going, 1) + beams * jnp.arange(batch)[:, None]).reshape(-1)
  return running, ended, better, rows, ~hits.all()
