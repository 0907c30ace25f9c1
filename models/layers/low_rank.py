"""Low-rank adapters (LoRA): a product with a frozen W gets a second path with few parameters, which alone are trained.

x W becomes x W + s (x A) B, with A of `rank` columns and B of `rank` rows. B is zero at first, so the function is that
of W alone. Source: Hu et al. 2021, arXiv:2106.09685, §4.1; A is drawn as peft draws it (tuners/lora/layer.py).
"""

import dataclasses
import functools
import math
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from models.partition import constrain
from models.product import contracted, product
from models.specs import Normal, ParamSpec, Tree, Zeros, cast, is_matrix, param_specs, weight

Path = tuple[str, ...]

KEY = 'lora'  # where the adapters stand in a tree of parameters, beside the parts of the model
ATTENTIONS = ('self_attention', 'cross_attention')


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
  """Adapters of `rank` on the products that `modules` names; everything else is frozen. Rank 0: no adapters.

  `modules` are names of products ('query', 'value', 'up', …), of a layer ('self_attention', 'cross_attention', 'mlp'),
  'attention' for both kinds of attention, or 'all'. The adapter's product is multiplied by alpha / rank, or with
  `scaling` 'sqrt_rank' by alpha / sqrt(rank) (Kalajdzievski 2023, arXiv:2312.03732, which peft calls rsLoRA).
  """

  rank: Annotated[int, '>= 0'] = 0
  alpha: Annotated[float, '> 0'] = 16.0
  modules: tuple[str, ...] = ('query', 'value')
  scaling: Literal['rank', 'sqrt_rank'] = 'rank'

  @property
  def scale(self) -> float:
    return self.alpha / (self.rank if self.scaling == 'rank' else math.sqrt(self.rank))


NONE = LoraConfig()


class LowRank(nnx.Module):
  """A weight and its adapter, in the place of the weight; `inputs` of the weight's leading dims are contracted."""

  def __init__(self, own: nnx.Param, a: nnx.Param, b: nnx.Param, scale: float, inputs: int):
    self.weight, self.a, self.b = own, a, b
    self.scale, self.inputs = scale, inputs

  def product(self, x: Array) -> Array:
    """x W + s (x A) B, in x's dtype."""
    narrow = contracted(x, cast(self.a, x), self.inputs)
    if narrow.ndim == 3:
      narrow = constrain(narrow, 'batch', 'length', 'rank')
    return product(x, self.weight, self.inputs) + self.scale * contracted(narrow, cast(self.b, x), 1)


def inputs_of(axes: tuple[str, ...]) -> int:
  """How many dims of a matrix with these axes (without `layers`) are its input's: heads and head_dim are one space.

  >>> inputs_of(('embed', 'heads', 'head_dim')), inputs_of(('heads', 'head_dim', 'embed'))
  (1, 2)
  """
  return 2 if axes[1] == 'head_dim' else 1


def attach(module: nnx.Module, cfg: LoraConfig) -> Tree:
  """Puts an adapter beside each product of `module` that `cfg.modules` names; returns the adapters' descriptions.

  Raises ValueError, with the names that exist, for a name of no product.
  """
  paths = chosen(cfg, param_specs(module))
  for *parents, name in paths:
    owner = functools.reduce(getattr, parents, module)
    setattr(owner, name, _adapted(getattr(owner, name), cfg))
  return apart(param_specs(module))


def _adapted(own: nnx.Param, cfg: LoraConfig) -> LowRank:
  shape, axes = own.get_value().shape, own.get_metadata()['axes']
  stacked = axes.count('layers')
  cut = stacked + inputs_of(axes[stacked:])
  first = Normal(3**-0.5, axes[stacked:cut])  # the std of peft's uniform draw
  a = weight((*shape[:cut], cfg.rank), (*axes[:cut], 'rank'), first)
  b = weight((*shape[:stacked], cfg.rank, *shape[cut:]), (*axes[:stacked], 'rank', *axes[cut:]), Zeros())
  return LowRank(own, a, b, cfg.scale, cut - stacked)


def products(specs: Tree) -> list[Path]:
  """The paths of the matrices of all blocks that `linear` multiplies with."""
  return [path for path, spec in flatten_dict(specs).items() if path[1:2] == ('blocks',) and _is_product(spec)]


def _is_product(spec: ParamSpec) -> bool:
  return is_matrix(spec) and not {'experts', 'vocab', 'length'} & set(spec.axes)


def words_of(path: Path) -> tuple[str, ...]:
  """The names that choose the product at `path`.

  >>> words_of(('decoder', 'blocks', 'self_attention', 'query'))
  ('all', 'attention', 'self_attention', 'query')
  """
  layer, name = path[-2:]
  return ('all', *(['attention'] if layer in ATTENTIONS else []), layer, name)


def chosen(cfg: LoraConfig, specs: Tree) -> list[Path]:
  """The paths of the products that `cfg.modules` names. Raises ValueError for a name of none."""
  there = products(specs)
  known = sorted({word for path in there for word in words_of(path)})
  wrong = [repr(word) for word in cfg.modules if word not in known]
  if wrong or not cfg.modules:
    what = f'{wrong[0]}, which is not a product of this model' if wrong else 'no name'
    raise ValueError(f'lora.modules={list(cfg.modules)} has {what}; choose from {", ".join(known)}.')
  return [path for path in there if {*words_of(path)} & {*cfg.modules}]


def apart(specs: Tree) -> Tree:
  """{KEY: the adapters}, out of a tree that has them in the place of their weights."""
  flat = flatten_dict(specs)
  own = {path: leaf for path, leaf in flat.items() if (*path[:-1], 'weight') in flat and path[-1] != 'weight'}
  return {KEY: unflatten_dict(own)}


def pairs(params: Tree) -> dict[Path, tuple[Any, Any]]:
  """The path of each adapted product, and its A and B; nothing in a tree without adapters."""
  flat = flatten_dict(params.get(KEY, {}))
  return {path[:-1]: (a, flat[*path[:-1], 'b']) for path, a in flat.items() if path[-1] == 'a'}


def weights(params: Tree) -> dict[Path, Any]:
  """The leaves without the adapters, by their path."""
  return flatten_dict({name: branch for name, branch in params.items() if name != KEY})


def grafted(params: Tree) -> Tree:
  """`params` with each adapter in the place of its weight, as the module has them after `attach`."""
  flat = weights(params)
  for path, (a, b) in pairs(params).items():
    flat |= {(*path, 'weight'): flat.pop(path), (*path, 'a'): a, (*path, 'b'): b}
  return unflatten_dict(flat)


def merged(params: Tree, cfg: LoraConfig) -> Tree:
  """The weights alone, W + s A B for each W that has an adapter."""
  flat = weights(params)
  for path, (a, b) in pairs(params).items():
    flat[path] += update(a, b, flat[path].ndim, cfg)
  return unflatten_dict(flat)


def update(a: Array, b: Array, dims: int, cfg: LoraConfig) -> Array:
  """s A B for a weight of `dims` dims: float32, layer by layer where adapters are stacked."""
  product = functools.partial(jnp.tensordot, axes=1, precision='highest')
  for _ in range(a.ndim + b.ndim - 2 - dims):
    product = jax.vmap(product)
  return cfg.scale * product(a, b)
