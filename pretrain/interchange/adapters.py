"""Adapters in the layout of peft: adapter_config.json and adapter_model.safetensors, in and out.

Source: huggingface/peft, src/peft/tuners/lora/config.py (keys), layer.py (lora_A and lora_B are Linear: [rank, in] and
[out, rank]; the update of a weight is scaling * B A), docs/source/developer_guides/checkpoint.md (names).
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from models.layers.low_rank import KEY, LoraConfig
from models.specs import ParamSpec
from pretrain.errors import CheckpointError, ConfigError
from pretrain.experiment.trunk import opened
from pretrain.interchange.exporting import chosen_family, config_values, new_folder, origin
from pretrain.interchange.importing import Source, placed
from pretrain.interchange.layout import Entry
from pretrain.interchange.safetensors import SINGLE, Tensor, allocate, open_file
from pretrain.tools.weights import Step, check_new, config_of

CONFIG, WEIGHTS = 'adapter_config.json', 'adapter_model.safetensors'
PREFIX = 'base_model.model.'
TASKS = {'decoder': 'CAUSAL_LM', 'encoder_decoder': 'SEQ_2_SEQ_LM', 'encoder': None}
# Keys that change what is computed. A value that is not empty is refused.
UNREAD = (
  'use_dora', 'rank_pattern', 'alpha_pattern', 'modules_to_save', 'lora_bias', 'target_parameters',
  'trainable_token_indices', 'layer_replication', 'use_qalora', 'alora_invocation_tokens', 'use_bdlora', 'kasa_config',
  'arrow_config', 'velora_config', 'monteclora_config',
)  # fmt: skip
PLAIN_INITS = (True, False, 'gaussian', 'orthogonal', 'eva')  # the others change the weights under the adapter


def export_adapter(step: Step, output: pathlib.Path) -> int:
  """Writes the adapters of `step` to a new folder in peft's layout; returns their number.

  Raises ConfigError for a run without adapters, and for adapters of a part of a tensor; then nothing is written.
  """
  check_new(output, '--out')
  cfg = config_of(step.workdir)
  if not cfg.lora.rank:
    raise ConfigError(f'--adapter: {step.workdir} has no adapters (lora.rank is 0). Nothing was written; leave it out.')
  imported = origin(step.workdir, cfg)
  family = chosen_family(cfg, imported)
  places = placed(family, cfg.model, config_values(cfg, family, imported))
  found = _adapters(step)
  tensors: dict[str, np.ndarray] = {}
  for entry, spec in places:
    if entry.ours in found:
      _check_whole(entry, family.model_type)
      tensors |= dict(_named(entry, spec, *found[entry.ours]))
  with new_folder(output, sum(x.nbytes for x in tensors.values())) as folder:
    for name, tensor in allocate(folder, {name: ('F32', x.shape) for name, x in tensors.items()}).items():
      tensor.write(0, tensors[name].astype(np.float32))
    (folder / SINGLE).rename(folder / WEIGHTS)
    values = _config(cfg.lora, cfg.model.name, places, found)
    (folder / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + '\n')
  return len(tensors) // 2


def _adapters(step: Step) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """A and B of each product by its path."""
  prefix = f'{"extra/ema" if step.ema else "params"}/{KEY}/'
  with opened(step.workdir) as checkpoints:
    keys = [key for key in checkpoints.shapes(step.number) if key.startswith(prefix)]
    arrays = {key.removeprefix(prefix): np.asarray(x) for key, x in checkpoints.arrays(step.number, keys).items()}
  return {path[:-2]: (a, arrays[f'{path[:-2]}/b']) for path, a in arrays.items() if path.endswith('/a')}


def _check_whole(entry: Entry, model_type: str) -> None:
  if '@' in entry.layout or entry.split:
    raise ConfigError(
      f'--adapter: {entry.ours} is a part of {entry.theirs} in the files of {model_type}, and peft has one adapter for '
      'the whole tensor. Nothing was written; leave --adapter out, so that the adapters are added to the weights.'
    )


def _named(entry: Entry, spec: ParamSpec, a: np.ndarray, b: np.ndarray):
  """(name, values) of lora_A [rank, in] and lora_B [out, rank] of each layer."""
  rank = a.shape[-1]
  for place, name in entry.names(spec).items():
    module = PREFIX + name.removesuffix('.weight')
    yield f'{module}.lora_A.weight', a[place].reshape(-1, rank).T
    yield f'{module}.lora_B.weight', b[place].reshape(rank, -1).T / np.float32(entry.scale)


def _config(lora: LoraConfig, model: str, places, found: Mapping[str, Any]) -> dict[str, Any]:
  names = {
    name.removesuffix('.weight'): entry.ours in found for entry, spec in places for name in entry.names(spec).values()
  }
  adapted = {name for name, own in names.items() if own}
  lasts = {name.rpartition('.')[2] for name in adapted}
  short = {name for name in names if name.rpartition('.')[2] in lasts} == adapted
  own = [entry for entry, _ in places if entry.ours in found]
  return {
    'peft_type': 'LORA', 'task_type': TASKS[model], 'base_model_name_or_path': None, 'r': lora.rank,
    'lora_alpha': lora.alpha, 'use_rslora': lora.scaling == 'sqrt_rank', 'lora_dropout': 0.0, 'bias': 'none',
    'target_modules': sorted(lasts if short else adapted), 'fan_in_fan_out': any(entry.inputs_first for entry in own),
    'inference_mode': True, 'modules_to_save': None, 'init_lora_weights': True,
  }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Adapter:
  """What peft wrote: the factors (A [rank, in], B [out, rank]) of each module of theirs, and their scale."""

  folder: pathlib.Path
  scale: float
  factors: Mapping[str, tuple[Tensor, Tensor]]


def open_adapter(folder: pathlib.Path) -> Adapter:
  """The adapter in `folder`. Raises CheckpointError, with all reasons in one line, if it is not plain LoRA."""
  values = _read_config(folder)
  problems = [f'{key}={values[key]!r}' for key in UNREAD if values.get(key)]
  problems += [f'peft_type={values.get("peft_type")!r}'] * (values.get('peft_type') != 'LORA')
  problems += [f'bias={values.get("bias")!r}'] * (values.get('bias', 'none') != 'none')
  init = values.get('init_lora_weights', True)
  problems += [f'init_lora_weights={init!r}'] * (init not in PLAIN_INITS)
  rank, alpha = values.get('r'), values.get('lora_alpha')
  if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float):
    problems.append(f'r={rank!r} and lora_alpha={alpha!r}')
  if not (folder / WEIGHTS).is_file():
    problems.append(f'no {WEIGHTS}')
  if problems:
    raise _refused(folder, f'{", ".join(problems)}; adapters that are read are LoRA with one rank and nothing else')
  lora = LoraConfig(rank=rank, alpha=float(alpha), scaling='sqrt_rank' if values.get('use_rslora') else 'rank')
  return Adapter(folder, lora.scale, _factors(folder, rank))


def _read_config(folder: pathlib.Path) -> dict[str, Any]:
  try:
    values = json.loads((folder / CONFIG).read_text())
  except (OSError, ValueError) as error:
    raise _refused(folder, f'{CONFIG} is not readable ({error})') from error
  if not isinstance(values, dict):
    raise _refused(folder, f'{CONFIG} holds no object')
  return values


def _factors(folder: pathlib.Path, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
  tensors = open_file(folder / WEIGHTS)
  plain = {name.replace('.default.', '.'): tensor for name, tensor in tensors.items()}
  ends = ('.lora_A.weight', '.lora_B.weight')
  unknown = [name for name in plain if not (name.startswith(PREFIX) and name.endswith(ends))]
  modules = {name.removeprefix(PREFIX)[: -len(ends[0])] for name in plain if name not in unknown}
  pair = lambda module: tuple(plain.get(PREFIX + module + end) for end in ends)
  alone = [module for module in modules if None in pair(module)]
  found = {module: pair(module) for module in sorted(modules) if module not in alone}
  wrong = [
    m for m, (a, b) in found.items() if not (len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1] == rank)
  ]
  if unknown or alone or wrong or not found:
    listed = ', '.join(sorted([*unknown, *alone, *wrong])) or 'no tensors'
    raise _refused(
      folder, f'{WEIGHTS} has {listed}, which do not form pairs of lora_A [{rank}, in] and lora_B [out, {rank}]'
    )
  return found


def _refused(folder: pathlib.Path, what: str) -> CheckpointError:
  return CheckpointError('IMPORT', f'{folder}: {what}. Nothing was written; choose another adapter.')


def check_modules(adapter: Adapter, source: Source) -> None:
  """Raises CheckpointError where a module of the adapter is not in the model, or has other sizes."""
  shapes = {
    name: (entry, entry.shape(spec))
    for entry, spec in placed(source.family, source.model, source.values)
    for name in entry.names(spec).values()
  }
  problems = []
  for module, (a, b) in adapter.factors.items():
    if f'{module}.weight' not in shapes:
      problems.append(f'{module} is not in the model')
      continue
    entry, shape = shapes[f'{module}.weight']
    own = (b.shape[0], a.shape[1])
    if (own[::-1] if entry.inputs_first else own) != shape:
      problems.append(f'{module} is {list(own)}, the weight {list(shape)}')
  if problems:
    raise _refused(adapter.folder, f'it belongs to another model than {source.folder}: {", ".join(problems)}')


def add_adapter(params: dict[str, Any], adapter: Adapter, source: Source) -> dict[str, Any]:
  """`params` plus the scaled product of each pair of factors: float32, each weight where it lies."""
  for entry, spec in placed(source.family, source.model, source.values):
    names = entry.names(spec)
    if not any(name.removesuffix('.weight') in adapter.factors for name in names.values()):
      continue
    update = np.zeros(spec.shape, np.float32)
    for place, name in names.items():
      if name.removesuffix('.weight') in adapter.factors:
        a, b = (x.values().astype(np.float32) for x in adapter.factors[name.removesuffix('.weight')])
        theirs = np.float32(adapter.scale) * (b @ a)
        own = entry.view(theirs.T if entry.inputs_first else theirs, spec)
        update[place] = own.reshape(update[place].shape) * np.float32(entry.scale)  # a product has no shift and no row
    *parents, leaf = entry.ours.split('/')
    node = params
    for name in parents:
      node = node[name]
    node[leaf] = node[leaf] + jax.device_put(update, node[leaf].sharding)
  return params
