"""Multi-head attention: projections around `flash_attention`, for training and for cached decoding."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from models.dropout import fold
from models.linear import linear
from models.partition import constrain
from models.positions import rotary
from models.specs import Normal, weight
from pallas_kernels.attention.api import RelativeBias, flash_attention

WEIGHTS_SITE = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
  """Heads of `head_dim`; `kv_heads` < heads shares keys (GQA). T5 folds 1/sqrt(head_dim) into the query's init."""

  heads: int
  kv_heads: int
  head_dim: int
  t5_scale: bool
  rope_theta: float | None
  dropout: float
  implementation: str


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=['q_segment_ids', 'kv_segment_ids', 'q_positions', 'kv_positions', 'prefix_end', 'relative_bias'],
  meta_fields=['causal'],
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Visibility:
  """Which keys a query sees, and the bias between them: the arguments of `flash_attention`, once for all layers.

  Rows are packed with contiguous segments, so that inside a segment a difference of indices is one of positions:
  positions are given only where a prefix or a cache needs them.
  """

  causal: bool
  q_segment_ids: Array | None = None
  kv_segment_ids: Array | None = None
  q_positions: Array | None = None
  kv_positions: Array | None = None
  prefix_end: Array | None = None
  relative_bias: RelativeBias | None = None


class Attention(nnx.Module):
  """Source: Vaswani et al. 2017; GQA: Ainslie et al. 2023, arXiv:2305.13245; query init: T5X examples/t5/layers.py."""

  def __init__(self, embed: int, cfg: AttentionConfig):
    heads, kv_heads, head_dim = cfg.heads, cfg.kv_heads, cfg.head_dim
    query = Normal(head_dim**-0.5 if cfg.t5_scale else 1.0, fan_in=('embed',))
    self.query = weight((embed, heads, head_dim), ('embed', 'heads', 'head_dim'), query)
    self.key = weight((embed, kv_heads, head_dim), ('embed', 'kv_heads', 'head_dim'), Normal(fan_in=('embed',)))
    self.value = weight((embed, kv_heads, head_dim), ('embed', 'kv_heads', 'head_dim'), Normal(fan_in=('embed',)))
    self.out = weight((heads, head_dim, embed), ('heads', 'head_dim', 'embed'), Normal(fan_in=('heads', 'head_dim')))
    self.cfg = cfg

  def queries(self, x: Array, positions: Array) -> Array:
    """[batch, length, heads, head_dim]."""
    q = constrain(linear(x, self.query), 'batch', 'length', 'heads', 'head_dim')
    return q if self.cfg.rope_theta is None else rotary(q, positions, self.cfg.rope_theta)

  def keys_values(self, x: Array, positions: Array) -> tuple[Array, Array]:
    """Two of [batch, length, kv_heads, head_dim]."""
    k, v = (constrain(linear(x, w), 'batch', 'length', 'kv_heads', 'head_dim') for w in (self.key, self.value))
    return (k, v) if self.cfg.rope_theta is None else (rotary(k, positions, self.cfg.rope_theta), v)

  def attend(self, q: Array, k: Array, v: Array, see: Visibility, keys: Array | None, site: int) -> Array:
    """Values mixed and projected back: [batch, length, embed]."""
    dropped = None
    if keys is not None and self.cfg.dropout:
      dropped = (self.cfg.dropout, fold(keys, WEIGHTS_SITE + site))
    options: dict[str, Any] = {f.name: getattr(see, f.name) for f in dataclasses.fields(see)}
    mixed = flash_attention(
      q,
      k,
      v,
      **options,
      scale=1.0 if self.cfg.t5_scale else None,
      dropout=dropped,
      implementation=self.cfg.implementation,
    )
    return linear(constrain(mixed, 'batch', 'length', 'heads', 'head_dim'), self.out, contract=2)


@functools.partial(jax.tree_util.register_dataclass, data_fields=['keys', 'values', 'index'], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Cache:
  """Keys and values of all layers, [layers, batch, slots, kv_heads, head_dim]; the next token goes to slot `index`."""

  keys: Array
  values: Array
  index: Array

  @classmethod
  def empty(cls, layers: int, batch: int, slots: int, cfg: AttentionConfig, dtype) -> 'Cache':
    zeros = jnp.zeros((layers, batch, slots, cfg.kv_heads, cfg.head_dim), dtype)
    return cls(zeros, zeros, jnp.zeros((), jnp.int32))

  def write(self, layer: Array, k: Array, v: Array) -> tuple['Cache', Array, Array]:
    """(the cache with k, v in `layer` at `index`, that layer's keys, its values)."""
    place = (layer, 0, self.index, 0, 0)
    keys = jax.lax.dynamic_update_slice(self.keys, k[None], place)
    values = jax.lax.dynamic_update_slice(self.values, v[None], place)
    own = lambda x: jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False)
    return Cache(keys, values, self.index), own(keys), own(values)

  def advance(self, tokens: int) -> 'Cache':
    return Cache(self.keys, self.values, self.index + tokens)
