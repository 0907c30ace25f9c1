"""A small model that every recipe divides, its rows, its loss, and both on a mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding

from models import partition
from models.build import KernelsConfig, build
from models.specs import initialize
from tests.models.small import LLAMA, batch

# Sizes and rows that blocks of 32 divide.
SMALL = dataclasses.replace(LLAMA, heads=4, kv_heads=4, mlp=dataclasses.replace(LLAMA.mlp, hidden=64))
ROWS = [[20, 12], [25, 7], [32], [9, 9], [31], [16, 16], [3, 20], [30]]
AXES = ('replica', 'data', 'fsdp', 'sequence', 'tensor', 'expert', 'stage')
SHAPES = {'fsdp': (1, 1, 8, 1, 1, 1, 1), 'tensor': (1, 1, 2, 1, 4, 1, 1)}

DEFAULT = KernelsConfig()


def rows() -> dict[str, np.ndarray]:
  return batch(ROWS, 32)


def loss_of(model, params, own, key=None, read=None):
  hidden, _ = model.apply(params, own, key, read)
  logits = model.logits(params, hidden)
  weights = (own['decoder_segment_ids'] != 0).astype(jnp.float32)
  nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), own['decoder_input_tokens'][..., None], -1)[..., 0]
  return (nats * weights).sum()


@functools.cache
def params():
  return initialize(build(SMALL).specs, jax.random.key(0))


def placed(cfg, precision, axes: str | None, kernels: KernelsConfig = DEFAULT):
  """(model, parameters, rows), on a mesh along `axes`."""
  if axes is None:
    return build(cfg, kernels, precision=precision), params(), rows()
  mesh = jax.make_mesh(SHAPES[axes], AXES, axis_types=(AxisType.Auto,) * len(AXES))
  model = build(cfg, kernels, mesh=mesh, precision=precision)
  put = jax.tree.map(jax.device_put, params(), partition.shardings(model.specs, mesh))
  place = lambda x: jax.device_put(x, NamedSharding(mesh, partition.spec_for(
    ('batch', 'length')[: x.ndim], partition.ACTIVATION_RULES)))  # fmt: skip
  return model, put, jax.tree.map(place, rows())
