"""Errors of implementations that support only some features."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from pallas_kernels.attention.reference import Visibility
from pallas_kernels.errors import KernelError

HALVES = (jnp.bfloat16, jnp.float16)
NAMES = {  # in the order of messages
  'window': 'window', 'q_segment_ids': 'segments (packed rows)', 'kv_segment_ids': 'segments (packed rows)',
  'q_positions': 'positions', 'kv_positions': 'positions', 'prefix_end': 'prefixes', 'relative_bias': 'relative bias',
  'alibi': 'slopes (alibi)', 'softcap': 'soft-cap', 'sink_logits': 'sinks',
}  # fmt: skip


def asked(see: Visibility, **options: Any) -> dict[str, bool]:
  """{name in messages: True} of each feature that `see` or `options` use."""
  given = {field.name: getattr(see, field.name) for field in dataclasses.fields(see)} | options
  return {text: True for name, text in NAMES.items() if given.get(name) is not None}


def refuse(implementation: str, wanted: Mapping[str, bool]) -> None:
  """Raises KernelError that names every feature that is `wanted`; the implementation has none of them."""
  if missing := [name for name, on in wanted.items() if on]:
    lacking = ', no '.join(missing)
    raise KernelError(
      f"kernels.attention='{implementation}' has no {lacking}, which this model needs; use 'triton' or 'reference'."
    )
