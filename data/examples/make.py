"""Makes rows: tokens and random bits -> fields, according to the tasks of an objective."""

import dataclasses
import functools

import numpy as np

from data.errors import DataError
from data.examples.asked import ByDocument, asked
from data.examples.tags import Tags
from data.objectives.corrupt import Corruption
from data.objectives.features import Batch, decoder_features, decoder_fields, encoder_decoder_features, encoder_features
from data.objectives.fitting import check_room
from data.objectives.lexicon import Lexicon
from data.objectives.masking import mask_tokens
from data.objectives.objectives import Objective, is_encoder_only, tasks_of
from data.objectives.tasks import LEFT_TO_RIGHT, Budget, Task
from data.packing.full_rows import prefix_bits
from data.packing.plan import Pieces, Stream
from data.ragged import Ragged
from data.stores.vocabulary import Tokenizer, Vocabulary


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowSpec:
  """The specification of rows, independent of their text. `tokenizer` is None for synthetic data."""

  objective: Objective
  budget: Budget
  vocabulary: Vocabulary
  tokenizer: Tokenizer | None
  attend_across_documents: bool
  tags: Tags | None = None

  @functools.cached_property
  def tasks(self) -> tuple[Task, ...]:
    """The tasks of rows. Fill-in-the-middle tasks include the extra tokens that cuts inside a token cost; masked ones
    the token before each text, where the tokenizer has one.

    Raises DataError if rows have no room for these.
    """
    tasks = tasks_of(self.objective)
    opened = self.vocabulary.ids.cls is not None and any(task.kind == 'masked' for task in tasks)
    if opened:
      tasks = tuple(dataclasses.replace(task, opened=True) for task in tasks)
    elif any(task.kind == 'fim' for task in tasks):
      tasks = tuple(dataclasses.replace(task, growth=self.lexicon.halves.growth) for task in tasks)
    else:
      return tasks
    try:
      check_room(tasks, self.budget)
    except ValueError as error:
      raise DataError(str(error)) from error
    return tasks

  @functools.cached_property
  def lexicon(self) -> Lexicon:
    return Lexicon(self.vocabulary, self.tokenizer)

  @property
  def ends(self) -> bool:
    """Whether text includes the EOS of its documents, because some task learns where documents end."""
    return any(task.kind in LEFT_TO_RIGHT for task in tasks_of(self.objective))


def text_of(store, spec: RowSpec, shard: int, variant: int = 0) -> Stream:
  """The stream of a shard from which rows are cut, the same for each variant of its plan.

  A left-to-right model learns where documents end, so its text includes their EOS. Denoising adds its own EOS after
  inputs and targets and leaves out the store's. With attend_across_documents the whole shard is one document, EOS
  included.
  """
  offsets, first = store.offsets_of(shard), store.shards[shard].documents.start
  if spec.attend_across_documents:
    return Stream(offsets[:1], offsets[-1:] - offsets[:1], first)
  drop = store.append_eos and not spec.ends
  return Stream(offsets[:-1], np.diff(offsets) - drop, first)


class RowMaker:
  """Tokens and random bits -> the fields of rows. `text` gives where each document's text begins, after its tags.

  `splits` are the seed and purpose of a plan that has drawn the splits of prefixes (data/packing/full_rows.py).
  """

  def __init__(self, spec: RowSpec, text: ByDocument | None = None, splits: tuple[int, str] | None = None):
    tasks, self._text = spec.tasks, text
    self._tasks, self._splits = tasks, splits
    self._budget, self._vocabulary, self._first = spec.budget, spec.vocabulary, spec.vocabulary.ids.first_input
    self._causal = all(task.kind == 'causal' for task in tasks)
    self._masked = is_encoder_only(spec.objective)
    self._inputs = not all(task.kind in LEFT_TO_RIGHT for task in tasks)
    self._loss_on_inputs = np.array([task.loss_on_inputs for task in tasks])
    if not self._masked:
      longest = max(spec.budget.capacity(task) for task in tasks)
      ends = spec.ends and not spec.attend_across_documents
      self._corruption = Corruption(tasks, longest, spec.vocabulary, spec.lexicon, ends=ends)

  def asked(self, pieces: Pieces) -> np.ndarray | None:
    return None if self._text is None else asked(pieces, self._text.of(pieces.documents)[0])

  def segments(self, pieces: Pieces) -> np.ndarray:
    return np.arange(len(pieces.rows)) + 1

  def make(self, tokens: Ragged, pieces: Pieces, tasks: np.ndarray, bits) -> Batch:
    """Fields of `len(tasks)` rows; `bits()` gives the random bits for `Corruption.apply`."""
    length, rows = self._budget.targets_length, pieces.rows
    own = tasks[rows] if pieces.tasks is None else pieces.tasks
    if self._causal:
      return decoder_fields(tokens, rows, (len(tasks), length), self.asked(pieces), first=self._first)
    if self._masked:
      sides = mask_tokens(tokens, self._tasks, own, bits(), self._vocabulary)
      return encoder_features(*sides, rows, len(tasks), length)
    drawn = bits() if self._splits is None else self._with_splits(bits(), pieces, *self._splits)
    inputs, targets = self._corruption.apply(tokens, own, drawn)
    if self._budget.inputs_length:
      lengths = self._budget.inputs_length, length
      return encoder_decoder_features(inputs, targets, rows, len(tasks), *lengths, self._first)
    inputs = inputs if self._inputs else None
    loss_on_inputs = self._loss_on_inputs[own]
    return decoder_features(inputs, targets, rows, len(tasks), length, loss_on_inputs, first=self._first)

  def _with_splits(self, bits: np.ndarray, pieces: Pieces, seed: int, purpose: str) -> np.ndarray:
    """`bits` with the planned number of each piece that is split in two."""
    own = np.array([task.kind == 'uniform_prefix' for task in self._tasks])[pieces.tasks]
    last = np.cumsum(pieces.lengths + 1) - 1
    bits[last[own]] = prefix_bits(seed, purpose, pieces.places[own], pieces.lengths[own])
    return bits
