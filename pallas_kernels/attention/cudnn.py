"""cuDNN's flash attention, for the features that it has. It equals the definition on an H200 (docs/LOG.md)."""

import dataclasses

import jax
from jax import Array

from pallas_kernels.attention import features
from pallas_kernels.attention.reference import Visibility


def attention(
  q: Array,
  k: Array,
  v: Array,
  see: Visibility,
  *,
  softcap: float | None = None,
  scale: float | None = None,
  sink_logits: Array | None = None,
  return_lse: bool = False,
):
  """`reference.attention`, causal by index or full, with a window before the query: what cuDNN does in O(length).

  Raises KernelError that names any other feature in use. Source: jax.nn.dot_product_attention, implementation='cudnn'.
  """
  window = see.window
  wanted = features.asked(dataclasses.replace(see, window=None), softcap=softcap) | {
    'sinks': sink_logits is not None or (window is not None and see.num_sinks > 0),
    'window without causality': window is not None and not see.causal,
    'window that leaves queries without a key': window is not None and q.shape[1] >= k.shape[1] + window,
    'log-sum-exp in f32': return_lse,
    f'{q.dtype} (bfloat16 or float16 only)': q.dtype not in features.HALVES,
    f'head_dim {q.shape[-1]} (multiples of 8 to 256 only)': q.shape[-1] % 8 != 0 or q.shape[-1] > 256,
  }
  features.refuse('cudnn', wanted)
  near = None if window is None else (window - 1, 0)
  with jax.numpy_dtype_promotion('standard'):  # jax's own code promotes
    return jax.nn.dot_product_attention(
      q, k, v, scale=scale, is_causal=see.causal, local_window_size=near, implementation='cudnn'
    )
