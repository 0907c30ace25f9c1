"""How fast one process loads batches, plans rows and resumes at a step, compared with Grain's packer and the bars.

python scripts/bench/data.py [--rounds 7] [--steps 40] [--store PATH] [--workers 1 2 4]

`loader` is `data.batches.loader.loader` as a run uses it (a thread makes batches ahead). `no loader` makes the same
batches in a loop. `Grain` is its ConcatThenSplit over the same documents, batched. `seqio` is T5's own pipeline from
documents in memory to packed features; it needs `pip install seqio t5 babel`. Rounds are interleaved; only tokens of
text count. Without --store random tokens are written to a store in a temporary folder: all numbers include reading it.
The bar for w workers is 0.7 w times the throughput of one, for w up to the number of cores.
"""

import argparse
import importlib.util
import itertools
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # before this folder, whose data.py would be `data`

import grain  # noqa: E402
import numpy as np  # noqa: E402

from data.batches import batches, source  # noqa: E402
from data.batches.loader import loader  # noqa: E402
from data.batches.plan_report import keep_plans  # noqa: E402
from data.objectives.objectives import CausalLm, SpanCorruption, Ul2, tasks_of  # noqa: E402
from data.objectives.tasks import Budget  # noqa: E402
from data.packing.best_fit import BestFitPlanner  # noqa: E402
from data.packing.full_rows import FullRows, FullRowsPlanner  # noqa: E402
from data.packing.packing import BestFit  # noqa: E402
from data.packing.plan import Stream  # noqa: E402
from data.prepare import prepare  # noqa: E402
from data.stores import store, vocabulary  # noqa: E402
from pretrain.devices.allocator import keep_memory  # noqa: E402

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


def open_source(
  path: str, objective, inputs_length: int, targets_length: int, cache: str = '', **options
) -> batches.DataSource:
  cfg = source.StoreData(
    batch_size=BATCH, inputs_length=inputs_length, targets_length=targets_length, sentinels=SENTINELS,
    sources=(source.Source(path=path),), **options,
  )  # fmt: skip
  cache = cache or f'{path}-cache'
  return source.open_data(cfg, objective, seed=0, vocab_size=2**20, cache_dir=cache)


def loaded(data: batches.DataSource, steps: range, ahead: int = 1) -> float:
  """Seconds that the loader takes for these steps, after it has given some batches before them."""
  batches = loader(data, {'examples': (steps.start - ahead) * BATCH}, slice(0, BATCH))
  for _ in range(ahead):
    next(batches)
  start = time.perf_counter()
  for _ in itertools.islice(batches, len(steps)):
    pass
  return time.perf_counter() - start


def made(data: batches.DataSource, steps: range) -> float:
  """Seconds that it takes to make the batches of these steps."""
  start = time.perf_counter()
  for step in steps:
    data.batch(step, slice(0, BATCH))
  return time.perf_counter() - start


def num_tokens(data: batches.DataSource, steps: range) -> int:
  (rows,) = data.sources
  located = [(epoch, *rows.locate(epoch, places)[:2]) for epoch, places in rows.epochs(_places(steps))]
  return sum(int(rows.pieces(*own).lengths.sum()) for own in located)


def _places(steps: range) -> np.ndarray:
  return np.arange(steps.start * BATCH, steps.stop * BATCH)


def grain_packed(store_path: str, count: int) -> float:
  """Seconds in which Grain packs a store's documents, joined and split, into `count` batches of 64 rows of 2048."""
  opened = store.open_store(store_path)
  documents = grain.MapDataset.source(_Documents(opened)).repeat(None)
  rows = grain.experimental.ConcatThenSplitIterDataset(
    documents.to_iter_dataset(grain.ReadOptions(num_threads=0)), length_struct={'targets': 2048}
  )
  packed = iter(rows.batch(BATCH))
  next(packed)
  start = time.perf_counter()
  for _ in range(count):
    next(packed)
  return time.perf_counter() - start


class _Documents:
  """A Grain source: the tokens of each document."""

  def __init__(self, opened: store.Store):
    self._store, self._offsets = opened, opened.offsets

  def __len__(self) -> int:
    return len(self._offsets) - 1

  def __getitem__(self, k: int) -> dict[str, np.ndarray]:
    return {'targets': self._store.read([(int(self._offsets[k]), int(self._offsets[k + 1] - self._offsets[k]))])[0]}


def seqio_batches(store_path: str) -> Iterator[dict[str, np.ndarray]] | None:
  """Endless batches of T5's span corruption, 512 + 114, over the first documents of a store; None without seqio."""
  if not (importlib.util.find_spec('seqio') and importlib.util.find_spec('t5')):
    return None
  os.environ |= {'TF_CPP_MIN_LOG_LEVEL': '3', 'CUDA_VISIBLE_DEVICES': ''}
  seqio, tensorflow = importlib.import_module('seqio'), importlib.import_module('tensorflow')

  # `import t5` would import its evaluation too; the preprocessors are one file.
  (package,) = importlib.util.find_spec('t5').submodule_search_locations
  spec = importlib.util.spec_from_file_location('preprocessors', f'{package}/data/preprocessors.py')
  t5 = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(t5)
  opened, lengths = store.open_store(store_path), {'inputs': 512, 'targets': 114}
  some = opened.offsets[:20_000]
  documents = tensorflow.RaggedTensor.from_row_splits(opened.read([(0, int(some[-1]))])[0], some)
  vocabulary = seqio.SentencePieceVocabulary(f'{store_path}/tokenizer.model', extra_ids=SENTINELS)
  features = dict.fromkeys(lengths, seqio.Feature(vocabulary, add_eos=True))
  rows = tensorflow.data.Dataset.from_tensor_slices({'targets': documents}).repeat()
  rows = t5.span_corruption(rows, sequence_length=lengths, output_features=features)
  rows = seqio.EncDecFeatureConverter(pack=True)(seqio.preprocessors.append_eos(rows, features), lengths)
  one = tensorflow.data.Options()  # thread and as many batches ahead as ours
  one.threading.private_threadpool_size = 1
  return rows.batch(BATCH).prefetch(2).with_options(one).as_numpy_iterator()


def seqio_rate(rows: Iterator[dict[str, np.ndarray]], count: int, pieces: int) -> float:
  """Mtok/s of text over `count` batches."""
  sides = ('encoder_input_tokens', 'decoder_target_tokens')
  for _ in range(3):  # skip the batches made ahead
    next(rows)
  start = time.perf_counter()
  batches = [next(rows) for _ in range(count)]
  seconds = time.perf_counter() - start
  return sum(((b[side] > 1) & (b[side] < pieces)).sum() for b in batches for side in sides) / seconds / 1e6


def planning(rounds: int) -> None:
  """Best fit, and UL2 in full rows, over documents of log-normal lengths."""
  lengths = np.clip(np.random.default_rng(0).lognormal(np.log(500), 1.1, 200_000), 20, 60_000).astype(np.int64)
  stream = Stream(np.cumsum(lengths) - lengths, lengths)
  (task,) = tasks_of(CausalLm())
  rates, rows = [], 0
  for _ in range(rounds):
    start = time.perf_counter()
    rows = len(BestFitPlanner(lambda shard: stream, task, Budget(0, 2048)).plan(0, 0).tasks)
    rates.append(lengths.sum() / (time.perf_counter() - start) / 1e6)
  show('plan: best fit, rows of 2048', rates, 'Mtok/s', 20)
  padding = 1 - lengths.sum() / (rows * 2048)
  print(f'{"  its padding":47} {padding:8.3%}         bar 0.1%   {"met" if padding <= 1e-3 else "MISSED"}')
  planner = FullRowsPlanner(lambda shard: stream, tasks_of(Ul2()), Budget(512, 328), seed=0, purpose='bench')
  rates = []
  for _ in range(rounds):
    start = time.perf_counter()
    planner.plan(0, 0)
    rates.append(lengths.sum() / (time.perf_counter() - start) / 1e6)
  show('plan: UL2 in full rows of 512 + 328', rates, 'Mtok/s', 20)


def seeking(path: str, cache: str, rounds: int) -> None:
  """Seconds from a data source with plans on disk to the batch of step 1,000,000, many epochs later."""
  opened = lambda: open_source(path, Ul2(), 512, 512, cache)
  keep_plans(opened(), len(os.sched_getaffinity(0)))
  opened().batch(1_000_000, slice(0, BATCH))  # counts the rows of each plan, once
  seconds = []
  for k in range(rounds):
    data = opened()
    start = time.perf_counter()
    data.batch(1_000_000 + k, slice(0, BATCH))
    seconds.append(time.perf_counter() - start)
  show('UL2: to step 1,000,000 and its batch', seconds, 's', 0.1, above=False)


def show(name: str, values: list[float], unit: str, bar: float | None = None, *, above: bool = True) -> float:
  """Prints median, spread and whether the bar is met; returns the median."""
  middle = statistics.median(values)
  line = f'{name:47} {middle:8.3g} {unit:7} [{min(values):.3g} .. {max(values):.3g}] of {len(values)}'
  if bar is not None:
    line += f'   bar {bar:g}   {"met" if (middle >= bar) == above else "MISSED"}'
  print(line, flush=True)
  return middle


def loading(path: str, options: argparse.Namespace) -> None:
  cases = {
    'LM rows of 2048': (open_source(path, CausalLm(), 0, 2048), 20.0),
    'LM rows of 2048, best fit': (open_source(path, CausalLm(), 0, 2048, packing=BestFit()), None),
    'LM rows of 512': (open_source(path, CausalLm(), 0, 512), None),
    'spans, 512 + 114': (open_source(path, SpanCorruption(), 512, 114), 4.0),
    'UL2, 512 + 512': (open_source(path, Ul2(), 512, 512), 3.0),
    'UL2, full rows, 512 + 328': (open_source(path, Ul2(), 512, 328, packing=FullRows()), 3.0),
  }
  for data, _ in cases.values():
    data.batch(0, slice(0, BATCH))  # plans the epoch
  ways = {'loader': loaded, 'no loader': made}
  rates: dict[tuple[str, str], list[float]] = {(name, way): [] for name in cases for way in ways}
  grain_rates, seqio_rates = [], []
  seqio_rows, pieces = seqio_batches(path), store.open_store(path).manifest['pieces']
  for k in range(options.rounds):
    steps = range(k * options.steps + 1, (k + 1) * options.steps + 1)
    for name, (data, _) in cases.items():
      tokens = num_tokens(data, steps)
      for way, seconds in ways.items():
        rates[name, way].append(tokens / seconds(data, steps) / 1e6)
    count = max(options.steps // 8, 2)
    grain_rates.append(count * BATCH * 2048 / grain_packed(path, count) / 1e6)
    if seqio_rows:
      seqio_rates.append(seqio_rate(seqio_rows, options.steps, pieces))
  for (name, way), values in rates.items():
    show(f'{name}, {way}', values, 'Mtok/s', cases[name][1] if way == 'loader' else None)
  show('LM rows of 2048, Grain ConcatThenSplit', grain_rates, 'Mtok/s')
  ratios = [a / b for a, b in zip(rates['LM rows of 2048', 'loader'], grain_rates, strict=True)]
  show('  ours / Grain', ratios, 'x', 10)
  if not seqio_rates:
    print('spans, 512 + 114, seqio: not installed')
    return
  show('spans, 512 + 114, seqio', seqio_rates, 'Mtok/s')
  ratios = [a / b for a, b in zip(rates['spans, 512 + 114', 'loader'], seqio_rates, strict=True)]
  show('  ours / seqio', ratios, 'x', 2)


def scaling(path: str, options: argparse.Namespace) -> None:
  """The throughput of UL2 batches from worker processes, measured after each has started, planned and read."""
  rates: dict[int, list[float]] = {workers: [] for workers in options.workers}
  for k in range(max(options.rounds // 2, 3)):
    ahead = 8 * max(options.workers)
    steps = range(ahead + 10 * k * options.steps, ahead + 10 * (k + 1) * options.steps)
    for workers in options.workers:
      data = open_source(path, Ul2(), 512, 512, workers=workers)
      rates[workers].append(num_tokens(data, steps) / loaded(data, steps, ahead) / 1e6)
  for workers, values in rates.items():
    factor = [a / b for a, b in zip(values, rates[options.workers[0]], strict=True)]
    show(f'UL2, 512 + 512, {workers} workers', values, 'Mtok/s')
    if workers != options.workers[0]:
      show(f'  times {options.workers[0]} worker', factor, 'x', 0.7 * min(workers, len(os.sched_getaffinity(0))))


def main() -> None:
  keep_memory()  # as a run does
  flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  flags.add_argument('--rounds', type=int, default=7)
  flags.add_argument('--steps', type=int, default=40, help='batches of 64 rows in a round')
  flags.add_argument('--store', help='a token store; otherwise one of random tokens')
  flags.add_argument('--workers', type=int, nargs='+', default=[1, 2, 4])
  options = flags.parse_args()
  cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
  print(f'cores {cores} (load {load:.1f}), Python {platform.python_version()}, numpy {np.__version__}')
  with tempfile.TemporaryDirectory() as folder:
    path = options.store or f'{folder}/store'
    if not options.store:
      write_store(pathlib.Path(path))
    loading(path, options)
    planning(options.rounds)
    seeking(path, f'{folder}/cache', options.rounds)
    scaling(path, options)


if __name__ == '__main__':
  main()
