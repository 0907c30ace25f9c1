"""The rows of one store, epoch after epoch: plan, tokens, random bits and objective put together."""

import collections
import dataclasses
import threading

import numpy as np

from data.bits import philox
from data.denoise import Recipes
from data.features import Batch, decoder_features, encoder_decoder_features, encoder_features
from data.masking import mask_tokens
from data.objectives import Objective, PrefixLm, Supervised, pair_lengths, tasks_of
from data.pairs import PairCounts, PairMaker, PairPlanner, PairStream, sample_pairs
from data.plan import Pieces, Plan, Planner, Stream
from data.ragged import Ragged, join, spread, starts
from data.tasks import Budget
from data.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowSpec:
  """What rows look like, whatever their text."""

  objective: Objective
  budget: Budget
  vocabulary: Vocabulary
  attend_across_documents: bool


def text_of(store, spec: RowSpec) -> Stream:
  """The stream that rows are cut from.

  A causal model learns where documents end, so it sees their EOS. Denoising puts EOS after inputs and targets on its
  own and leaves the store's out. With attend_across_documents all of the store is one document, EOS included.
  """
  begins, ends = store.offsets[:-1], store.offsets[1:]
  if spec.attend_across_documents:
    return Stream(np.zeros(1, np.int64), np.array([store.num_tokens]))
  drop = store.append_eos and tasks_of(spec.objective)[0].kind != 'causal'
  return Stream(begins, ends - begins - drop)


class RowMaker:
  """Tokens and random bits -> the fields of rows."""

  def __init__(self, spec: RowSpec):
    tasks, budget = tasks_of(spec.objective), spec.budget
    self._budget = budget
    self._vocabulary = spec.vocabulary
    self._causal = tasks[0].kind == 'causal'
    self._masked = tasks[0] if tasks[0].kind == 'masked' else None
    self._recipes = Recipes(tasks, max(budget.capacity(task) for task in tasks), spec.vocabulary)
    self._loss_on_inputs = isinstance(spec.objective, PrefixLm) and spec.objective.loss_on_prefix

  def make(self, tokens: Ragged, rows: np.ndarray, tasks: np.ndarray, bits) -> Batch:
    """Fields of `len(tasks)` rows: piece i is in row `rows[i]`; `bits()` gives what `Recipes.apply` wants."""
    length = self._budget.targets_length
    if self._causal:
      return decoder_features(None, tokens, rows, len(tasks), length)
    if self._masked is not None:
      return encoder_features(*mask_tokens(tokens, bits(), self._masked, self._vocabulary), rows, len(tasks), length)
    inputs, targets = self._recipes.apply(tokens, tasks[rows], bits())
    if self._budget.inputs_length:
      return encoder_decoder_features(inputs, targets, rows, len(tasks), self._budget.inputs_length, length)
    return decoder_features(inputs, targets, rows, len(tasks), length, self._loss_on_inputs)


class StoreRows:
  """Row k of an endless sequence over one store: epoch 0 in its order, then epoch 1, … Picklable.

  Threads may share one; a plan is made once, and those who want another meanwhile wait.
  """

  def __init__(self, store, spec: RowSpec, *, seed: int, purpose: str):
    self.store, self._seed, self._purpose = store, seed, purpose
    self._tasks = tasks_of(spec.objective)
    self._pairs: PairStream | None = None
    if isinstance(spec.objective, Supervised):
      self._pairs = PairStream(store, pair_lengths(spec.objective, spec.budget))
      self._maker, self._planner = PairMaker(spec.budget), PairPlanner(self._pairs, spec.budget, seed, purpose)
    else:
      self._maker = RowMaker(spec)
      self._planner = Planner(
        text_of(store, spec), self._tasks, spec.budget, seed=seed, purpose=purpose,
        attend_across_documents=spec.attend_across_documents,
      )  # fmt: skip
    self._firsts = [0]  # the row in the sequence with which each epoch begins
    self._recent: collections.OrderedDict[int, Plan] = collections.OrderedDict()
    self._lock = threading.RLock()

  def __getstate__(self):
    return {k: v for k, v in self.__dict__.items() if k != '_lock'}

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._lock = threading.RLock()

  def plan(self, epoch: int) -> Plan:
    """The plan of an epoch; the last two are kept."""
    with self._lock:
      if epoch not in self._recent:
        self._recent[epoch] = self._planner.plan(epoch)
        while len(self._recent) > 2:
          self._recent.popitem(last=False)
      return self._recent[epoch]

  def row_count(self, epoch: int) -> int:
    with self._lock:
      return int(np.diff(self._first_rows(epoch))[epoch])

  def _first_rows(self, epoch: int) -> list[int]:
    """Where epochs 0 … epoch + 1 begin. Counting rows takes planning each epoch once, in order; under the lock."""
    while len(self._firsts) < epoch + 2:
      self._firsts.append(self._firsts[-1] + self.plan(len(self._firsts) - 1).num_rows)
    return self._firsts

  def epochs(self, rows: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """(epoch, rows of its plan) for ascending rows of the sequence, in the order of training."""
    with self._lock:
      while self._firsts[-1] <= rows[-1]:
        self._first_rows(len(self._firsts) - 1)
      epochs = np.searchsorted(self._firsts, rows, side='right') - 1
      groups = []
      for epoch in np.unique(epochs).tolist():
        groups.append((epoch, self.plan(epoch).order[rows[epochs == epoch] - self._firsts[epoch]]))
      return groups

  def pieces(self, epoch: int, rows: np.ndarray) -> tuple[Pieces, np.ndarray]:
    """(pieces of rows of the plan of an epoch, each row's task)."""
    plan = self.plan(epoch)
    return self._planner.stream.pieces(plan.cuts[rows], plan.cuts[rows + 1]), plan.tasks[rows]

  @property
  def pair_counts(self) -> PairCounts | None:
    """None where the store holds text."""
    return self._pairs and self._pairs.counts

  def sample_pairs(self, count: int) -> list[tuple[list[int], list[int]]]:
    """See `pairs.sample_pairs`; none where the store holds text."""
    return sample_pairs(self.store, self._pairs.counts.longest, count) if self._pairs else []

  def task_label(self, task: int) -> str:
    return self._tasks[task].label

  def batch(self, epoch: int, rows: np.ndarray) -> Batch:
    """The fields of rows of an epoch's plan, in the given order."""
    pieces, tasks = self.pieces(epoch, rows)
    return self._maker.make(self._tokens(pieces), pieces.stretches, tasks, lambda: self._bits(epoch, rows, pieces))

  def _tokens(self, pieces: Pieces) -> Ragged:
    """The text of pieces, one read for each row: its pieces lie close together."""
    begin = np.flatnonzero(np.diff(pieces.stretches, prepend=-1))
    end = np.append(begin[1:], len(pieces.stretches)) - 1
    first, last = pieces.places[begin], pieces.places[end] + pieces.lengths[end]
    read = join(self.store.read(list(zip(first.tolist(), (last - first).tolist(), strict=True))))
    if len(read.values) == pieces.lengths.sum():  # no EOS between documents is left out
      return Ragged(read.values, pieces.lengths)
    offset = np.repeat(starts(read.lengths) - first, np.diff(begin, append=len(pieces.stretches)))
    return Ragged(read.values[spread(pieces.places + offset, pieces.lengths)], pieces.lengths)

  def _bits(self, epoch: int, rows: np.ndarray, pieces: Pieces) -> np.ndarray:
    """For each row its own stream: a number for each token and each piece."""
    counts = np.bincount(pieces.stretches, pieces.lengths + 1, len(rows)).astype(np.int64).tolist()
    purpose = self._purpose + ' noise'
    draw = lambda row, count: philox(self._seed, purpose, epoch, row).random_raw(count)
    return np.concatenate([draw(row, count) for row, count in zip(rows.tolist(), counts, strict=True)])
