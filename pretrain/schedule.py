"""Learning rate as a function of the step: linear warm-up, then one of four shapes."""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Literal, assert_never

import jax.numpy as jnp
from jax import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant:
  name: Literal['constant'] = 'constant'
  peak: Annotated[float, '>= 0']
  warmup_steps: Annotated[int, '>= 0'] = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rsqrt:
  """peak * sqrt(warmup_steps / step) after warm-up. Source: Raffel et al. 2020, arXiv:1910.10683, §3.1.2."""

  name: Literal['rsqrt'] = 'rsqrt'
  peak: Annotated[float, '>= 0']
  warmup_steps: Annotated[int, '>= 1']


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
  """Straight from `peak` down to `peak * final_fraction` at step `steps`."""

  name: Literal['linear'] = 'linear'
  peak: Annotated[float, '>= 0']
  warmup_steps: Annotated[int, '>= 0'] = 0
  steps: Annotated[int, '>= 1']
  final_fraction: Annotated[float, '[0, 1]'] = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine:
  """Half a cosine from `peak` down to `peak * final_fraction` at step `steps`. Source: arXiv:1608.03983, eq. 5."""

  name: Literal['cosine'] = 'cosine'
  peak: Annotated[float, '>= 0']
  warmup_steps: Annotated[int, '>= 0'] = 0
  steps: Annotated[int, '>= 1']
  final_fraction: Annotated[float, '[0, 1]'] = 0.1


Schedule = Constant | Rsqrt | Linear | Cosine


def _decay(cfg: Schedule, step: Array) -> Array:
  match cfg:
    case Constant():
      return jnp.ones_like(step)
    case Rsqrt():
      return jnp.sqrt(cfg.warmup_steps / jnp.maximum(step, cfg.warmup_steps))
    case Linear() | Cosine():
      done = jnp.clip((step - cfg.warmup_steps) / (cfg.steps - cfg.warmup_steps), 0.0, 1.0)
      left = 1 - done if isinstance(cfg, Linear) else 0.5 * (1 + jnp.cos(jnp.pi * done))
      return cfg.final_fraction + (1 - cfg.final_fraction) * left
    case _:
      assert_never(cfg)


def make_schedule(cfg: Schedule, start: int = 0) -> Callable[[Array], Array]:
  """`schedule(step)` -> learning rate, f32, counted from step `start`, whose update already moves in a warm-up."""

  def schedule(step: Array) -> Array:
    step = jnp.asarray(step, jnp.float32) - start
    warmup = jnp.minimum(1.0, (step + 1) / cfg.warmup_steps) if cfg.warmup_steps else 1.0
    return cfg.peak * warmup * _decay(cfg, step)

  return schedule


def check_schedule(cfg: Schedule) -> None:
  """Raises ValueError where the decay would end before the warm-up does."""
  if isinstance(cfg, Linear | Cosine) and cfg.steps <= cfg.warmup_steps:
    raise ValueError(
      f'schedule.steps={cfg.steps} does not exceed schedule.warmup_steps={cfg.warmup_steps}; '
      'the decay needs steps of its own.'
    )
