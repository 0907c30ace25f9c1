"""A mixture of experts in place of an MLP: a router chooses a few of many MLPs for each token."""

import dataclasses
import functools
from typing import Annotated

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from models.layers.dropout import dropout
from models.layers.linear import Projections
from models.layers.mlp import HIDDEN_SITE, MlpConfig
from models.layers.routing.dispatch import buffered, gathered, mixture
from models.layers.routing.routers import placed, places, router_values
from models.layers.values import Aux, ByLayer
from models.partition import constrain, divides, per_shard
from models.specs import cast, weight

MATRIX_AXES = {
  'gate': ('experts', 'embed', 'mlp'),
  'up': ('experts', 'embed', 'mlp'),
  'down': ('experts', 'mlp', 'embed'),
  'dropped': ('batch', 'mlp'),
}
OF_TOKENS = ('batch', 'length', None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
  """`number` MLPs, of which each token goes through `per_token`. With a `capacity` an expert takes that many times its
  equal share of a row's choices, and drops the others; None drops nothing.
  """

  number: Annotated[int, '>= 2']
  per_token: Annotated[int, '>= 1']
  capacity: Annotated[float, '> 0'] | None = None


class Experts(nnx.Module):
  """The sum of `per_token` MLPs of each token, weighted by the softmax of their router logits, which is in f32.

  Source: Shazeer et al. 2017, arXiv:1701.06538; Jiang et al. 2024 (Mixtral), arXiv:2401.04088, §2.1; without a
  capacity: Gale et al. 2022 (MegaBlocks), arXiv:2211.15841; a router in f32: Fedus et al. 2021, arXiv:2101.03961, §2.4.
  """

  def __init__(self, embed: int, mlp: MlpConfig, cfg: ExpertsConfig, projections: Projections, rate: float):
    self.router = weight((embed, cfg.number), ('embed', 'experts'), projections.init('embed'))
    shape, axes = (cfg.number, embed, mlp.hidden), ('experts', 'embed', 'mlp')
    self.up = weight(shape, axes, projections.init('embed'))
    self.gate = weight(shape, axes, projections.init('embed')) if mlp.gated else None
    down = (cfg.number, mlp.hidden, embed)
    self.down = weight(down, ('experts', 'mlp', 'embed'), projections.init_residual('mlp'))
    self.cfg, self.activation, self.hidden, self.rate = cfg, mlp.activation, mlp.hidden, rate
    self.tells_choices = False  # set by models/build.py

  def __call__(
    self,
    x: Float[Array, 'batch length embed'],
    keys: Array | None,
    segments: Array | None = None,
    *,
    decoding: bool = False,
  ) -> tuple[Float[Array, 'batch length embed'], Aux]:
    """(the same shape, `router_values`), these without padding, whose `segments` are 0.

    `decoding` drops nothing: what a token gets must not depend on how many are written at once.
    """
    logits = jnp.matmul(x.astype(jnp.float32), self.router[...], precision=jax.lax.Precision.HIGHEST)
    logits = constrain(logits, *OF_TOKENS)
    # On each device's tokens: the partitioner gathers the operand of top_k.
    best = lambda x: tuple(jax.lax.top_k(x, self.cfg.per_token))
    top, chosen = per_shard(best, (OF_TOKENS,), (OF_TOKENS, OF_TOKENS))(logits)
    own = {'gate': self.gate, 'up': self.up, 'down': self.down}
    matrices = {name: cast(w, x) for name, w in own.items() if w is not None}
    if keys is not None and self.rate:
      ones = jnp.ones((x.shape[0], 1, self.hidden), x.dtype)
      matrices['dropped'] = dropout(ones, self.rate, keys, HIDDEN_SITE)[:, 0]
    capacity = None if decoding else self.cfg.capacity
    kept = None if capacity is None else self.kept(chosen, segments, capacity)
    mixed = self.mixed(x, chosen, kept, jax.nn.softmax(top), matrices)
    values = router_values(logits, chosen, segments, kept)
    if self.tells_choices:
      values['choices'] = ByLayer(chosen)
    return mixed, values

  def kept(self, chosen: Array, segments: Array | None, capacity: float) -> Array:
    """Which choices have a place. Rows are whole here, also where the mesh divides their length."""
    whole = constrain(chosen, 'batch', None, None)
    room = places(chosen.shape[1], self.cfg.number, self.cfg.per_token, capacity)
    return constrain(placed(whole, segments, self.cfg.number, room), *OF_TOKENS)

  def mixed(self, x: Array, chosen: Array, kept: Array | None, weights: Array, matrices: dict[str, Array]) -> Array:
    """The sum over the experts of each token, with tokens and experts where the mesh has them."""
    axis, capacity = 'expert' if divides('experts') else None, self.cfg.capacity
    routes, in_axes = (chosen, weights), (OF_TOKENS, OF_TOKENS, {name: MATRIX_AXES[name] for name in matrices})
    if kept is not None:
      room = places(x.shape[1], self.cfg.number, self.cfg.per_token, capacity)
      run, routes = functools.partial(buffered, room=room, axis=axis), (chosen, kept, weights)
      in_axes = (OF_TOKENS, *in_axes)
    elif axis is not None:
      run = functools.partial(gathered, axis=axis)
    else:
      run = mixture
    run = functools.partial(run, self.activation)
    each = per_shard(run, (('batch', 'length', 'embed'), *in_axes), ('mlp', 'batch', 'length', 'embed'))
    # `tensor` divides the hidden dim, so each of its devices has a part of the sum.
    return constrain(each(x, *routes, matrices).sum(0), 'batch', 'length', 'embed')
