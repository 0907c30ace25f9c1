"""How fast one process loads batches: packed rows of a causal LM, and UL2.

python scripts/bench/data.py [--rounds 7] [--store PATH]

Times `data.loader.loader`, as a run has it (a thread makes batches ahead), and beside it a loop that makes the same
batches without it. Rounds are interleaved. Bars, of the loader: 20 Mtok/s of packed LM rows, 3 Mtok/s of UL2. A token
is a text token of the store.
Without --store random tokens are written to a store in a temporary folder: both numbers include reading it.
"""

import argparse
import itertools
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # in front of this folder, where `data` would be this file

import numpy as np  # noqa: E402

from data import batches, prepare, source, store, vocabulary  # noqa: E402
from data.loader import loader  # noqa: E402
from data.objectives import CausalLm, Ul2  # noqa: E402

SENTINELS, BATCH = 128, 64
NUM_TOKENS = 40_000_000


def write_store(path: pathlib.Path) -> None:
  """Random pieces in documents of 20 to 5,000 tokens (log-normal, median 300)."""
  rng = np.random.default_rng(0)
  words = [' '.join(f'{x:03d}' for x in rng.integers(0, 1000, 50)) for _ in range(2000)]
  tokenizer = vocabulary.Tokenizer(prepare.train_sentencepiece(words, 600), SENTINELS)
  lengths = np.clip(rng.lognormal(np.log(300), 1.0, NUM_TOKENS // 400), 20, 5000).astype(int)
  tokens = rng.integers(3, tokenizer.vocabulary.pieces, lengths.sum())
  with store.StoreWriter(path, tokenizer) as writer:
    writer.add(np.split(tokens, np.cumsum(lengths)[:-1]))
    writer.finish(source='random tokens')


def open_source(path: str, objective, inputs_length: int, targets_length: int) -> batches.DataSource:
  cfg = source.StoreData(
    batch_size=BATCH, inputs_length=inputs_length, targets_length=targets_length, sentinels=SENTINELS,
    sources=(source.Source(path=path),),
  )  # fmt: skip
  return source.open_data(cfg, objective, seed=0, vocab_size=2**20, cache_dir='unused')


def loaded(data: batches.DataSource, steps: range) -> float:
  """Seconds that the loader takes for these steps, once it has given the step before them."""
  batches = loader(data, {'examples': (steps.start - 1) * BATCH}, slice(0, BATCH))
  next(batches)
  start = time.perf_counter()
  for _ in itertools.islice(batches, len(steps)):
    pass
  return time.perf_counter() - start


def made(data: batches.DataSource, steps: range) -> float:
  """Seconds that the batches of these steps take to make."""
  start = time.perf_counter()
  for step in steps:
    data.batch(step, slice(0, BATCH))
  return time.perf_counter() - start


def num_tokens(data: batches.DataSource, steps: range) -> int:
  return sum(n for step in steps for row in range(BATCH) for _, _, n in data.describe_row(step * BATCH + row).pieces)


WAYS = {'loader': loaded, 'no loader': made}


def main() -> None:
  flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  flags.add_argument('--rounds', type=int, default=7)
  flags.add_argument('--steps', type=int, default=40, help='batches of 64 rows in a round')
  flags.add_argument('--store', help='a token store; otherwise one of random tokens')
  options = flags.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    path = options.store or f'{folder}/store'
    if not options.store:
      write_store(pathlib.Path(path))
    cases = {
      'packed LM rows of 2048 (bar 20)': open_source(path, CausalLm(), 0, 2048),
      'packed LM rows of 512': open_source(path, CausalLm(), 0, 512),
      'UL2, 512 + 512 (bar 3)': open_source(path, Ul2(), 512, 512),
    }
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    print(f'cores {cores} (load {load:.1f}), Python {platform.python_version()}, numpy {np.__version__}')
    for data in cases.values():
      data.batch(0, slice(0, BATCH))  # plans the epoch
    rates: dict[str, list[float]] = {f'{name}, {way}': [] for name in cases for way in WAYS}
    for k in range(options.rounds):
      steps = range(k * options.steps + 1, (k + 1) * options.steps + 1)
      for name, data in cases.items():
        tokens = num_tokens(data, steps)
        for way, seconds in WAYS.items():
          rates[f'{name}, {way}'].append(tokens / seconds(data, steps) / 1e6)
  for name, values in rates.items():
    middle = statistics.median(values)
    print(f'{name:43} {middle:6.1f} Mtok/s, median of {len(values)} [{min(values):.1f} .. {max(values):.1f}]')


if __name__ == '__main__':
  main()
