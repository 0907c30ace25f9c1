"""How fast `pretrain data prepare` tokenises, and how much memory it takes.

python scripts/bench/prepare.py [--megabytes 50 500] [--workers 1 4]

Pieces of documentation strings are written as JSONL documents to a temporary folder and prepared in a separate process,
with a model of 8,000 pieces trained on the same words. Bars: 2.5 Mtok per CPU second (of all processes, with start-up,
so that other work on the machine matters little); the peak memory for the largest input at most 1.2 times that for the
smallest. Peak memory is the resident size of the process that reads and writes; the size of its largest worker is
printed beside it.
"""

import argparse
import itertools
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # before this folder, whose data.py would be `data`

import numpy as np  # noqa: E402

from data.prepare import builtin, docstrings, prepare  # noqa: E402
from data.stores import vocabulary  # noqa: E402

BAR, MEMORY_BAR = 2.5, 1.2
TIMED = """
import json, os, resource, sys, time
sys.path.insert(0, sys.argv[1])
from data.prepare import prepare
from data.stores import store
if __name__ == '__main__':
  start = time.perf_counter()
  prepare.prepare([sys.argv[2]], sys.argv[3], tokenizer=sys.argv[4], workers=int(sys.argv[5]))
  seconds = time.perf_counter() - start
  peak = lambda who: resource.getrusage(who).ru_maxrss / 1024
  cpu = sum(os.times()[:4])
  found = store.open_store(sys.argv[3])
  print(json.dumps({'seconds': seconds, 'cpu': cpu, 'tokens': found.num_tokens, 'fingerprint': found.fingerprint,
                    'main': peak(resource.RUSAGE_SELF), 'worker': peak(resource.RUSAGE_CHILDREN)}))
"""


def words() -> list[str]:
  """Words of the documentation of Python's standard library, in its order."""
  root = pathlib.Path(os.__file__).parent
  paths = [path for path in sorted(root.rglob('*.py')) if not builtin.SKIPPED & set(path.parts)]
  found = [text for path in paths for text in docstrings.extract_file(str(path))]
  return ' '.join(found).split(' ')


def write(path: pathlib.Path, text: list[str], num_bytes: int) -> None:
  """Documents of 20 to 3,000 words: pieces of `text` from random places."""
  rng, written = np.random.default_rng(0), 0
  with path.open('w') as file:
    while written < num_bytes:
      first, count = rng.integers(0, len(text) - 3000), int(np.clip(rng.lognormal(5.5, 1.0), 20, 3000))
      line = json.dumps({'text': ' '.join(text[first : first + count])}) + '\n'
      file.write(line)
      written += len(line)


def alone(path: pathlib.Path, model: pathlib.Path) -> float:
  """Mtok per CPU second of SentencePiece alone, on the first documents: the upper limit."""
  with path.open() as file:
    texts = [json.loads(line)['text'] for line in itertools.islice(file, 2000)]
  tokenizer = vocabulary.Tokenizer(model.read_bytes(), 0)
  tokenizer.encode(texts[0])
  start = time.process_time()
  tokens = sum(map(len, tokenizer.encode_batch(texts)))
  return tokens / (time.process_time() - start) / 1e6


def describe(size: int, workers: int, found: dict) -> str:
  tokens = found['tokens'] / 1e6
  return (
    f'{size} MB, {workers} workers: {tokens / found["seconds"]:5.2f} Mtok/s ({size / found["seconds"]:.1f} MB/s), '
    f'{tokens / found["cpu"]:.2f} Mtok per CPU second (bar {BAR}); '
    f'peak {found["main"]:.0f} MiB, largest worker {found["worker"]:.0f} MiB'
  )


def main() -> None:
  flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  flags.add_argument('--megabytes', type=int, nargs='+', default=[50, 500])
  flags.add_argument('--workers', type=int, nargs='+', default=[1, len(os.sched_getaffinity(0))])
  flags.add_argument('--pieces', type=int, default=8_000)
  options = flags.parse_args()
  text, peaks, prints = words(), {}, {}
  cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
  print(f'cores {cores} (load {load:.1f}), Python {platform.python_version()}, {len(text):,} words')
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    (folder / 'model').write_bytes(prepare.train_sentencepiece([' '.join(text)], options.pieces))
    for size in options.megabytes:
      write(folder / 'text.jsonl', text, size * 1_000_000)
      for workers in options.workers:
        out = folder / f'{size}-{workers}'
        command = [sys.executable, '-c', TIMED, ROOT, folder / 'text.jsonl', out, folder / 'model', workers]
        found = json.loads(subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout)
        peaks[workers, size] = found['main']
        prints.setdefault(size, set()).add(found['fingerprint'])
        rate = alone(folder / 'text.jsonl', folder / 'model')
        print(f'{describe(size, workers, found)}; SentencePiece alone {rate:.2f}')
  for workers in options.workers:
    ratio = peaks[workers, max(options.megabytes)] / peaks[workers, min(options.megabytes)]
    print(f'memory, {workers} workers: {ratio:.2f} times (bar {MEMORY_BAR})')
  print('the same store for any number of workers:', all(len(found) == 1 for found in prints.values()))


if __name__ == '__main__':
  main()
