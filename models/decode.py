"""Greedy and beam decoding with a cache of keys and values: a prompt is read once, then each step costs one token."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from models.build import Model
from models.families.encoder_decoder import EncoderDecoder
from models.layers.attention import Cache, Visibility
from models.layers.block import Cross
from models.specs import Tree


@functools.partial(jax.jit, static_argnames=('model', 'max_tokens', 'vocab_size', 'eos', 'pad', 'decoder_start'))
def greedy(
  model: Model,
  params: Tree,
  batch: Mapping[str, Array],
  max_tokens: int,
  vocab_size: int | None = None,
  *,
  eos: tuple[int, ...] = (1,),
  pad: int = 0,
  decoder_start: int = 0,
) -> Array:
  """int32[batch, max_tokens]: the most likely token below `vocab_size` (None: of all) at each step, `pad` after EOS.

  Encoder-decoder: `batch` holds encoder fields, and the decoder reads `decoder_start` first. Decoder-only:
  `decoder_input_tokens` hold the whole prompt, with what is read before its text, and `decoder_prefix_end` makes the
  first positions visible to each other. Shorter prompts stand at the end of their rows, behind padding whose
  `decoder_segment_ids` are 0; without this field there is no padding.
  """
  step, carry, token = _start(model.bind(params), batch, max_tokens, decoder_start)
  choose = lambda hidden: jnp.argmax(model.logits(params, hidden[:, -1])[:, :vocab_size], -1).astype(jnp.int32)
  return _loop(step, choose, carry, token, max_tokens, eos, pad)


def _loop(step, choose, carry: tuple[Array, Cache], token: Array | None, max_tokens: int, eos, pad: int) -> Array:
  """`carry` is (hidden of the last token read, cache). A `token` is read first, and hidden is then ignored."""
  hidden, cache = carry
  if token is not None:
    hidden, cache = step(token, cache)
  batch = hidden.shape[0]

  def alive(state):
    index, _, _, _, done = state
    return (index < max_tokens) & ~done.all()

  def body(state):
    index, hidden, cache, output, done = state
    token = jnp.where(done, pad, choose(hidden))
    output = output.at[:, index].set(token)
    hidden, cache = step(token[:, None], cache)
    return index + 1, hidden[:, -1:], cache, output, done | (token[:, None] == jnp.asarray(eos, jnp.int32)).any(-1)

  unwritten = jnp.full((batch, max_tokens), pad, jnp.int32)
  start = (jnp.zeros((), jnp.int32), hidden[:, -1:], cache, unwritten, jnp.zeros(batch, bool))
  return jax.lax.while_loop(alive, body, start)[3]


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
  decoder_start: int = 0,
) -> tuple[Sequences, Sequences]:
  """(ended, open): the `width` most likely sequences that a beam search finds after the one prompt of `batch`.

  The decoder first reads `forced` int32[tokens], behind `decoder_start` if there is an encoder. It then writes tokens
  of `allowed` bool[vocab]; a sequence ends where any token of `ends` bool[vocab] follows. The probability of an ended
  sequence is the product of the probabilities of its tokens and of the sum over `ends`; `open` ones have `max_tokens`
  tokens, or are less likely than all `ended` ones, and count their tokens alone. The softmax is over the whole
  vocabulary, as in the loss.

  Source: Sutskever et al. 2014, arXiv:1409.3215, §3.2 (an ended sequence leaves the beam); Huang et al. 2017,
  arXiv:1809.00069, §3 (probabilities only fall, so the search is over when the last of `width` ended sequences is at
  least as likely as the first open one). Ties go to the lower token id and the earlier sequence: no randomness.
  """
  rows = {name: jnp.repeat(jnp.asarray(values), width, axis=0) for name, values in batch.items()}
  step, carry, token = _start(model.bind(params), rows, len(forced) + max_tokens, decoder_start)
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
  start = (jnp.zeros((), jnp.int32), hidden[:, -1:], cache, empty, first)
  _, hidden, _, done, beam = jax.lax.while_loop(unfinished, body, start)
  return ended(hidden, done, beam), beam


def _start(module, batch: Mapping[str, Array], max_tokens: int, decoder_start: int):
  """(step, (hidden of the last token read, cache), the token to read first or None)."""
  if isinstance(module, EncoderDecoder):
    return _start_encoder_decoder(module, batch, max_tokens, decoder_start)
  return _start_decoder(module, batch, max_tokens)


def _positions(cache: Cache, tokens: Array, empty: Array | int = 0) -> Array:
  """Positions of `tokens` in rows that begin after `empty` slots: negative in those slots."""
  return jnp.broadcast_to(cache.index + jnp.arange(tokens.shape[1], dtype=jnp.int32) - empty, tokens.shape)


def _slots(cache: Cache, empty: Array | int = 0) -> Array:
  return jnp.broadcast_to(jnp.arange(cache.keys.shape[2], dtype=jnp.int32) - empty, cache.keys.shape[1:3])


def _filled(positions: Array) -> Array:
  """Segment ids: 0 in the empty slots of a row, 1 elsewhere."""
  return (positions >= 0).astype(jnp.int32)


def _start_encoder_decoder(module: EncoderDecoder, batch, max_tokens: int, decoder_start: int):
  memory = module.encode(batch, None)
  segments, rows = batch['encoder_segment_ids'], memory.shape[0]
  cross_keys_values = module.decoder.cross_keys_values(memory, batch['encoder_positions'])
  cache = Cache.empty(module.cfg.decoder_layers, rows, max_tokens + 1, module.attention, memory.dtype)

  def step(tokens: Array, cache: Cache):
    positions = _positions(cache, tokens)
    see = Visibility(
      causal=True, cached=True, q_positions=positions, kv_positions=_slots(cache), **module.decoder_bias()
    )
    across = Visibility(causal=False, cached=True, q_segment_ids=jnp.ones_like(tokens), kv_segment_ids=segments)
    x = module.embedding(tokens, positions, memory.dtype, None)
    return module.decoder.decode(x, positions, see, cache, Cross(see=across, keys_values=cross_keys_values))

  return step, (memory[:, :1], cache), jnp.full((rows, 1), decoder_start, jnp.int32)


def _decoder_step(module, batch, max_tokens: int):
  """(step, empty cache) with room for the prompt of `batch` and `max_tokens` more."""
  rows, length = batch['decoder_input_tokens'].shape
  dtype = jnp.dtype(module.cfg.dtype)
  cache = Cache.empty(module.cfg.layers, rows, length + max_tokens, module.attention, dtype)
  segments = batch.get('decoder_segment_ids')
  empty = 0 if segments is None else (jnp.asarray(segments) == 0).sum(1, keepdims=True, dtype=jnp.int32)
  prefix = batch.get('decoder_prefix_end')
  if prefix is not None:
    prefix = jnp.pad(jnp.asarray(prefix), ((0, 0), (0, cache.keys.shape[2] - prefix.shape[1])))

  def step(tokens: Array, cache: Cache):
    positions, slots = _positions(cache, tokens, empty), _slots(cache, empty)
    own = {} if segments is None else {f'{k}_segment_ids': _filled(p) for k, p in (('q', positions), ('kv', slots))}
    see = Visibility(
      causal=True,
      cached=True,
      q_positions=positions,
      kv_positions=slots,
      prefix_end=prefix,
      **own,
      **module.decoder_bias(),
    )
    positions = jnp.maximum(positions, 0)
    return module.decoder.decode(module.embedding(tokens, positions, dtype, None), positions, see, cache)

  return step, cache


def _start_decoder(module, batch, max_tokens: int):
  step, cache = _decoder_step(module, batch, max_tokens)
  return step, step(jnp.asarray(batch['decoder_input_tokens']), cache), None


@functools.partial(jax.jit, static_argnames=('model', 'at_once'))
def teacher_forced(model: Model, params: Tree, batch: Mapping[str, Array], tokens: Array, at_once: int = 1) -> Array:
  """Logits f32[batch, length, vocab] of the cached path fed `tokens`; for tests against `Model.apply`.

  The first `at_once` tokens are read in one step, as `greedy` reads a prompt; the others one by one.
  """
  module = model.bind(params)
  if isinstance(module, EncoderDecoder):
    step, (_, cache), _ = _start_encoder_decoder(module, batch, tokens.shape[1], 0)  # `tokens` begin with the start
  else:
    empty = dict(batch) | {'decoder_input_tokens': tokens[:, :0]}
    step, cache = _decoder_step(module, empty, tokens.shape[1])
  first, cache = step(tokens[:, :at_once], cache)

  def one(cache: Cache, token: Array):
    hidden, cache = step(token[:, None], cache)
    return cache, hidden[:, 0]

  rest = jax.lax.scan(one, cache, tokens[:, at_once:].T)[1]
  return model.logits(params, jnp.concatenate([first, jnp.swapaxes(rest, 0, 1)], 1))
