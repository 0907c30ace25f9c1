"""Quantized products on the GPU of this machine, beside bfloat16.

  python scripts/bench/matmul.py --gpu

For each program the median of `ROUNDS` rounds, in which all programs take turns, and their spread. `product`: two
matrices of codes, alone. `forward`: a product of bfloat16 matrices that are rounded first. `MLP`: forward and backward
of a gated MLP, all three products of each matrix by the recipe. The last column is the speed relative to bfloat16.
Without a GPU the only line says "not measured".
"""

import functools
import statistics
import time

TOKENS, EMBED, HIDDEN = 16384, 4096, 14336
ROUNDS, CALLS = 5, 5
FORMATS = ('int8', 'fp8_e4m3')


def rows():
  """One line for each program."""
  import jax

  device = jax.devices()[0]
  if device.platform != 'gpu':
    yield f'not measured: no GPU here, {device.device_kind}'
    return
  yield f'{device.device_kind}: {TOKENS:,} tokens, {EMBED:,} x {HIDDEN:,}'
  for kind, made in (('product', products), ('forward', forwards), ('MLP', mlps)):
    programs, work = made()
    base = None
    for name, seconds in timed(programs).items():
      middle, spread = statistics.median(seconds), max(seconds) - min(seconds)
      base = middle if base is None else base
      speed = f'{work / middle / 1e12:>6.0f} TFLOP/s {base / middle:>6.2f}x'
      yield f'{kind:<9}{name:<20}{middle * 1e3:>9.3f} ms +- {spread * 1e3:.3f}  {speed}'


def timed(programs: dict) -> dict[str, list[float]]:
  """{name: seconds of each round} of {name: (function, arrays)}; the first call, which compiles, is not counted."""
  import jax

  found = {name: [] for name in programs}
  for run, arrays in programs.values():
    jax.block_until_ready(run(*arrays))
  for _ in range(ROUNDS):
    for name, (run, arrays) in programs.items():
      began = time.perf_counter()
      jax.block_until_ready([run(*arrays) for _ in range(CALLS)])
      found[name].append((time.perf_counter() - began) / CALLS)
  return found


def drawn(*shape: int, scale: float = 1.0):
  import jax
  import jax.numpy as jnp

  return jax.random.normal(jax.random.key(sum(shape)), shape, jnp.bfloat16) * jnp.bfloat16(scale)


def products():
  """Both operands lie along the sum, as tensor cores take fp8."""
  import jax
  import jax.numpy as jnp

  x, w = drawn(TOKENS, EMBED), drawn(HIDDEN, EMBED)
  dot = lambda wide: jax.jit(
    lambda x, w: jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=wide)
  )
  kinds = {
    'bf16': (jnp.bfloat16, jnp.bfloat16), 'int8': (jnp.int8, jnp.int32), 'fp8_e4m3': (jnp.float8_e4m3fn, jnp.bfloat16),
  }  # fmt: skip
  found = {name: (dot(wide), (x.astype(dtype), w.astype(dtype))) for name, (dtype, wide) in kinds.items()}
  return found, 2 * TOKENS * EMBED * HIDDEN


def recipe(name: str, scale: str):
  from pallas_kernels.quantized_matmul.formats import Operand, Recipe

  own = Operand(name, scale)
  gradient = Operand('fp8_e5m2', scale) if name.startswith('fp8') else own
  return Recipe(forward=(own, own), dgrad=(gradient, own), wgrad=(own, gradient))


def kinds() -> dict:
  """{name: a product of x and w}."""
  from pallas_kernels.quantized_matmul.api import quantized_matmul

  found = {'bf16': lambda x, w: x @ w}
  for name in FORMATS:
    for scale in ('tensor', 'channel'):
      found[f'{name} {scale}'] = functools.partial(quantized_matmul, recipe=recipe(name, scale))
  return found


def forwards():
  import jax

  arrays = drawn(TOKENS, EMBED), drawn(EMBED, HIDDEN)
  return {name: (jax.jit(product), arrays) for name, product in kinds().items()}, 2 * TOKENS * EMBED * HIDDEN


def mlps():
  import jax
  import jax.numpy as jnp

  scale = EMBED**-0.5
  gate = drawn(EMBED, HIDDEN, scale=scale)
  arrays = drawn(TOKENS, EMBED), gate, -gate, drawn(HIDDEN, EMBED, scale=scale)

  def gradient(product):
    def loss(x, gate, up, down):
      out = product(jax.nn.silu(product(x, gate)) * product(x, up), down)
      return jnp.square(out.astype(jnp.float32)).mean()

    return jax.jit(jax.grad(loss, (0, 1, 2, 3)))

  return {name: (gradient(product), arrays) for name, product in kinds().items()}, 3 * 3 * 2 * TOKENS * EMBED * HIDDEN
