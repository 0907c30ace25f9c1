"""Seconds to read a batch of prompts of very different lengths: a row for each, or packed rows.

python scripts/bench/generation/prefill.py [--repeats 5]

The decoder of configs/decoder/tiny.gin, wider, with random weights. Medians of interleaved runs, with the least and the
most seconds; compiling is not timed. The first logits of both are compared.
"""

import argparse
import pathlib
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))
LENGTHS = {
  'one long, fifteen short': [480, *range(20, 80, 4)],
  'evenly spread': [*range(30, 510, 30)],
  'nearly equal': [*range(465, 481)],
}


def cases(cfg):
  """(name, rows of a prompt each, packed rows or None where they save too little)."""
  import numpy as np

  from data.stores.special_ids import T5_IDS
  from pretrain.evaluation.outputs import padded
  from pretrain.evaluation.prompts import packed_batch, prompt_batch

  rng = np.random.default_rng(0)
  for name, lengths in LENGTHS.items():
    prompts = [rng.integers(3, cfg.model.vocab_size, n).tolist() for n in lengths]
    length = padded(max(lengths))
    yield name, prompt_batch(prompts, cfg, length, T5_IDS), packed_batch(prompts, cfg, length, T5_IDS)


def timed(run, batch) -> float:
  began = time.perf_counter()
  run(batch)[0].block_until_ready()
  return time.perf_counter() - began


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--repeats', type=int, default=5)
  repeats = parser.parse_args().repeats
  from pretrain.devices import mesh

  mesh.prepare_platform(mesh.MeshConfig())
  import jax
  import numpy as np

  from models.build import build
  from models.decode.cached import start
  from models.specs import initialize
  from pretrain.config import bindings
  from pretrain.experiment.experiment import Experiment

  wider = ['model.embed=256', 'model.mlp.hidden=768', 'model.layers=4', 'data.targets_length=512']
  cfg = bindings.load(Experiment, [str(ROOT / 'configs/decoder/tiny.gin')], wider)
  model = build(cfg.model)
  params = initialize(model.specs, jax.random.key(0))

  @jax.jit
  def read(batch):
    _, (hidden, cache), _ = start(model.bind(params), batch, 64, 0)
    return model.logits(params, hidden[:, -1]), cache

  for name, rows, packed in cases(cfg):
    if packed is None:
      print(f'{name}: not packed, which would save less than a quarter of the rows')
      continue
    both = {'a row each': rows, 'packed': packed}
    first = [np.asarray(read(batch)[0]) for batch in both.values()]
    seconds = {how: [] for how in both}
    for _ in range(repeats):
      for how, batch in both.items():
        seconds[how].append(timed(read, batch))
    medians = {how: statistics.median(own) for how, own in seconds.items()}
    for how, own in seconds.items():
      size = ' x '.join(map(str, both[how]['decoder_input_tokens'].shape))
      print(f'{name}, {how} ({size} positions): {medians[how]:.3f} s ({min(own):.3f} to {max(own):.3f})')
    ratio, apart = medians['a row each'] / medians['packed'], np.abs(first[0] - first[1]).max() / np.abs(first[0]).max()
    print(f'{name}: packed prefill is {ratio:.2f} times as fast; logits differ by {apart:.1e} of their scale')


if __name__ == '__main__':
  main()
