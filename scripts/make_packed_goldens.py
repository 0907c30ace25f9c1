"""Writes tests/golden/interchange/llama_int4 and llama_int8 again: the golden `llama`, packed by compressed-tensors.

Run by hand, in an environment with torch, transformers and compressed-tensors (last written with torch 2.15 on a CPU,
transformers 5.24, compressed-tensors 0.20.1). Neither the tests nor the packages import these libraries. Each has

  config.json, model.safetensors   `pack-quantized`: groups of 16 inputs (int4), a scale for each output (int8)
  expected.npz                     `short` of `llama`, and `short_logits` of the packed files in `transformers`

  python scripts/make_packed_goldens.py            writes both
  python scripts/make_packed_goldens.py FOLDER     prints how far the logits of an export of `llama` are from those of
                                                   the float32 weights, and keeps them in FOLDER.logits.npy
"""

import json
import pathlib
import sys

import numpy as np
import torch
from check_export import load
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file

GOLDENS = pathlib.Path(__file__).parents[1] / 'tests/golden/interchange'
KINDS = {'llama_int4': (4, 16), 'llama_int8': (8, None)}


def scheme_of(bits: int, group: int | None) -> QuantizationScheme:
  strategy = 'channel' if group is None else 'group'
  args = QuantizationArgs(num_bits=bits, type='int', symmetric=True, strategy=strategy, group_size=group)
  return QuantizationScheme(targets=['Linear'], weights=args)


def packed(weight: torch.Tensor, scheme: QuantizationScheme) -> dict[str, torch.Tensor]:
  args = scheme.weights
  split = weight.reshape(len(weight), -1, args.group_size or weight.shape[1])
  scale, zero = calculate_qparams(split.amin(-1), split.amax(-1), args)
  return PackedQuantizationCompressor.compress(
    {'weight': weight, 'weight_scale': scale.float(), 'weight_zero_point': zero}, scheme
  )


def write(name: str) -> None:
  source, folder, scheme = GOLDENS / 'llama', GOLDENS / name, scheme_of(*KINDS[name])
  folder.mkdir(exist_ok=True)
  found = {}
  for key, tensor in load_file(source / 'model.safetensors').items():
    if '_proj.' in key:
      found |= {key.removesuffix('weight') + part: x for part, x in packed(tensor, scheme).items()}
    else:
      found[key] = tensor
  save_file(found, folder / 'model.safetensors', {'format': 'pt'})
  made = QuantizationConfig(
    config_groups={'group_0': scheme}, format='pack-quantized', quantization_status='compressed', ignore=['lm_head']
  )
  values = json.loads((source / 'config.json').read_text())
  values['quantization_config'] = json.loads(made.model_dump_json())
  (folder / 'config.json').write_text(json.dumps(values, indent=2, sort_keys=True) + '\n')
  with np.load(source / 'expected.npz', allow_pickle=False) as old:
    short = old['short']
  np.savez_compressed(folder / 'expected.npz', short=short, short_logits=logits(folder, short))


@torch.no_grad()
def logits(folder: pathlib.Path, tokens: np.ndarray) -> np.ndarray:
  return load(folder)(input_ids=torch.tensor(tokens)[None]).logits[0].numpy()


def main(argv: list[str]) -> int:
  if not argv:
    for name in KINDS:
      write(name)
    return 0
  folder = pathlib.Path(argv[0])
  with np.load(GOLDENS / 'llama/expected.npz', allow_pickle=False) as old:
    tokens, exact = old['short'], old['short_logits']
  found = logits(folder, tokens)
  np.save(folder.with_suffix('.logits.npy'), found)
  print(f'{folder}: logits are {np.abs(found - exact).max() / np.abs(exact).max():.3f} of their scale from float32')
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
