"""Multi-head attention: projections around `flash_attention`, for training and for cached decoding."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from models.layers.dropout import Dropout, fold
from models.layers.linear import Projections, from_heads, linear
from models.layers.low_rank import LowRank
from models.layers.norm import RmsNorm
from models.layers.positions.disentangled import RelativeEmbeddings
from models.layers.positions.rotary import Angles, Rope, rotary
from models.layers.remat import Name, named
from models.partition import constrain, divides, per_shard
from models.product import within
from models.specs import weight
from pallas_kernels.attention import api

WEIGHTS_SITE = 20
QkNorm = Literal['none', 'heads', 'all']


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
  """Heads of `head_dim`; `kv_heads` < heads shares keys (GQA). T5 folds 1/sqrt(head_dim) into the query's init.

  `qk_norm` normalises queries and keys before positions enter, as an RMS norm whatever `model.norm.name`, with
  `qk_norm_eps` = `model.norm.eps`: each head by itself ('heads': Qwen3, Gemma 3) or all heads together ('all': OLMo 2);
  the scores are then scaled in any case.
  `softcap` bends scores to softcap * tanh(scores / softcap). With `sink_distance`, sinks outside the window are rotated
  as if they were so far away, and keys are cached as they are before rotation.
  """

  heads: int
  kv_heads: int
  head_dim: int
  t5_scale: bool
  rope: Rope | None
  qk_norm: QkNorm
  qk_norm_eps: float
  softcap: float | None
  sink_distance: int | None
  dropout: Dropout
  implementation: str

  @property
  def kv_axis(self) -> str:
    """The logical axis of key heads. A single one serves all query heads, so every device of `tensor` has it whole."""
    return 'kv_heads' if self.kv_heads > 1 else 'one_head'

  @property
  def folds_scale(self) -> bool:
    """Whether 1/sqrt(head_dim) is in the query's init; a norm would take it out again."""
    return self.t5_scale and self.qk_norm == 'none'


VECTORS = {'q_segment_ids', 'kv_segment_ids', 'q_positions', 'kv_positions', 'prefix_end'}
VISIBILITY_AXES: dict[str, tuple[str | None, ...]] = {
  'q_segment_ids': ('batch', None),
  'kv_segment_ids': ('batch', None),
  'q_positions': ('batch', None),
  'kv_positions': ('batch', None),
  'prefix_end': ('batch', None),
  'relative_bias': (None, 'heads'),
  'alibi': ('heads',),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Visibility(api.Visibility):
  """Which keys a query sees, once for all layers.

  Rows are packed with contiguous segments, so inside a segment a difference of indices is a difference of positions:
  positions are given only where a prefix or a cache needs them. `cached`: keys are slots of a cache, and there are more
  of them than queries; there the reference is as fast as a kernel. `relative`: embeddings of
  distances for disentangled attention. `kv_places`: the indices of keys in rows in order, where `RowOrder` moved them.
  `silenced`: `silence_padding` has been applied to keys and values, and attention does not do it again.
  """

  relative: RelativeEmbeddings | None = None
  kv_places: Array | None = None
  cached: bool = dataclasses.field(default=False, metadata={'static': True})
  silenced: bool = dataclasses.field(default=False, metadata={'static': True})

  def silence_padding(self, k: Array, v: Array, *, heads_first: bool = False) -> tuple[Array, Array]:
    return (k, v) if self.silenced else super().silence_padding(k, v, heads_first=heads_first)


def _on_each_device(run, see: Visibility, kv_axis: str, *, return_lse: bool, length: str | None = None):
  """`run` for the examples and heads of each device, and with `length`='length' for its part of their rows."""
  heads, kv_heads = ('batch', 'heads', length, 'head_dim'), ('batch', kv_axis, length, 'head_dim')
  given = {name: axes for name, axes in VISIBILITY_AXES.items() if getattr(see, name) is not None}
  given |= {name: ('batch', length) for name in given.keys() & VECTORS}
  out = (heads, heads[:3]) if return_lse else heads
  return per_shard(run, (heads, kv_heads, kv_heads, dataclasses.replace(see, **given)), out)


def _of_sinks(see: Visibility, q_positions: Array, kv_positions: Array) -> Visibility:
  """The sinks that `see` has outside its window: those at least `see.window` before the query, in its segment.

  A sink ahead of a query is always in its window: there are at most as many sinks as a window has positions.
  """
  is_sink = (kv_positions >= 0) & (kv_positions < see.num_sinks)
  if see.kv_segment_ids is None:
    q_segments, kv_segments = jnp.ones(q_positions.shape, jnp.int32), is_sink.astype(jnp.int32)
  else:
    q_segments, kv_segments = see.q_segment_ids, jnp.where(is_sink, see.kv_segment_ids, 0)
  return Visibility(
    causal=True, cached=see.cached, silenced=see.silenced, q_segment_ids=q_segments, kv_segment_ids=kv_segments,
    q_positions=q_positions - see.window, kv_positions=kv_positions, kv_places=see.kv_places,
  )  # fmt: skip


def _joined(near: tuple[Array, Array], far: tuple[Array, Array]) -> Array:
  """Attention over the keys of both, of which each has (values, lse); `near` sees a key wherever `far` does."""
  (near_values, near_lse), (far_values, far_lse) = near, far
  seen = jnp.isfinite(far_lse)
  difference = jnp.where(seen, far_lse, 0.0) - jnp.where(seen, near_lse, 0.0)
  share = jnp.where(seen, jax.nn.sigmoid(difference), 0.0)[..., None]
  f32 = near_values.astype(jnp.float32), far_values.astype(jnp.float32)
  return (f32[0] + share * (f32[1] - f32[0])).astype(near_values.dtype)


def _named(result):
  """Kernels name what their gradients need; of the reference it is the result, which the next product needs."""
  return jax.tree.map(lambda x: named(x, 'context'), result)


def _head_norm(cfg: AttentionConfig, heads: int, axis: str) -> RmsNorm | None:
  match cfg.qk_norm:
    case 'none':
      return None
    case 'heads':
      return RmsNorm((cfg.head_dim,), cfg.qk_norm_eps, ('head_dim',))
    case 'all':  # the mean over heads that `tensor` divides is a sum over devices, which the partitioner adds
      return RmsNorm((heads, cfg.head_dim), cfg.qk_norm_eps, (axis, 'head_dim'))


def _turned(x: Array) -> Array:
  """[batch, length, heads, ...] from [batch, heads, length, ...], or the other way round.

  The order of heads and length is that of a product's output, which the compiler for TPU writes and reads in any order;
  for an array in memory it is a copy.
  """
  return jnp.swapaxes(x, 1, 2)


class Attention(nnx.Module):
  """Queries, keys, values and what is mixed of them are [batch, heads, length, head_dim], the order of the kernels.

  Source: Vaswani et al. 2017; GQA: Ainslie et al. 2023, arXiv:2305.13245; query init: T5X examples/t5/layers.py;
  norms of queries and keys: Henry et al. 2020, arXiv:2010.04245, as RMS norms with a scale in Qwen3 and Gemma 3; over
  all heads: OLMo 2, arXiv:2501.00656, §3.2.
  """

  def __init__(self, embed: int, cfg: AttentionConfig, projections: Projections):
    heads, kv_heads, head_dim, kv_axis = cfg.heads, cfg.kv_heads, cfg.head_dim, cfg.kv_axis
    query = projections.init('embed', scale=head_dim**-0.5 if cfg.folds_scale else 1.0)
    self.query = weight((embed, heads, head_dim), ('embed', 'heads', 'head_dim'), query)
    self.query_bias = projections.make_bias((heads, head_dim), ('heads', 'head_dim'), 'qkv')
    wide = lambda: weight((embed, kv_heads, head_dim), ('embed', kv_axis, 'head_dim'), projections.init('embed'))
    bias = lambda: projections.make_bias((kv_heads, head_dim), (kv_axis, 'head_dim'), 'qkv')
    self.key, self.key_bias = wide(), bias()
    self.value, self.value_bias = wide(), bias()
    out = projections.init_residual('heads', 'head_dim')
    self.out = weight((heads, head_dim, embed), ('heads', 'head_dim', 'embed'), out)
    self.out_bias = projections.make_bias((embed,), ('embed',), 'out')
    self.query_norm, self.key_norm = _head_norm(cfg, heads, 'heads'), _head_norm(cfg, kv_heads, kv_axis)
    self.cfg = cfg

  def queries(self, x: Array, positions: Array | Angles) -> Array:
    """[batch, heads, length, head_dim]."""
    q = self._heads(x, self.query, self.query_bias, 'heads')
    return self._finished(q, self.query_norm, positions, 'query', 'heads')

  def keys_values(self, x: Array, positions: Array | Angles, see: Visibility | None = None) -> tuple[Array, Array]:
    """Two of [batch, kv_heads, length, head_dim]. With `see` they are silenced for it: 0 for padding.

    That is done before norm and positions, which leave 0 as it is: there the compiler makes it a part of the product.
    Behind the rotary kernel it would be a pass of its own.
    """
    k = self._heads(x, self.key, self.key_bias, self.cfg.kv_axis)
    v = self._heads(x, self.value, self.value_bias, self.cfg.kv_axis)
    if see is not None:
      k, v = see.silence_padding(k, v, heads_first=True)
    return self._finished(k, self.key_norm, positions, 'key', self.cfg.kv_axis), named(v, 'value')

  def _heads(self, x: Array, w: nnx.Param | LowRank, bias: nnx.Param | None, axis: str) -> Array:
    """The projection of x[batch, length, embed], [batch, heads, length, head_dim]."""
    return constrain(_turned(linear(x, w, bias)), 'batch', axis, 'length', 'head_dim')

  def _finished(self, x: Array, norm: RmsNorm | None, positions: Array | Angles, name: Name, axis: str) -> Array:
    """`x` as scores take it. What `name` keeps is what the gradient needs: the input of a norm, else the result."""
    if norm is None:
      return named(self._rotate(x, positions, axis), name)
    x = named(x, name)
    return self._rotate(_turned(norm(_turned(x))) if self.cfg.qk_norm == 'all' else norm(x), positions, axis)

  def _rotate(self, x: Array, positions: Array | Angles, axis: str) -> Array:
    if self.cfg.rope is None or self.cfg.sink_distance is not None:
      return x
    return rotary(x, positions, self.cfg.rope, axis)

  def attend(
    self,
    q: Array,
    k: Array,
    v: Array,
    see: Visibility,
    keys: Array | None,
    site: int,
    positions: Array | Angles | None = None,
  ) -> Array:
    """The values, mixed by attention and projected back: [batch, length, embed]. `positions` are those of q."""
    scale, see = self._with_position_scores(see, q.dtype)
    dropped = self._dropped(keys, site)
    implementation = self._implementation(see, dropped is not None, (q.shape[2], k.shape[2]))
    run = self._op(implementation, see, scale, dropped)
    mixed = run(q, k, v, see) if self.cfg.sink_distance is None else self._attend_sinks(q, k, v, see, run, positions)
    mixed = constrain(mixed, 'batch', 'heads', 'length', 'head_dim')
    return named(from_heads(mixed, self.out, self.out_bias, in_order=implementation == 'tpu'), 'out')

  def _attend_sinks(self, q: Array, k: Array, v: Array, see: Visibility, run: Callable, positions: Array) -> Array:
    """As `run`, of q and k that are not rotated, with sinks outside the window at `sink_distance`.

    Source: Han et al. 2024 (LM-Infinite), arXiv:2308.16137, §4; its code, lambda_attention.py: keys of sinks stay at
    position 0, and queries are at position `sink_distance` for them.
    """
    rope, kv_positions = self.cfg.rope, see.kv_positions if see.cached else positions
    near = rotary(q, positions, rope), rotary(k, kv_positions, rope, self.cfg.kv_axis), v
    if see.window is None:
      return run(*near, see)
    at = lambda x, position, axis: rotary(x, jnp.full((x.shape[0], x.shape[2]), position), rope, axis)
    far = at(q, self.cfg.sink_distance, 'heads'), at(k, 0, self.cfg.kv_axis), v
    parts = (near, dataclasses.replace(see, num_sinks=0)), (far, _of_sinks(see, positions, kv_positions))
    return _joined(*(run(*arrays, own, return_lse=True) for arrays, own in parts))

  def _dropped(self, keys: Array | None, site: int) -> api.Dropout | None:
    """What drops weights of attention."""
    if keys is None or not self.cfg.dropout.outer:
      return None
    return api.Dropout(self.cfg.dropout.outer, fold(keys, WEIGHTS_SITE + site), shared=self.cfg.dropout.shared)

  def _implementation(self, see: Visibility, dropout: bool, lengths: tuple[int, int]) -> str:
    """The implementation to use."""
    if see.cached:
      return 'reference'
    return api.choose(
      self.cfg.implementation, dropout=dropout, shared=self.cfg.dropout.shared, divided=divides('length'),
      position_scores=see.position_scores is not None, relative_bias=see.relative_bias is not None, lengths=lengths,
    )  # fmt: skip

  def _op(self, implementation: str, see: Visibility, scale: float | None, dropped: api.Dropout | None) -> Callable:
    """run(q, k, v, see) -> the mixed values, or with `return_lse` these and lse."""
    run = functools.partial(
      api.attention, scale=scale, softcap=self.cfg.softcap, implementation=implementation, heads_first=True
    )
    if implementation == 'reference':
      return lambda *args, **options: _named(run(*args, dropout=dropped, **options))
    if implementation == 'ring':
      return self._around(run, dropped)

    def divided(q: Array, k: Array, v: Array, see: Visibility, *, return_lse: bool = False):
      own = functools.partial(run, return_lse=return_lse)
      return _on_each_device(own, see, self.cfg.kv_axis, return_lse=return_lse)(q, k, v, see)

    return divided

  def _around(self, run: Callable, dropped: api.Dropout | None) -> Callable:
    """`_op` of rows whose parts are on different devices."""

    def ring(q: Array, k: Array, v: Array, see: Visibility, *, return_lse: bool = False):
      own = functools.partial(run, return_lse=return_lse, axis='sequence' if divides('length') else None)
      kv_axis, places, see = self.cfg.kv_axis, see.kv_places, dataclasses.replace(see, kv_places=None).count_sinks()
      if dropped is not None:
        (k, v), kv_axis = api.drop_values(k, v, q.shape[1] // k.shape[1], dropped, places), 'heads'
      return _on_each_device(own, see, kv_axis, return_lse=return_lse, length='length')(q, k, v, see)

    return ring

  def _with_position_scores(self, see: Visibility, dtype) -> tuple[float | None, Visibility]:
    """(the scale of scores, `see` with this layer's keys and queries of relative embeddings where there are any).

    A score is a sum of 1 + len(scores) products, hence 1/sqrt(that * head_dim): He et al. 2020, eq. 4.
    """
    if see.relative is None:
      return 1.0 if self.cfg.folds_scale else None, see
    x, kinds = see.relative.table.astype(dtype), see.relative.scores
    # The sizes that delayed scales follow from are those of the tokens: those of the table would be added to them.
    with within(amax=None):
      own = api.PositionScores(
        keys=linear(x, self.key, self.key_bias) if 'c2p' in kinds else None,
        queries=linear(x, self.query, self.query_bias) if 'p2c' in kinds else None,
        max_distance=see.relative.max_distance,
      )
    scale = ((1 + len(kinds)) * self.cfg.head_dim) ** -0.5
    return scale, dataclasses.replace(see, relative=None, position_scores=own)


@functools.partial(jax.tree_util.register_dataclass, data_fields=['keys', 'values', 'index'], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Cache:
  """Keys and values of all layers, [layers, batch, slots, kv_heads, head_dim]; the next token goes to slot `index`.

  A slot is together in memory, so that a token is written, and beams are reordered, in one piece.
  """

  keys: Array
  values: Array
  index: Array

  @classmethod
  def empty(cls, layers: int, batch: int, slots: int, cfg: AttentionConfig, dtype) -> 'Cache':
    zeros = jnp.zeros((layers, batch, slots, cfg.kv_heads, cfg.head_dim), dtype)
    return cls(zeros, zeros, jnp.zeros((), jnp.int32))

  def write(self, layer: Array, k: Array, v: Array) -> tuple['Cache', Array, Array]:
    """(the cache with k and v written at `index` of `layer`, that layer's keys, that layer's values).

    k, v and the results are [batch, kv_heads, length, head_dim].
    """
    start = (layer, 0, self.index, 0, 0)
    keys = jax.lax.dynamic_update_slice(self.keys, _turned(k)[None], start)
    values = jax.lax.dynamic_update_slice(self.values, _turned(v)[None], start)
    own = lambda x: _turned(jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False))
    return Cache(keys, values, self.index), own(keys), own(values)

  def advance(self, tokens: int) -> 'Cache':
    return Cache(self.keys, self.values, self.index + tokens)
