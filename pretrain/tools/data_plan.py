"""`pretrain data plan`: how documents are packed, how many positions of rows are used, what padding costs."""

import collections
from collections.abc import Mapping

from data.batches.batches import DataSource
from data.batches.plan_report import Used, is_ordered, packed, used_positions
from models.build import ModelConfig
from models.flops import flops_by_side
from models.layers.low_rank import NONE, LoraConfig
from pretrain.experiment.phases import Phase
from pretrain.records.names import one_line

SIDES = ('encoder', 'decoder')
FLOPS = (
  'FLOPs: matrix products of a step, forward and backward. Padding: those at unused positions; in attention, those of '
  'their queries.'
)


class Filling:
  """Used and padded positions and FLOPs of some rows, added up batch by batch."""

  def __init__(self):
    self.rows = 0
    self._used: collections.Counter[str] = collections.Counter()
    self._positions: collections.Counter[str] = collections.Counter()
    self._padding_flops = self._flops = 0.0

  def add(self, rows: int, used: Mapping[str, int], lengths: Mapping[str, int], flops: Mapping[str, int]) -> None:
    """Adds rows of these lengths; `flops` are those of each side of one row."""
    self.rows += rows
    for side, count in used.items():
      each = flops[side] / lengths[side]
      self._used[side] += count
      self._positions[side] += rows * lengths[side]
      self._padding_flops += (rows * lengths[side] - count) * each
      self._flops += rows * flops[side]

  def used(self, side: str) -> float | None:
    """The share of the positions of a side that hold a token; None where rows have no such side."""
    return self._used[side] / self._positions[side] if self._positions[side] else None

  @property
  def padding_flops(self) -> float:
    """The share of the FLOPs of these rows that is spent at unused positions."""
    return self._padding_flops / self._flops if self._flops else 0.0


def fillings(
  source: DataSource, model: ModelConfig, first: int = 0, end: int | None = None, lora: LoraConfig = NONE
) -> list[Filling]:
  """The sampled rows between examples `first` and `end`: all of them, then those of each source."""
  found = [Filling() for _ in range(1 + len(source.names))]
  for batch in used_positions(source, first, end):
    flops = _flops_of(model, batch.lengths, lora)
    _add(found[0], batch, slice(None), flops)
    for i, own in enumerate(found[1:]):
      _add(own, batch, batch.sources == i, flops)
  return found


def _flops_of(model: ModelConfig, lengths: Mapping[str, int], lora: LoraConfig) -> dict[str, int]:
  """FLOPs of each side of a row; one stack's length is `targets_length` in the config of a model."""
  inputs, targets = (lengths[side] for side in SIDES) if len(lengths) == 2 else (0, *lengths.values())
  return flops_by_side(model, inputs_length=inputs, targets_length=targets, lora=lora)


def _add(to: Filling, batch: Used, rows, flops: Mapping[str, int]) -> None:
  used = {side: int(counts[rows].sum()) for side, counts in batch.positions.items()}
  to.add(len(batch.sources[rows]), used, batch.lengths, flops)


def report(phase: Phase, source: DataSource) -> str:
  """What `pretrain data plan` prints for one phase."""
  end = None if phase.end is None else phase.example(phase.end)
  paths = [one_line(rows.store.path) for rows in source.sources]
  packing = _packing_lines(source, paths)
  all_rows, *by_source = fillings(source, phase.cfg.model, phase.first_example, end, phase.cfg.lora)
  named = list(zip(by_source, paths, strict=True))
  if len(named) > 1:
    named.insert(0, (all_rows, 'all sources'))
  where = 'spread over an epoch' if is_ordered(source) else f'the first from example {phase.first_example:,} on'
  return '\n'.join([
    *packing, '',
    f'positions used, counted in {all_rows.rows:,} rows ({where}):',
    f'{"rows":>12} {"encoder":>8} {"decoder":>8} {"padding FLOPs":>14}  source',
    *(_filling_line(filling, name) for filling, name in named),
    FLOPS, *source.losses(),
  ])  # fmt: skip


def _packing_lines(source: DataSource, paths: list[str]) -> list[str]:
  lines = [
    f'packing {source.cfg.packing.name}, an epoch of each source{_promise(source)}:',
    f'{"rows":>12} {"tokens":>14} {"cut documents":>14} {"pieces/row":>11}  source',
  ]
  for rows, path in zip(source.sources, paths, strict=True):
    plan = packed(rows)
    lines.append(
      f'{plan.rows:>12,} {plan.tokens:>14,} {plan.cut / plan.documents:>14.1%} {plan.pieces / plan.rows:>11.2f}  {path}'
    )
  return lines


def _filling_line(filling: Filling, name: str) -> str:
  used = (filling.used(side) for side in SIDES)
  shares = ' '.join(f'{"-" if share is None else f"{share:.2%}":>8}' for share in used)
  cost = f'{filling.padding_flops:.2%}' if filling.rows else '-'
  return f'{filling.rows:>12,} {shares} {cost:>14}  {name}'


def _promise(source: DataSource) -> str:
  return '' if source.losses() else ' (no token is dropped; the last row of a shard is padded)'
