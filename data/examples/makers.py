"""Chooses the planner and the maker of a store's rows, by objective and packing, for StoreRows (batches/rows.py)."""

import functools
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from data.examples.asked import ByDocument
from data.examples.conversations import TurnMaker, TurnStream
from data.examples.make import RowMaker, RowSpec, text_of
from data.examples.pairs import PairMaker, PairStream
from data.examples.tags import TaggedText, TagPlanner
from data.examples.units import UnitPlanner, UnitStream
from data.objectives.features import Batch
from data.objectives.objectives import Instruction, Supervised, pair_lengths
from data.packing.full_rows import FullRows
from data.packing.kept_plans import LARGE, KeptPlans, PlanFiles
from data.packing.packing import BestFit, Packing, make_planner
from data.packing.plan import Pieces, Planner
from data.ragged import Ragged


@runtime_checkable
class Maker(Protocol):
  """Makes the fields of `len(tasks)` rows from pieces and their tokens; `bits()` gives random bits."""

  def make(self, tokens: Ragged, pieces: Pieces, tasks: np.ndarray, bits) -> Batch: ...

  def asked(self, pieces: Pieces) -> np.ndarray | None:
    """bool[tokens]: which tokens carry loss; None if the objective decides that."""
    ...

  def segments(self, pieces: Pieces) -> np.ndarray:
    """int64[pieces]: which segment each piece of a row is in, counted from 1."""
    ...


class Makers(NamedTuple):
  """`units` are the pairs or conversations of a store, None if it has text."""

  planner: Planner
  maker: Maker
  units: UnitStream | None


def makers_of(store, spec: RowSpec, packing: Packing, *, seed: int, purpose: str, plans: PlanFiles | None) -> Makers:
  """The makers of a store. Raises DataError if rows are too short for the text, or for every conversation."""
  first = spec.vocabulary.ids.first_input
  length, best_fit = spec.budget.targets_length, isinstance(packing, BestFit)
  match spec.objective:
    case Supervised():
      pairs = PairStream(store, pair_lengths(spec.objective, spec.budget), sides=bool(spec.budget.inputs_length))
      return Makers(UnitPlanner(pairs, spec.budget.rooms, best_fit), PairMaker(spec.budget, first), pairs)
    case Instruction():
      turns = TurnStream(store, spec.objective, length)
      return Makers(UnitPlanner(turns, (length,), best_fit), TurnMaker(turns, spec.objective, length, first), turns)
    case _:
      return _of_text(store, spec, packing, seed, purpose, plans)


def _of_text(store, spec: RowSpec, packing: Packing, seed: int, purpose: str, plans: PlanFiles | None) -> Makers:
  make = functools.partial(
    make_planner, packing, tasks=spec.tasks, budget=spec.budget, seed=seed, purpose=purpose,
    attend_across_documents=spec.attend_across_documents,
  )  # fmt: skip
  if spec.tags is None:
    stream = functools.partial(text_of, store, spec)
    splits = (seed, purpose) if isinstance(packing, FullRows) else None
    planner, maker = make(stream), RowMaker(spec, splits=splits)
  else:
    text = TaggedText(store, spec.tags, seed, purpose)
    stream, planner, maker = text.stream, TagPlanner(text, make), RowMaker(spec, ByDocument(store, text.begins))
  if plans is not None and store.num_tokens >= LARGE:
    planner = KeptPlans(planner, stream, plans, _identity(store, spec, packing, planner.variants, seed, purpose))
  return Makers(planner, maker, None)


def _identity(store, spec: RowSpec, packing: Packing, variants: int, seed: int, purpose: str) -> list[Any]:
  """Everything that plans depend on (JSON). Seed and purpose matter only if tasks or tags are drawn at random."""
  chance = [seed, purpose] if variants > 1 else []
  tasks = [repr(task) for task in spec.tasks]
  tags = [repr(spec.tags)] if spec.tags else []
  return [store.fingerprint, repr(packing), tasks, repr(spec.budget), spec.attend_across_documents, *tags, *chance]
