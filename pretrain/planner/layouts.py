"""Layouts of a step: mesh axes, kept activations, microbatches; and which of them a slice and a model allow."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from jax.sharding import AbstractMesh, AxisType

from models.layers.remat import KEPT
from models.partition import check_divisible
from models.specs import Tree
from pretrain.config import bindings
from pretrain.devices.chips import Slice
from pretrain.devices.mesh import AXES, BATCH_AXES, axis_sizes
from pretrain.experiment.experiment import Experiment

SEARCHED = ('data', 'fsdp', 'tensor')
REMATS = ('none', 'dots', *KEPT)  # and what the config has, where it names activations itself
MOST_TENSOR = 16  # beyond it a product of a head or an MLP's part is too small for a matrix unit
# Axes that are not searched, and why.
LEFT_OUT = {
  'sequence': 'it is for rows too long for one device',
  'expert': 'its time was not compared with compiled steps',
  'stage': 'its time was not compared with compiled steps',
}


@dataclasses.dataclass(frozen=True)
class Layout:
  """One way to run a step. `sizes` has all mesh axes; `keep` and `offload` are `model.remat_keep` and `_offload`."""

  sizes: Mapping[str, int]
  accumulate: int
  remat: str
  keep: tuple[str, ...] = ()
  offload: tuple[str, ...] = ()

  @property
  def shards(self) -> int:
    """Into how many parts the rows of a microbatch are divided."""
    return math.prod(self.sizes[axis] for axis in BATCH_AXES)

  def rows(self, batch_size: int) -> int:
    """Rows of a microbatch on one device."""
    return batch_size // (self.shards * self.accumulate)

  @property
  def mesh(self) -> str:
    return ' '.join(f'{axis}={n}' for axis, n in self.sizes.items() if n > 1) or 'data=1'

  @property
  def policy(self) -> str:
    """What is kept, in a word."""
    names = f'({",".join(self.keep)})' if self.keep else ''
    return f'{self.remat}{names}' + (f'+offload({",".join(self.offload)})' if self.offload else '')

  @property
  def text(self) -> str:
    return f'{self.mesh} accumulate={self.accumulate} remat={self.policy}'

  def values(self) -> dict[str, Any]:
    """The config keys that it sets."""
    own = {f'mesh.{axis}': n for axis, n in self.sizes.items()}
    names = {'model.remat_keep': list(self.keep), 'model.remat_offload': list(self.offload)}
    return own | {'train.accumulate': self.accumulate, 'model.remat': self.remat} | names

  def of(self, cfg: Experiment) -> Experiment:
    """`cfg` with this layout."""
    return bindings.override(cfg, self.values(), 'the layout')


def of_config(cfg: Experiment, devices: int) -> Layout:
  """The layout that a config has on so many devices; raises ConfigError where they do not fit its mesh."""
  return Layout(axis_sizes(cfg.mesh, devices), cfg.train.accumulate, *_remat(cfg))


def _remat(cfg: Experiment) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
  return cfg.model.remat, cfg.model.remat_keep, cfg.model.remat_offload


def candidates(cfg: Experiment, specs: Tree, of: Slice) -> Iterator[Layout]:
  """Every layout that divides the parameters and the rows; slices are joined by `replica`."""
  own = _remat(cfg)
  policies = [(name, (), ()) for name in REMATS] + ([own] if own[1] or own[2] else [])
  if 'parameters' in cfg.optimizer.offload:  # `check_offload` refuses it
    policies = [policy for policy in policies if policy[0] != 'none']
  for sizes in _meshes(of):
    if not _divides(specs, sizes):
      continue
    shards = math.prod(sizes[axis] for axis in BATCH_AXES)
    for accumulate in _microbatches(cfg.data.batch_size, shards):
      for policy in policies:
        yield Layout(sizes, accumulate, *policy)


def _meshes(of: Slice) -> Iterator[dict[str, int]]:
  inside = of.devices // of.slices
  for tensor in _divisors(inside):
    if tensor > MOST_TENSOR:
      continue
    for data in _divisors(inside // tensor):
      yield dict.fromkeys(AXES, 1) | {
        'replica': of.slices, 'data': data, 'fsdp': inside // tensor // data, 'tensor': tensor,
      }  # fmt: skip


def _divides(specs: Tree, sizes: Mapping[str, int]) -> bool:
  try:
    check_divisible(specs, abstract(sizes))
  except ValueError:
    return False
  return True


def abstract(sizes: Mapping[str, int]) -> AbstractMesh:
  return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _microbatches(batch_size: int, shards: int) -> Iterable[int]:
  """Numbers of microbatches that leave each device a power of two of rows, or all."""
  if batch_size % shards:
    return []
  rows = batch_size // shards
  return [rows // n for n in _divisors(rows) if n & (n - 1) == 0 or n == rows]


def _divisors(n: int) -> list[int]:
  return [d for d in range(1, n + 1) if n % d == 0]


def gin(layout: Layout, headline: Iterable[str]) -> str:
  """A file to include after a config: the layout, with `headline` as comments."""
  lines = [f'# {line}' for line in headline]
  return '\n'.join([*lines, *(f'{key} = {value!r}' for key, value in layout.values().items())]) + '\n'
