"""What a router decides: which choices of a token have a place in their expert, and the values that describe it."""

import math

import jax
import jax.numpy as jnp
from jax import Array

from models.layers.values import Aux, Balance, ByLayer


def places(length: int, number: int, per_token: int, capacity: float) -> int:
  """How many tokens of a row of `length` have a place in each of `number` experts: `capacity` times an equal share of
  the choices, rounded up, and at most all tokens.

  Source: Lepikhin et al. 2020 (GShard), arXiv:2006.16668, §2.2; Fedus et al. 2021, arXiv:2101.03961, eq. 3. Their
  groups of tokens are rows here, as in MaxText, so that the same tokens are dropped on every mesh.

  >>> places(64, 8, 2, 1.25), places(4, 8, 1, 1.0), places(4, 2, 2, 9.0)
  (20, 1, 4)
  """
  return min(math.ceil(capacity * length * per_token / number), length)


def placed(chosen: Array, segments: Array | None, number: int, room: int) -> Array:
  """bool[batch, length, per_token]: whether each choice is among the first `room` of its row for its expert.

  First choices of all tokens come before second choices, and earlier tokens before later ones (GShard, algorithm 1).
  Padding, whose `segments` are 0, has no place.
  """
  batch, length, per_token = chosen.shape
  if segments is not None:
    chosen = jnp.where((segments != 0)[..., None], chosen, number)
  ids = jnp.swapaxes(chosen, 1, 2).reshape(batch, per_token * length)
  ranks = ranked(ids, number)[1].reshape(batch, per_token, length)
  return (jnp.swapaxes(ranks, 1, 2) < room) & (chosen < number)


def ranked(ids: Array, number: int) -> tuple[Array, Array, Array]:
  """(order, rank, counts) of the ids < `number` in each row: the indices that sort it, how many of the same id are
  before each, and how many of each id there are. Other ids come last."""
  order = jnp.argsort(ids, axis=1, stable=True)
  counts = jax.vmap(lambda row: jnp.bincount(row, length=number + 1))(ids).astype(jnp.int32)
  starts = jnp.cumsum(counts, 1) - counts
  rank = jnp.argsort(order, axis=1) - jnp.take_along_axis(starts, ids, 1)
  return order, rank, counts[:, :number]


def router_values(logits: Array, chosen: Array, segments: Array | None, kept: Array | None = None) -> Aux:
  """`load_balance`, whose value is 1 where all experts get equally many tokens, `number` where one gets all;
  `router_z`: the mean square of log Z of the router. Means are over tokens whose `segments` are not 0 (None: all).

  For each layer `expert_load`, each expert's share of all choices; `router_entropy` in nats, ln(number) where the
  router prefers no expert; and where there is a capacity `expert_dropped`, the share of choices that are not `kept`.

  Source: Fedus et al. 2021, arXiv:2101.03961, §2.2, with the shares of all `per_token` choices; Zoph et al. 2022,
  arXiv:2202.08906, eq. 5.
  """
  number = logits.shape[-1]
  share = jnp.ones(logits.shape[:2], jnp.float32) if segments is None else (segments != 0).astype(jnp.float32)
  share = share / jnp.maximum(share.sum(), 1.0)
  mean = lambda x: jnp.einsum('bl,bl...->...', share, x)
  load = mean(jax.nn.one_hot(chosen, number, dtype=jnp.float32).mean(-2))
  balance = Balance(load, mean(jax.nn.softmax(logits)))
  found: Aux = {'load_balance': balance, 'router_z': mean(jnp.square(jax.nn.logsumexp(logits, -1)))}
  entropy = -(jax.nn.softmax(logits) * jax.nn.log_softmax(logits)).sum(-1)
  described = {'expert_load': load, 'router_entropy': mean(entropy)}
  if kept is not None:
    described['expert_dropped'] = mean(1 - kept.astype(jnp.float32).mean(-1))
  return found | {name: ByLayer(jax.lax.stop_gradient(x)) for name, x in described.items()}
