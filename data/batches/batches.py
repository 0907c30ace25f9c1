"""The rows of a run: the global batch of any step as a pure function of config, seed and position."""

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data.batches.rows import StoreRows
from data.batches.text_bytes import text_bytes
from data.examples.units import Losses
from data.mixing.mixture import Mixture
from data.objectives.features import Batch
from data.packing.plan import Pieces
from data.prepare.messages import ROLES as ROLE_NAMES
from data.stores.store import ROLES, Kind, Store
from data.stores.vocabulary import Tokenizer, Vocabulary

Rows = slice | Sequence[slice]  # of a global batch: a host's may lie apart, in ascending order


def ranges(rows: Rows) -> Sequence[slice]:
  """The slices that `rows` consists of."""
  return (rows,) if isinstance(rows, slice) else rows


@dataclasses.dataclass(frozen=True)
class RowDescription:
  """Where a row came from.

  `pieces` are (document, first token in the store, length): inputs and targets of pairs, turns of conversations, or
  parts of text. For each piece, `segments` has its segment (counted from 1), `asked` the number of its tokens that
  carry loss (None if the objective decides that), `roles` the role of its turn, and `tasks` its task (None if all have
  the row's). `losses` says how much of the store is cut or left out because rows are too short.
  """

  path: str
  epoch: int
  shard: int
  row: int
  task: str
  pieces: tuple[tuple[int, int, int], ...]
  kind: Kind
  segments: tuple[int, ...]
  asked: tuple[int, ...] | None = None
  roles: tuple[str, ...] | None = None
  losses: Losses | None = None
  tasks: tuple[str, ...] | None = None


class DataSource:
  """The rows of a run: position p of the run always has the same row, on any host and in any process. Picklable."""

  def __init__(
    self,
    cfg,
    vocabulary: Vocabulary,
    tokenizer: Tokenizer | None,
    sources: Mapping[str, StoreRows],
    mixture: Mixture,
    heldout: Mapping[str, StoreRows],
    renumbered: Callable[[str, int], StoreRows] | None = None,
  ):
    self._renumbered = renumbered  # (name, number) -> the rows of a source in the order that belongs to the number
    self.cfg, self.vocabulary, self.tokenizer, self.mixture = cfg, vocabulary, tokenizer, mixture
    self.names, self.sources, self._heldout = tuple(sources), tuple(sources.values()), heldout

  def fingerprint(self) -> dict:
    """Identifies the data that a resumed run must find again (JSON): the stores' contents and the tokenizer."""
    stores = [rows.store.fingerprint for rows in self.sources]
    return {'stores': stores, 'tokenizer': self.tokenizer.fingerprint if self.tokenizer else None}

  def at(self, position: Mapping[str, Any]) -> 'DataSource':
    """This data for a run at `position`, which records since when the run has used other sources or weights."""
    began, changed = position.get('mixture'), position.get('changed')
    if not began:
      return self
    there, shift = copy.copy(self), 0
    if changed:
      there.sources = tuple(self._numbered(i, changed['numbers'].get(name, i)) for i, name in enumerate(self.names))
      shift = changed['start'] - changed['step'] * self.cfg.batch_size
    used = _in_order(began['used'], self.names)
    there.mixture = self.mixture.restarted(began['start'], used, began.get('weights'), shift)
    return there

  def _numbered(self, place: int, number: int) -> StoreRows:
    same = number == place or self._renumbered is None
    return self.sources[place] if same else self._renumbered(self.names[place], number)

  def after_change(self, position: Mapping[str, Any], used: Mapping[str, int], step: int) -> dict[str, Any]:
    """The position of a run that continues with this data from `step` on and used other data before.

    `position` and `used` were saved with the step. Each source keeps its number, which determines the order of its
    rows, and its count of used rows, even if it is left out for a while.
    """
    before = position.get('changed', {})
    numbers = {name: i for i, name in enumerate(used)} | before.get('numbers', {})
    known = {**before.get('used', {}), **used}
    if len(used) == len(self.names) == 1 and self.names[0] not in known:  # the only source, under another name
      (new,), (old,) = self.names, used
      numbers, known = {new: numbers[old]}, {new: known[old]}
    free = (number for number in itertools.count() if number not in numbers.values())
    numbers = numbers | {name: next(free) for name in self.names if name not in numbers}
    start = position['examples']
    return {
      **position,
      'changed': {'start': start, 'step': step, 'numbers': numbers, 'used': known},
      'mixture': {'start': start, 'used': {name: known.get(name, 0) for name in self.names}},
    }

  def used(self, examples: int) -> dict[str, int]:
    """The number of rows of each source among the first `examples` rows of the run."""
    return dict(zip(self.names, self.mixture.used(examples).tolist(), strict=True))

  def global_rows(self, start: int, count: int) -> Batch:
    """Rows start … start + count - 1 of the run, as fields [count, length] and `example_index` [count].

    With several sources there is also a `source_index` [count].
    """
    source, own = self.mixture.at(start, count)
    parts = [(place, rows.batch(epoch, places)) for place, rows, epoch, places in self._locate(source, own)]
    batch = parts[0][1] if len(parts) == 1 else _merge(parts, count)
    batch['example_index'] = (np.arange(start, start + count) % 2**31).astype(np.int32)
    if len(self.sources) > 1:
      batch['source_index'] = source.astype(np.int32)
    return batch

  def batch(self, step: int, rows: Rows) -> Batch:
    """These rows of the global batch of a step, which begins at row `step * batch_size` of the run."""
    return self.batch_at(step * self.cfg.batch_size, rows)

  def batch_at(self, start: int, rows: Rows) -> Batch:
    """These rows of the global batch that begins at row `start` of the run."""
    parts = [self.global_rows(start + own.start, own.stop - own.start) for own in ranges(rows)]
    return parts[0] if len(parts) == 1 else {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

  def _locate(self, source: np.ndarray, own: np.ndarray) -> Iterator[tuple[np.ndarray, StoreRows, int, np.ndarray]]:
    """Yields (rows of the result, source, epoch, positions in the epoch) for each source and epoch of mixed rows."""
    for i, rows in enumerate(self.sources):
      mine = np.flatnonzero(source == i)
      for epoch, places in rows.epochs(own[mine]):
        yield mine[: len(places)], rows, epoch, places
        mine = mine[len(places) :]

  def progress(self, position: int) -> dict[str, dict[str, float]]:
    """For each source, at the row before `position`: its `weight`, its `share` of the rows of this stage so far, and
    the number of `epochs` seen."""
    mixture = self.mixture
    known = zip(mixture.used(position), mixture.shares(position), mixture.weights(position), strict=True)
    return {
      name: {'weight': float(weight), 'share': float(share), 'epochs': rows.epochs_in(int(n))}
      for name, rows, (n, share, weight) in zip(self.names, self.sources, known, strict=True)
    }

  def describe_row(self, position: int) -> RowDescription:
    """Where the row at `position` in the run came from."""
    ((_, source, epoch, places),) = self._locate(*self.mixture.at(position, 1))
    shards, rows, tasks = source.locate(epoch, places)
    pieces = source.pieces(epoch, shards, rows)
    segments, asked = source.parts(pieces)
    label, own = source.labels(int(tasks[0]), pieces)
    return RowDescription(
      source.store.path, epoch, int(shards[0]), int(rows[0]), label, listed(pieces),
      source.store.kind, tuple(segments.tolist()), None if asked is None else tuple(asked.tolist()),
      _roles(source.store, int(shards[0]), pieces.documents), source.losses, own,
    )  # fmt: skip

  def losses(self) -> list[str]:
    """A line for each source of which something is cut or left out because rows are too short."""
    return [f'{rows.store.path}: {rows.losses}' for rows in self.sources if rows.losses and rows.losses.any]

  def batch_rows(self, start: int) -> int:
    """The number of rows of the global batch that begins at this position."""
    return self.cfg.batch_size

  def row(self, start: int, row: int) -> tuple[RowDescription, Batch]:
    """(origin, fields as int32[length]) of row `row` of the batch that begins at this position."""
    fields = {name: values[0] for name, values in self.global_rows(start + row, 1).items()}
    return self.describe_row(start + row), fields

  def document_start(self, origin: RowDescription, document: int) -> int:
    """The first token, in its store, of a document of a described row."""
    store = next(rows.store for rows in self.sources if rows.store.path == origin.path)
    return int(store.offsets_of(origin.shard)[document - store.shards[origin.shard].documents.start])

  def heldout(self, num_batches: int, rows: Rows) -> dict[str, 'HeldoutSet']:
    """At most `num_batches` batches of each evaluation set, the same ones in every call."""
    size = self.cfg.batch_size
    return {name: HeldoutSet(own, size, num_batches, rows) for name, own in self._heldout.items()}

  def heldout_bytes(self, num_batches: int) -> dict[str, int]:
    """`text_bytes` of the rows of `heldout`, of each evaluation set that has them."""
    rows = num_batches * self.cfg.batch_size
    found = {name: text_bytes(own, rows, self.tokenizer) for name, own in self._heldout.items() if self.tokenizer}
    return {name: size for name, size in found.items() if size}

  def heldout_stores(self) -> dict[str, Store]:
    """The store of each evaluation set."""
    return {name: own.store for name, own in self._heldout.items()}

  def heldout_pairs(self, count: int) -> dict[str, list[tuple[list[int], list[int]]]]:
    """At most `count` pairs of each evaluation set (`pairs.sample_pairs`), the same ones in every call."""
    return {name: own.sample_pairs(count) for name, own in self._heldout.items()}


def listed(pieces: Pieces) -> tuple[tuple[int, int, int], ...]:
  """(document, first token in the store, length) of each piece."""
  return tuple(zip(pieces.documents.tolist(), pieces.places.tolist(), pieces.lengths.tolist(), strict=True))


def _roles(store, shard: int, documents: np.ndarray) -> tuple[str, ...] | None:
  """The role of the turn that each document of a shard is; None if the store has no conversations."""
  if store.kind != 'conversations':
    return None
  own = store.column(ROLES, shard)[documents - store.shards[shard].documents.start]
  return tuple(ROLE_NAMES[role] for role in own.tolist())


def _in_order(used: Mapping[str, int], names: Sequence[str]) -> list[int]:
  """The used rows of each source of `names`. A single source is matched even if its name has changed."""
  if len(used) == len(names) == 1:
    return list(used.values())
  return [used.get(name, 0) for name in names]


def _merge(parts: list[tuple[np.ndarray, Batch]], count: int) -> Batch:
  """One batch of `count` rows from (rows to fill, fields) of each part."""
  batch = {name: np.empty((count, *values.shape[1:]), values.dtype) for name, values in parts[0][1].items()}
  for place, part in parts:
    for name, values in part.items():
      batch[name][place] = values
  return batch


@dataclasses.dataclass(frozen=True)
class HeldoutSet:
  """A fixed set of batches to iterate over. The last batch is filled up with padding rows, whose loss weights are 0."""

  source: StoreRows
  batch_size: int
  num_batches: int
  rows: Rows

  def __len__(self) -> int:
    return min(self.num_batches, -(-self.source.num_rows(0) // self.batch_size))

  def __iter__(self) -> Iterator[Batch]:
    for i in range(len(self)):
      yield self._batch(i * self.batch_size + np.concatenate([np.arange(r.start, r.stop) for r in ranges(self.rows)]))

  def _batch(self, places: np.ndarray) -> Batch:
    present = places < self.source.num_rows(0)
    # A padding row needs the shapes of a real row: row 0 is made and set to zero.
    part = self.source.batch(0, np.where(present, places, 0))
    blanked = {name: values * present[:, None].astype(values.dtype) for name, values in part.items()}
    return blanked | {'example_index': places.astype(np.int32)}
