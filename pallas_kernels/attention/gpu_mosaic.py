"""Plain attention on Hopper GPUs (H100, H200) through Mosaic: wgmma and TMA forward, the kernels of `gpu` backward.

It lowers for CUDA, compiles for sm_90a without spills, and equals the definition in jax's interpreter for GPUs, which
replaces wgmma by plain products, and on an H200 (docs/LOG.md). Its block sizes are not tuned. According to jax's own
kernel, the compilers of CUDA 12.8 to 12.9.0 miscompile causal masks: use CUDA 13, as `pretrain[cuda]` does.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import tuned
from pallas_kernels.attention import features, gpu, gpu_mosaic_kernel
from pallas_kernels.attention.gpu_mosaic_kernel import ATTENDING, LOG2E, SCRATCH_BYTES, Spec
from pallas_kernels.attention.reference import Visibility
from pallas_kernels.errors import KernelError

NAME = 'mosaic_gpu'
HOPPER = ('H100', 'H200', 'H800', 'H20')  # parts of the names that jax gives devices
HEAD_DIMS = (64, 128, 256)
SHARED_BYTES = 227 * 1024  # that one program can have on a multiprocessor
ALIGNED = 1024  # Mosaic aligns arrays in shared memory to this
REGISTERS = 208  # per thread, as `registers` counts: ptxas 13.0 spills at 224 in two of three shapes, and not at 176
ROWS = 64  # of one product of a warpgroup


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
  """`q` queries of a program, half for each warpgroup; `kv` keys of a tile; `stages` tiles in shared memory."""

  q: int
  kv: int
  stages: int


DEFAULTS = {  # not measured: the powers of 2 among the sizes of arXiv:2407.08608 that fit
  64: Blocks(q=128, kv=128, stages=4),
  128: Blocks(q=128, kv=128, stages=2),
  256: Blocks(q=128, kv=64, stages=2),
}


def shape_class(head_dim: int, dtype) -> str:
  """The key of tuned block sizes."""
  return f'mosaic_{gpu.shape_class(head_dim, dtype)}'


def choose_blocks(q_length: int, kv_length: int, head_dim: int, dtype) -> Blocks:
  """The sizes tuned for this chip, or `DEFAULTS`; smaller ones where these do not divide the lengths."""
  found = tuned.lookup('attention', shape_class(head_dim, dtype), ('q', 'kv', 'stages'))
  blocks = DEFAULTS[head_dim] if found is None else Blocks(**found)
  q, kv = max(ATTENDING * ROWS, math.gcd(blocks.q, q_length)), max(ROWS, math.gcd(blocks.kv, kv_length))
  return Blocks(q=q, kv=kv, stages=max(1, min(blocks.stages, kv_length // kv)))


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
  blocks: Blocks | None = None,
  interpret: Any = None,
):
  """`reference.attention`, causal by index or full. `interpret`: jax's InterpretGPUParams, for tests.

  Raises KernelError for features that it lacks, lengths that its blocks do not divide, blocks that do not fit a
  multiprocessor, and GPUs other than Hopper.
  """
  (batch, q_length, heads, head_dim), kv_length = q.shape, k.shape[1]
  scale = 1 / math.sqrt(head_dim) if scale is None else scale
  wanted = features.asked(see, softcap=softcap, sink_logits=sink_logits) | {
    f'{q.dtype} (bfloat16 or float16 only)': q.dtype not in features.HALVES,
    f'head_dim {head_dim} (64, 128 or 256 only)': head_dim not in HEAD_DIMS,
    f'scale {scale:g} (positive only)': scale <= 0,
  }
  features.refuse(NAME, wanted)
  if interpret is None:
    _check_device()
  blocks = choose_blocks(q_length, kv_length, head_dim, q.dtype) if blocks is None else blocks
  check_blocks(blocks, head_dim, q_length, kv_length)
  spec = Spec(
    batch=batch, heads=heads, group=heads // k.shape[2], q_length=q_length, kv_length=kv_length, head_dim=head_dim,
    dtype=q.dtype, **vars(blocks), causal=see.causal, scale=scale, interpret=interpret,
  )  # fmt: skip
  out, lse = _flash(spec, q, k, v)
  return (out, lse) if return_lse else out


def _check_device() -> None:
  kind = tuned.device_kind()
  if kind is not None and not any(part in kind for part in HOPPER):
    raise KernelError(
      f"kernels.attention='{NAME}' runs on Hopper GPUs (H100, H200), this mesh has {kind} devices; use 'triton' or "
      "'reference'."
    )


def check_blocks(blocks: Blocks, head_dim: int, q_length: int, kv_length: int) -> None:
  """Raises KernelError for invalid blocks, and for blocks that do not divide the lengths or fit a multiprocessor."""
  if blocks.q % (ATTENDING * ROWS) or blocks.kv % ROWS or blocks.kv > 256 or min(vars(blocks).values()) < 1:
    raise KernelError(
      f"kernels.attention='{NAME}' got {blocks}; q is a multiple of {ATTENDING * ROWS}, kv 64, 128, 192 or 256, "
      'stages at least 1.'
    )
  if q_length % blocks.q or kv_length % blocks.kv:
    raise KernelError(
      f"kernels.attention='{NAME}' cannot run {q_length} queries and {kv_length} keys, which blocks of {blocks.q} "
      f"and {blocks.kv} do not divide; use lengths that are multiples of these, 'triton' or 'reference'."
    )
  if (size := shared_bytes(blocks, head_dim)) > SHARED_BYTES:
    raise KernelError(
      f"kernels.attention='{NAME}' with {blocks} at head_dim {head_dim} takes {size} bytes of shared memory, of "
      f'{SHARED_BYTES}; use fewer stages or a smaller kv.'
    )
  if (number := registers(blocks, head_dim)) > REGISTERS:
    raise KernelError(
      f"kernels.attention='{NAME}' with {blocks} at head_dim {head_dim} takes {number} registers of a thread, of "
      f'{REGISTERS}; use a smaller q or kv.'
    )


def shared_bytes(blocks: Blocks, head_dim: int) -> int:
  """Shared memory of a program: queries, tiles of keys and values, log-sum-exps, scratch, barriers of 8 bytes."""
  half, single, barriers = 2, 4, 4 * blocks.stages + ATTENDING + 1
  arrays = (blocks.q + 2 * blocks.stages * blocks.kv) * head_dim * half
  return arrays + -(-blocks.q * single // ALIGNED) * ALIGNED + SCRATCH_BYTES + barriers * 8


def registers(blocks: Blocks, head_dim: int) -> int:
  """Registers of a thread. 128 threads, a warpgroup, hold its scores, its values, and weights of half their width."""
  return blocks.q // ATTENDING * (2 * blocks.kv + blocks.kv + 2 * head_dim) // (2 * 128)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(spec: Spec, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
  """(o like q, lse f32[batch, T, heads])."""
  return _forward(spec, q, k, v)[0]


def _forward(spec: Spec, q, k, v):
  out, lse = gpu_mosaic_kernel.forward(spec, q, k, v)
  return (out, jnp.moveaxis(lse, 1, 2) / LOG2E), (q, k, v, out, lse)


def _backward(spec: Spec, saved, gradients):
  interpret = spec.interpret is not None
  return gpu.plain_gradients(saved, gradients, causal=spec.causal, scale=spec.scale, interpret=interpret)


_flash.defvjp(_forward, _backward)
