"""Experts in place of MLPs: each is a copy of the MLP, and the router is new (sparse upcycling).

Source: Komatsuzaki et al. 2022, arXiv:2212.05055; google-research/t5x contrib/moe/checkpoints.py UpcycleCheckpointer,
with sparse_upcycle.gin: optimizer states are not copied. Here every layer has experts, and the weights of a token's
experts are a softmax over them alone. They sum to 1, so the model computes what the dense one did, whatever its router,
until `noise` is added to the copies or a capacity drops tokens.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from models.build import ModelConfig
from models.specs import Normal, ParamSpec, initialize
from pretrain.errors import ConfigError

Path = tuple[str, ...]
KEYS = ('model.experts', 'model.experts_per_token')  # config keys that upcycling may change


def check_upcycling(before: ModelConfig, after: ModelConfig) -> None:
  """Raises ConfigError where the one model has experts already, or the other has none."""
  if before.experts is not None:
    raise ConfigError(
      f'model.experts is {before.experts} in the weights; --method=upcycle makes experts of an MLP. Nothing was '
      'written; choose a run without experts.'
    )
  if after.experts is None:
    raise ConfigError('model.experts is None in --gin_file; --method=upcycle needs it. Nothing was written; set it.')


def upcycled(
  params: Mapping[Path, Any], specs: Mapping[Path, ParamSpec], key: jax.Array, noise: float = 0.0
) -> tuple[dict[Path, Any], dict[Path, Any]]:
  """(all parameters of the model with `specs`, initializers of the new ones), each by path.

  What `params` lack is drawn from `key` as in a new model. With `noise` every expert gets normal numbers of its own,
  whose std is that share of the std of the matrix in its layer.
  """
  inits = {path: spec.init for path, spec in specs.items() if path not in params}
  drawn = _drawn({path: specs[path] for path in inits}, key)
  grown: dict[Path, Any] = {path: drawn[path] if path in inits else params[path] for path in specs}
  copies = {path: specs[path] for path in params if 'experts' in specs[path].axes}
  for path, spec in copies.items():
    one = jnp.expand_dims(params[path], spec.axes.index('experts'))
    grown[path] = jnp.broadcast_to(one, spec.shape)
    if noise:
      matrix = tuple(i for i, axis in enumerate(spec.axes) if axis not in ('layers', 'experts'))
      normal = _drawn({path: dataclasses.replace(spec, init=Normal(noise))}, key)[path]
      grown[path] += jnp.std(one, matrix, keepdims=True) * normal
  return grown, inits


def _drawn(specs: Mapping[Path, ParamSpec], key: jax.Array) -> dict[Path, Any]:
  return flatten_dict(initialize(unflatten_dict(dict(specs)), key))
