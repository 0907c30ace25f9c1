"""Learning rate as a function of the step: linear warm-up, then a shape. All are continuous but multistep's drops and
the restarts of cyclic's cosine.

With a warm-up the formulas count steps from 1: step 1 has the rate peak / warmup_steps, step `warmup_steps` the peak,
the next step the first lower rate, and step `steps` the final rate. Without a warm-up they count from 0: the first step
has the peak.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Literal, assert_never

import jax.numpy as jnp
import numpy as np
from jax import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant:
  name: Literal['constant'] = 'constant'
  peak: Annotated[float, '>= 0']
  warmup_steps: Annotated[int, '>= 0'] = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rsqrt:
  """peak * sqrt(warmup_steps / step) after warm-up, in which it climbs, or stays at `peak` as in T5 (0.01, 10,000).

  Source: Raffel et al. 2020, arXiv:1910.10683, §3.1.2; T5X's factors 'constant * rsqrt_decay'.
  """

  name: Literal['rsqrt'] = 'rsqrt'
  peak: Annotated[float, '>= 0']
  warmup_steps: Annotated[int, '>= 1']
  warmup: Literal['linear', 'constant'] = 'linear'


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
  """Half a cosine from `peak` down to `peak * final_fraction` at step `steps`. Source: arXiv:1608.03983, eq. 5.

  A moderate decay, to a rate only moderately below the peak (a higher `final_fraction`), keeps the best data of a
  curriculum, which comes last, from being learnt at a rate near zero: Luo et al. 2025, arXiv:2511.18903, abstract. The
  same goes for `linear` and `wsd`.
  """

  name: Literal['cosine'] = 'cosine'
  peak: Annotated[float, '>= 0']
  warmup_steps: Annotated[int, '>= 0'] = 0
  steps: Annotated[int, '>= 1']
  final_fraction: Annotated[float, '[0, 1]'] = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wsd:
  """Warm-up, stable at `peak`, then over the last `decay_steps` before `steps` down to `peak * final_fraction`.

  Source: Hu et al. 2024, arXiv:2404.06395; 'sqrt' is 1 - sqrt(done): Hägele et al. 2024, arXiv:2405.18392.
  """

  name: Literal['wsd'] = 'wsd'
  peak: Annotated[float, '>= 0']
  warmup_steps: Annotated[int, '>= 0'] = 0
  steps: Annotated[int, '>= 1']
  decay_steps: Annotated[int, '>= 1']
  decay: Literal['linear', 'cosine', 'sqrt'] = 'sqrt'
  final_fraction: Annotated[float, '[0, 1]'] = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Infinite:
  """Warm-up; a cosine of `cooldown_steps` down to `constant_fraction`, kept for ever, or until `anneal_start`: from
  there exponentially to `final_fraction` in `anneal_steps`. All fractions are of `peak`.

  Source: Ibrahim et al. 2024, arXiv:2403.08763, §7.4 and eq. 2.
  """

  name: Literal['infinite'] = 'infinite'
  peak: Annotated[float, '>= 0']
  warmup_steps: Annotated[int, '>= 0'] = 0
  cooldown_steps: Annotated[int, '>= 1']
  constant_fraction: Annotated[float, '(0, 1]'] = 0.55
  anneal_start: Annotated[int, '>= 1'] | None = None
  anneal_steps: Annotated[int, '>= 1'] | None = None
  final_fraction: Annotated[float, '(0, 1]'] = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rewarm:
  """Continual pretraining: `peak * final_fraction` up to step `start`, then linearly up to `peak` in `warmup_steps`,
  and by half a cosine down again at step `steps`. Source: Gupta et al. 2023, arXiv:2308.04014, §3.
  """

  name: Literal['rewarm'] = 'rewarm'
  peak: Annotated[float, '>= 0']
  start: Annotated[int, '>= 0']
  warmup_steps: Annotated[int, '>= 1']
  steps: Annotated[int, '>= 1']
  final_fraction: Annotated[float, '[0, 1]'] = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cyclic:
  """After warm-up, cycles of `cycle_steps`, each `growth` times as long as the one before.

  'cosine' falls from `peak` to `peak * final_fraction` and restarts (Loshchilov and Hutter 2017, arXiv:1608.03983);
  'triangular' falls to it half-way and climbs back (Smith 2017, arXiv:1506.01186, from the top: the warm-up is there).
  """

  name: Literal['cyclic'] = 'cyclic'
  peak: Annotated[float, '>= 0']
  warmup_steps: Annotated[int, '>= 0'] = 0
  cycle_steps: Annotated[int, '>= 2']
  growth: Annotated[int, '>= 1'] = 1
  shape: Literal['cosine', 'triangular'] = 'cosine'
  final_fraction: Annotated[float, '[0, 1]'] = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Multistep:
  """`peak` until `drops[0]` of `steps`, then `peak * factors[0]`, and so on.

  Source: DeepSeek LLM, 2024, arXiv:2401.02954, §2.3: 31.6% after 80% of the run, 10% after 90%.
  """

  name: Literal['multistep'] = 'multistep'
  peak: Annotated[float, '>= 0']
  warmup_steps: Annotated[int, '>= 0'] = 0
  steps: Annotated[int, '>= 1']
  drops: tuple[Annotated[float, '(0, 1)'], ...] = (0.8, 0.9)
  factors: tuple[Annotated[float, '[0, 1]'], ...] = (0.316, 0.1)


Schedule = Constant | Rsqrt | Linear | Cosine | Wsd | Infinite | Rewarm | Cyclic | Multistep


def _fall(shape: Literal['linear', 'cosine', 'sqrt'], done: Array, floor: float) -> Array:
  """From 1 at done = 0 to `floor` at done = 1, flat on both sides."""
  done = jnp.clip(done, 0.0, 1.0)
  match shape:
    case 'linear':
      left = 1 - done
    case 'cosine':
      left = 0.5 * (1 + jnp.cos(jnp.pi * done))
    case 'sqrt':
      left = 1 - jnp.sqrt(done)
    case _:
      assert_never(shape)
  return floor + (1 - floor) * left


def _decay(cfg: Schedule, step: Array) -> Array:
  match cfg:
    case Constant():
      return jnp.ones_like(step)
    case Rsqrt():
      return jnp.sqrt(cfg.warmup_steps / jnp.maximum(step, cfg.warmup_steps))
    case Linear() | Cosine():
      done = (step - cfg.warmup_steps) / (cfg.steps - cfg.warmup_steps)
      return _fall(cfg.name, done, cfg.final_fraction)
    case Wsd():
      return _fall(cfg.decay, 1 - (cfg.steps - step) / cfg.decay_steps, cfg.final_fraction)
    case Infinite():
      return _fall('cosine', (step - cfg.warmup_steps) / cfg.cooldown_steps, cfg.constant_fraction) * _anneal(cfg, step)
    case Rewarm():
      begin = cfg.start + cfg.warmup_steps
      return _fall('cosine', (step - begin) / (cfg.steps - begin), cfg.final_fraction)
    case Cyclic():
      return _cycle(cfg, step)
    case Multistep():
      # Counted from 0: the first lower rate is that of the step after `drops`, as everywhere.
      reached = jnp.searchsorted(jnp.asarray(_drops(cfg), jnp.float32), step, side='right')
      return jnp.asarray((1.0, *cfg.factors), jnp.float32)[reached]
    case _:
      assert_never(cfg)


def _anneal(cfg: Infinite, step: Array) -> Array:
  if cfg.anneal_start is None:
    return jnp.ones_like(step)
  done = jnp.clip((step - cfg.anneal_start) / cfg.anneal_steps, 0.0, 1.0)
  return (cfg.final_fraction / cfg.constant_fraction) ** done


def _cycle(cfg: Cyclic, step: Array) -> Array:
  """Starts and lengths are counted, not computed by a logarithm, which would miss a boundary by rounding."""
  step = jnp.maximum(step - cfg.warmup_steps, 0)
  if cfg.growth == 1:
    done = jnp.mod(step, cfg.cycle_steps) / cfg.cycle_steps
  else:
    lengths = np.array([cfg.cycle_steps * cfg.growth**k for k in range(32)], np.float64)
    starts = jnp.asarray(np.cumsum(lengths) - lengths, jnp.float32)
    cycle = jnp.searchsorted(starts, step, side='right') - 1
    done = (step - starts[cycle]) / jnp.asarray(lengths, jnp.float32)[cycle]
  if cfg.shape == 'cosine':
    return _fall('cosine', done, cfg.final_fraction)
  return _fall('linear', 1 - jnp.abs(2 * done - 1), cfg.final_fraction)


def _drops(cfg: Multistep) -> list[int]:
  """The steps from which each factor holds."""
  return [round(drop * cfg.steps) for drop in cfg.drops]


def _warmup(cfg: Schedule, step: Array) -> Array | float:
  """The share of the warm-up that is done; it climbs from 0, or from the floor of rewarm."""
  if not cfg.warmup_steps or (isinstance(cfg, Rsqrt) and cfg.warmup == 'constant'):
    return 1.0
  begin, floor = (cfg.start, cfg.final_fraction) if isinstance(cfg, Rewarm) else (0, 0.0)
  return floor + (1 - floor) * jnp.clip((step - begin + 1) / cfg.warmup_steps, 0.0, 1.0)


def _first_step(cfg: Schedule) -> int:
  """The number that the formula of the decay gives the first step.

  T5 counts the updates that were made (`warmup='constant'`: 1 / sqrt(max(n, k))).
  """
  match cfg:
    case Multistep() | Rsqrt(warmup='constant'):
      return 0
    case _:
      return 1 if cfg.warmup_steps else 0


def make_schedule(cfg: Schedule, start: int = 0, *, decay_delay: Literal[0, 1] = 0) -> Callable[[Array], Array]:
  """`schedule(step)` -> learning rate, f32, of the update after `step` updates; `start` of them are not counted.

  The peak comes once. With `decay_delay` = 1 it comes twice, as before version 0.1.0: the decay counts from 0.
  """
  first = 0 if decay_delay else _first_step(cfg)

  def schedule(step: Array) -> Array:
    step = jnp.asarray(step, jnp.float32) - start
    return cfg.peak * _warmup(cfg, step) * _decay(cfg, step + first)

  return schedule


def check_schedule(cfg: Schedule) -> None:
  """Raises ValueError where phases overlap or a phase is half given."""
  match cfg:
    case Linear() | Cosine() | Multistep() if cfg.steps <= cfg.warmup_steps:
      raise ValueError(
        f'schedule.steps={cfg.steps} does not exceed schedule.warmup_steps={cfg.warmup_steps}; '
        'the decay needs steps of its own.'
      )
    case Wsd() if cfg.steps - cfg.decay_steps < cfg.warmup_steps:
      raise ValueError(
        f'schedule.decay_steps={cfg.decay_steps} before schedule.steps={cfg.steps} begins at step '
        f'{cfg.steps - cfg.decay_steps}, in the warm-up; lower decay_steps to at most {cfg.steps - cfg.warmup_steps}, '
        f'or schedule.warmup_steps={cfg.warmup_steps}.'
      )
    case Rewarm() if cfg.steps <= cfg.start + cfg.warmup_steps:
      raise ValueError(
        f'schedule.steps={cfg.steps} does not exceed schedule.start={cfg.start} + '
        f'schedule.warmup_steps={cfg.warmup_steps}; the decay needs steps of its own.'
      )
    case Infinite():
      _check_infinite(cfg)
    case Multistep():
      _check_multistep(cfg)


def _check_infinite(cfg: Infinite) -> None:
  if (cfg.anneal_start is None) != (cfg.anneal_steps is None):
    raise ValueError(
      f'schedule.anneal_start={cfg.anneal_start} with schedule.anneal_steps={cfg.anneal_steps}; set both, or neither.'
    )
  begin = cfg.warmup_steps + cfg.cooldown_steps
  if cfg.anneal_start is not None and cfg.anneal_start < begin:
    raise ValueError(
      f'schedule.anneal_start={cfg.anneal_start} lies in the cool-down, which ends at warmup_steps + cooldown_steps = '
      f'{begin}; set it to {begin} or later.'
    )
  if cfg.anneal_start is not None and cfg.final_fraction > cfg.constant_fraction:
    raise ValueError(
      f'schedule.final_fraction={cfg.final_fraction} exceeds schedule.constant_fraction={cfg.constant_fraction}; '
      'an anneal goes down.'
    )


def _check_multistep(cfg: Multistep) -> None:
  if len(cfg.drops) != len(cfg.factors):
    raise ValueError(
      f'schedule.drops has {len(cfg.drops)} values, schedule.factors {len(cfg.factors)}; give one factor a drop.'
    )
  steps = _drops(cfg)
  if any(b <= a for a, b in zip([cfg.warmup_steps - 1, *steps], steps, strict=False)):
    raise ValueError(
      f'schedule.drops={cfg.drops} are the steps {steps} of schedule.steps={cfg.steps}; they must ascend, after '
      f'schedule.warmup_steps={cfg.warmup_steps}.'
    )
