"""Deeper stacks: which layer of the small model each layer of the large one is a copy of.

Everything that is stored once for each layer follows this list: blocks, and tables of relative biases where each layer
has its own (umT5). The rest of the model, the last norm among it, is copied.
"""

from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp

from models.build import ModelConfig
from models.specs import ParamSpec
from pretrain.errors import ConfigError

Path = tuple[str, ...]
Depth = Literal['stack', 'interleave', 'upscale']
STACKS = {'layers': ('decoder', 'encoder'), 'encoder_layers': ('encoder',), 'decoder_layers': ('decoder',)}


def stacked(before: int, after: int) -> list[int]:
  """The whole stack again and again. Layer i is a copy of layer i mod `before`.

  Source: G_stack of Du et al. 2024, arXiv:2405.15319; github.com/tongxuluo/prts, `stacking_list` of
  prts_configs/stacking_6L_24L.json.

  >>> stacked(3, 6)
  [0, 1, 2, 0, 1, 2]
  """
  return [i % before for i in range(after)]


def interleaved(before: int, after: int) -> list[int]:
  """Each layer again and again in its place: the interpolation that Du et al. compare G_stack with.

  >>> interleaved(3, 6)
  [0, 0, 1, 1, 2, 2]
  """
  return [i * before // after for i in range(after)]


def upscaled(before: int, after: int, first: int | None = None) -> list[int]:
  """Two copies of the stack, the one without its last layers, then the other without its first `first`.

  None leaves out equally many: the m = before - after / 2 of SOLAR (Kim et al. 2023, arXiv:2312.15166, figure 1: 32
  layers, m = 8, 48 layers). Yi-9B, which has the layers 12 to 27 of Yi-6B twice, is `upscaled(32, 48, first=12)`
  (arXiv:2403.04652; 01-ai.github.io/blog/dive-deeper-into-yi-9b).

  >>> upscaled(4, 6), upscaled(4, 6, first=2)
  ([0, 1, 2, 1, 2, 3], [0, 1, 2, 3, 2, 3])
  """
  more = after - before
  first = (before - more) // 2 if first is None else first
  return [*range(first + more), *range(first, before)]


def depths(cfg: ModelConfig) -> dict[str, int]:
  """The number of layers by the name of the key: `layers`, or `encoder_layers` and `decoder_layers`."""
  return {key: layers for key in STACKS if (layers := getattr(cfg, key, None)) is not None}


def places(before: ModelConfig, after: ModelConfig, how: Depth, first: int | None) -> dict[str, list[int]]:
  """The list of each stack by the key of its depth. Raises ConfigError for depths that `how` does not make."""
  old, new = depths(before), depths(after)
  if old == new:
    shown = ', '.join(f'model.{key}={layers}' for key, layers in new.items())
    raise ConfigError(
      f'{shown} in --gin_file is the depth that the weights have already. Nothing was written; set more layers.'
    )
  if how == 'interleave' and len(set(after.windows)) > 1:
    raise ConfigError(
      f'--method=interleave with model.windows={after.windows}: copies of a layer would get the windows of others. '
      'Nothing was written; use --method=stack or upscale, which keep them.'
    )
  return {key: _places(f'model.{key}', old[key], new[key], how, first) for key in new}


def _places(key: str, before: int, after: int, how: Depth, first: int | None) -> list[int]:
  grown = f'{key} is {before} in the weights, {after} in --gin_file'
  if after < before:
    raise ConfigError(f'{grown}; growth removes no layers. Nothing was written; set {key} >= {before}.')
  if after == before:
    return [*range(before)]
  if how == 'upscale':
    _check_upscale(key, grown, before, after, first)
    return upscaled(before, after, first)
  if after % before:
    other = ', or use --method=upscale' if after < 2 * before else ''
    raise ConfigError(
      f'{grown}; --method={how} repeats every layer equally often. Nothing was written; set '
      f'{key}={after // before * before + before}{other}.'
    )
  return (stacked if how == 'stack' else interleaved)(before, after)


def _check_upscale(key: str, grown: str, before: int, after: int, first: int | None) -> None:
  more = after - before
  if more > before:
    raise ConfigError(
      f'{grown}; --method=upscale has a layer at most twice. Nothing was written; set {key} <= {2 * before}, or use '
      '--method=stack.'
    )
  if first is None and (before - more) % 2:
    raise ConfigError(
      f'{grown}; --method=upscale leaves out equally many layers of both copies, so the depth is even. Nothing was '
      f'written; set {key}={after + 1}, or say with --first=N which layer comes twice.'
    )
  if first is not None and first > before - more:
    raise ConfigError(
      f'{grown}; with --first={first} the layers {first} to {first + more - 1} would come twice, and the last one is '
      f'{before - 1}. Nothing was written; use --first <= {before - more}.'
    )


def deepened(
  params: Mapping[Path, Any], specs: Mapping[Path, ParamSpec], lists: Mapping[str, list[int]]
) -> dict[Path, Any]:
  """`params` by their path, with copies of layers as the lists of `places` say; `specs` are those of either model."""

  def grown(path: Path, x: Any) -> Any:
    own = next((own for key, own in lists.items() if path[0].startswith(STACKS[key])), None)
    if own is None or 'layers' not in specs[path].axes:  # also the block of each depth of model.mtp_depth
      return x
    return jnp.take(x, jnp.array(own), axis=specs[path].axes.index('layers'))

  return {path: grown(path, x) for path, x in params.items()}
