"""`pretrain checkpoints grow`: the weights of a larger model from those of a smaller one, whose other keys are equal.

A run starts from the result (`checkpoint.initial`) at step 0, with a new optimizer and learning rate and the first
example of its data: nothing but parameters is written, as G_stack's reference code and T5X's upcycling have it.
"""

import dataclasses
from typing import Literal

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from models.build import build
from pretrain.config import bindings
from pretrain.errors import ConfigError
from pretrain.experiment.experiment import Experiment
from pretrain.experiment.trunk import plain
from pretrain.growth.depth import STACKS, Depth, deepened, places
from pretrain.growth.experts import KEYS, check_upcycling, upcycled
from pretrain.tools.weights import (
  NOT_ARCHITECTURE,
  Step,
  check_new,
  config_of,
  differences,
  program_on_one_device,
  without_initial,
  write_run,
)
from pretrain.workdirs.folder import Folder

Method = Depth | Literal['upcycle']


@dataclasses.dataclass(frozen=True)
class Growth:
  """A method, the first layer that `upscale` has twice, and the noise that `upcycle` adds to experts."""

  method: Method
  first: int | None = None
  noise: float = 0.0


def grow(cfg: Experiment, step: Step, how: Growth, output: Folder, source: str) -> list[str]:
  """Writes a new workdir with the weights of `cfg`'s model, grown from those of `step`; returns what it did, in lines.

  Raises ConfigError where `cfg` is no extension of the model of `step`; then nothing is read or written.
  """
  check_new(output, '--to')
  cfg, own = plain(cfg), plain(config_of(step.workdir))
  _check_options(how)
  _check_extension(cfg, own, how.method, step)
  lists = {}
  if how.method == 'upcycle':
    check_upcycling(own.model, cfg.model)
  else:
    lists = places(own.model, cfg.model, how.method, how.first)
  specs = flatten_dict(dict(build(cfg.model).specs))
  params = flatten_dict(step.read(program_on_one_device(own).abstract.params))
  if how.method == 'upcycle':
    params, drawn = upcycled(params, specs, jax.random.key(cfg.seed), how.noise)
    lines = [f'{"/".join(path)} is drawn: {init}' for path, init in drawn.items()]
  else:
    params = deepened(params, specs, lists)
    lines = [f'model.{key}: copies of layers {", ".join(map(str, own))}' for key, own in lists.items()]
  write_run(output, unflatten_dict(params), without_initial(cfg), step.tokenizer(), source)
  return lines


def _check_options(how: Growth) -> None:
  """Raises ConfigError for values of another method, and for values out of range."""
  for flag, given, method in (('--first', how.first is not None, 'upscale'), ('--noise', how.noise != 0, 'upcycle')):
    if given and how.method != method:
      raise ConfigError(
        f'{flag} belongs to --method={method}, and this is --method={how.method}. Nothing was written; remove it.'
      )
  if not 0 <= how.noise < float('inf'):
    raise ConfigError(f'--noise={how.noise:g}; it is a share of the std of each matrix, a finite number >= 0.')


def _check_extension(cfg: Experiment, own: Experiment, method: Method, step: Step) -> None:
  """Raises ConfigError where a key differs that `method` does not change, and that changes what the model computes."""
  ours, theirs = bindings.flatten(cfg), bindings.flatten(own)
  grown = KEYS if method == 'upcycle' else tuple(f'model.{key}' for key in STACKS)
  if bad := differences(ours, theirs, (*NOT_ARCHITECTURE, *grown), 'data.sentinels'):
    changes = ', '.join(key for key in grown if key in ours)
    raise ConfigError(
      f'{bad[0]} is {theirs.get(bad[0])!r} in {step.workdir}/config.gin, {ours.get(bad[0])!r} in --gin_file (first of '
      f'{len(bad)}); --method={method} changes {changes} alone. Nothing was written; set it as it is there.'
    )
