"""Rotary positions, and the changes of their frequencies that let a model read longer rows than it was trained on."""

import dataclasses
import math
from typing import Annotated, Literal, assert_never

import jax
import jax.numpy as jnp
from jax import Array

from models.partition import divides, per_shard
from pallas_kernels import rotation
from pallas_kernels.attention.api import mesh_platform


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoScaling:
  name: Literal['none'] = 'none'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
  """Positions divided by `factor`. Source: Chen et al. 2023, arXiv:2306.15595."""

  name: Literal['linear'] = 'linear'
  factor: Annotated[float, '>= 1']


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3:
  """Wavelengths above `original_max_positions / low_freq_factor` grow by `factor`, those below
  `original_max_positions / high_freq_factor` stay, and between them the frequencies are interpolated.

  Source: Llama 3.1's reference code, apply_scaling; `transformers` modeling_rope_utils.py, llama3.
  """

  name: Literal['llama3'] = 'llama3'
  factor: Annotated[float, '>= 1']
  original_max_positions: Annotated[int, '>= 1']
  low_freq_factor: Annotated[float, '> 0'] = 1.0
  high_freq_factor: Annotated[float, '> 0'] = 4.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
  """Frequencies of less than `beta_slow` turns in `original_max_positions` are divided by `factor`, frequencies of
  more than `beta_fast` turns stay, with a ramp between them; `truncate` rounds its ends to whole dims.

  Sines and cosines are multiplied by `attention_factor`; None: 0.1 ln(factor) + 1. Source: Peng et al. 2023,
  arXiv:2309.00071; `transformers` modeling_rope_utils.py, yarn.
  """

  name: Literal['yarn'] = 'yarn'
  factor: Annotated[float, '>= 1']
  original_max_positions: Annotated[int, '>= 1']
  beta_fast: Annotated[float, '> 0'] = 32.0
  beta_slow: Annotated[float, '> 0'] = 1.0
  attention_factor: Annotated[float, '> 0'] | None = None
  truncate: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Truncated:
  """Frequencies of `kept_turns` or more in `original_max_positions` stay, those of `zero_turns` or fewer become 0, and
  those between them become that of `fixed_turns`.

  Source: Pal et al. 2023 (Giraffe), arXiv:2308.10882, §3.2; the defaults are those of its code, interpolate.py.
  """

  name: Literal['truncated'] = 'truncated'
  original_max_positions: Annotated[int, '>= 1']
  kept_turns: Annotated[float, '> 0'] = 1.0
  zero_turns: Annotated[float, '>= 0'] = 0.125
  fixed_turns: Annotated[float, '>= 0'] = 0.0625


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clex:
  """Frequencies learned as a function of the length: models/layers/positions/clex.py.

  A row of up to t * `original_max_positions` has the frequencies of scale t, at most `max_factor`. A training step
  draws t. `width` times the rotated dims are the units of the hidden layer; `steps` of the solver make one unit of t.
  Source: Chen et al. 2024, arXiv:2310.16450.
  """

  name: Literal['clex'] = 'clex'
  original_max_positions: Annotated[int, '>= 1']
  max_factor: Annotated[int, '>= 2']
  width: Annotated[int, '>= 1'] = 1
  activation: Literal['silu', 'tanh'] = 'silu'
  steps: Annotated[int, '>= 1'] = 10


RopeScaling = NoScaling | Linear | Llama3 | Yarn | Truncated | Clex


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
  """The first `dims` of each head are rotated, pairs (i, i + dims / 2)."""

  theta: float
  dims: int
  scaling: RopeScaling = NoScaling()


def check_scaling(cfg: RopeScaling) -> None:
  """Raises ValueError where the two ends of a ramp are not in order."""
  ends = {
    Llama3: ('low_freq_factor', 'high_freq_factor', 'interpolated'),
    Yarn: ('beta_slow', 'beta_fast', 'interpolated'),
    Truncated: ('zero_turns', 'kept_turns', 'replaced'),
  }
  for low, high, done in [ends[type(cfg)]] if type(cfg) in ends else []:
    if getattr(cfg, low) >= getattr(cfg, high):
      raise ValueError(
        f'model.rope_scaling.{low}={getattr(cfg, low)} is not below model.rope_scaling.{high}={getattr(cfg, high)}; '
        f'the frequencies between them are {done}, so make it smaller.'
      )


def frequencies(rope: Rope) -> tuple[Array, float]:
  """(radians for each position f32[dims / 2], the factor on sines and cosines)."""
  half = rope.dims // 2
  frequency = rope.theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
  match rope.scaling:
    case NoScaling():
      return frequency, 1.0
    case Linear(factor=factor):
      return frequency / factor, 1.0
    case Llama3() as cfg:
      return _llama3(frequency, cfg), 1.0
    case Yarn() as cfg:
      factor = 0.1 * math.log(cfg.factor) + 1.0 if cfg.attention_factor is None else cfg.attention_factor
      return _yarn(frequency, rope, cfg), factor
    case Truncated() as cfg:
      return _truncated(frequency, cfg), 1.0
    case Clex():  # those of scale 1; a model with others gives `rotary` angles
      return frequency, 1.0
    case _:
      assert_never(rope.scaling)


def _llama3(frequency: Array, cfg: Llama3) -> Array:
  turns = cfg.original_max_positions * frequency / (2 * math.pi)  # in the original length
  kept = jnp.clip((turns - cfg.low_freq_factor) / (cfg.high_freq_factor - cfg.low_freq_factor), 0.0, 1.0)
  return (1 - kept) * frequency / cfg.factor + kept * frequency


def _yarn(frequency: Array, rope: Rope, cfg: Yarn) -> Array:
  turning = lambda turns: (  # the dim whose frequency turns so often in the original length
    rope.dims * math.log(cfg.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
  )
  low, high = turning(cfg.beta_fast), turning(cfg.beta_slow)
  if cfg.truncate:
    low, high = math.floor(low), math.ceil(high)
  low, high = max(low, 0), min(high, rope.dims - 1)
  width = high - low or 0.001
  divided = jnp.clip((jnp.arange(len(frequency), dtype=jnp.float32) - low) / width, 0.0, 1.0)
  return frequency / cfg.factor * divided + frequency * (1 - divided)


def _truncated(frequency: Array, cfg: Truncated) -> Array:
  of = lambda turns: 2 * math.pi * turns / cfg.original_max_positions
  low = jnp.where(frequency <= of(cfg.zero_turns), 0.0, of(cfg.fixed_turns))
  return jnp.where(frequency >= of(cfg.kept_turns), frequency, low)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Angles:
  """What `rotary` turns each pair of dims by, f32[batch or 1, length, dims / 2], in place of positions."""

  radians: Array


def rotary(x: Array, positions: Array | Angles, rope: Rope, axis: str = 'heads') -> Array:
  """`x[batch, heads, length, head_dim]` whose first `rope.dims` are rotated by `positions[batch, length]`.

  `axis` is the logical axis of the heads. Angles in f32. Source: Su et al. 2021, arXiv:2104.09864; pairing as in
  Llama's reference code converted by HF; a part of each head: GPT-J, GPT-NeoX (Black et al. 2022, arXiv:2204.06745,
  §2.1.1).
  """
  frequency, factor = frequencies(rope)
  if isinstance(positions, Angles):
    angle = positions.radians[:, None]
  else:
    angle = positions.astype(jnp.float32)[:, None, :, None] * frequency
  sin, cos = jnp.sin(angle), jnp.cos(angle)
  if factor != 1.0:
    sin, cos = factor * sin, factor * cos
  if _by_kernel(x, positions, rope):
    whole, angles = ('batch', axis, None, 'head_dim'), ('batch', None, None)
    return per_shard(rotation.rotate, (whole, angles, angles), whole)(x, sin[:, 0], cos[:, 0])
  a, b = jnp.split(x[..., : rope.dims].astype(jnp.float32), 2, -1)
  turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
  return turned if rope.dims == x.shape[-1] else jnp.concatenate([turned, x[..., rope.dims :]], -1)


def _by_kernel(x: Array, positions: Array | Angles, rope: Rope) -> bool:
  """Whether `rotate` takes this x; it has no gradient of learned angles."""
  if isinstance(positions, Angles) or positions.shape[0] != x.shape[0] or divides('length'):
    return False
  return mesh_platform() == 'tpu' and x.dtype != jnp.float32 and rotation.fits(x.shape, rope.dims)
