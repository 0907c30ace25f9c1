"""What rows are made of: tokens and random bits -> fields, as the tasks of an objective say."""

import dataclasses

import numpy as np

from data.denoise import Recipes
from data.features import Batch, decoder_features, encoder_decoder_features, encoder_features
from data.masking import mask_tokens
from data.objectives import Objective, PrefixLm, tasks_of
from data.plan import Stream
from data.ragged import Ragged
from data.tasks import Budget
from data.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowSpec:
  """What rows look like, whatever their text."""

  objective: Objective
  budget: Budget
  vocabulary: Vocabulary
  attend_across_documents: bool


def text_of(store, spec: RowSpec, shard: int) -> Stream:
  """The stream of a shard that rows are cut from.

  A causal model learns where documents end, so it sees their EOS. Denoising puts EOS after inputs and targets on its
  own and leaves the store's out. With attend_across_documents all of the shard is one document, EOS included.
  """
  offsets, first = store.offsets_of(shard), store.shards[shard].documents.start
  if spec.attend_across_documents:
    return Stream(offsets[:1], offsets[-1:] - offsets[:1], first)
  drop = store.append_eos and tasks_of(spec.objective)[0].kind != 'causal'
  return Stream(offsets[:-1], np.diff(offsets) - drop, first)


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
