"""Checkpoints in T5X's layout, made of the goldens of `transformers`.

The names and transposes are those of `transformers`, models/t5/convert_t5x_checkpoint_to_pytorch.py and, for scanned
layers, models/umt5/convert_umt5_checkpoint_to_pytorch.py, read backwards. The placeholders are those of
t5x/testdata/tiny_t5/checkpoint_1/checkpoint.
"""

import pathlib
import re
from collections.abc import Mapping

import numpy as np
import tensorstore as ts
from flax import serialization, traverse_util

from pretrain.interchange.safetensors import open_folder
from tests.pretrain.interchange.goldens import GOLDENS

PARTS = {'q': 'query', 'k': 'key', 'v': 'value', 'o': 'out'}
SELF = {'encoder': 'attention', 'decoder': 'self_attention'}


def unscanned(name: str) -> dict[str, np.ndarray]:
  """Each array of a golden by its name in T5X, in slashes, as t5x/examples/t5 has them."""
  arrays = {}
  for theirs, tensor in open_folder(GOLDENS / name).items():
    if theirs.endswith('embed_tokens.weight'):
      continue
    values = tensor.values()
    plain = theirs == 'shared.weight' or 'norm' in theirs
    arrays[_name(theirs)] = values if plain else values.T
  if name == 't5_v1_0':  # its head is the table
    arrays.pop('decoder/logits_dense/kernel', None)
  return arrays


def _name(theirs: str) -> str:
  whole = {'shared.weight': 'token_embedder/embedding', 'lm_head.weight': 'decoder/logits_dense/kernel'}
  if theirs in whole:
    return whole[theirs]
  if match := re.fullmatch(r'(\w+)\.final_layer_norm\.weight', theirs):
    return f'{match[1]}/{match[1]}_norm/scale'
  stack, block, index, rest = re.fullmatch(r'(\w+)\.block\.(\d+)\.layer\.(\d)\.(.*)\.weight', theirs).groups()
  layer = f'{stack}/layers_{block}'
  if rest.endswith('relative_attention_bias'):
    return f'{layer}/relpos_bias/rel_embedding'
  if rest == 'layer_norm':
    kinds = [SELF[stack], 'mlp'] if stack == 'encoder' else [SELF[stack], 'cross_attention', 'mlp']
    return f'{layer}/pre_{kinds[int(index)]}_layer_norm/scale'
  module, part = rest.split('.')
  if module == 'DenseReluDense':
    return f'{layer}/mlp/{part}/kernel'
  attention = SELF[stack] if module == 'SelfAttention' else 'encoder_decoder_attention'
  return f'{layer}/{attention}/{PARTS[part]}/kernel'


def shared(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """With the relative biases of the first layer for all of them."""
  return {name.replace('layers_0/relpos_bias', 'relpos_bias'): values for name, values in arrays.items()}


def scanned(arrays: Mapping[str, np.ndarray], *, heads: int | None = None, axis: int = 1) -> dict[str, np.ndarray]:
  """With one array for the layers of a stack; with `heads`, these are an axis of their own, as in scalable_t5."""
  found, layers = {}, {}
  for name, values in arrays.items():
    if match := re.fullmatch(r'(\w+)/layers_(\d+)/(.*)', name):
      layers.setdefault(f'{match[1]}/{match[1]}/{match[3]}', {})[int(match[2])] = _apart(match[3], values, heads)
    else:
      found[name] = values
  return found | {name: np.stack([own[i] for i in range(len(own))], axis) for name, own in layers.items()}


def _apart(name: str, values: np.ndarray, heads: int | None) -> np.ndarray:
  if heads is None or 'attention' not in name or not name.endswith('kernel'):
    return values
  if '/out/' in name:
    return values.reshape(heads, -1, values.shape[1])
  return values.reshape(values.shape[0], heads, -1)


def write(folder: pathlib.Path, arrays: Mapping[str, np.ndarray], rows: int = 7, driver: str = 'gfile') -> pathlib.Path:
  """The checkpoint: scales in the msgpack file, other arrays in zarr folders with chunks of at most `rows` a side."""
  target = {}
  for name, values in arrays.items():
    place = f'target.{name.replace("/", ".")}'
    target[name] = values if name.endswith('encoder_norm/scale') else _zarr(folder, place, values, rows, driver)
  state = {'step': np.int32(3), 'param_states': {'v': _zarr(folder, 'state.param_states.v', np.ones(3), rows, driver)}}
  tree = {'version': 3, 'optimizer': {'target': traverse_util.unflatten_dict(target, sep='/'), 'state': state}}
  (folder / 'checkpoint').write_bytes(serialization.msgpack_serialize(tree))
  return folder


def _zarr(folder: pathlib.Path, name: str, values: np.ndarray, rows: int, driver: str) -> dict:
  kind = values.dtype.str if values.dtype.kind == 'f' else values.dtype.name
  metadata = {
    'chunks': [min(rows, size) for size in values.shape], 'compressor': {'id': 'gzip', 'level': 1},
    'shape': list(values.shape),
  }  # fmt: skip
  store = ts.open(
    {
      'driver': 'zarr', 'kvstore': {'driver': 'file', 'path': f'{folder / name}/'},
      'metadata': metadata | {'dtype': kind},
    },
    create=True,
  ).result()  # fmt: skip
  store.write(np.ascontiguousarray(values)).result()
  return {
    'driver': 'zarr', 'dtype': values.dtype.name, 'kvstore': {'driver': driver, 'path': f'{name}/'},
    'metadata': metadata,
  }  # fmt: skip
