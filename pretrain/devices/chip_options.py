"""Options of libtpu that every train step for a chip is compiled with, unless `compiler.chip_defaults` is False.

Each entry has a reason and what it did to a compiled program: cycles are the compiler's own estimate (libtpu 0.0.42),
as `scripts/bench/end_to_end.py --aot` counts them, GB are bytes of collectives that other work overlaps. No TPU has
timed them.
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
  Entry(
    chips=('v5e', 'v5p'),
    options={'xla_tpu_scoped_vmem_limit_kib': 98304},
    reason='a fusion may use 96 MiB of VMEM, so products have larger tiles; compiling takes twice as long (MaxText)',
    evidence='decoder/7b v5e:16x16 save_dot_except_mlp 4.31e9 -> 3.71e9; v5p:4x4x4 full 2.34e9 -> 1.94e9',
  ),
  Entry(
    chips=('v5p',),
    options={
      'xla_enable_async_all_gather': True,
      'xla_enable_async_all_reduce': True,
      'xla_tpu_overlap_compute_collective_tc': True,
      'xla_tpu_enable_async_collective_fusion': True,
      'xla_tpu_enable_async_collective_fusion_fuse_all_gather': True,
      'xla_tpu_enable_async_collective_fusion_fuse_all_reduce': True,
      'xla_tpu_enable_async_collective_fusion_multiple_steps': True,
      'xla_jf_crs_combiner_threshold_count': 1,
    },
    reason='parameters are gathered and gradients are summed inside of products (MaxText); on v5e the former is the '
    'default, and the latter costs 1.5% of the cycles',
    evidence='decoder/7b v5p:4x4x4 full: overlapped all-gathers 0% -> 86%, all-reduces 0% -> 77%, cycles equal',
  ),
)


def of_chip(name: str) -> dict[str, Any]:
  """The options of the table for this chip (`pretrain/devices/chips.py`)."""
  found: dict[str, Any] = {}
  for entry in TABLE:
    found |= entry.options if name in entry.chips else {}
  return found
