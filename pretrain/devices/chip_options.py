"""Options of libtpu that every train step for a chip is compiled with, unless `compiler.chip_defaults` is False.

Each entry has a reason and what it did to a compiled program: cycles are the compiler's own estimate (libtpu 0.0.42),
as `scripts/bench/end_to_end.py --aot` counts them. No TPU has timed them.
"""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
  """`options` for the compiler of steps on `chips`."""

  chips: tuple[str, ...]
  options: dict[str, Any]
  reason: str
  evidence: str


TABLE = (
  Entry(
    chips=('v5e', 'v5p'),
    options={'xla_jf_spmd_threshold_for_windowed_einsum_mib': 1000000},
    reason='products with gathered parameters stay whole: as loops over shards they read their output for each shard',
    evidence='decoder/7b v5e:4x4 9.35e9 -> 4.65e9, v5p:2x2x4 4.64e9 -> 2.31e9; t5/base v5e:4x4 4.90e9 -> 1.30e9',
  ),
)


def of_chip(name: str) -> dict[str, Any]:
  """The options of the table for this chip (`pretrain/devices/chips.py`)."""
  found: dict[str, Any] = {}
  for entry in TABLE:
    found |= entry.options if name in entry.chips else {}
  return found
