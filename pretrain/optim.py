"""Optimizers: config -> optax transform. Rules are functions of a parameter's axes, never of its name."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from models.specs import ParamSpec, is_matrix
from pretrain.mesh import replicated


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
  """Adam with decoupled weight decay. Source: Loshchilov and Hutter 2019, arXiv:1711.05101.

  `parameter_scale` multiplies each update by the RMS of its parameter, layer by layer: T5's parameters are drawn at
  sizes a hundred times apart, for Adafactor, which does the same. Source: Shazeer and Stern 2018, arXiv:1804.04235, §8;
  with Adam: Nawrot 2023, arXiv:2309.02373, §3.
  """

  name: Literal['adamw'] = 'adamw'
  b1: Annotated[float, '[0, 1)'] = 0.9
  b2: Annotated[float, '[0, 1)'] = 0.98
  eps: Annotated[float, '> 0'] = 1e-8
  weight_decay: Annotated[float, '>= 0'] = 0.01
  clip_norm: Annotated[float, '>= 0'] = 1.0  # 0 clips nothing
  parameter_scale: bool = False
  max_consecutive_nonfinite: Annotated[int, '>= 1'] = 5


def decays(spec: ParamSpec) -> bool:
  """Matrices decay; norm scales, biases and bias tables do not."""
  return is_matrix(spec)


def scale_by_parameter(specs: Mapping[str, Any], smallest: float = 1e-3) -> optax.GradientTransformation:
  """Updates times the RMS of their parameter, at least `smallest`; stacked layers each have their own."""

  def scaled(update: Array, param: Array, spec: ParamSpec) -> Array:
    dims = tuple(i for i, axis in enumerate(spec.axes) if axis != 'layers')
    rms = jnp.sqrt(jnp.mean(jnp.square(param), dims, keepdims=True))
    return update * jnp.maximum(rms, smallest)

  def update(updates, state, params=None):
    return jax.tree.map(scaled, updates, params, specs), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class SkipState(NamedTuple):
  total: Array
  consecutive: Array
  inner: optax.OptState


def skip_nonfinite(inner: optax.GradientTransformation) -> optax.GradientTransformation:
  """Where the global gradient norm is not finite, the update is zero and `inner` keeps its state; both are counted."""

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


def make_optimizer(
  cfg: AdamW, schedule: Callable[[Array], Array], specs: Mapping[str, Any]
) -> optax.GradientTransformation:
  """Clip by global norm, AdamW with decay by axes, non-finite steps skipped; the schedule counts every step."""
  mask = jax.tree.map(decays, specs, is_leaf=lambda x: isinstance(x, ParamSpec))
  moments = optax.chain(
    optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity(),
    optax.scale_by_adam(b1=cfg.b1, b2=cfg.b2, eps=cfg.eps),
    scale_by_parameter(specs) if cfg.parameter_scale else optax.identity(),
    optax.add_decayed_weights(cfg.weight_decay, mask=mask) if cfg.weight_decay else optax.identity(),
  )
  return optax.chain(skip_nonfinite(moments), optax.scale_by_learning_rate(schedule))


def skipped(opt_state) -> SkipState:
  """The counts of skipped updates inside an optimizer state made by `make_optimizer`."""
  return opt_state[0]


def state_shardings(tx: optax.GradientTransformation, params, shardings, mesh: Mesh):
  """Shardings of tx's state: a parameter's statistics lie where it lies, everything else on every device."""
  state = jax.eval_shape(tx.init, params)
  return optax.tree_map_params(tx, lambda _, s: s, state, shardings, transform_non_params=lambda _: replicated(mesh))
