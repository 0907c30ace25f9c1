"""`flash_attention`: one signature, one dict of implementations."""

import logging

from jax import Array

from pallas_kernels.attention import reference
from pallas_kernels.attention.reference import RelativeBias

__all__ = ['IMPLEMENTATIONS', 'RelativeBias', 'flash_attention']

IMPLEMENTATIONS = {'reference': reference.attention}
_reported: set[str] = set()


def choose(implementation: str) -> str:
  """The implementation that `auto` means here; a named one must exist. Says its choice once."""
  if implementation != 'auto':
    if implementation not in IMPLEMENTATIONS:
      known = ', '.join(repr(name) for name in IMPLEMENTATIONS)
      raise ValueError(f"kernels.attention='{implementation}' is not one of 'auto', {known}.")
    return implementation
  if 'auto' not in _reported:
    _reported.add('auto')
    logging.getLogger(__name__).info('attention: reference (no kernel for this platform)')
  return 'reference'


def flash_attention(
  q: Array,
  k: Array,
  v: Array,
  *,
  causal: bool,
  window: int | None = None,
  num_sinks: int = 0,
  q_segment_ids: Array | None = None,
  kv_segment_ids: Array | None = None,
  q_positions: Array | None = None,
  kv_positions: Array | None = None,
  prefix_end: Array | None = None,
  relative_bias: RelativeBias | None = None,
  alibi: Array | None = None,
  softcap: float | None = None,
  scale: float | None = None,
  sink_logits: Array | None = None,
  dropout: tuple[float, Array] | None = None,
  implementation: str = 'auto',
  return_lse: bool = False,
):
  """Attention of q[batch, T, heads, head_dim] over k, v[batch, S, kv_heads, head_dim]; heads = kv_heads * group.

  Query i sees key j iff their segments are equal and not 0, and (not causal, or position j <= position i, or
  position j < prefix_end[j]), and |position i - position j| < window or position j < num_sinks. Positions default to
  indices. `relative_bias`, `alibi` (slopes[heads]), `softcap`, `sink_logits[heads]` and `dropout` (rate, keys[batch])
  act as `reference.attention` defines. Returns q's shape and dtype, and lse f32[batch, T, heads] if asked.

  Raises ValueError for an implementation that does not exist, or segment ids given on one side only.
  """
  if (q_segment_ids is None) != (kv_segment_ids is None):
    raise ValueError('flash_attention got segment ids of one side only; pass q_segment_ids and kv_segment_ids.')
  return IMPLEMENTATIONS[choose(implementation)](
    q, k, v, causal=causal, window=window, num_sinks=num_sinks, q_segment_ids=q_segment_ids,
    kv_segment_ids=kv_segment_ids, q_positions=q_positions, kv_positions=kv_positions, prefix_end=prefix_end,
    relative_bias=relative_bias, alibi=alibi, softcap=softcap, scale=scale, sink_logits=sink_logits, dropout=dropout,
    return_lse=return_lse,
  )  # fmt: skip
