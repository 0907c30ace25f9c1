"""Which products of a model are quantized, and how: recipes, chosen for a whole model and for parts by their names.

Parameters stay float32 and their tree is the same under every recipe, so a checkpoint moves between recipes.
"""

import dataclasses
import difflib
import functools
import math
import zlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from models.layers.low_rank import Path, inputs_of, products, words_of
from models.product import KEY, Quantization
from models.rendered import IF_SET
from models.specs import ParamSpec, Tree, param_specs
from pallas_kernels.quantized_matmul.api import Operand, Recipe

RecipeName = Literal[
  'bf16', 'int8', 'fp8', 'fp8_delayed', 'mxfp8', 'mxfp4', 'nvfp4', 'nvfp4_fp8', 'int4', 'int8_weights', 'int4_weights'
]  # fmt: skip
DELAYED = 'fp8_delayed'
AMAX = 'amax'  # the name of the histories beside the parameters


def _recipe(forward: str, gradient: str | None = None, **options: Any) -> Recipe:
  """x and w in `forward`; the gradient that comes from above in `gradient`, rounded as `options` say."""
  scale = {'scale': options.pop('scale')} if 'scale' in options else {}
  own, g = Operand(forward, **scale), Operand(gradient or forward, **scale, **options)
  return Recipe(forward=(own, own), dgrad=(g, own), wgrad=(own, g))


# Stochastic rounding keeps the mean of gradients whose rounding errors would otherwise add up: Chmiel et al. 2021,
# arXiv:2112.10769 (4 bits); Xi et al. 2023, arXiv:2306.11987. fp8: Micikevicius et al. 2022, arXiv:2209.05433, §3 with
# current scaling or delayed scaling (pallas_kernels/quantized_matmul/reference.py has the sources);
# mxfp8: Mishra et al. 2025, arXiv:2506.08027; nvfp4: NVIDIA 2025, arXiv:2509.25149, §4.2 and §4.4 (without its
# transforms and blocks of 16 x 16).
FP8 = _recipe('fp8_e4m3', 'fp8_e5m2', scale='tensor')
RECIPES: dict[str, Recipe | None] = {
  'bf16': None,
  'int8': _recipe('int8', rounding='stochastic'),
  'fp8': FP8,
  DELAYED: _recipe('fp8_e4m3', 'fp8_e5m2', scale='delayed'),
  'mxfp8': _recipe('mxfp8'),
  'mxfp4': _recipe('mxfp4', rounding='stochastic'),
  'nvfp4': _recipe('nvfp4', rounding='stochastic'),
  # Weights and activations in four bits forward, all three in eight backward: Zhou et al. 2025, arXiv:2502.11458.
  'nvfp4_fp8': dataclasses.replace(FP8, forward=(Operand('nvfp4'), Operand('nvfp4'))),
  # Forward alone, of a trained model: round to nearest (Dettmers and Zettlemoyer 2023, arXiv:2212.09720). The weights
  # alone have the scales of `pretrain export --quantize`.
  'int4': Recipe(forward=(Operand('int4'), Operand('int4'))),
  'int8_weights': Recipe(weights=Operand('int8')),
  'int4_weights': Recipe(weights=Operand('int4', scale='block', block=128)),
}
POST_TRAINING = tuple(name for name, recipe in RECIPES.items() if recipe is not None and recipe.dgrad is None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
  """`recipe` quantizes the products with weights of all blocks, forward and backward; 'bf16' none: products are in
  `model.dtype`. Embeddings, the head, norms, softmax and experts are never quantized.

  `overrides` gives parts another recipe, by the names of products: 'attention', 'mlp', 'query',
  'cross_attention.key', 'decoder.mlp', …; the name that says most about a product counts.

  In the `first_layers` and `last_layers` layers of each stack all products have `edge_recipe`, whatever `overrides`
  say.
  'fp8_delayed' takes scales from the largest sizes in the last `amax_history` steps, 1024 in Transformer Engine.

  >>> PrecisionConfig(recipe='fp8', overrides={'mlp': 'nvfp4', 'mlp.down': 'bf16'}).recipe
  'fp8'
  """

  recipe: RecipeName = 'bf16'
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
  first_layers: Annotated[int, '>= 0'] = dataclasses.field(default=0, metadata=IF_SET)
  last_layers: Annotated[int, '>= 0'] = dataclasses.field(default=0, metadata=IF_SET)
  edge_recipe: RecipeName = dataclasses.field(default='bf16', metadata=IF_SET)
  amax_history: Annotated[int, '>= 0'] = dataclasses.field(default=0, metadata=IF_SET)

  @property
  def edges(self) -> tuple[int, int]:
    return self.first_layers, self.last_layers


BF16 = PrecisionConfig()


def named_by(cfg: PrecisionConfig) -> list[Any]:
  """What a config names as recipes, right or wrong."""
  return [cfg.recipe, *cfg.overrides.values(), *([cfg.edge_recipe] if any(cfg.edges) else [])]


def names_of(path: Path) -> tuple[str, ...]:
  """The names that choose the product at `path`; later ones say more.

  >>> names_of(('decoder', 'blocks', 'mlp', 'up'))
  ('all', 'mlp', 'up', 'mlp.up', 'decoder', 'decoder.mlp', 'decoder.up', 'decoder.mlp.up')
  """
  own = (*words_of(path), '.'.join(path[-2:]))
  return (*own, path[0], *(f'{path[0]}.{word}' for word in own[1:]))


def chosen(cfg: PrecisionConfig, specs: Tree) -> dict[Path, str]:
  """The name of the recipe of each product. Raises ValueError for names of no product and of no recipe."""
  paths = products(specs)
  known = dict.fromkeys(name for path in paths for name in names_of(path))
  for name, recipe in cfg.overrides.items():
    if name not in known:
      close = difflib.get_close_matches(name, known, 1)
      fix = (
        f'did you mean {close[0]!r}?'
        if close
        else f'choose from {", ".join(word for word in known if "." not in word)}.'
      )
      raise ValueError(f'precision.overrides has {name!r}, which is not a product of this model; {fix}')
    if not isinstance(recipe, str) or recipe not in RECIPES:
      raise ValueError(f'precision.overrides[{name!r}]={recipe!r} is not one of {", ".join(map(repr, RECIPES))}.')
  own = lambda path: next((cfg.overrides[name] for name in reversed(names_of(path)) if name in cfg.overrides), None)
  return {path: own(path) or cfg.recipe for path in paths}


def attach(module: nnx.Module, cfg: PrecisionConfig, implementation: str = 'auto') -> None:
  """Each weight of `module` that a recipe quantizes has it in its metadata, and stacks know their first and last
  layers. Raises ValueError as `chosen`.
  """
  for path, name in chosen(cfg, param_specs(module)).items():
    recipe, edge = RECIPES[name], RECIPES[cfg.edge_recipe] if any(cfg.edges) else None
    getattr(module, path[0]).edges = cfg.edges
    if recipe is not None or edge is not None:
      owner, full = functools.reduce(getattr, path[:-1], module), '/'.join(path)
      own = Quantization(recipe, zlib.crc32(full.encode()), implementation, edge, full)
      getattr(owner, path[-1]).set_metadata(**{KEY: own})


def first_history(cfg: PrecisionConfig, specs: Tree) -> Tree:
  """f32[layers, 3, amax_history] for each product, at its weight's path: amax of x, w and the gradient, the newest
  first; 0 for steps that have not run yet. All products have a history, so that phases may change recipes.
  """
  flat = flatten_dict(dict(specs))
  return unflatten_dict({path: jnp.zeros((flat[path].shape[0], 3, cfg.amax_history)) for path in products(specs)})


def largest_of(history: Array) -> Array:
  """The amax that scales follow from: the largest of a history."""
  return history.max(-1)


def pushed(history: Array, now: Array) -> Array:
  """`history` with the amax of this step in front. What was not observed (0) or is not finite does not enter: scales
  stay as they were. (Transformer Engine keeps the scale too, and has the number in its history.)
  """
  moved = jnp.concatenate([now[..., None], history[..., :-1]], -1)
  return jnp.where(((now > 0) & jnp.isfinite(now))[..., None], moved, history)


def check_layers(cfg: PrecisionConfig, specs: Tree, windows: int = 1) -> None:
  """Raises ValueError where a stack has no such first and last layers. `windows`: layers are scanned in groups of so
  many.
  """
  flat, both = flatten_dict(dict(specs)), 'precision.first_layers={} and precision.last_layers={}'.format(*cfg.edges)
  for stack, layers in {path[0]: flat[path].shape[0] for path in products(specs)}.items():
    if sum(cfg.edges) > layers:
      raise ValueError(f'{both}, but the {stack} has {layers} layers; use at most {layers} together.')
  if any(number % windows for number in cfg.edges):
    raise ValueError(f'{both} with {windows} entries of model.windows; use multiples of {windows}.')
  if not any(cfg.edges) and cfg.edge_recipe != 'bf16':
    raise ValueError(
      f"precision.edge_recipe='{cfg.edge_recipe}' without precision.first_layers or precision.last_layers, whose "
      'recipe it is; set one of them, or remove it.'
    )


def check_trains(cfg: PrecisionConfig) -> None:
  """Raises ValueError for a recipe that only evaluation and generation can use, and for delayed scales without a
  history of sizes.
  """
  if DELAYED in named_by(cfg) and not cfg.amax_history:
    raise ValueError(
      f"precision: recipe '{DELAYED}' with precision.amax_history=0, so there are no earlier steps to scale by; set "
      "it, e.g. 1024, or use 'fp8'."
    )
  if found := [name for name in named_by(cfg) if name in POST_TRAINING]:
    trains = ', '.join(repr(name) for name in RECIPES if name not in POST_TRAINING)
    raise ValueError(
      f"precision: recipe '{found[0]}' is for trained models: it has no gradients, and no float32 copy of the weights "
      f'to which an optimizer could add updates that are smaller than a step of the codes. Train with {trains}, and '
      'give it to pretrain eval or pretrain generate.'
    )


def check_blocks(cfg: PrecisionConfig, specs: Tree, lengths: Mapping[str, int], *, forward_only: bool = False) -> None:
  """Raises ValueError where blocks of a recipe do not divide what a product sums over. `lengths` of rows by key."""
  flat = flatten_dict(dict(specs))
  edge = [cfg.edge_recipe] * any(cfg.edges)
  for path, name in [(path, name) for path, own in chosen(cfg, specs).items() for name in (own, *edge)]:
    recipe, (inputs, outputs) = RECIPES[name], _sides(flat[path])
    if recipe is not None:
      sums = [('forward', *inputs), ('dgrad', *outputs), *(('wgrad', key, n) for key, n in lengths.items())]
      for product, what, size in sums[:1] if forward_only else sums:
        _check_divides(recipe.block(product), what, size, '.'.join(names_of(path)[-1:]), name)


def _sides(spec: ParamSpec) -> tuple[tuple[str, int], tuple[str, int]]:
  """(name and size of the inputs, of the outputs) of a stacked weight."""
  axes, shape = spec.axes[1:], spec.shape[1:]
  cut = inputs_of(axes)
  side = lambda part: ('*'.join(axes[part]), math.prod(shape[part]))
  return side(slice(cut)), side(slice(cut, None))


def _check_divides(block: int, what: str, size: int, where: str, recipe: str) -> None:
  if size % block:
    raise ValueError(
      f"precision: recipe '{recipe}' of {where} has blocks of {block}, which do not divide {what}={size}; use a "
      f"multiple of {block}, e.g. {-(-size // block) * block}, or precision.overrides = {{'{where}': 'bf16'}}."
    )
