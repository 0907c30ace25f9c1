"""One block and its stack: encoder, decoder and decoder-only models are made of these."""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from models.layers.attention import Attention, AttentionConfig, Cache, Visibility
from models.layers.dropout import dropout, fold
from models.layers.linear import Projections
from models.layers.mlp import Mlp, MlpConfig
from models.layers.norm import LayerNorm, NormConfig, RmsNorm, make_norm
from models.partition import constrain
from models.specs import stack

Remat = Literal['none', 'dots', 'full']
Placement = Literal['pre', 'post', 'sandwich']
SELF_SITE, CROSS_SITE, MLP_SITE, FINAL_SITE = 0, 1, 2, 3
CROSS_KEYS_SITE = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cross:
  """What cross-attention reads: the encoder's output (or each layer's keys and values of it), and the visibility."""

  see: Visibility
  memory: Array | None = None
  keys_values: tuple[Array, Array] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
  """The parts of a block. `placement` of the norms, with f a layer and N a norm:

  pre: x + f(N(x)), T5 and Llama; post: N(x + f(x)), Vaswani et al. 2017 and BERT; sandwich: x + N(f(N(x))), Ding et al.
  2021, arXiv:2105.13290, §3.3, and Gemma 2. `cross` adds attention to an encoder, which has no rotary positions.
  """

  embed: int
  attention: AttentionConfig
  mlp: MlpConfig
  norm: NormConfig
  placement: Placement
  projections: Projections
  cross: bool
  rate: float


class Sublayer(NamedTuple):
  """One layer in a block: its norm, the second norm of a sandwich, the number that its dropout keys fold in."""

  norm: RmsNorm | LayerNorm
  out_norm: RmsNorm | LayerNorm | None
  site: int


class Block(nnx.Module):
  """Residual block: self-attention, cross-attention where there is an encoder, MLP."""

  def __init__(self, cfg: BlockConfig):
    norm = lambda: make_norm(cfg.embed, cfg.norm)
    out_norm = lambda: norm() if cfg.placement == 'sandwich' else None
    self.self_norm, self.self_out_norm = norm(), out_norm()
    self.self_attention = Attention(cfg.embed, cfg.attention, cfg.projections)
    if cfg.cross:
      self.cross_norm, self.cross_out_norm = norm(), out_norm()
      # There is no distance between an encoder's position and a decoder's.
      across = dataclasses.replace(cfg.attention, rope_theta=None)
      self.cross_attention = Attention(cfg.embed, across, cfg.projections)
    self.mlp_norm, self.mlp_out_norm = norm(), out_norm()
    self.mlp = Mlp(cfg.embed, cfg.mlp, cfg.projections, cfg.rate)
    self.placement, self.rate = cfg.placement, cfg.rate

  def __call__(
    self,
    x: Array,
    positions: Array,
    see: Visibility,
    cross: Cross | None,
    keys: Array | None,
    layer: Array,
    cache: Cache | None,
  ) -> tuple[Array, Cache | None]:
    """x[batch, length, embed] -> the same, and the cache with this layer's new keys and values."""
    at = Sublayer(self.self_norm, self.self_out_norm, SELF_SITE)
    h = self._enter(x, at)
    q, (k, v) = self.self_attention.queries(h, positions), self.self_attention.keys_values(h, positions)
    if cache is not None:
      cache, k, v = cache.write(layer, k, v)
    x = self._add(x, self.self_attention.attend(q, k, v, see, keys, SELF_SITE), keys, at)
    if cross is not None:
      at = Sublayer(self.cross_norm, self.cross_out_norm, CROSS_SITE)
      q = self.cross_attention.queries(self._enter(x, at), positions)
      k, v = cross.keys_values or self.cross_attention.keys_values(cross.memory, positions)
      x = self._add(x, self.cross_attention.attend(q, k, v, cross.see, keys, CROSS_KEYS_SITE), keys, at)
    at = Sublayer(self.mlp_norm, self.mlp_out_norm, MLP_SITE)
    return self._add(x, self.mlp(self._enter(x, at), keys), keys, at), cache

  def _enter(self, x: Array, at: Sublayer) -> Array:
    return x if self.placement == 'post' else at.norm(x)

  def _add(self, x: Array, update: Array, keys: Array | None, at: Sublayer) -> Array:
    update = update if at.out_norm is None else at.out_norm(update)
    x = constrain(x + dropout(update, self.rate, keys, at.site), 'batch', 'length', 'embed')
    return at.norm(x) if self.placement == 'post' else x


class Stack(nnx.Module):
  """`layers` blocks of one shape, scanned, then a norm unless blocks end with one. One block is compiled."""

  def __init__(self, cfg: BlockConfig, layers: int, *, remat: Remat):
    self.blocks = stack(Block(cfg), layers)
    self.norm = None if cfg.placement == 'post' else make_norm(cfg.embed, cfg.norm)
    self.layers, self.remat, self.rate = layers, remat, cfg.rate

  def __call__(
    self, x: Array, positions: Array, see: Visibility, cross: Cross | None = None, keys: Array | None = None
  ) -> Array:
    def body(x, inputs):
      block, layer = inputs
      return block(x, positions, see, cross, fold(keys, layer), layer, None)[0], None

    x, _ = jax.lax.scan(rematerialise(body, self.remat), x, (self.blocks, jnp.arange(self.layers, dtype=jnp.uint32)))
    return dropout(self.finish(x), self.rate, fold(keys, self.layers), FINAL_SITE)

  def decode(
    self, x: Array, positions: Array, see: Visibility, cache: Cache, cross: Cross | None = None
  ) -> tuple[Array, Cache]:
    """As `__call__`, for tokens that follow those in `cache`; the cache is updated in place in the carry."""

    def body(carry, inputs):
      block, layer, cross_keys_values = inputs
      own = None if cross is None else dataclasses.replace(cross, keys_values=cross_keys_values)
      return block(*carry[:1], positions, see, own, None, layer, carry[1]), None

    layers = jnp.arange(self.layers, dtype=jnp.int32)
    inputs = (self.blocks, layers, None if cross is None else cross.keys_values)
    (x, cache), _ = jax.lax.scan(body, (x, cache), inputs)
    return self.finish(x), cache.advance(x.shape[1])

  def finish(self, x: Array) -> Array:
    return x if self.norm is None else self.norm(x)

  def cross_keys_values(self, memory: Array, positions: Array) -> tuple[Array, Array]:
    """Every layer's cross-attention keys and values of the encoder's output: [layers, batch, length, …]."""
    return jax.lax.map(lambda block: block.cross_attention.keys_values(memory, positions), self.blocks)


def rematerialise(body, remat: Remat):
  """`body` with fewer activations kept for its gradient: all (`none`), matrix products (`dots`), none (`full`)."""
  if remat == 'none':
    return body
  policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == 'dots' else None
  return jax.checkpoint(body, policy=policy, prevent_cse=False)
