"""`pretrain checkpoints warm-start`: the weights of an encoder-decoder from those of an encoder and of a decoder.

Source: Rothe et al. 2020, arXiv:1907.12461: stacks of BERT or GPT as encoder and decoder; cross-attention, which they
lack, is drawn as in a new model, or here also copied from the self-attention of its layer.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from models.build import ModelConfig, build
from models.families.parts import attention_config
from models.specs import initialize
from pretrain.config import bindings
from pretrain.errors import CheckpointError, ConfigError
from pretrain.experiment.experiment import Experiment
from pretrain.experiment.trunk import plain
from pretrain.tools.weights import (
  MAY_DIFFER,
  Step,
  check_new,
  config_of,
  program_on_one_device,
  without_initial,
  write_run,
)
from pretrain.workdirs.folder import Folder

Path = tuple[str, ...]
Cross = Literal['random', 'self']
# Keys that a stack of another family may have with other values: sizes that are compared array by array, and names.
FREE = (*MAY_DIFFER, 'model.name', 'model.head', 'model.vocab_size', 'model.max_positions')


@dataclasses.dataclass(frozen=True)
class Source:
  """The weights of a step by their path, and its model."""

  step: Step
  model: ModelConfig
  params: Mapping[Path, Any]

  def find(self, path: Path, stack: str) -> Path | None:
    """Where this model has what stands at `path` of an encoder-decoder: in the stack of that name, or its only one."""
    own = stack if any(key[0] == stack for key in self.params) else {'encoder': 'decoder', 'decoder': 'encoder'}[stack]
    moved = (own, *path[1:]) if path[0] == stack else path
    return moved if moved in self.params else None


def warm_start(
  cfg: Experiment, encoder: Step | None, decoder: Step | None, cross: Cross, output: Folder, source: str
) -> list[str]:
  """Writes a new workdir with the weights of an encoder-decoder; returns a line for each that is not a copy.

  Raises ConfigError where `cfg` is no encoder-decoder, CheckpointError where parts do not fit; then nothing is written.
  """
  check_new(output, '--to')
  cfg = plain(cfg)
  if cfg.model.name != 'encoder_decoder':
    raise ConfigError(f"model.name='{cfg.model.name}' in --gin_file; warm-start makes an 'encoder_decoder'.")
  if encoder is None and decoder is None:
    raise ConfigError('warm-start needs weights; give --encoder=RUN, --decoder=RUN or both.')
  tokenizer = _tokenizer(encoder, decoder)
  sources = {name: _open(step, cfg.model) for name, step in (('encoder', encoder), ('decoder', decoder)) if step}
  specs = flatten_dict(dict(build(cfg.model).specs))
  drawn = flatten_dict(initialize(unflatten_dict(specs), jax.random.key(cfg.seed)))
  params, lines = {}, []
  for path, spec in specs.items():
    found, where = _value(path, sources, cross)
    if found is None:
      lines.append(f'{"/".join(path)}  {spec.init}')
    elif found.shape != spec.shape:
      raise CheckpointError(
        'CKPT-MISMATCH',
        f'{"/".join(path)} is {list(found.shape)} in {where.step}, {list(spec.shape)} in --gin_file. Nothing was '
        'written; set the sizes of model.* as they are there.',
      )
    params[path] = drawn[path] if found is None else _scaled(found, path, where.model, cfg.model)
  write_run(output, unflatten_dict(params), without_initial(cfg), tokenizer, source)
  return lines


def _tokenizer(encoder: Step | None, decoder: Step | None) -> str | None:
  found = {step.tokenizer() for step in (encoder, decoder) if step} - {None}
  if len(found) > 1:
    raise CheckpointError(
      'CKPT-MISMATCH',
      f'{encoder} and {decoder} have different tokenizers, and an encoder-decoder has one table. Nothing was written; '
      'choose parts with one tokenizer, or see pretrain checkpoints extend-vocabulary.',
    )
  return next(iter(found), None)


def _open(step: Step, model: ModelConfig) -> Source:
  own = plain(config_of(step.workdir))
  ours, theirs = bindings.flatten(model, 'model.'), bindings.flatten(own.model, 'model.')
  common = [key for key in ours if key in theirs and key not in FREE]
  if bad := [key for key in common if ours[key] != theirs[key]]:
    raise CheckpointError(
      'CKPT-MISMATCH',
      f'{bad[0]} is {theirs[bad[0]]!r} in {step.workdir}/config.gin, {ours[bad[0]]!r} in --gin_file (first of '
      f'{len(bad)}). Nothing was written; set it as it is there.',
    )
  return Source(step, own.model, flatten_dict(step.read(program_on_one_device(own).abstract.params)))


def _value(path: Path, sources: Mapping[str, Source], cross: Cross) -> tuple[Any, Source]:
  """(the values for `path`, where they come from); None where no part has them."""
  part = 'encoder' if path[0].startswith('encoder') else 'decoder'
  shared = not path[0].startswith(('encoder', 'decoder'))  # embedding and head: the decoder's, else the encoder's
  own = sources.get(part) or (next(iter(sources.values())) if shared else None)
  if own is None:
    return None, next(iter(sources.values()))
  at = own.find(path, part)
  names = [name.replace('cross_', 'self_') for name in path]
  if at is None and cross == 'self' and names != list(path):
    at = own.find(tuple(names), part)
  return (None if at is None else own.params[at]), own


def _scaled(x: Any, path: Path, theirs: ModelConfig, ours: ModelConfig) -> Any:
  """Queries with 1/sqrt(head_dim) in them where the one model has it in the weights and the other in the scores."""
  if path[-1] not in ('query', 'query_bias'):
    return x
  before, now = (_folds_scale(cfg) for cfg in (theirs, ours))
  return x * jnp.float32(ours.head_dim ** (0.5 * (before - now)))


def _folds_scale(cfg: ModelConfig) -> bool:
  t5 = cfg.name == 'encoder_decoder'
  return attention_config(cfg, 'reference', kv_heads=cfg.heads, t5_scale=t5).folds_scale
