"""What an implementation that cannot do everything says of what it is asked for."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from pallas_kernels.errors import KernelError

HALVES = (jnp.bfloat16, jnp.float16)
NAMES = {
  'q_segment_ids': 'segments (packed rows)', 'kv_segment_ids': 'segments (packed rows)', 'q_positions': 'positions',
  'kv_positions': 'positions', 'prefix_end': 'prefixes', 'relative_bias': 'relative bias', 'alibi': 'slopes (alibi)',
  'softcap': 'soft-cap', 'sink_logits': 'sinks', 'window': 'window',
}  # fmt: skip


def asked(options: Mapping[str, Any]) -> dict[str, bool]:
  """{what stands in a message: whether `options`, arguments of `flash_attention`, ask for it}."""
  found = dict.fromkeys((NAMES[name] for name in options), False)
  return found | {NAMES[name]: True for name, value in options.items() if value is not None}


def refuse(implementation: str, wanted: Mapping[str, bool]) -> None:
  """Raises KernelError that names everything which is `wanted` of an implementation that has none of it."""
  if missing := [name for name, on in wanted.items() if on]:
    lacking = ', no '.join(missing)
    raise KernelError(
      f"kernels.attention='{implementation}' has no {lacking}, which this model asks for; use 'triton' or 'reference'."
    )
