"""The rows of a run: the global batch of any step as a pure function of config, seed and position."""

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data.batches.rows import StoreRows
from data.examples.units import Losses
from data.mixing.mixture import Mixture
from data.objectives.features import Batch
from data.packing.plan import Pieces
from data.prepare.messages import ROLES as ROLE_NAMES
from data.stores.store import ROLES, Kind, Store
from data.stores.vocabulary import Tokenizer, Vocabulary


@dataclasses.dataclass(frozen=True)
class RowDescription:
  """Where a row came from.

  `pieces` are (document, first token in the store, length): inputs and targets of pairs, turns of conversations.
  `segments` (counted from 1) says which each is in; `asked` how many of its tokens carry loss, where its document says;
  `roles` whose turn it is. `losses` is what the store loses to the length of rows.
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


class DataSource:
  """The rows of a run: position p in the run always holds the same row, whoever asks. Picklable."""

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
    self._renumbered = renumbered  # the rows of a source in the order that the source of another number has
    self.cfg, self.vocabulary, self.tokenizer, self.mixture = cfg, vocabulary, tokenizer, mixture
    self.names, self.sources, self._heldout = tuple(sources), tuple(sources.values()), heldout

  def fingerprint(self) -> dict:
    """What a resumed run must find again (JSON): the stores' contents and the tokenizer."""
    stores = [rows.store.fingerprint for rows in self.sources]
    return {'stores': stores, 'tokenizer': self.tokenizer.fingerprint if self.tokenizer else None}

  def at(self, position: Mapping[str, Any]) -> 'DataSource':
    """This data as a run at `position` has it: one that went on with other sources or weights knows from where."""
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
    """The position of a run that goes on with this data from `step` on, where it had other data until then.

    `position` and `used` are those that were saved with the step. Each source keeps its number, by which its rows are
    ordered, and the rows that were used of it; so does one that is left out for a while.
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
    """How many rows of each source the first `examples` of the run were."""
    return dict(zip(self.names, self.mixture.used(examples).tolist(), strict=True))

  def global_rows(self, start: int, count: int) -> Batch:
    """Rows start … start + count - 1 of the run, as fields [count, length] and `example_index` [count].

    Of several sources there is a `source_index` [count] too.
    """
    source, own = self.mixture.at(start, count)
    parts = [(place, rows.batch(epoch, places)) for place, rows, epoch, places in self._locate(source, own)]
    batch = parts[0][1] if len(parts) == 1 else _merge(parts, count)
    batch['example_index'] = (np.arange(start, start + count) % 2**31).astype(np.int32)
    if len(self.sources) > 1:
      batch['source_index'] = source.astype(np.int32)
    return batch

  def batch(self, step: int, rows: slice) -> Batch:
    """These rows of the global batch of a step that begins at `step * batch_size`."""
    return self.global_rows(step * self.cfg.batch_size + rows.start, rows.stop - rows.start)

  def _locate(self, source: np.ndarray, own: np.ndarray) -> Iterator[tuple[np.ndarray, StoreRows, int, np.ndarray]]:
    """(rows of the answer, source, epoch, places in it) for each source and epoch of what a mixture gave."""
    for i, rows in enumerate(self.sources):
      mine = np.flatnonzero(source == i)
      for epoch, places in rows.epochs(own[mine]):
        yield mine[: len(places)], rows, epoch, places
        mine = mine[len(places) :]

  def progress(self, position: int) -> dict[str, dict[str, float]]:
    """For each source, of the row before `position`: its `weight`, its `share` of the rows of this stage until there,
    and how many `epochs` were seen."""
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
    return RowDescription(
      source.store.path, epoch, int(shards[0]), int(rows[0]), source.task_label(int(tasks[0])), listed(pieces),
      source.store.kind, tuple(segments.tolist()), None if asked is None else tuple(asked.tolist()),
      _roles(source.store, int(shards[0]), pieces.documents), source.losses,
    )  # fmt: skip

  def losses(self) -> list[str]:
    """A line for each source of which no row has room for something."""
    return [f'{rows.store.path}: {rows.losses}' for rows in self.sources if rows.losses and rows.losses.any]

  def batch_rows(self, start: int) -> int:
    """How many rows the global batch has that begins at this position."""
    return self.cfg.batch_size

  def row(self, start: int, row: int) -> tuple[RowDescription, Batch]:
    """(where row `row` of the batch that begins at this position came from, its fields, int32[length])."""
    fields = {name: values[0] for name, values in self.global_rows(start + row, 1).items()}
    return self.describe_row(start + row), fields

  def document_start(self, origin: RowDescription, document: int) -> int:
    """The first token, in its store, of a document of a described row."""
    store = next(rows.store for rows in self.sources if rows.store.path == origin.path)
    return int(store.offsets_of(origin.shard)[document - store.shards[origin.shard].documents.start])

  def heldout(self, num_batches: int, rows: slice) -> dict[str, 'HeldoutSet']:
    """At most `num_batches` batches of each evaluation set: the same ones whenever asked."""
    size = self.cfg.batch_size
    return {name: HeldoutSet(own, size, num_batches, rows) for name, own in self._heldout.items()}

  def heldout_stores(self) -> dict[str, Store]:
    """The store of each evaluation set."""
    return {name: own.store for name, own in self._heldout.items()}

  def heldout_pairs(self, count: int) -> dict[str, list[tuple[list[int], list[int]]]]:
    """At most `count` pairs of each evaluation set (`pairs.sample_pairs`): the same ones whenever asked."""
    return {name: own.sample_pairs(count) for name, own in self._heldout.items()}


def listed(pieces: Pieces) -> tuple[tuple[int, int, int], ...]:
  """(document, first token in the store, length) of each."""
  return tuple(zip(pieces.documents.tolist(), pieces.places.tolist(), pieces.lengths.tolist(), strict=True))


def _roles(store, shard: int, documents: np.ndarray) -> tuple[str, ...] | None:
  """Whose turn each document of a shard is; None where they are none."""
  if store.kind != 'conversations':
    return None
  own = store.column(ROLES, shard)[documents - store.shards[shard].documents.start]
  return tuple(ROLE_NAMES[role] for role in own.tolist())


def _in_order(used: Mapping[str, int], names: Sequence[str]) -> list[int]:
  """Rows used of each source now, by its name; one that had another name, if it is the only one."""
  if len(used) == len(names) == 1:
    return list(used.values())
  return [used.get(name, 0) for name in names]


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
