"""Batches of rows of several lengths, one length per step (packing/buckets.py); replaces `batches.DataSource`."""

import collections
import threading
from collections.abc import Mapping

import numpy as np

from data.batches.batches import DataSource, RowDescription, listed
from data.batches.rows import GAP, StoreRows
from data.examples.make import RowSpec, text_of
from data.mixing.mixture import Mixture, Stage
from data.objectives.features import Batch, decoder_features
from data.packing.buckets import BucketOrder, Place, decompose, joined_plans, windows_of
from data.packing.plan import Bins, Pieces, cut_out, runs_of
from data.ragged import join
from data.stores.vocabulary import Tokenizer, Vocabulary


class BucketRows:
  """The rows of one store by length. Picklable; threads may share one. Plans of two windows of shards are cached."""

  def __init__(self, store, spec: RowSpec, cfg, *, seed: int):
    self.store, self._spec = store, spec
    self.lengths, self._first = cfg.packing.lengths(cfg.targets_length), spec.vocabulary.ids.first_input
    self._windows = windows_of(len(store.shards))
    self._plans: collections.OrderedDict[int, list[Bins]] = collections.OrderedDict()
    self._lock = threading.RLock()
    counts = np.array([[len(plan.tasks) for plan in self.plans(w)] for w in range(len(self._windows))])
    self.per_step = np.array([cfg.batch_size * cfg.targets_length // length for length in self.lengths])
    self.order = BucketOrder(counts, cfg.packing, self.per_step, seed=seed, purpose='buckets')

  def __getstate__(self):
    return {k: v for k, v in self.__dict__.items() if k != '_lock'}

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._lock = threading.RLock()

  def plans(self, window: int) -> list[Bins]:
    """The rows of each length in a window of shards."""
    with self._lock:
      if window not in self._plans:
        shards = [decompose(text_of(self.store, self._spec, shard), self.lengths) for shard in self._windows[window]]
        self._plans[window] = [joined_plans(list(plans)) for plans in zip(*shards, strict=True)]
        while len(self._plans) > 2:
          self._plans.popitem(last=False)
      return self._plans[window]

  def planned(self, shard: int, epoch: int) -> tuple[int, Pieces]:
    """(number of rows of all lengths, their pieces) of a shard; the same in every epoch."""
    whole = joined_plans(decompose(text_of(self.store, self._spec, shard), self.lengths))
    return len(whole.tasks), whole.pieces(np.arange(len(whole.tasks)))

  @property
  def variants(self) -> int:
    return 1

  @property
  def losses(self) -> None:
    """None: rows of text cut nothing off."""

  def keep_plan(self, shard: int, variant: int) -> None:
    """Does nothing: making such a plan takes less time than reading it from a file."""

  def pieces(self, place: Place, rows: np.ndarray) -> Pieces:
    """The pieces of rows of one length; a row of -1 is padding and has none."""
    present = np.flatnonzero(rows >= 0)
    found = self.plans(place.window)[place.bucket].pieces(rows[present])
    return Pieces(present[found.rows], *found[1:])

  def batch(self, place: Place, first: int, count: int) -> Batch:
    """Fields int32[count, length] of rows `first` … of a step. Once its length has no rows left, rows are padding."""
    pieces = self.pieces(place, self.order.rows(place, first, count))
    ranges, places = runs_of(pieces, GAP)
    tokens = cut_out(join(self.store.read(ranges)).values, places, pieces.lengths)
    return decoder_features(None, tokens, pieces.rows, count, self.lengths[place.bucket], first=self._first)


class BucketedSource(DataSource):
  """Positions count rows of the full length. A step of rows of 1/n of that length has n times as many rows."""

  def __init__(
    self,
    cfg,
    vocabulary: Vocabulary,
    tokenizer: Tokenizer | None,
    name: str,
    rows: BucketRows,
    heldout: Mapping[str, StoreRows],
  ):
    super().__init__(cfg, vocabulary, tokenizer, {name: rows}, Mixture([Stage(0, (1.0,))], 0), heldout)
    self._rows = rows

  def global_rows(self, start: int, count: int) -> Batch:
    """The rows that replace the full rows start … start + count - 1, all of one step: fields [>= count, length]."""
    step, first = divmod(start, self.cfg.batch_size)
    place = self._rows.order.place(step)
    factor = self.cfg.targets_length // self._rows.lengths[place.bucket]
    batch = self._rows.batch(place, first * factor, count * factor)
    numbers = start * factor + np.arange(count * factor)
    return batch | {'example_index': (numbers % 2**31).astype(np.int32)}

  def batch_rows(self, start: int) -> int:
    return int(self._rows.per_step[self._rows.order.place(start // self.cfg.batch_size).bucket])

  def row(self, start: int, row: int) -> tuple[RowDescription, Batch]:
    place = self._rows.order.place(start // self.cfg.batch_size)
    number = self._rows.order.rows(place, row, 1)
    pieces = self._rows.pieces(place, number)
    found, store = listed(pieces), self._rows.store
    segments = tuple(range(1, len(found) + 1))
    label = f'causal, {self._rows.lengths[place.bucket]} tokens'
    origin = RowDescription(
      store.path, place.epoch, self._shard(found), int(number[0]), label, found, store.kind, segments
    )
    whole = self.global_rows(start, self.cfg.batch_size)
    return origin, {name: values[row] for name, values in whole.items()}

  def _shard(self, pieces) -> int:
    """The shard of the first piece; 0 for a row of padding."""
    firsts = [shard.documents.start for shard in self._rows.store.shards]
    return int(np.searchsorted(firsts, pieces[0][0], side='right')) - 1 if pieces else 0

  def progress(self, position: int) -> dict[str, dict[str, float]]:
    steps = position / self.cfg.batch_size
    return {self.names[0]: {'share': 1.0, 'epochs': steps / self._rows.order.steps_per_epoch}}
