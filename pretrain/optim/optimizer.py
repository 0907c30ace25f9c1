"""Optimizers: config -> optax transform. Rules are functions of a parameter's axes, never of its name."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, assert_never

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from pretrain.optim.adafactor import Adafactor, scale_by_adafactor
from pretrain.optim.muon import Muon, is_hidden_matrix, scale_by_muon
from pretrain.optim.shared import Shared, decays, scale_by_parameter
from pretrain.optim.spikes import NONE, Spikes, SpikeState, guarded
from pretrain.optim.state import stored


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW(Shared):
  """Adam with decoupled weight decay. Source: Loshchilov and Hutter 2019, arXiv:1711.05101."""

  name: Literal['adamw'] = 'adamw'
  b1: Annotated[float, '[0, 1)'] = 0.9
  b2: Annotated[float, '[0, 1)'] = 0.98
  eps: Annotated[float, '> 0'] = 1e-8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lion(Shared):
  """The sign of an interpolated momentum; keeps one moment. Its authors use a learning rate 3 to 10 times smaller than
  AdamW's, and a weight decay larger by the same factor. Source: Chen et al. 2023, arXiv:2302.06675, Algorithm 2.
  """

  name: Literal['lion'] = 'lion'
  weight_decay: Annotated[float, '>= 0'] = 0.1
  b1: Annotated[float, '[0, 1)'] = 0.9
  b2: Annotated[float, '[0, 1)'] = 0.99


Optimizer = AdamW | Adafactor | Lion | Muon


def check_optimizer(cfg: Optimizer) -> None:
  """Raises ValueError for a key that has no effect."""
  if not isinstance(cfg, Adafactor) or cfg.momentum:
    return
  if 'moments' in cfg.offload:
    raise ValueError(
      "optimizer.offload has 'moments', and optimizer.name='adafactor' with optimizer.momentum=0.0 has none of a "
      "parameter's size; remove it."
    )
  if cfg.state_dtype != 'float32':
    raise ValueError(
      f"optimizer.state_dtype='{cfg.state_dtype}' is of moments of a parameter's size, and optimizer.name='adafactor' "
      'with optimizer.momentum=0.0 has none; remove it.'
    )


class SkipState(NamedTuple):
  total: Array
  consecutive: Array
  inner: optax.OptState


def skip_nonfinite(inner: optax.GradientTransformation) -> optax.GradientTransformation:
  """If the gradient norm is not finite, the update is zero and `inner` keeps its state; both cases are counted."""

  def init(params):
    return SkipState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), inner.init(params))

  def update(grads, state, params=None):
    finite = jnp.isfinite(optax.tree.norm(grads))
    updates, moved = inner.update(grads, state.inner, params)
    keep = lambda new, old: jnp.where(finite, new, old)
    bad = 1 - finite.astype(jnp.int32)
    updates = jax.tree.map(lambda u: jnp.where(finite, u, jnp.zeros_like(u)), updates)
    return updates, SkipState(state.total + bad, (state.consecutive + 1) * bad, jax.tree.map(keep, moved, state.inner))

  return optax.GradientTransformation(init, update)


def direction(cfg: Optimizer, specs: Mapping[str, Any], mesh: Mesh | None) -> optax.GradientTransformation:
  """Gradients -> the direction of the update, before parameter scale, weight decay and learning rate."""
  adam = lambda own: stored(optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps), cfg.state_dtype, own)
  match cfg:
    case AdamW():
      return adam(specs)
    case Lion():
      return stored(optax.scale_by_lion(b1=cfg.b1, b2=cfg.b2), cfg.state_dtype, specs)
    case Adafactor():
      return scale_by_adafactor(cfg, specs)
    case Muon():
      labels = jax.tree.map(lambda spec: 'muon' if is_hidden_matrix(spec) else 'adam', specs)
      own = {label: only(label, labels, specs) for label in ('muon', 'adam')}
      muon = stored(scale_by_muon(cfg, own['muon'], mesh), cfg.state_dtype, own['muon'])
      return optax.partition({'muon': muon, 'adam': adam(own['adam'])}, labels)
    case _:
      assert_never(cfg)


def only(label: str, labels: Mapping[str, Any], specs: Mapping[str, Any]) -> Mapping[str, Any]:
  """The specs of a label; the others are replaced by optax.MaskedNode, as optax.partition does."""
  return jax.tree.map(lambda own, spec: spec if own == label else optax.MaskedNode(), labels, specs)


def make_optimizer(
  cfg: Optimizer,
  schedule: Callable[[Array], Array],
  specs: Mapping[str, Any],
  mesh: Mesh | None = None,
  *,
  spikes: Spikes = NONE,
  since: int = 0,
) -> optax.GradientTransformation:
  """Clip by global norm, the optimizer, decay by axes; non-finite steps skipped; the schedule counts every step.

  Muon spreads its work over `mesh`, the mesh of the run. `spikes` compares a step only with steps after `since`.
  """
  momentum = cfg.momentum if isinstance(cfg, Adafactor) else 0
  moments = optax.chain(
    optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity(),
    direction(cfg, specs, mesh),
    scale_by_parameter(specs) if cfg.parameter_scale else optax.identity(),
    stored(optax.ema(momentum, debias=False), cfg.state_dtype, specs) if momentum else optax.identity(),
    optax.add_decayed_weights(cfg.weight_decay, mask=jax.tree.map(decays, specs))
    if cfg.weight_decay
    else optax.identity(),
  )
  return guarded(optax.chain(skip_nonfinite(moments), optax.scale_by_learning_rate(schedule)), spikes, since)


def num_updates(opt_state) -> Array:
  """int32: the number of updates, including skipped ones, that a state of `make_optimizer` has counted."""
  return opt_state[1].count


def skipped(opt_state) -> dict[str, Array]:
  """Metrics of an optimizer state made by `make_optimizer`: counts of skipped updates; where spikes are judged, those
  too, and the limits."""
  counts = {'skipped': opt_state[0].total, 'skipped_consecutive': opt_state[0].consecutive}
  if isinstance(spikes := opt_state[-1], SpikeState):
    counts |= {'spikes': spikes.total, 'spikes_consecutive': spikes.consecutive}
    counts |= {'loss_limit': spikes.limits[0], 'grad_norm_limit': spikes.limits[1]}
  return counts
