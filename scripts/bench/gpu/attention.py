"""Attention on the GPU of this machine: each implementation against the definition, and its speed.

  python scripts/bench/attention.py --gpu [--length 8192]

8 heads of 128, bfloat16, 16,384 tokens; TFLOP/s count 4 (forward) and 10 (backward) operations for each
visible pair and channel, with their share of the peak. Without a GPU every row says "not measured".
"""

import functools
import statistics
import time

HEADS, HEAD_DIM, TOKENS = 8, 128, 16384
IMPLEMENTATIONS = ('reference', 'triton', 'mosaic_gpu', 'cudnn')
PEAK = {'H100': 989e12, 'H200': 989e12, 'A100': 312e12}  # bfloat16, without sparsity


def rows(length: int):
  """One line for each implementation and mask."""
  yield "implementation  mask    error of out, dq, dk, dv / the definition's   forward TFLOP/s  backward TFLOP/s"
  for name in IMPLEMENTATIONS:
    for causal in (True, False):
      yield f'{name:<16}{"causal" if causal else "full":<8}{measured(name, causal, length)}'


def measured(name: str, causal: bool, length: int) -> str:
  import jax

  device = jax.devices()[0]
  if device.platform != 'gpu':
    return f'not measured: no GPU here, {device.device_kind}'
  from pallas_kernels.errors import KernelError

  mesh = jax.make_mesh((1,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
  try:
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # tuned blocks are looked up by the device of the mesh
      wrong = ' '.join(f'{x:.2f}' for x in errors(name, causal))
      forward, backward = timed(name, causal, length)
  except (KernelError, RuntimeError) as error:  # JAX and XLA raise RuntimeError
    return f'failed: {str(error).splitlines()[0][:120]}'
  work = HEADS * HEAD_DIM * TOKENS * length / (2 if causal else 1) / 1e12
  forward, backward = 4 * work / forward, 10 * work / backward
  peak = next((peak for part, peak in PEAK.items() if part in device.device_kind), float('nan')) / 1e12
  return f'{wrong:<52}{forward:>8.0f} {forward / peak:>6.0%} {backward:>10.0f} {backward / peak:>6.0%}'


def draw(length: int, batch: int, dtype):
  import jax.numpy as jnp
  import numpy as np

  rng = np.random.default_rng(0)
  return tuple(jnp.asarray(rng.normal(size=(batch, length, HEADS, HEAD_DIM)), dtype) for _ in range(4))


def attend(name: str, causal: bool):
  """Two functions: of q, k, v, do to (o, (dq, dk, dv)), and of q, k, v to o."""
  import jax

  from pallas_kernels.attention.api import IMPLEMENTATIONS as KNOWN
  from pallas_kernels.attention.api import Visibility

  run = functools.partial(KNOWN[name], see=Visibility(causal=causal))

  def both(q, k, v, do):
    out, back = jax.vjp(run, q, k, v)
    return out, back(do)

  return jax.jit(both), jax.jit(run)


def errors(name: str, causal: bool, length: int = 1024) -> list[float]:
  """The largest errors of out, dq, dk, dv, divided by those of the definition in the same dtype; above 3 is a fault."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  arrays = draw(length, 1, jnp.bfloat16)
  found = lambda which, *arrays: [np.asarray(x, np.float64) for x in jax.tree.leaves(attend(which, causal)[0](*arrays))]
  with jax.default_matmul_precision('highest'):
    truth = found('reference', *(x.astype(jnp.float32) for x in arrays))
  worst = lambda got: [np.abs(x - t).max() for x, t in zip(got, truth, strict=True)]
  pairs = zip(worst(found(name, *arrays)), worst(found('reference', *arrays)), strict=True)
  return [own / definition for own, definition in pairs]


def timed(name: str, causal: bool, length: int) -> tuple[float, float]:
  """Seconds of the forward pass and of the backward pass, which is the time of both minus the forward."""
  import jax.numpy as jnp

  arrays = draw(length, TOKENS // length, jnp.bfloat16)
  both, forward = attend(name, causal)
  alone = median(forward, arrays[:3])
  return alone, median(both, arrays) - alone


def median(run, arrays, rounds: int = 20) -> float:
  import jax

  jax.block_until_ready(run(*arrays))
  seconds = []
  for _ in range(rounds):
    start = time.perf_counter()
    jax.block_until_ready(run(*arrays))
    seconds.append(time.perf_counter() - start)
  return statistics.median(seconds)
