"""Compares an exported folder with the model that it was imported from, in `transformers`.

Run by hand, in an environment with torch and transformers; neither the tests nor the packages import these libraries.

  python scripts/check_export.py IMPORTED EXPORTED

Prints the largest difference of the logits for 200 random tokens, and how many tensors have equal bytes. Exit code 1 if
either folder does not load without remote code, if a weight is missing or unexpected, or if the logits differ.
"""

import pathlib
import sys

import numpy as np
import torch
import transformers
from safetensors import safe_open

TOLERANCE = 3e-6  # of the logits' scale


def load(folder: pathlib.Path):
  cfg = transformers.AutoConfig.from_pretrained(folder)
  model, info = getattr(transformers, cfg.architectures[0]).from_pretrained(
    folder, dtype=torch.float32, attn_implementation='eager', output_loading_info=True
  )
  wrong = {kind: sorted(info[kind]) for kind in ('missing_keys', 'unexpected_keys', 'mismatched_keys') if info[kind]}
  if wrong:
    sys.exit(f'{folder}: {wrong}')
  return model.eval()


@torch.no_grad()
def logits(model) -> np.ndarray:
  tokens = torch.tensor(np.random.default_rng(0).integers(3, model.config.vocab_size, (1, 200)))
  own = {'decoder_input_ids': tokens[:, :50]} if model.config.is_encoder_decoder else {}
  return model(input_ids=tokens, **own).logits.numpy()


def tensors(folder: pathlib.Path) -> dict[str, torch.Tensor]:
  found = {}
  for path in sorted(folder.glob('*.safetensors')):
    with safe_open(path, framework='pt') as file:
      names = file.keys()  # the file itself cannot be iterated
      found |= {name: file.get_tensor(name) for name in names}
  return found


def main(imported: str, exported: str) -> int:
  old, new = (logits(load(pathlib.Path(folder))) for folder in (imported, exported))
  error = float(np.abs(old - new).max() / np.abs(old).max())
  before, after = tensors(pathlib.Path(imported)), tensors(pathlib.Path(exported))
  same = sum(name in after and torch.equal(before[name], after[name]) for name in before)
  print(f'logits differ by {error:.1e} of their scale; {same} of {len(before)} tensors are equal')
  return int(error > TOLERANCE)


if __name__ == '__main__':
  sys.exit(main(*sys.argv[1:]))
