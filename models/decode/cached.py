"""Decoding with a cache of keys and values: a prompt is read once, then each step costs one token."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from models.build import Model
from models.families.encoder_decoder import EncoderDecoder
from models.layers.attention import Cache, Visibility
from models.layers.rows import Cross
from models.partition import constrain
from models.specs import Tree

PLACES = 'prompt_places'
"""int32[prompts, length]: where in the packed rows, counted from their beginning to end, each token of a prompt stands.
A prompt is at the end of its row, behind -1."""


def start(module, batch: Mapping[str, Array], max_tokens: int, decoder_start: int):
  """(step, (hidden of the last token read, cache), the token to read first or None).

  Encoder-decoder: `batch` holds encoder fields; a decoder reads `decoder_start` first. Decoder-only:
  `decoder_input_tokens` are the prompts, and `decoder_prefix_end` makes the first positions visible to each other.
  Shorter prompts stand at the end of their rows, behind padding whose `decoder_segment_ids` are 0; without this field
  there is no padding.

  Packed prefill: with a field `PLACES`, the other fields are packed rows as training has them. They are read in one
  forward pass, and each prompt's keys and values are then copied to a row of the cache of its own.
  Source: Zhao et al. 2024, arXiv:2404.09529, Prepacking.
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
  memory, _ = module.encode(batch, None, decoding=True)
  segments = batch['encoder_segment_ids']
  cross_keys_values = module.decoder.cross_keys_values(memory, batch['encoder_positions'])
  if PLACES in batch:
    places = jnp.asarray(batch[PLACES])
    segments = _filled(places)
    turn = lambda x: jnp.swapaxes(x, 2, 3)  # heads and length
    cross_keys_values = tuple(turn(_taken(turn(x), places, module.attention.kv_axis)) for x in cross_keys_values)
  rows = segments.shape[0]
  cache = Cache.empty(module.cfg.decoder_layers, rows, max_tokens + 1, module.attention, memory.dtype)

  def step(tokens: Array, cache: Cache):
    positions = _positions(cache, tokens)
    see = Visibility(
      causal=True, cached=True, q_positions=positions, kv_positions=_slots(cache), **module.decoder_bias()
    )
    across = Visibility(causal=False, cached=True, q_segment_ids=jnp.ones_like(tokens), kv_segment_ids=segments)
    x = module.embedding(tokens, positions, memory.dtype, None)
    return module.decoder.decode(x, positions, see, cache, Cross(see=across, keys_values=cross_keys_values))

  return step, (jnp.zeros((rows, 1, memory.shape[2]), memory.dtype), cache), rows


def _decoder_step(module, batch, max_tokens: int):
  """(step, empty cache) with room for the prompt of `batch` and `max_tokens` more."""
  rows, length = batch['decoder_input_tokens'].shape
  cache = _empty(module, rows, length + max_tokens)
  segments = batch.get('decoder_segment_ids')
  empty = None if segments is None else (jnp.asarray(segments) == 0).sum(1, keepdims=True, dtype=jnp.int32)
  prefix = batch.get('decoder_prefix_end')
  if prefix is not None:
    prefix = jnp.pad(jnp.asarray(prefix), ((0, 0), (0, cache.keys.shape[2] - prefix.shape[1])))
  return _step_behind(module, empty, prefix), cache


def _empty(module, rows: int, slots: int) -> Cache:
  return Cache.empty(module.cfg.layers, rows, slots, module.attention, jnp.dtype(module.cfg.dtype))


def _step_behind(module, empty: Array | None, prefix: Array | None):
  """The step of a decoder whose rows begin after `empty` slots, int32[rows, 1]; None: after none."""
  dtype = jnp.dtype(module.cfg.dtype)

  def step(tokens: Array, cache: Cache):
    behind = 0 if empty is None else empty
    positions, slots = _positions(cache, tokens, behind), _slots(cache, behind)
    own = {} if empty is None else {f'{k}_segment_ids': _filled(p) for k, p in (('q', positions), ('kv', slots))}
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
    rotations = module.rotations_of_length(positions, cache.keys.shape[2] - behind)
    return module.decoder.decode(x, rotations, see, cache)

  return step


def _start_packed_decoder(module, batch, max_tokens: int):
  """Packed rows are read as in training, with the kernels of training; the steps after them are those of one prompt
  a row. A prefix needs no field there: all of it stands before every later token."""
  batch = {name: jnp.asarray(values) for name, values in batch.items()}
  places = batch[PLACES]
  x, positions, see = module.enter(batch, None)
  rotations = module.rotations(positions, batch['decoder_segment_ids'], None, max_tokens)
  hidden, packed = module.decoder.decode(x, rotations, see, _empty(module, *positions.shape))
  own = lambda x: jnp.pad(
    _taken(x, places, module.attention.kv_axis), ((0, 0), (0, 0), (0, max_tokens), (0, 0), (0, 0))
  )
  cache = Cache(own(packed.keys), own(packed.values), jnp.int32(places.shape[1]))
  last = hidden.reshape(-1, hidden.shape[2])[places[:, -1:]]
  return _step_behind(module, (places < 0).sum(1, keepdims=True, dtype=jnp.int32), None), (last, cache), None


def _taken(x: Array, places: Array, axis: str) -> Array:
  """[layers, prompts, length, heads, head_dim] at `places` of `x`[layers, rows, …]. What empty slots have is masked."""
  flat = x.reshape(x.shape[0], -1, *x.shape[3:])
  return constrain(flat[:, jnp.maximum(places, 0)], None, 'batch', None, axis, 'head_dim')


def repeated(batch: Mapping[str, Array], times: int) -> dict[str, Array]:
  """`batch` with so many equal rows for each prompt, one after another; packed rows are read once for all of them."""
  names = [PLACES] if PLACES in batch else list(batch)
  return {**batch, **{name: jnp.repeat(jnp.asarray(batch[name]), times, axis=0) for name in names}}


def tokens_read(batch: Mapping[str, Array]) -> tuple[Array, Array | None]:
  """(tokens[prompts, length] of a decoder's prompts, which of them are not padding, or None without padding)."""
  tokens = jnp.asarray(batch['decoder_input_tokens'])
  if PLACES in batch:
    places = jnp.asarray(batch[PLACES])
    return tokens.reshape(-1)[jnp.maximum(places, 0)], places >= 0
  segments = batch.get('decoder_segment_ids')
  return tokens, None if segments is None else jnp.asarray(segments) > 0


def _start_decoder(module, batch, max_tokens: int):
  if PLACES in batch:
    return _start_packed_decoder(module, batch, max_tokens)
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
