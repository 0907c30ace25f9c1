"""One block and its stack: encoder, decoder and decoder-only models are made of these."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from models.attention import Attention, AttentionConfig, Cache, Visibility
from models.dropout import dropout, fold
from models.mlp import Mlp, MlpConfig
from models.norm import RmsNorm
from models.partition import constrain
from models.specs import stack

Remat = Literal['none', 'dots', 'full']
SELF_SITE, CROSS_SITE, MLP_SITE, FINAL_SITE = 0, 1, 2, 3
CROSS_KEYS_SITE = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cross:
  """What cross-attention reads: the encoder's output (or each layer's keys and values of it), and who sees what."""

  see: Visibility
  memory: Array | None = None
  keys_values: tuple[Array, Array] | None = None


class Block(nnx.Module):
  """Pre-norm residual block: self-attention, cross-attention where there is an encoder, MLP."""

  def __init__(self, embed: int, attention: AttentionConfig, mlp: MlpConfig, *, cross: bool, rate: float):
    self.self_norm, self.self_attention = RmsNorm(embed), Attention(embed, attention)
    if cross:
      self.cross_norm, self.cross_attention = RmsNorm(embed), Attention(embed, attention)
    self.mlp_norm, self.mlp = RmsNorm(embed), Mlp(embed, mlp, rate)
    self.rate = rate

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
    h = self.self_norm(x)
    q, (k, v) = self.self_attention.queries(h, positions), self.self_attention.keys_values(h, positions)
    if cache is not None:
      cache, k, v = cache.write(layer, k, v)
    x = self._add(x, self.self_attention.attend(q, k, v, see, keys, SELF_SITE), keys, SELF_SITE)
    if cross is not None:
      q = self.cross_attention.queries(self.cross_norm(x), positions)
      k, v = cross.keys_values or self.cross_attention.keys_values(cross.memory, positions)
      x = self._add(x, self.cross_attention.attend(q, k, v, cross.see, keys, CROSS_KEYS_SITE), keys, CROSS_SITE)
    return self._add(x, self.mlp(self.mlp_norm(x), keys), keys, MLP_SITE), cache

  def _add(self, x: Array, update: Array, keys: Array | None, site: int) -> Array:
    return constrain(x + dropout(update, self.rate, keys, site), 'batch', 'length', 'embed')


class Stack(nnx.Module):
  """`layers` equal blocks, scanned, then a norm. The compiled program holds one block, whatever the depth."""

  def __init__(self, block: Block, layers: int, embed: int, *, remat: Remat, rate: float):
    self.blocks, self.norm = stack(block, layers), RmsNorm(embed)
    self.layers, self.remat, self.rate = layers, remat, rate

  def __call__(
    self, x: Array, positions: Array, see: Visibility, cross: Cross | None = None, keys: Array | None = None
  ) -> Array:
    def body(x, inputs):
      block, layer = inputs
      return block(x, positions, see, cross, fold(keys, layer), layer, None)[0], None

    x, _ = jax.lax.scan(rematerialise(body, self.remat), x, (self.blocks, jnp.arange(self.layers, dtype=jnp.uint32)))
    return dropout(self.norm(x), self.rate, fold(keys, self.layers), FINAL_SITE)

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
    return self.norm(x), cache.advance(x.shape[1])

  def cross_keys_values(self, memory: Array, positions: Array) -> tuple[Array, Array]:
    """Every layer's cross-attention keys and values of the encoder's output: [layers, batch, length, …]."""
    return jax.lax.map(lambda block: block.cross_attention.keys_values(memory, positions), self.blocks)


def rematerialise(body, remat: Remat):
  """`body` with fewer activations kept for its gradient: all (`none`), matrix products (`dots`), none (`full`)."""
  if remat == 'none':
    return body
  policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == 'dots' else None
  return jax.checkpoint(body, policy=policy, prevent_cse=False)
