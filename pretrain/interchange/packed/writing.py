"""`pretrain export --quantize`: an export whose products have weights of 4 or 8 bits, for engines that serve models.

The tensors are written unquantized first, to a folder inside of the new one, then packed a block at a time: one file of
theirs may hold several parameters of ours, and values that folds change.
"""

import dataclasses
import math
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np

from models.build import build
from models.layers.low_rank import products
from pretrain.errors import CheckpointError, ConfigError
from pretrain.interchange.exporting import Export, exported, new_folder, reader_of
from pretrain.interchange.family import Family
from pretrain.interchange.packed import reading
from pretrain.interchange.packed.codes import BITS, GROUP, Kind, Scheme, packed, quantized
from pretrain.interchange.placing import BLOCK, copy
from pretrain.interchange.safetensors import READ, SHARD_BYTES, SIZES, Tensor, allocate, open_folder
from pretrain.tools.weights import Step, check_new

WHOLE = 'unquantized'  # the folder of the tensors before they are packed


def export_packed(
  step: Step, output: pathlib.Path, kind: Kind, *, group: int | None = None, dtype: str | None = None,
  shard_bytes: int = SHARD_BYTES,
) -> Family:  # fmt: skip
  """As `export`, but the weights of all products in blocks are codes of `kind`; `group` inputs share a scale, 0: all.

  Scales and the other tensors have the types of `export`. Raises ConfigError for a group that does not divide a weight,
  and for a family that stores weights transposed; CheckpointError for values that are not finite. Then nothing is
  written.
  """
  check_new(output, '--out')
  plan = exported(step, dtype)
  scheme = Scheme(BITS[kind], GROUP[kind] if group is None else group)
  names = matrices(plan)
  _check_group(plan, names, scheme, given=group is not None)
  plan = dataclasses.replace(plan, values=plan.values | {reading.KEY: description(plan, names, scheme)})
  size = plan.weights.size + sum(_bytes(plan.weights.tensors[name], scheme) for name in names)
  with reader_of(step) as read, new_folder(output, size) as partial:
    whole = partial / WHOLE
    whole.mkdir()
    plan.write_weights(read, whole, shard_bytes)
    _pack(open_folder(whole), names, scheme, partial, shard_bytes)
    shutil.rmtree(whole)
    plan.write_files(partial)
  return plan.family


def matrices(plan: Export) -> list[str]:
  """The names of the weights of products in blocks, as in the files. Raises ConfigError for transposed ones."""
  wanted, found = {'/'.join(path) for path in products(build(plan.cfg.model).specs)}, {}
  for entry, spec in plan.weights.places:
    if entry.ours not in wanted:
      continue
    own = [name for first in entry.names(spec).values() for name in plan.weights.names_of(first)]
    if entry.inputs_first:
      raise ConfigError(
        f'--quantize: {plan.family.model_type} stores {own[0]} as [inputs, outputs], and {reading.METHOD} has scales '
        'for rows of outputs. Nothing was written; leave --quantize out.'
      )
    found |= dict.fromkeys(own)
  return list(found)


def _check_group(plan: Export, names: list[str], scheme: Scheme, *, given: bool) -> None:
  inputs = {name: plan.weights.tensors[name][1][1] for name in names}
  wrong = [name for name, n in inputs.items() if scheme.group and n % scheme.group]
  if scheme.group < 0:
    raise ConfigError(f'--group_size={scheme.group}; it must be at least 1, or 0 for one scale for each output.')
  if wrong:
    fitting = math.gcd(scheme.group, *inputs.values())
    raise ConfigError(
      f'--group_size={scheme.group}{"" if given else " (the default)"} does not divide the {inputs[wrong[0]]} inputs '
      f'of {wrong[0]} (first of {len(wrong)}). Nothing was written; use --group_size={fitting}, or --group_size=0 for '
      'one scale for each output.'
    )


def description(plan: Export, names: list[str], scheme: Scheme) -> dict[str, Any]:
  """The `quantization_config` of config.json: linear modules except those in `ignore`, weights alone."""
  family, tensors = plan.family, plan.weights.tensors
  own = {name for name, (_, shape) in tensors.items() if name.endswith('.weight') and len(shape) > 1} - set(names)
  own |= {name for name in (*family.aliases, *(family.tied or ())) if name.endswith('.weight')}
  weights = {
    'num_bits': scheme.bits, 'type': 'int', 'symmetric': True, 'strategy': 'group' if scheme.group else 'channel',
    'group_size': scheme.group or None, 'dynamic': False, 'actorder': None, 'block_structure': None,
    'observer': 'minmax', 'observer_kwargs': {},
  }  # fmt: skip
  group = {'targets': ['Linear'], 'weights': weights, 'input_activations': None, 'output_activations': None}
  return {
    'quant_method': reading.METHOD, 'format': reading.FORMAT, 'quantization_status': 'compressed',
    'config_groups': {'group_0': group}, 'ignore': sorted(name.removesuffix('.weight') for name in own),
    'kv_cache_scheme': None, 'global_compression_ratio': None,
  }  # fmt: skip


def _parts(name: str, kind: str, shape: tuple[int, ...], scheme: Scheme) -> dict[str, tuple[str, tuple[int, ...]]]:
  """{name: (type, shape)} of the three tensors of a packed weight."""
  (rows, inputs), module = shape, name.removesuffix('weight')
  sizes = ('I32', (rows, scheme.words(inputs))), (kind, (rows, scheme.groups(inputs))), ('I64', (2,))
  return {module + part: size for part, size in zip(reading.PARTS, sizes, strict=True)}


def _bytes(tensor: tuple[str, tuple[int, ...]], scheme: Scheme) -> int:
  return sum(math.prod(shape) * SIZES[kind] for kind, shape in _parts('', *tensor, scheme).values())


def _pack(
  found: Mapping[str, Tensor], names: list[str], scheme: Scheme, output: pathlib.Path, shard_bytes: int
) -> None:
  """Writes the files of the export, with the weights `names` packed."""
  others = {name: (tensor.dtype, tensor.shape) for name, tensor in found.items() if name not in names}
  parts = {name: _parts(name, found[name].dtype, found[name].shape, scheme) for name in names}
  made = allocate(output, others | {part: size for own in parts.values() for part, size in own.items()}, shard_bytes)
  for name in others:
    copy(found[name], made[name])
  for name, own in parts.items():
    _pack_one(found[name], *(made[part] for part in own), scheme)


def _pack_one(tensor: Tensor, words: Tensor, scales: Tensor, shape: Tensor, scheme: Scheme) -> None:
  rows, inputs = tensor.shape
  step = max(1, BLOCK // inputs)
  for first in range(0, rows, step):
    last = min(first + step, rows)
    x = tensor.read(first * inputs, last * inputs).reshape(-1, inputs)
    if not np.isfinite(x.astype(np.float32)).all():
      raise CheckpointError(
        'CKPT-NONFINITE',
        f'{tensor.name} has values that are not finite, for which int{scheme.bits} has no codes. Nothing was written; '
        'choose another --step.',
      )
    codes, own = quantized(x, scheme, READ[scales.dtype])
    words.write(first * words.shape[1], packed(codes, scheme))
    scales.write(first * scales.shape[1], own)
  shape.write(0, np.array(tensor.shape, np.int64))
