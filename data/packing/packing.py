"""The `data.packing` section of a config: how text is packed into rows."""

import dataclasses
from collections.abc import Callable
from typing import Literal, assert_never

from data.objectives.objectives import CausalLm, OfUnits, tasks_of
from data.objectives.tasks import Budget, Task
from data.packing.best_fit import BestFitPlanner
from data.packing.buckets import LengthBuckets
from data.packing.concat_split import ConcatSplitPlanner
from data.packing.full_rows import FullRows, FullRowsPlanner, check_full_rows
from data.packing.next_fit import NextFitPlanner
from data.packing.plan import Planner, Stream


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConcatSplit:
  """Documents end to end, cut where a row is full (data/packing/concat_split.py). For any objective.

  Pairs and conversations are never cut: they come in this order, while they fit a row (data/examples/units.py).
  """

  name: Literal['concat_split'] = 'concat_split'


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestFit:
  """No document that fits a row is cut (packing/best_fit.py). For objectives of one task, pairs and conversations."""

  name: Literal['best_fit'] = 'best_fit'


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextFit:
  """As seqio packs, for comparisons (data/packing/next_fit.py). For objectives of one task."""

  name: Literal['next_fit'] = 'next_fit'


Packing = ConcatSplit | BestFit | NextFit | LengthBuckets | FullRows


def check_packing(cfg, objective) -> None:
  """Raises ValueError where the `packing` of a data config does not go with the rest of it, or with the objective."""
  packing, attend_across_documents = cfg.packing, cfg.attend_across_documents
  if isinstance(packing, ConcatSplit):
    return
  if isinstance(objective, OfUnits) and not isinstance(packing, BestFit):
    raise ValueError(
      f"data.packing.name='{packing.name}' is for text; pairs and conversations go whole into rows: set "
      "data.packing.name='best_fit', or remove it (in the order of the store)."
    )
  if isinstance(packing, FullRows):
    check_full_rows(tasks_of(objective), cfg.budget)
    return
  number = len(tasks_of(objective))
  if number > 1:
    raise ValueError(
      f"data.packing.name='{packing.name}' is for objectives of one task, objective.name='{objective.name}' has "
      f"{number}; set data.packing.name='concat_split'."
    )
  if attend_across_documents:
    raise ValueError(
      f"data.packing.name='{packing.name}' keeps documents whole, data.attend_across_documents=True makes one of all; "
      "set one of them back (data.packing.name='concat_split')."
    )
  if isinstance(packing, LengthBuckets):
    _check_buckets(packing, cfg, objective)


def _check_buckets(packing: LengthBuckets, cfg, objective) -> None:
  packing.lengths(cfg.targets_length)
  if not isinstance(objective, CausalLm):
    raise ValueError(
      f"data.packing.name='length_buckets' is for objective.name='causal_lm', not '{objective.name}'; set either back."
    )
  if cfg.num_sources > 1:
    raise ValueError(
      f"data.packing.name='length_buckets' is for one source, not {cfg.num_sources}; prepare one store of all text."
    )


def make_planner(
  packing: Packing,
  stream: Callable[[int], Stream],
  tasks: tuple[Task, ...],
  budget: Budget,
  *,
  seed: int,
  purpose: str,
  attend_across_documents: bool = False,
) -> Planner:
  """The planner that `packing` names; `stream(shard)` are the documents of a shard."""
  match packing:
    case ConcatSplit():
      return ConcatSplitPlanner(
        stream, tasks, budget, seed=seed, purpose=purpose, attend_across_documents=attend_across_documents
      )
    case BestFit():
      return BestFitPlanner(stream, tasks[0], budget)
    case NextFit():
      return NextFitPlanner(stream, tasks[0], budget)
    case FullRows():
      return FullRowsPlanner(stream, tasks, budget, seed=seed, purpose=purpose)
    case LengthBuckets():
      raise ValueError('rows of several lengths have no single planner; data/batches/bucketed.py makes them.')
    case _:
      assert_never(packing)
