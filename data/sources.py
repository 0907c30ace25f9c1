"""Where rows come from: token stores, the built-in corpus, or random tokens; and the global batch at any place.

A batch is a pure function of (config, seed, position): no host count, no worker count, no history.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import Any, Literal, assert_never

import numpy as np

from data import features, plan
from data.errors import DataError
from data.objectives import CausalLm, Objective, tasks
from data.store import Store, open_store
from data.vocabulary import Tokenizer, Vocabulary

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
  """A token store and its share of the rows."""

  path: str
  weight: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
  """What a batch looks like. `inputs_length` is the encoder's; one stream of `targets_length` tokens has none.

  `attend_across_documents` cuts rows from documents laid end to end, as T5's reference does, one example to a row.
  `workers` processes make batches ahead (0: a thread does); neither they nor `prefetch` change a batch.
  """

  batch_size: int
  inputs_length: int = 0
  targets_length: int
  sentinels: int = 0
  attend_across_documents: bool = False
  workers: int = 0
  prefetch: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Builtin(Rows):
  """The documentation strings of this Python installation: real English without a download. See data/builtin.py."""

  name: Literal['builtin'] = 'builtin'


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreData(Rows):
  """Token stores made by `pretrain data prepare`, mixed by weight; `heldout` sets are for evaluation."""

  name: Literal['store'] = 'store'
  sources: tuple[Source, ...]
  heldout: tuple[Source, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Synthetic(Rows):
  """Random ids, full rows, no disk: for benchmarks of the step."""

  name: Literal['synthetic'] = 'synthetic'


Data = Builtin | StoreData | Synthetic


class StoreRows:
  """The endless rows of one store: epoch after epoch, each token once in each."""

  def __init__(self, store: Store, cfg: Rows, objective: Objective, seed: int):
    self.store, self._cfg, self._seed = store, cfg, seed
    self.tokenizer = store.tokenizer(cfg.sentinels)
    self.tasks = tasks(objective, self.tokenizer.vocabulary, encoder=cfg.inputs_length > 0)
    self._causal = isinstance(objective, CausalLm)
    offsets = store.offsets[[0, -1]] if cfg.attend_across_documents else store.offsets
    self.planner = plan.Planner(offsets, self.tasks, cfg.inputs_length, cfg.targets_length, seed)
    self._epoch_ends = [0]

  def locate(self, index: int) -> tuple[int, int]:
    """(epoch, row of its plan) of the `index`-th row of this source since the start of the run."""
    while index >= self._epoch_ends[-1]:
      epoch = len(self._epoch_ends) - 1
      self._epoch_ends.append(self._epoch_ends[-1] + self.planner.plan(epoch).num_rows)
    epoch = int(np.searchsorted(self._epoch_ends, index, side='right')) - 1
    return epoch, int(self.planner.plan(epoch).order[index - self._epoch_ends[epoch]])

  def pieces(self, index: int) -> list[tuple[int, int]]:
    epoch, row = self.locate(index)
    return self.planner.plan(epoch).pieces(row)

  def row(self, index: int, tokens: list[np.ndarray]) -> features.Row:
    """The features of a row, given the tokens of its pieces."""
    epoch, row = self.locate(index)
    task = self.tasks[self.planner.plan(epoch).row_task[row]]
    rng = plan.generator(self._seed, plan.EXAMPLE, epoch, row)
    examples = [task.example(piece, rng) for piece in tokens]
    if self._cfg.inputs_length:
      return features.encoder_decoder_row(examples, self._cfg.inputs_length, self._cfg.targets_length)
    return (features.causal_row if self._causal else features.prefix_row)(examples, self._cfg.targets_length)


class StoreBatches:
  """Global batches over one or more stores, each row's store drawn so that every block holds the exact shares."""

  def __init__(self, stores: list[Store], weights: list[float], cfg: Rows, objective: Objective, seed: int):
    if len({store.manifest['tokenizer_sha256'] for store in stores}) > 1:
      other = next(s for s in stores if s.manifest['tokenizer_sha256'] != stores[0].manifest['tokenizer_sha256'])
      raise DataError(
        f'{stores[0].path} and {other.path} were made with different tokenizers; '
        f'prepare one again with --tokenizer={stores[0].path}/tokenizer.model.'
      )
    self._rows = [StoreRows(store, cfg, objective, seed + 7919 * i) for i, store in enumerate(stores)]
    self._counts, self._seed = plan.quotas(weights), seed
    self.stores, self.cfg = stores, cfg
    self.tokenizer: Tokenizer | None = self._rows[0].tokenizer
    self.vocabulary: Vocabulary = self._rows[0].tokenizer.vocabulary

  @functools.lru_cache(maxsize=64)  # noqa: B019 - lives as long as the run
  def _block(self, block: int) -> np.ndarray:
    return plan.block_choices(self._counts, self._seed, plan.SOURCE_ORDER, 0, block, 1)[0]

  def place(self, position: int) -> tuple[StoreRows, int]:
    """(the source, its own row index) of the run's row `position`."""
    if len(self._rows) == 1:
      return self._rows[0], position
    block, inside = divmod(position, int(self._counts.sum()))
    chosen = self._block(block)
    source = int(chosen[inside])
    return self._rows[source], block * int(self._counts[source]) + int((chosen[:inside] == source).sum())

  def rows(self, positions: range) -> Batch:
    """The rows at these places of the run, stacked. All their tokens are read at once."""
    places = [self.place(p) for p in positions]
    wanted: dict[int, list[tuple[int, int]]] = {}
    spans = []
    for source, index in places:
      pieces = source.pieces(index)
      own = wanted.setdefault(id(source), [])
      spans.append((len(own), len(own) + len(pieces)))
      own += pieces
    tokens = {id(s): s.store.read(wanted[id(s)]) for s in self._rows if id(s) in wanted}
    made = [s.row(i, tokens[id(s)][a:b]) for (s, i), (a, b) in zip(places, spans, strict=True)]
    batch = {name: np.stack([row[name] for row in made]) for name in made[0]}
    return batch | {'example_index': np.array([p & 0x7FFFFFFF for p in positions], np.int32)}

  def batch(self, step: int, rows: slice) -> Batch:
    """This host's `rows` of the global batch at `step`."""
    start = step * self.cfg.batch_size
    return self.rows(range(start + rows.start, start + rows.stop))

  def fingerprint(self) -> dict[str, Any]:
    return {'stores': [s.fingerprint[:16] for s in self.stores], 'tokenizer': self.tokenizer.fingerprint[:16]}

  def num_batches(self) -> int:
    """Batches of one epoch, the last one padded with rows that carry no loss."""
    return -(-self._rows[0].planner.plan(0).num_rows // self.cfg.batch_size)

  def epoch(self, rows: slice, limit: int) -> Iterator[Batch]:
    """The first `limit` batches of epoch 0."""
    num_rows = self._rows[0].planner.plan(0).num_rows
    for step in range(min(limit, self.num_batches())):
      batch = self.batch(step, rows)
      real = batch['example_index'] < num_rows
      yield batch | {'decoder_loss_weights': batch['decoder_loss_weights'] * real[:, None]}


class SyntheticBatches:
  """Uniform random ids in full rows of one segment."""

  tokenizer = None

  def __init__(self, cfg: Synthetic, objective: Objective, seed: int, vocab_size: int):
    self.cfg, self._seed = cfg, seed
    self._prefix = cfg.inputs_length == 0 and not isinstance(objective, CausalLm)
    self.vocabulary = Vocabulary(vocab_size - cfg.sentinels - 3, cfg.sentinels)

  def batch(self, step: int, rows: slice) -> Batch:
    start = step * self.cfg.batch_size
    made = [self._row(start + i) for i in range(rows.start, rows.stop)]
    batch = {name: np.stack([row[name] for row in made]) for name in made[0]}
    return batch | {'example_index': np.arange(start + rows.start, start + rows.stop, dtype=np.int32)}

  def _row(self, position: int) -> features.Row:
    rng = plan.generator(self._seed, plan.SYNTHETIC, position)
    sizes = (self.cfg.inputs_length, self.cfg.targets_length)
    inputs, targets = (3 + (rng.random(n) * (self.vocabulary.pieces - 3)).astype(np.int32) for n in sizes)
    if self.cfg.inputs_length:
      return features.encoder_decoder_row([(inputs, targets)], *sizes)
    if not self._prefix:
      return features.causal_row([(inputs, targets)], sizes[1])
    half = sizes[1] // 2
    return features.prefix_row([(targets[:half], targets[half:])], sizes[1])

  def fingerprint(self) -> dict[str, Any]:
    return {'synthetic': True}


@dataclasses.dataclass(frozen=True)
class DataSource:
  """The training batches of a run and its held-out sets."""

  batches: StoreBatches | SyntheticBatches
  heldout_sets: dict[str, StoreBatches]

  @property
  def vocabulary(self) -> Vocabulary:
    return self.batches.vocabulary

  @property
  def tokenizer(self) -> Tokenizer | None:
    return self.batches.tokenizer

  def fingerprint(self) -> dict[str, Any]:
    """What a resumed run must find unchanged."""
    return self.batches.fingerprint()

  def heldout(self, limit: int, rows: slice) -> dict[str, Iterator[Batch]]:
    """At most `limit` batches of each held-out set: the same ones at every evaluation."""
    return {name: batches.epoch(rows, limit) for name, batches in self.heldout_sets.items()}


def open_data(cfg: Data, objective: Objective, *, seed: int, vocab_size: int, cache_dir: pathlib.Path) -> DataSource:
  """Opens what `cfg` names. Raises DataError for a missing store or a vocabulary that does not fit the model."""
  match cfg:
    case Synthetic():
      return DataSource(SyntheticBatches(cfg, objective, seed, vocab_size), {})
    case Builtin():
      from data.builtin import builtin_stores

      train, heldout = builtin_stores(cache_dir, vocab_size, cfg.sentinels)
      sources, sets = (Source(path=str(train)),), {'heldout': heldout}
    case StoreData():
      sources, sets = cfg.sources, _heldout_names(cfg.heldout)
    case _:
      assert_never(cfg)
  if not sources:
    raise DataError("data.sources is empty; name a store, e.g. data.sources = [{'path': 'stores/train'}].")
  if bad := [s for s in sources if s.weight <= 0]:
    raise DataError(f'data.sources: {bad[0].path} has weight {bad[0].weight}; give a weight > 0, or remove it.')
  stores = [open_store(source.path) for source in sources]
  batches = StoreBatches(stores, [s.weight for s in sources], cfg, objective, seed)
  evaluated = {name: StoreBatches([open_store(path)], [1.0], cfg, objective, seed) for name, path in sets.items()}
  for each in (batches, *evaluated.values()):
    _check_vocabulary(each, batches, vocab_size)
  return DataSource(batches, evaluated)


def _heldout_names(heldout: tuple[Source, ...]) -> dict[str, str]:
  names = [pathlib.Path(source.path).name for source in heldout]
  if len(set(names)) < len(names):
    raise DataError(f'data.heldout: the sets are named by their folders, and {names} are not distinct; rename one.')
  return {name: source.path for name, source in zip(names, heldout, strict=True)}


def _check_vocabulary(batches: StoreBatches, train: StoreBatches, vocab_size: int) -> None:
  path, vocabulary = batches.stores[0].path, batches.vocabulary
  if vocabulary.size > vocab_size:
    raise DataError(
      f'{path} has {vocabulary.pieces} pieces, with {vocabulary.sentinels} sentinels and 3 mode tokens '
      f'{vocabulary.size} ids; model.vocab_size={vocab_size} is too small. Set model.vocab_size >= {vocabulary.size}.'
    )
  if batches.tokenizer.fingerprint != train.tokenizer.fingerprint:
    raise DataError(
      f'{path} and {train.stores[0].path} were made with different tokenizers; '
      f'prepare it again with --tokenizer={train.stores[0].path}/tokenizer.model.'
    )
