"""Options of libtpu that every train step for a chip is compiled with, unless `compiler.chip_defaults` is False.

Each entry has a reason and what it did to a compiled program: cycles are the compiler's own estimate (libtpu 0.0.42),
as `scripts/bench/end_to_end.py --aot` counts them. No TPU has timed them.
"""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
  """`options` for the compiler of steps on `chips`. With `slow` compiling takes two to four times as long: a search
  among layouts compiles without them.
  """

  chips: tuple[str, ...]
  options: dict[str, Any]
  reason: str
  evidence: str
  slow: bool = False


TABLE = (
  Entry(
    chips=('v5e', 'v5p', 'v6e', 'tpu7x'),
    options={'xla_jf_spmd_threshold_for_windowed_einsum_mib': 1000000},
    reason='products with gathered parameters stay whole: as loops over shards they read their output for each shard',
    evidence='decoder/7b v5e:4x4 9.35e9 -> 4.65e9, v5p:2x2x4 4.64e9 -> 2.31e9, v6e:4x4 4.34e9 -> 1.58e9; t5/base '
    'v5e:4x4 4.90e9 -> 1.30e9; decoder/7b in fp8 tpu7x:4x4x1 4.26e9 -> 0.81e9',
  ),
  Entry(
    chips=('v5e', 'v6e'),
    options={'xla_tpu_scoped_vmem_limit_kib': 98304},
    reason='a fusion may use 96 of the 128 MiB of VMEM, so tiles of products are larger',
    evidence='decoder/7b v5e:16x16 save_dot_except_mlp 3.95e9 -> 3.36e9, v6e:4x4 1.41e9 -> 1.14e9; t5/base v5e:4x4 '
    '1.34e9 -> 1.44e9: its config leaves it out',
    slow=True,
  ),
  Entry(
    chips=('tpu7x',),
    options={'xla_tpu_scoped_vmem_limit_kib': 57344},
    reason='a fusion may use 56 of the 64 MiB of VMEM; with 32 some products of fp8 get tiles of a few KiB',
    evidence='decoder/7b tpu7x:4x4x1 1.34e9 -> 1.03e9, in fp8 7.06e9 -> 0.81e9',
  ),
)


def of_chip(name: str, *, quick: bool = False) -> dict[str, Any]:
  """The default options of this chip (`pretrain/devices/chips.py`). With `quick`, without the options that make
  compilation slow."""
  found: dict[str, Any] = {}
  for entry in TABLE:
    found |= entry.options if name in entry.chips and not (quick and entry.slow) else {}
  return found
