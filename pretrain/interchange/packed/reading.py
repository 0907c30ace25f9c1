"""Packed weights as tensors of float32: a block is unpacked when it is read."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from pretrain.errors import CheckpointError
from pretrain.interchange.packed.codes import WORD, Scheme, dequantized, unpacked
from pretrain.interchange.safetensors import READ, Tensor

KEY = 'quantization_config'  # of a config.json
METHOD, FORMAT = 'compressed-tensors', 'pack-quantized'
PARTS = ('weight_packed', 'weight_scale', 'weight_shape')


@dataclasses.dataclass(frozen=True)
class Packed(Tensor):
  """A weight [outputs, inputs] whose values are code * scale; `words` holds its codes."""

  words: Tensor
  scales: Tensor
  scheme: Scheme

  def read(self, begin: int = 0, end: int | None = None) -> np.ndarray:
    """Elements `begin` to `end` of its values in a row, float32."""
    rows, inputs = self.shape
    end = rows * inputs if end is None else end
    first, last = begin // inputs, -(-end // inputs)
    part = lambda x: x.raw(first * x.shape[1], last * x.shape[1]).reshape(last - first, -1)
    values = dequantized(unpacked(part(self.words), self.scheme, inputs), part(self.scales))
    return values.reshape(-1)[begin - first * inputs : end - first * inputs]


def unpacked_tensors(found: Mapping[str, Tensor], quantization: Any, folder: pathlib.Path) -> dict[str, Tensor]:
  """`found` with the three parts of each packed weight as one tensor, NAME.weight of type F32.

  `quantization` is the value of `KEY` in config.json; None: nothing is packed. Raises CheckpointError, with all reasons
  in one line, for another layout than `codes` describes.
  """
  if quantization is None:
    return dict(found)
  schemes = _schemes(quantization, folder)
  modules = [name.removesuffix(PARTS[0]) for name in found if name.endswith(f'.{PARTS[0]}')]
  made, problems = {}, []
  for module in modules:
    own = [found.get(module + part) for part in PARTS]
    try:
      made[f'{module}weight'] = _one(f'{module}weight', own, schemes)
    except ValueError as error:
      problems.append(str(error))
  if problems:
    raise _refused(folder, '; '.join(problems), 'both must be of one model')
  gone = {module + part for module in modules for part in PARTS}
  return {name: tensor for name, tensor in found.items() if name not in gone} | made


def _one(name: str, parts: list[Tensor | None], schemes: list[Scheme]) -> Packed:
  words, scales, shape = parts
  if scales is None or shape is None:
    raise ValueError(f'{name} has {PARTS[0]} and no {PARTS[1] if scales is None else PARTS[2]}')
  if scales.dtype not in READ or words.dtype != 'I32' or shape.dtype not in ('I32', 'I64') or shape.shape != (2,):
    raise ValueError(f'{name} has parts of types {words.dtype}, {scales.dtype} and {shape.dtype}{list(shape.shape)}')
  rows, inputs = (int(n) for n in shape.raw())
  fits = lambda own: words.shape == (rows, own.words(inputs)) and scales.shape == (rows, own.groups(inputs))
  fitting = [own for own in schemes if min(rows, inputs) > 0 and inputs % (own.group or 1) == 0 and fits(own)]
  if len(fitting) != 1:
    what = 'fit none of' if not fitting else 'fit several of'
    raise ValueError(
      f'{name} {[rows, inputs]} has words {list(words.shape)} and scales {list(scales.shape)}, which {what} the groups '
      'of config.json'
    )
  return Packed(words.path, name, 'F32', (rows, inputs), words.begin, words, scales, fitting[0])


def _schemes(quantization: Any, folder: pathlib.Path) -> list[Scheme]:
  """The different schemes of a `quantization_config`."""
  values = quantization if isinstance(quantization, dict) else {}
  problems = [
    f'{key}={values.get(key)!r} (supported: {wanted!r})'
    for key, wanted in (('quant_method', METHOD), ('format', FORMAT), ('kv_cache_scheme', None))
    if values.get(key) != wanted
  ]
  groups = values.get('config_groups')
  found = {}
  for name, group in groups.items() if isinstance(groups, dict) and not problems else ():
    wrong, scheme = _scheme(group if isinstance(group, dict) else {})
    problems += [f'{name}: {what}' for what in wrong]
    found[scheme] = None
  if problems or not found:
    listed = ', '.join(problems) or f'{KEY} has no config_groups'
    raise _refused(
      folder, f'{listed}; read are weights of 4 or 8 bits, symmetric, with a scale for each output or group of inputs',
      'choose the weights before they were quantized, or quantize them so',
    )  # fmt: skip
  return list(found)


def _scheme(group: Mapping[str, Any]) -> tuple[list[str], Scheme]:
  """(what is not read, the scheme) of one group of `config_groups`."""
  weights = group.get('weights') or {}
  allowed = {
    'num_bits': (4, 8), 'type': ('int', None), 'symmetric': (True, None), 'strategy': ('group', 'channel'),
    'actorder': (None,), 'dynamic': (False, None),
  }  # fmt: skip
  wrong = [f'weights.{key}={weights.get(key)!r}' for key, values in allowed.items() if weights.get(key) not in values]
  wrong += [f'{key}={group[key]!r}' for key in ('input_activations', 'output_activations') if group.get(key)]
  wrong += [f'format={group.get("format")!r}'] * (group.get('format', FORMAT) not in (FORMAT, None))
  size = weights.get('group_size') if weights.get('strategy') == 'group' else 0
  if type(size) is not int or size < 0:
    wrong.append(f'weights.group_size={size!r}')
    size = 0
  return wrong, Scheme(weights.get('num_bits', WORD), size)


def _refused(folder: pathlib.Path, what: str, fix: str) -> CheckpointError:
  return CheckpointError(
    'IMPORT', f'{folder} has quantized weights that Pretrain does not read: {what}. Nothing was written; {fix}.'
  )
