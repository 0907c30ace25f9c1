"""A mixture of experts in place of an MLP: a router chooses a few of many MLPs for each token, and drops no token."""

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
from models.layers.mlp import ACTIVATIONS, HIDDEN_SITE, MlpConfig
from models.layers.remat import named
from models.partition import constrain, per_shard
from models.specs import cast, weight

# The matrices of all experts are whole on each device along `experts`, which sends no token to another device.
MATRIX_AXES = {
  'gate': (None, 'embed', 'mlp'),
  'up': (None, 'embed', 'mlp'),
  'down': (None, 'mlp', 'embed'),
  'dropped': ('batch', 'mlp'),
}
OF_TOKENS = ('batch', 'length', None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
  """`number` MLPs, of which each token goes through `per_token`."""

  number: Annotated[int, '>= 2']
  per_token: Annotated[int, '>= 1']


class Experts(nnx.Module):
  """The sum of `per_token` MLPs of each token, weighted by the softmax of their router logits, which is in f32.

  Source: Shazeer et al. 2017, arXiv:1701.06538; Jiang et al. 2024 (Mixtral), arXiv:2401.04088, §2.1; no expert has a
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

  def __call__(
    self, x: Float[Array, 'batch length embed'], keys: Array | None, segments: Array | None = None
  ) -> tuple[Float[Array, 'batch length embed'], dict[str, Array]]:
    """(the same shape, `router_values`), these without padding, whose `segments` are 0."""
    logits = jnp.matmul(x.astype(jnp.float32), self.router[...], precision=jax.lax.Precision.HIGHEST)
    logits = constrain(logits, *OF_TOKENS)
    top, chosen = jax.lax.top_k(logits, self.cfg.per_token)
    own = {'gate': self.gate, 'up': self.up, 'down': self.down}
    matrices = {name: cast(w, x) for name, w in own.items() if w is not None}
    if keys is not None and self.rate:
      ones = jnp.ones((x.shape[0], 1, self.hidden), x.dtype)
      matrices['dropped'] = dropout(ones, self.rate, keys, HIDDEN_SITE)[:, 0]
    in_axes = (('batch', 'length', 'embed'), OF_TOKENS, OF_TOKENS, {name: MATRIX_AXES[name] for name in matrices})
    run = per_shard(functools.partial(mixture, self.activation), in_axes, ('mlp', 'batch', 'length', 'embed'))
    # `tensor` divides the hidden dim, so each of its devices has a part of the sum.
    mixed = run(x, chosen, jax.nn.softmax(top), matrices).sum(0)
    return constrain(mixed, 'batch', 'length', 'embed'), router_values(logits, chosen, segments)


def mixture(activation: str, x: Array, chosen: Array, weights: Array, matrices: dict[str, Array]) -> Array:
  """[1, batch, length, embed]: x through the experts `chosen[batch, length, per_token]`.

  Tokens are sorted by expert, so that each expert's are contiguous rows of one product.
  """
  batch, length, per_token = chosen.shape
  order = jnp.argsort(chosen.reshape(-1), stable=True)
  back = jnp.argsort(order)
  sizes = jnp.bincount(chosen.reshape(-1), length=matrices['up'].shape[0]).astype(jnp.int32)
  product = lambda x, name: named(jax.lax.ragged_dot(x, matrices[name], sizes), name)
  rows = permuted(jnp.repeat(x.reshape(-1, x.shape[-1]), per_token, axis=0), order, back)
  hidden, activate = product(rows, 'up'), ACTIVATIONS[activation]
  hidden = activate(product(rows, 'gate')) * hidden if 'gate' in matrices else activate(hidden)
  if 'dropped' in matrices:
    hidden = hidden * matrices['dropped'][order // (per_token * length)]
  each = permuted(product(hidden, 'down'), back, order).reshape(batch, length, per_token, -1)
  return (each * weights[..., None].astype(x.dtype)).sum(2)[None]


@jax.custom_vjp
def permuted(x: Array, order: Array, back: Array) -> Array:
  """`x[order]`, whose gradient is a gather by the inverse `back` instead of a scatter."""
  return x[order]


permuted.defvjp(lambda x, order, back: (x[order], back), lambda back, g: (g[back], None, None))


def router_values(logits: Array, chosen: Array, segments: Array | None) -> dict[str, Array]:
  """`load_balance`: 1 where all experts get equally many tokens, `number` where one gets all; `router_z`: the mean
  square of log Z of the router. Means are over tokens whose `segments` are not 0 (None: all).

  Source: Fedus et al. 2021, arXiv:2101.03961, §2.2, with the shares of all `per_token` choices; Zoph et al. 2022,
  arXiv:2202.08906, eq. 5.
  """
  number = logits.shape[-1]
  share = jnp.ones(logits.shape[:2], jnp.float32) if segments is None else (segments != 0).astype(jnp.float32)
  share = share / jnp.maximum(share.sum(), 1.0)
  mean = lambda x: jnp.einsum('bl,bl...->...', share, x)
  load = mean(jax.nn.one_hot(chosen, number, dtype=jnp.float32).mean(-2))
  balance = number * (load * mean(jax.nn.softmax(logits))).sum()
  return {'load_balance': balance, 'router_z': mean(jnp.square(jax.nn.logsumexp(logits, -1)))}
