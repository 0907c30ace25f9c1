"""Attention in plain JAX: the definition that every kernel must equal, in values and gradients."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

MASKED = -1e30  # finite, so that a row with no visible key has finite gradients


@functools.partial(
  jax.tree_util.register_dataclass, data_fields=['table'], meta_fields=['bidirectional', 'max_distance']
)
@dataclasses.dataclass(frozen=True)
class RelativeBias:
  """T5's bias: `table[bucket(key position - query position), head]` is added to the scores."""

  table: Float[Array, 'buckets heads']
  bidirectional: bool
  max_distance: int


@functools.partial(jax.tree_util.register_dataclass, data_fields=['keys', 'queries'], meta_fields=['max_distance'])
@dataclasses.dataclass(frozen=True)
class PositionScores:
  """Disentangled attention: scale * (q_i . keys[b] + queries[b] . k_j) is added to the scores, content to position
  (c2p) and position to content (p2c), where b = `signed_log_bucket(i - j)`; None leaves one out.

  Distances are those of indices, which inside a contiguous segment are those of positions. Each kind costs
  2 T (T + S) head_dim FLOPs a head, twice what the scores cost, and f32[batch, heads, T, T + S], twice their memory.
  Source: He et al. 2020, arXiv:2006.03654, eq. 3 and 4.
  """

  keys: Float[Array, 'buckets heads head_dim'] | None
  queries: Float[Array, 'buckets heads head_dim'] | None
  max_distance: int

  @property
  def given(self) -> dict[str, Array]:
    return {name: x for name, x in (('keys', self.keys), ('queries', self.queries)) if x is not None}


def _static(**options) -> Any:
  """A field that belongs to the tree's structure: each value compiles its own program."""
  return dataclasses.field(**options, metadata={'static': True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Visibility:
  """Which keys each query sees, and the bias between their positions: the `see` of every implementation.

  Query i sees key j iff their segments are equal and not 0, and (not causal, or position j <= position i, or
  position j < prefix_end[j]), and |position i - position j| < window or position j < num_sinks. Positions default to
  indices, with `num_sinks` to those inside a segment: the first tokens of each document, not of the row.
  """

  causal: bool = _static()
  window: int | None = _static(default=None)
  num_sinks: int = _static(default=0)
  alibi: Float[Array, ' heads'] | None = None
  kv_positions: Int[Array, 'batch S'] | None = None
  kv_segment_ids: Int[Array, 'batch S'] | None = None
  prefix_end: Int[Array, 'batch S'] | None = None
  q_positions: Int[Array, 'batch T'] | None = None
  q_segment_ids: Int[Array, 'batch T'] | None = None
  relative_bias: RelativeBias | None = None
  position_scores: PositionScores | None = None

  def count_sinks(self) -> 'Visibility':
    """The same, with the positions inside contiguous segments where sinks need them and none are given."""
    given = self.q_positions is not None or self.kv_positions is not None
    if self.window is None or not self.num_sinks or self.kv_segment_ids is None or given:
      return self
    q_positions, kv_positions = _inside(self.q_segment_ids), _inside(self.kv_segment_ids)
    return dataclasses.replace(self, q_positions=q_positions, kv_positions=kv_positions)

  def silence_padding(self, k: Array, v: Array, *, heads_first: bool = False) -> tuple[Array, Array]:
    """k and v with 0 for keys of segment 0: a weight of 0 does not silence a NaN."""
    if self.kv_segment_ids is None:
      return k, v
    given = jnp.expand_dims(self.kv_segment_ids != 0, (1, 3) if heads_first else (2, 3))
    silence = lambda x: jnp.where(given, x, 0)
    return silence(k), silence(v)


def _inside(segment_ids: Array) -> Array:
  """int32[batch, length]: how many tokens of its own segment stand before each one."""
  index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
  starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
  return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def relative_position_bucket(distance, *, buckets: int, bidirectional: bool, max_distance: int):
  """The bucket of each `distance` = key position - query position: one bucket for each short distance, then buckets
  that grow logarithmically up to `max_distance`. A numpy array gives a numpy array, a jax array a jax array, with equal
  values: numpy computes the borders in both cases, as in T5X, because logarithms differ between devices.

  Source: Raffel et al. 2020, arXiv:1910.10683; T5X relative_position_biases.py, _relative_position_bucket.
  """
  count = functools.partial(_bucket, buckets=buckets, bidirectional=bidirectional, max_distance=max_distance)
  if isinstance(distance, np.ndarray):
    return count(distance)
  far = np.arange(-max_distance, max_distance + 1)
  bucket = count(far).astype(np.int32)
  found = jnp.full_like(distance, bucket[0])
  for n in np.flatnonzero(np.diff(bucket)) + 1:
    found = jnp.where(distance >= far[n], bucket[n], found)
  return found


def _bucket(distance: np.ndarray, *, buckets: int, bidirectional: bool, max_distance: int) -> np.ndarray:
  bucket = np.zeros_like(distance)
  if bidirectional:
    buckets //= 2
    bucket = np.where(distance > 0, buckets, 0)
    distance = np.abs(distance)
  else:
    distance = np.maximum(-distance, 0)
  exact = buckets // 2
  ratio = distance.astype(np.float32) / exact + np.finfo(np.float32).eps
  far = exact + (np.log(ratio) / math.log(max_distance / exact) * (buckets - exact)).astype(np.int32)
  return bucket + np.where(distance < exact, distance, np.minimum(far, buckets - 1))


def _bias(bias: RelativeBias, q_positions: Array, kv_positions: Array) -> Array:
  """[batch or 1, heads, T, S], f32."""
  distance = kv_positions[:, None, :] - q_positions[:, :, None]
  bucket = relative_position_bucket(
    distance, buckets=bias.table.shape[0], bidirectional=bias.bidirectional, max_distance=bias.max_distance
  )
  # A product with a one-hot: its gradient is a product too. The gradient of a gather is a slow scatter.
  hot = jax.nn.one_hot(bucket, bias.table.shape[0], dtype=jnp.float32)
  return jnp.einsum('btsk,kn->bnts', hot, bias.table.astype(jnp.float32))


def signed_log_bucket(distance: np.ndarray, *, buckets: int, max_distance: int) -> np.ndarray:
  """The bucket of each `distance` = query position - key position, 0 at the middle one, `buckets // 2`.

  Each side has half of the buckets: one for each distance up to half of that, then buckets that grow logarithmically up
  to `max_distance`; what is further away is in the last. All in float32, as in the source.
  Source: microsoft/DeBERTa da_utils.py, make_log_bucket_position; He et al. 2021, arXiv:2111.09543.
  """
  span = buckets // 2
  middle = span // 2
  far = np.maximum(np.abs(distance), middle).astype(np.float32)
  whole = np.log(np.float32((max_distance - 1) / middle))
  steps = np.ceil(np.log(far / np.float32(middle)) / whole * np.float32(middle - 1)).astype(np.int32) + middle
  bucket = np.where(np.abs(distance) <= middle, distance, np.sign(distance) * steps)
  return np.clip(bucket + span, 0, 2 * span - 1).astype(np.int32)


def _add_position_scores(scores: Array, q: Array, k: Array, own: PositionScores) -> Array:
  """`scores` f32[batch, heads, T, S] with those of positions added; `q` and `k` are scaled."""
  length, width = scores.shape[-2:]
  expand = lambda table, distance: table[
    signed_log_bucket(distance, buckets=table.shape[0], max_distance=own.max_distance)
  ]
  columns, product = np.arange(length + width), functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  if own.keys is not None:
    scores = scores + _skew(product('bthd,ehd->bhte', q, expand(own.keys, length - 1 - columns)))
  if own.queries is not None:
    own_scores = _skew(product('bshd,ehd->bhse', k, expand(own.queries, columns - width + 1)))
    scores = scores + jnp.swapaxes(own_scores, -1, -2)
  return scores


def _skew(x: Array) -> Array:
  """[..., R, R + C] -> [..., R, C]: row i begins at column R - 1 - i, so columns that were distances are places.

  Views alone, with no gather (Transformer-XL's relative shift, Dai et al. 2019, arXiv:1901.02860, appendix B).

  >>> _skew(jnp.arange(8).reshape(2, 4)).tolist()
  [[1, 2], [4, 5]]
  """
  rows, both = x.shape[-2:]
  flat = x.reshape(*x.shape[:-2], rows * both)[..., rows - 1 : rows * both - 1]
  return flat.reshape(*x.shape[:-1], both - 1)[..., : both - rows]


def _place(see: Visibility, q: Array, k: Array) -> Visibility:
  """`see` with positions: indices where it has none."""
  index = lambda x, given: jnp.arange(x.shape[1])[None] if given is None else given
  see = see.count_sinks()
  return dataclasses.replace(see, q_positions=index(q, see.q_positions), kv_positions=index(k, see.kv_positions))


def _mask(see: Visibility) -> Array | None:
  """bool[batch or 1, T, S] of a `see` with positions, or None where every query sees every key."""
  parts = []
  ahead = see.kv_positions[:, None, :] - see.q_positions[:, :, None]
  if see.causal:
    visible = ahead <= 0
    prefix = None if see.prefix_end is None else (see.kv_positions < see.prefix_end)[:, None, :]
    parts.append(visible if prefix is None else visible | prefix)
  if see.window is not None:
    near = (ahead > -see.window) & (ahead < see.window)
    parts.append(near | (see.kv_positions < see.num_sinks)[:, None, :])
  if see.q_segment_ids is not None:
    same = see.q_segment_ids[:, :, None] == see.kv_segment_ids[:, None, :]
    parts.append(same & (see.q_segment_ids != 0)[:, :, None])
  return functools.reduce(jnp.logical_and, parts) if parts else None


def _scores(q: Array, k: Array, see: Visibility, scale: float, softcap: float | None) -> Array:
  """f32[batch, kv_heads, group, T, S], of a `see` with positions."""
  batch, length, _, head_dim = q.shape
  grouped = (q * jnp.asarray(scale, q.dtype)).reshape(batch, length, k.shape[2], -1, head_dim)
  scores = jnp.einsum('btkgd,bskd->bkgts', grouped, k, preferred_element_type=jnp.float32)
  if softcap is not None:
    scores = softcap * jnp.tanh(scores / softcap)
  if see.relative_bias is not None:
    bias = _bias(see.relative_bias, see.q_positions, see.kv_positions)
    scores = scores + bias.reshape(bias.shape[0], *scores.shape[1:3], *bias.shape[2:])
  if see.position_scores is not None:  # one key head for each query head, so `group` is 1
    scaled = k * jnp.asarray(scale, k.dtype)
    scores = _add_position_scores(scores[:, :, 0], grouped[:, :, :, 0], scaled, see.position_scores)[:, :, None]
  if see.alibi is not None:
    distance = jnp.abs(see.kv_positions[:, None, :] - see.q_positions[:, :, None]).astype(jnp.float32)
    scores = scores - see.alibi.reshape(1, k.shape[2], -1, 1, 1) * distance[:, None, None]
  return scores


class Dropout(NamedTuple):
  """Attention dropout at `rate` with keys[batch]; `shared`: one mask for all queries of an example and head, as T5X's
  broadcast_dropout; otherwise each weight has its own, as in BERT."""

  rate: float
  keys: Array
  shared: bool = True


def _drop(weights: Array, dropout: Dropout) -> Array:
  shape = (*weights.shape[1:3], 1 if dropout.shared else weights.shape[-2], weights.shape[-1])
  return jnp.where(_kept(dropout, shape), weights / (1 - dropout.rate), 0.0)


def _kept(dropout: Dropout, shape: tuple[int, ...]) -> Array:
  return jax.vmap(lambda key: jax.random.bernoulli(key, 1 - dropout.rate, shape))(dropout.keys)


def drop_values(k: Array, v: Array, group: int, dropout: Dropout, places: Array | None = None) -> tuple[Array, Array]:
  """k and v[batch, kv_heads, S, head_dim], one for each query head, whose attention is that of k and v with a `shared`
  dropout: what all queries of a head drop of a key is dropped of its value.

  `places` int32[batch, S] are the indices of the keys in rows in order, where they are not in order.
  """
  keep = _kept(dropout, (k.shape[1], group, 1, k.shape[2]))[:, :, :, 0]
  if places is not None:
    keep = jnp.take_along_axis(keep, places[:, None, None], axis=3)
  keep = keep.reshape(k.shape[0], -1, k.shape[2], 1)
  k, v = (jnp.repeat(x, group, axis=1) for x in (k, v))
  return k, jnp.where(keep, v / (1 - dropout.rate), jnp.zeros((), v.dtype))


def attention(
  q: Float[Array, 'batch T heads head_dim'],
  k: Float[Array, 'batch S kv_heads head_dim'],
  v: Float[Array, 'batch S kv_heads head_dim'],
  see: Visibility,
  *,
  softcap: float | None = None,
  scale: float | None = None,
  sink_logits: Float[Array, ' heads'] | None = None,
  dropout: Dropout | tuple[float, Array] | None = None,
  return_lse: bool = False,
):
  """softmax(scale q k^T + biases, over visible keys) v, f32 inside: [batch, T, heads, head_dim] in q's dtype.

  Positions default to indices. A query of segment 0, or with no visible key, gives 0 and lse = -inf. `sink_logits`
  add one logit without a value to each head's softmax; a query without a visible key then has it as its lse.
  lse: f32[batch, T, heads]. Keys of segment 0 have no effect, even if they are NaN.
  """
  k, v = see.silence_padding(k, v)
  see = _place(see, q, k)
  scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
  scores = _scores(q, k, see, scale, softcap)
  mask = _mask(see)
  if mask is not None:
    mask = mask[:, None, None]
    scores = jnp.where(mask, scores, MASKED)
  sinks = None if sink_logits is None else sink_logits.astype(jnp.float32).reshape(1, *scores.shape[1:3], 1, 1)
  top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
  top = top if sinks is None else jnp.maximum(top, jax.lax.stop_gradient(sinks))
  weights = jnp.exp(scores - top)
  total = weights.sum(-1, keepdims=True)
  total = total if sinks is None else total + jnp.exp(sinks - top)
  weights = weights if dropout is None else _drop(weights, Dropout(*dropout))
  mixed = jnp.einsum('bkgts,bskd->bkgtd', weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
  # Divide after the product: head_dim divisions for each query instead of S.
  mixed = mixed / total
  seen = None if mask is None else top > MASKED / 2  # the largest score of a fully masked row is MASKED
  mixed = mixed if seen is None else jnp.where(seen, mixed, 0.0)
  out = jnp.moveaxis(mixed.astype(q.dtype), 3, 1).reshape(q.shape)
  if not return_lse:
    return out
  lse = (top + jnp.log(total))[..., 0]
  lse = lse if seen is None else jnp.where(seen[..., 0], lse, -jnp.inf)
  return out, jnp.moveaxis(lse, 3, 1).reshape(q.shape[:3])
