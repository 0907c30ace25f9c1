"""Decoding with a cache of keys and values: a prompt is read once, then each step costs one token."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from models.build import Model
from models.families.encoder_decoder import EncoderDecoder
from models.layers.attention import Cache, Visibility
from models.layers.block import Cross
from models.specs import Tree


def start(module, batch: Mapping[str, Array], max_tokens: int, decoder_start: int):
  """(step, (hidden of the last token read, cache), the token to read first or None).

  Encoder-decoder: `batch` holds encoder fields; a decoder reads `decoder_start` first. Decoder-only:
  `decoder_input_tokens` are the prompts, and `decoder_prefix_end` makes the first positions visible to each other.
  Shorter prompts stand at the end of their rows, behind padding whose `decoder_segment_ids` are 0; without this field
  there is no padding.
  """
  if isinstance(module, EncoderDecoder):
    step, carry, rows = _start_encoder_decoder(module, batch, max_tokens)
    return step, carry, jnp.full((rows, 1), decoder_start, jnp.int32)
  return _start_decoder(module, batch, max_tokens)


def _positions(cache: Cache, tokens: Array, empty: Array | int = 0) -> Array:
  """Positions of `tokens` in rows that begin after `empty` slots: negative in those slots."""
  return jnp.broadcast_to(cache.index + jnp.arange(tokens.shape[1], dtype=jnp.int32) - empty, tokens.shape)


def _slots(cache: Cache, empty: Array | int = 0) -> Array:
  return jnp.broadcast_to(jnp.arange(cache.keys.shape[2], dtype=jnp.int32) - empty, cache.keys.shape[1:3])


def _filled(positions: Array) -> Array:
  """Segment ids: 0 in the empty slots of a row, 1 elsewhere."""
  return (positions >= 0).astype(jnp.int32)


def _start_encoder_decoder(module: EncoderDecoder, batch, max_tokens: int):
  memory, _ = module.encode(batch, None)
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

  return step, (memory[:, :1], cache), rows


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
    x = module.embedding(tokens, positions, dtype, None)
    rotations = module.rotations_of_length(positions, cache.keys.shape[2] - empty)
    return module.decoder.decode(x, rotations, see, cache)

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
    step, (_, cache), _ = _start_encoder_decoder(module, batch, tokens.shape[1])
  else:
    empty = dict(batch) | {'decoder_input_tokens': tokens[:, :0]}
    step, cache = _decoder_step(module, empty, tokens.shape[1])
  first, cache = step(tokens[:, :at_once], cache)

  def one(cache: Cache, token: Array):
    hidden, cache = step(token[:, None], cache)
    return cache, hidden[:, 0]

  rest = jax.lax.scan(one, cache, tokens[:, at_once:].T)[1]
  return model.logits(params, jnp.concatenate([first, jnp.swapaxes(rest, 0, 1)], 1))
