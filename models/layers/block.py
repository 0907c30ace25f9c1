"""One block and its stack: encoder, decoder and decoder-only models are made of these."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from models.host_memory import brought
from models.layers.attention import Attention, AttentionConfig, Cache, Visibility
from models.layers.dropout import Dropout, dropout, fold
from models.layers.experts import Experts, ExpertsConfig
from models.layers.linear import Projections
from models.layers.mlp import Mlp, MlpConfig
from models.layers.norm import LayerNorm, NormConfig, RmsNorm, make_norm
from models.layers.pipeline.program import pipelined, split
from models.layers.pipeline.schedule import Pipeline
from models.layers.positions.rotary import Angles
from models.layers.remat import Remat, distinct_shapes, keeping, rematerialise
from models.layers.rows import Beside, Cross
from models.layers.values import Aux, ByLayer, averaged, resolved
from models.partition import constrain, parts
from models.product import amax_of, within
from models.specs import stack

Placement = Literal['pre', 'post', 'sandwich', 'inner']
Parallel = Literal['none', 'one_norm', 'two_norms']
Windows = tuple[int | None, ...]
SELF_SITE, CROSS_SITE, MLP_SITE, FINAL_SITE = 0, 1, 2, 3
CROSS_KEYS_SITE = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
  """The parts of a block. `placement` of the norms, with f a layer and N a norm:

  pre: x + f(N(x)), T5 and Llama; post: N(x + f(x)), Vaswani et al. 2017 and BERT; sandwich: x + N(f(N(x))), Ding et al.
  2021, arXiv:2105.13290, §3.3, and Gemma 2; inner: x + N(f(x)), OLMo 2, arXiv:2501.00656, §3.1.

  `parallel` blocks add attention and MLP of the same x: x + f(N(x)) + g(N(x)) with one norm (GPT-J, Falcon 7B) or two
  (GPT-NeoX, arXiv:2204.06745, §2.1.2; Falcon 40B). `cross` adds attention to an encoder, which has no rotary positions.
  With `experts`, `mlp` is that of each expert.
  """

  embed: int
  attention: AttentionConfig
  mlp: MlpConfig
  norm: NormConfig
  placement: Placement
  parallel: Parallel
  projections: Projections
  cross: bool
  dropout: Dropout
  experts: ExpertsConfig | None = None


def excess_kurtosis(x: Array, segments: Array | None) -> Array:
  """E[(y - m)^4] / E[(y - m)^2]^2 - 3 over the features y of a token, m their mean: 0 for normal numbers, large where a
  few features are far larger than the others. The mean over tokens whose `segments` are not 0 (None: all).

  Source: the metric of Park et al. 2025, arXiv:2506.19697, of hidden states. Their code, evaluate_kurtosis.py, takes
  y^4 in place of (y - m)^4, and 0 for tokens where it is negative.
  """
  x = jax.lax.stop_gradient(x).astype(jnp.float32)
  square = jnp.square(x - x.mean(-1, keepdims=True))
  found = jnp.square(square).mean(-1) / jnp.maximum(jnp.square(square.mean(-1)), 1e-30) - 3
  share = jnp.ones(found.shape) if segments is None else (segments != 0).astype(jnp.float32)
  return (found * share).sum() / jnp.maximum(share.sum(), 1.0)


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
      across = dataclasses.replace(cfg.attention, rope=None, sink_distance=None)
      self.cross_attention = Attention(cfg.embed, across, cfg.projections)
    self.mlp_norm, self.mlp_out_norm = None if cfg.parallel == 'one_norm' else norm(), out_norm()
    self.mlp = make_mlp(cfg)
    self.placement, self.parallel, self.dropout = cfg.placement, cfg.parallel, cfg.dropout

  def __call__(
    self,
    x: Array,
    positions: Array | Angles,
    see: Visibility,
    cross: Cross | None,
    keys: Array | None,
    layer: Array,
    cache: Cache | None,
    *,
    decoding: bool = False,
  ) -> tuple[Array, Cache | None, Aux]:
    """x[batch, length, embed] -> the same, the cache with this layer's new keys and values, this layer's values."""
    at = Sublayer(self.self_norm, self.self_out_norm, SELF_SITE)
    h = self._enter(x, at)
    q = self.self_attention.queries(h, positions)
    if cache is None:
      k, v = self.self_attention.keys_values(h, positions, see)
      see = dataclasses.replace(see, silenced=True)
    else:  # `see` covers all slots of the cache, not only the new keys
      cache, k, v = cache.write(layer, *self.self_attention.keys_values(h, positions))
    mixed = self.self_attention.attend(q, k, v, see, keys, SELF_SITE, positions)
    if self.parallel != 'none':
      update, aux = self.mlp(
        h if self.mlp_norm is None else self.mlp_norm(x), keys, see.q_segment_ids, decoding=decoding
      )
      x = self._add(x, mixed, keys, at)
      return self._add(x, update, keys, Sublayer(self.self_norm, None, MLP_SITE)), cache, aux
    x = self._add(x, mixed, keys, at)
    if cross is not None:
      at = Sublayer(self.cross_norm, self.cross_out_norm, CROSS_SITE)
      q = self.cross_attention.queries(self._enter(x, at), positions)
      k, v = cross.keys_values or self.cross_attention.keys_values(cross.memory, positions)
      x = self._add(x, self.cross_attention.attend(q, k, v, cross.see, keys, CROSS_KEYS_SITE), keys, at)
    at = Sublayer(self.mlp_norm, self.mlp_out_norm, MLP_SITE)
    update, aux = self.mlp(self._enter(x, at), keys, see.q_segment_ids, decoding=decoding)
    return self._add(x, update, keys, at), cache, aux

  def _enter(self, x: Array, at: Sublayer) -> Array:
    return x if self.placement in ('post', 'inner') else at.norm(x)

  def _add(self, x: Array, update: Array, keys: Array | None, at: Sublayer) -> Array:
    out_norm = at.norm if self.placement == 'inner' else at.out_norm
    update = update if out_norm is None else out_norm(update)
    dropped = dropout(update, self.dropout.outer, keys, at.site, shared=self.dropout.shared)
    x = constrain(x + dropped, 'batch', 'length', 'embed')
    return at.norm(x) if self.placement == 'post' else x


def make_mlp(cfg: BlockConfig) -> Mlp | Experts:
  if cfg.experts is None:
    return Mlp(cfg.embed, cfg.mlp, cfg.projections, cfg.dropout.inner)
  return Experts(cfg.embed, cfg.mlp, cfg.experts, cfg.projections, cfg.dropout.inner)


class Stack(nnx.Module):
  """`layers` blocks of one shape, scanned, then a norm unless blocks end with one.

  `windows` gives the window of each layer and repeats: blocks are scanned in groups of its length, and so many are
  compiled; layers with one also see the first `sinks` tokens of each document. `own_bias`: `see.relative_bias` has a
  table for each layer. `edges` are the numbers of first and of last layers whose products have a recipe of their own:
  they are scanned before and after the others, over slices of the same stacked parameters. `finishing` comes after the
  last norm; `kurtosis` gives that of each layer's output.
  """

  def __init__(
    self,
    cfg: BlockConfig,
    layers: int,
    *,
    remat: Remat,
    windows: Windows = (None,),
    sinks: int = 0,
    own_bias: bool = False,
    finishing: nnx.Module | None = None,
    kurtosis: bool = False,
    pipeline: Pipeline | None = None,
  ):
    self.blocks = stack(Block(cfg), layers)
    self.norm = None if cfg.placement == 'post' else make_norm(cfg.embed, cfg.norm)
    self.layers, self.remat, self.rate = layers, remat, cfg.dropout.inner
    self.windows, self.sinks, self.own_bias = windows, sinks, own_bias
    self.finishing, self.kurtosis = finishing, kurtosis
    self.edges = (0, 0)  # set by models/precision.py
    self.pipeline = pipeline  # None: every stage of a mesh computes all layers

  def __call__(
    self,
    x: Array,
    positions: Array | Angles,
    see: Visibility,
    cross: Cross | None = None,
    keys: Array | None = None,
    *,
    decoding: bool = False,
  ) -> tuple[Array, Aux]:
    """(x[batch, length, embed], what blocks give beside it, averaged over layers but for each `ByLayer`).

    `decoding`: a text is written, and experts drop nothing.
    """

    beside = Beside(positions, see, cross, keys)
    layers = (self.blocks, jnp.arange(self.layers, dtype=jnp.uint32), self._tables(see))
    if decoding or self.pipeline is None or parts('stages') == 1:
      x, aux = self._scan(lambda window: self._layer(window, beside, decoding), x, (layers, amax_of(self.blocks)))
    else:
      x, aux = self._staged(x, beside, layers, self.pipeline)
    x = dropout(self.finish(x), self.rate, fold(keys, self.layers), FINAL_SITE)
    return x, averaged(aux)

  def _layer(self, window: int | None, beside: Beside, decoding: bool = False, stages: bool = False) -> Callable:
    """One layer: the body of a scan over ((block, its number, its table), its amax)."""
    positions, see, cross, keys = beside.positions, beside.see, beside.cross, beside.keys

    def body(x, inputs):
      (block, layer, table), amax = inputs
      block = brought(block)
      own, own_keys = _of_layer(see, window, self.sinks, table), fold(keys, layer)
      with within(keys=own_keys, amax=amax):
        x, _, aux = block(x, positions, own, cross, own_keys, layer, None, decoding=decoding)
      if self.kurtosis:
        aux = {**aux, 'kurtosis': ByLayer(excess_kurtosis(x, see.q_segment_ids))}
      return x, aux if stages else resolved(aux)

    return rematerialise(body if cross is None else distinct_shapes(body), self.remat, stages=stages)

  def _staged(self, x: Array, beside: Beside, layers, pipeline: Pipeline) -> tuple[Array, Aux]:
    """All layers, a part of them on each stage of the mesh."""
    schedule = pipeline.of(x.shape[0] // parts('batch'), parts('stages'))

    def run(x: Array, rows, inputs):
      own = beside.of_rows(rows)
      return self._scan(lambda window: self._layer(window, own, stages=True), x, inputs)

    x, aux = pipelined(
      run, x, beside.by_row(), layers, amax_of(self.blocks), schedule, shares(beside.see, schedule.microbatches),
      keeping(self.remat),
    )  # fmt: skip
    return x, resolved(aux)

  def decode(
    self, x: Array, positions: Array | Angles, see: Visibility, cache: Cache, cross: Cross | None = None
  ) -> tuple[Array, Cache]:
    """As `__call__`, for tokens that follow those in `cache`; the cache is updated in place in the carry."""

    def one(window: int | None):
      def body(carry, inputs):
        block, layer, table, cross_keys_values = inputs
        x, cache = carry
        own = None if cross is None else dataclasses.replace(cross, keys_values=cross_keys_values)
        own_see = _of_layer(see, window, self.sinks, table)
        return brought(block)(x, positions, own_see, own, None, layer, cache, decoding=True)[:2], None

      return body

    layers = jnp.arange(self.layers, dtype=jnp.int32)
    inputs = (self.blocks, layers, self._tables(see), None if cross is None else cross.keys_values)
    (x, cache), _ = self._scan(one, (x, cache), inputs)
    return self.finish(x), cache.advance(x.shape[1])

  def _tables(self, see: Visibility) -> Array | None:
    return see.relative_bias.table if self.own_bias else None

  def _scan(self, one: Callable, carry, inputs):
    """(the last carry, the outputs) of `one(window)(carry, inputs of a layer)` over all layers."""
    parts = []
    for start, stop, edge in segments(self.layers, self.edges):
      own = inputs
      if stop - start < self.layers:
        own = jax.tree.map(lambda x, own=slice(start, stop): x[own], inputs)
      with within(edge=edge):
        carry, outputs = self._scan_alike(one, carry, own)
      parts.append(outputs)
    return carry, parts[0] if len(parts) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *parts)

  def _scan_alike(self, one: Callable, carry, inputs):
    bodies = [one(window) for window in self.windows]
    if len(bodies) > 1:
      inputs = jax.tree.map(lambda x: x.reshape(-1, len(bodies), *x.shape[1:]), inputs)
    carry, outputs = jax.lax.scan(_in_turn(bodies), carry, inputs)
    if len(bodies) > 1:
      outputs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)
    return carry, outputs

  def finish(self, x: Array) -> Array:
    x = x if self.norm is None else self.norm(x)
    return x if self.finishing is None else self.finishing(x)

  def cross_keys_values(self, memory: Array, positions: Array) -> tuple[Array, Array]:
    """Every layer's cross-attention keys and values of the encoder's output: [layers, batch, heads, length, …]."""
    one = lambda window: lambda carry, block: (carry, brought(block).cross_attention.keys_values(memory, positions))
    return self._scan(one, (), self.blocks)[1]


def segments(layers: int, edges: tuple[int, int]) -> list[tuple[int, int, bool]]:
  """(first layer, the one after the last, whether they are edges) of the parts of a stack, none of them empty.

  >>> segments(6, (1, 2)), segments(2, (0, 0))
  ([(0, 1, True), (1, 4, False), (4, 6, True)], [(0, 2, False)])
  """
  first, last = edges
  parts = [(0, first, True), (first, layers - last, False), (layers - last, layers, True)]
  return [part for part in parts if part[0] < part[1]]


def shares(see: Visibility, microbatches: int) -> Array:
  """f32[microbatches]: what part of the tokens that count each of them has; they are those of `excess_kurtosis`."""
  if see.q_segment_ids is None:
    return jnp.full(microbatches, 1 / microbatches)
  tokens = (split(see.q_segment_ids, microbatches) != 0).sum((1, 2)).astype(jnp.float32)
  return tokens / jnp.maximum(tokens.sum(), 1.0)


def _of_layer(see: Visibility, window: int | None, sinks: int, table: Array | None) -> Visibility:
  """`see` of one layer: with its window and, where layers do not share one, its own table of relative biases."""
  if table is not None:
    see = dataclasses.replace(see, relative_bias=dataclasses.replace(see.relative_bias, table=table))
  return see if window is None else dataclasses.replace(see, window=window, num_sinks=sinks)


def _in_turn(bodies: Sequence[Callable]) -> Callable:
  """One body of a scan that runs `bodies`, each with its part of the inputs."""
  if len(bodies) == 1:
    return bodies[0]

  def body(carry, inputs):
    outputs = []
    for place, one in enumerate(bodies):
      carry, output = one(carry, jax.tree.map(lambda x, place=place: x[place], inputs))
      outputs.append(output)
    return carry, jax.tree.map(lambda *x: jnp.stack(x), *outputs)

  return body
