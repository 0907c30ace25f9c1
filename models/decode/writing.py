"""Outputs one token at a time, greedy or drawn at random; a whole batch of prompts at once."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from models import partition
from models.build import Model
from models.decode.cached import start, tokens_read
from models.decode.sampling import Sampling, row_keys, step_keys
from models.specs import Tree

STATIC = ('model', 'max_tokens', 'vocab_size', 'sampling', 'eos', 'pad', 'decoder_start')


def greedy(
  model: Model, params: Tree, batch: Mapping[str, Array], max_tokens: int, vocab_size: int | None = None,
  *, eos: tuple[int, ...], pad: int, decoder_start: int,
) -> Array:  # fmt: skip
  """int32[batch, max_tokens]: the most likely token below `vocab_size` (None: of all) at each step, `pad` after EOS.

  `batch`: see `models.decode.cached.start`.
  """
  ids = {'eos': eos, 'pad': pad, 'decoder_start': decoder_start}
  return write(model, params, batch, max_tokens, vocab_size, Sampling(), **ids)


@functools.partial(jax.jit, static_argnames=STATIC)
def write(
  model: Model, params: Tree, batch: Mapping[str, Array], max_tokens: int, vocab_size: int | None, sampling: Sampling,
  rooms: Array | None = None, seed: Array | None = None, numbers: Array | None = None,
  *, eos: tuple[int, ...], pad: int, decoder_start: int,
) -> Array:  # fmt: skip
  """int32[batch, max_tokens]: tokens below `vocab_size` (None: all) chosen by `sampling`, then `pad`.

  An output ends with any token of `eos`, or after `rooms` (int32[batch]) tokens. With a temperature, row i draws with a
  key that follows from `seed`, `numbers[i]` (its prompt's number) and the step: its text is the same in any batch.
  """
  ends = functools.partial(is_any, tokens=eos)
  with on_several(model):
    step, carry, token = start(model.bind(params), batch, max_tokens, decoder_start)
    hidden, cache = carry if token is None else step(token, carry[1])
    seen = None if sampling.repetition_penalty == 1.0 else _read(model, batch, token, vocab_size)
    keys = None if sampling.temperature is None else row_keys(seed, numbers)
    rows = hidden.shape[0]

    def alive(state):
      index, _, _, _, done, _ = state
      return (index < max_tokens) & ~done.all()

    def body(state):
      index, hidden, cache, output, done, seen = state
      logits = model.logits(params, hidden[:, -1])[:, :vocab_size]
      chosen = sampling.choose(logits, seen, None if keys is None else step_keys(keys, index))
      token = jnp.where(done, pad, chosen)
      output = output.at[:, index].set(token)
      done = done | ends(token) if rooms is None else done | ends(token) | (index + 1 >= rooms)
      seen = None if seen is None else seen.at[jnp.arange(rows), token].set(True)
      hidden, cache = step(token[:, None], cache)
      return index + 1, hidden[:, -1:], cache, output, done, seen

    done = jnp.zeros(rows, bool) if rooms is None else rooms < 1
    empty = jnp.full((rows, max_tokens), pad, jnp.int32)
    state = (jnp.zeros((), jnp.int32), hidden[:, -1:], cache, empty, done, seen)
    return jax.lax.while_loop(alive, body, state)[3]


def is_any(values: Array, tokens: tuple[int, ...]) -> Array:
  """Whether each value is one of `tokens`."""
  return functools.reduce(jnp.logical_or, [values == token for token in tokens], jnp.zeros(values.shape, bool))


def on_several(model: Model):
  """Activations are placed on the mesh of the model; one device has nothing to place."""
  return partition.on(model.mesh if model.mesh is not None and model.mesh.size > 1 else None)


def _read(model: Model, batch: Mapping[str, Array], token: Array | None, vocab_size: int | None) -> Array:
  """bool[batch, vocab]: the tokens that the decoder has read, without padding."""
  tokens, own = tokens_read(batch) if token is None else (token, None)
  vocab = model.cfg.vocab_size if vocab_size is None else vocab_size
  # Ids beyond the vocabulary are dropped by the scatter, and so is padding.
  tokens = tokens if own is None else jnp.where(own, tokens, vocab)
  rows = jnp.arange(tokens.shape[0])[:, None]
  return jnp.zeros((tokens.shape[0], vocab), bool).at[rows, tokens].set(True, mode='drop')
