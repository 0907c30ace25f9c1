"""Where batches come from: the data section of a config, and the global batch of any step as a pure function."""

import dataclasses
import os
import pathlib
from collections.abc import Iterator
from typing import Annotated, Literal, assert_never

import numpy as np

from data.builtin import builtin_store
from data.errors import DataError
from data.features import Batch
from data.make import RowSpec
from data.objectives import Objective, Supervised, check_objective
from data.order import Deal
from data.packing import ConcatSplit, Packing, check_packing
from data.pairs import PairCounts
from data.rows import StoreRows
from data.store import Store, open_store
from data.synthetic import SyntheticStore
from data.tasks import Budget, block_of
from data.vocabulary import MODES, Tokenizer, Vocabulary


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
  """A token store and its relative share of the rows."""

  path: str
  weight: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Common:
  """`batch_size` counts the rows of all hosts. `inputs_length` is 0 for a model of one stack, decoder or encoder, whose
  rows then have `targets_length` tokens in all. `workers` processes make batches, 0 a thread; `prefetch` batches wait
  (for each)."""

  batch_size: Annotated[int, '>= 1']
  inputs_length: Annotated[int, '>= 0'] = 0
  targets_length: Annotated[int, '>= 1']
  sentinels: Annotated[int, '>= 0'] = 100
  attend_across_documents: bool = False
  packing: Packing = ConcatSplit()
  workers: Annotated[int, '>= 0'] = 0
  prefetch: Annotated[int, '>= 0'] = 2

  @property
  def budget(self) -> Budget:
    return Budget(self.inputs_length, self.targets_length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Builtin(_Common):
  """Documentation strings of this Python installation, made into a store on first use; see data/builtin.py."""

  name: Literal['builtin'] = 'builtin'


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreData(_Common):
  """Token stores made by `pretrain data prepare`. Each store of `heldout` is an evaluation set of its own."""

  name: Literal['store'] = 'store'
  sources: tuple[Source, ...]
  heldout: tuple[Source, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Synthetic(_Common):
  """Random tokens, no disk."""

  name: Literal['synthetic'] = 'synthetic'


Data = Builtin | StoreData | Synthetic


@dataclasses.dataclass(frozen=True)
class RowDescription:
  """Where a row came from. `pieces` are (document, first token in the store, length); inputs and targets of pairs."""

  path: str
  epoch: int
  shard: int
  row: int
  task: str
  pieces: tuple[tuple[int, int, int], ...]
  pairs: PairCounts | None = None


def open_data(
  cfg: Data, objective: Objective, *, seed: int, vocab_size: int, cache_dir: str | os.PathLike[str]
) -> 'DataSource':
  """The batches of a config. `vocab_size` is the model's; the built-in corpus is made in `cache_dir` when missing.

  Raises DataError for stores that are missing, damaged or of different tokenizers, and for a model whose vocabulary is
  too small; ValueError where the objective does not fit (`check_objective`).
  """
  check_objective(objective, cfg.inputs_length, cfg.targets_length, cfg.sentinels)
  check_packing(cfg.packing, objective, cfg.attend_across_documents)
  match cfg:
    case Synthetic():
      vocabulary = Vocabulary(vocab_size - cfg.sentinels - len(MODES), cfg.sentinels)
      if vocabulary.pieces < 4:
        raise DataError(f'model.vocab_size={vocab_size} leaves no pieces beside data.sentinels={cfg.sentinels}.')
      return _source(cfg, objective, seed, vocabulary, None, [SyntheticStore(vocabulary.pieces, seed)], [1.0], {})
    case Builtin():
      train, heldout = builtin_store(cache_dir, vocab_size, cfg.sentinels)
      return _open_stores(cfg, objective, seed, vocab_size, [Source(path=str(train))], {'builtin': str(heldout)})
    case StoreData():
      heldout = _names(cfg.heldout)
      return _open_stores(cfg, objective, seed, vocab_size, cfg.sources, heldout)
    case _:
      assert_never(cfg)


def _names(heldout: tuple[Source, ...]) -> dict[str, str]:
  """The name of each evaluation set: the last part of its path, numbered where two would be the same."""
  names: dict[str, str] = {}
  for source in heldout:
    stem = pathlib.PurePath(source.path.rstrip('/')).name
    names[stem if stem not in names else f'{stem}_{len(names)}'] = source.path
  return names


def _open_stores(cfg, objective, seed, vocab_size, sources, heldout: dict[str, str]) -> 'DataSource':
  if not sources:
    raise DataError("data.sources is empty; name at least one, e.g. data.sources = [{'path': 'my_store'}].")
  stores = [open_store(source.path) for source in sources]
  others = {name: open_store(path) for name, path in heldout.items()}
  _check_same_tokenizer([*stores, *others.values()])
  tokenizer = stores[0].tokenizer(cfg.sentinels)
  vocabulary = tokenizer.vocabulary
  if vocab_size < vocabulary.size:
    raise DataError(
      f'model.vocab_size={vocab_size} but {stores[0].path} needs {vocabulary.size} ids ({vocabulary.pieces} pieces + '
      f'data.sentinels={cfg.sentinels} + {len(MODES)} modes); set model.vocab_size >= {vocabulary.size}.'
    )
  weights = [source.weight for source in sources]
  return _source(cfg, objective, seed, vocabulary, tokenizer, stores, weights, others)


def _check_same_tokenizer(stores: list[Store]) -> None:
  first = stores[0]
  for other in stores[1:]:
    a, b = (s.manifest['tokenizer_sha256'] for s in (first, other))
    if a != b:
      raise DataError(
        f'{first.path} and {other.path} have different tokenizers (sha256 {a[:8]}.. and {b[:8]}..); prepare one with '
        f'--tokenizer={first.path}/tokenizer.model.'
      )


def _check_pairs(store, objective: Objective) -> None:
  """Raises DataError for text where `objective` learns from pairs, and the other way round."""
  wanted = isinstance(objective, Supervised)
  if wanted and not store.pairs:
    raise DataError(
      f"{store.path} holds text, objective.name='supervised' learns from pairs; make a store of them with: "
      'pretrain data prepare --inputs_field=inputs --targets_field=targets …'
    )
  if store.pairs and not wanted:
    raise DataError(
      f"{store.path} holds pairs, objective.name='{objective.name}' learns from text; set objective.name='supervised', "
      'or name a store of text.'
    )


def _source(cfg, objective, seed, vocabulary, tokenizer, stores, weights, heldout) -> 'DataSource':
  for store in [*stores, *heldout.values()]:
    _check_pairs(store, objective)
  spec = RowSpec(
    objective=objective, budget=cfg.budget, vocabulary=vocabulary, attend_across_documents=cfg.attend_across_documents
  )
  rows = [StoreRows(store, spec, cfg.packing, seed=seed, purpose=f'source {i}') for i, store in enumerate(stores)]
  # Evaluation sets have a seed and a packing of their own: runs that differ in theirs are judged on the same rows.
  sets = {name: StoreRows(store, spec, ConcatSplit(), seed=0, purpose='heldout') for name, store in heldout.items()}
  return DataSource(cfg, seed, vocabulary, tokenizer, rows, weights, sets)


class DataSource:
  """The rows of a run: position p in the run always holds the same row, whoever asks. Picklable."""

  def __init__(
    self,
    cfg: Data,
    seed: int,
    vocabulary: Vocabulary,
    tokenizer: Tokenizer | None,
    rows: list[StoreRows],
    weights: list[float],
    heldout: dict[str, StoreRows],
  ):
    self.cfg, self.vocabulary, self.tokenizer = cfg, vocabulary, tokenizer
    self._seed, self._rows, self._heldout = seed, rows, heldout
    try:
      self._deal = Deal(block_of(weights, 'data.sources weights'), seed, 'mixture')
    except ValueError as error:
      raise DataError(str(error)) from error

  @property
  def sources(self) -> list[StoreRows]:
    return self._rows

  def fingerprint(self) -> dict:
    """What a resumed run must find again (JSON): the stores' contents and the tokenizer."""
    stores = [rows.store.fingerprint for rows in self._rows]
    return {'stores': stores, 'tokenizer': self.tokenizer.fingerprint if self.tokenizer else None}

  def global_rows(self, start: int, count: int) -> Batch:
    """Rows start … start + count - 1 of the run, as fields [count, length] and `example_index` [count]."""
    parts = [(place, rows.batch(epoch, own)) for place, rows, epoch, own in self._locate(start, count)]
    batch = parts[0][1] if len(parts) == 1 else _merge(parts, count)
    return batch | {'example_index': np.arange(start, start + count).astype(np.int32)}

  def batch(self, step: int, rows: slice) -> Batch:
    """These rows of the global batch of a step that begins at `step * batch_size`."""
    return self.global_rows(step * self.cfg.batch_size + rows.start, rows.stop - rows.start)

  def _locate(self, start: int, count: int) -> Iterator[tuple[np.ndarray, StoreRows, int, np.ndarray]]:
    """(rows of the answer, source, epoch, places in it) for each source and epoch that occurs."""
    source, own = self._deal.at(np.arange(start, start + count))
    for i, rows in enumerate(self._rows):
      mine = np.flatnonzero(source == i)
      mine = mine[np.argsort(own[mine], kind='stable')]
      for epoch, places in rows.epochs(own[mine]):
        yield mine[: len(places)], rows, epoch, places
        mine = mine[len(places) :]

  def describe_row(self, position: int) -> RowDescription:
    """Where the row at `position` in the run came from."""
    ((_, source, epoch, places),) = self._locate(position, 1)
    shards, rows, tasks = source.locate(epoch, places)
    pieces = source.pieces(epoch, shards, rows)
    listed = zip(pieces.documents.tolist(), pieces.places.tolist(), pieces.lengths.tolist(), strict=True)
    return RowDescription(
      source.store.path, epoch, int(shards[0]), int(rows[0]), source.task_label(int(tasks[0])), tuple(listed),
      source.pair_counts,
    )  # fmt: skip

  def document_start(self, origin: RowDescription, document: int) -> int:
    """The first token, in its store, of a document of a described row."""
    store = next(rows.store for rows in self._rows if rows.store.path == origin.path)
    return int(store.offsets_of(origin.shard)[document - store.shards[origin.shard].documents.start])

  def heldout(self, num_batches: int, rows: slice) -> dict[str, 'HeldoutSet']:
    """At most `num_batches` batches of each evaluation set: the same ones whenever asked."""
    size = self.cfg.batch_size
    return {name: HeldoutSet(own, size, num_batches, rows) for name, own in self._heldout.items()}

  def heldout_pairs(self, count: int) -> dict[str, list[tuple[list[int], list[int]]]]:
    """At most `count` pairs of each evaluation set (`pairs.sample_pairs`): the same ones whenever asked."""
    return {name: own.sample_pairs(count) for name, own in self._heldout.items()}


def _merge(parts: list[tuple[np.ndarray, Batch]], count: int) -> Batch:
  """One batch of `count` rows from parts and the rows that each fills."""
  batch = {name: np.empty((count, *values.shape[1:]), values.dtype) for name, values in parts[0][1].items()}
  for place, part in parts:
    for name, values in part.items():
      batch[name][place] = values
  return batch


@dataclasses.dataclass(frozen=True)
class HeldoutSet:
  """A fixed set of batches to iterate over; rows beyond the last are padding, whose loss weights are 0."""

  source: StoreRows
  batch_size: int
  num_batches: int
  rows: slice

  def __len__(self) -> int:
    return min(self.num_batches, -(-self.source.num_rows(0) // self.batch_size))

  def __iter__(self) -> Iterator[Batch]:
    for i in range(len(self)):
      yield self._batch(i * self.batch_size + self.rows.start, self.rows.stop - self.rows.start)

  def _batch(self, start: int, count: int) -> Batch:
    present = np.arange(start, start + count) < self.source.num_rows(0)
    # Padding needs the shapes of a real row: the first is made and blanked.
    part = self.source.batch(0, np.where(present, np.arange(start, start + count), 0))
    blanked = {name: values * present[:, None].astype(values.dtype) for name, values in part.items()}
    return blanked | {'example_index': np.arange(start, start + count).astype(np.int32)}
