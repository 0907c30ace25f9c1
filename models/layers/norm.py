"""Normalisation of features: RMS norm and layer norm."""

import dataclasses
from typing import Annotated, Literal, assert_never

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from models.rendered import IF_SET
from models.specs import Ones, Zeros, cast, weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class RmsNormConfig:
  """`eps` is 1e-6 in T5, 1e-5 in Llama 2. `scale` 'single' learns one number for all features, so that no norm can
  make one feature larger than the others (SSNorm of Park et al. 2025, arXiv:2506.19697; `feature_axes=()` in its
  code, example_modeling_flax.py); norms of queries and keys keep one for each.
  """

  name: Literal['rmsnorm'] = 'rmsnorm'
  eps: Annotated[float, '> 0'] = 1e-6
  scale: Literal['each', 'single'] = dataclasses.field(default='each', metadata=IF_SET)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerNormConfig:
  """`eps` is 1e-5 in GPT-2, 1e-12 in BERT; `bias` adds a learned vector."""

  name: Literal['layernorm'] = 'layernorm'
  eps: Annotated[float, '> 0'] = 1e-5
  bias: bool = True


NormConfig = RmsNormConfig | LayerNormConfig


class RmsNorm(nnx.Module):
  """x / rms(x) * scale over the last dims of x, which `shape` gives, statistics in f32. `single`: scale is a number.

  Source: Zhang and Sennrich 2019, arXiv:1910.07467; T5's layer norm.
  """

  def __init__(self, shape: tuple[int, ...], eps: float, axes: tuple[str, ...] = ('embed',), *, single: bool = False):
    self.scale = weight((), (), Ones()) if single else weight(shape, axes, Ones())
    self.dims, self.eps = tuple(range(-len(shape), 0)), eps

  def __call__(self, x: Array) -> Array:
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), self.dims, keepdims=True) + self.eps)
    return (x32 * inverse).astype(x.dtype) * cast(self.scale, x)


class LayerNorm(nnx.Module):
  """(x - mean(x)) / std(x) * scale (+ bias), statistics in f32. Source: Ba et al. 2016, arXiv:1607.06450."""

  def __init__(self, dim: int, eps: float, *, bias: bool):
    self.scale = weight((dim,), ('embed',), Ones())
    self.bias = weight((dim,), ('embed',), Zeros()) if bias else None
    self.eps = eps

  def __call__(self, x: Array) -> Array:
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, -1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(centred), -1, keepdims=True) + self.eps)
    scaled = (centred * inverse).astype(x.dtype) * cast(self.scale, x)
    return scaled if self.bias is None else scaled + cast(self.bias, x)


def make_norm(embed: int, cfg: NormConfig) -> RmsNorm | LayerNorm:
  match cfg:
    case RmsNormConfig():
      return RmsNorm((embed,), cfg.eps, single=cfg.scale == 'single')
    case LayerNormConfig():
      return LayerNorm(embed, cfg.eps, bias=cfg.bias)
    case _:
      assert_never(cfg)
