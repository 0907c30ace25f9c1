"""Attention on a CPU, values and gradients: 'blockwise' against 'reference', in one process, interleaved.

python scripts/bench/cpu/attention.py [--lengths 1024,2048,4096] [--cases causal,packed] [--blocks 512,256]

CPU seconds are medians of `--rounds`; MiB are the temporaries of the compiled program. Bars: at 2,048 at most 1.1 times
the reference's CPU seconds, above it less. `--memory` compiles only, with one row, for lengths at which the reference
would not fit.
"""

import argparse
import os
import pathlib
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))
CASES = ('causal', 'full', 'window', 'packed', 'bias', 'prefix')


def visibility(case: str, batch: int, length: int, heads: int):
  """Options of each case; rows of `packed` and the later ones hold four documents."""
  import jax.numpy as jnp
  import numpy as np

  from pallas_kernels.attention.reference import RelativeBias, Visibility

  segments = jnp.broadcast_to(jnp.asarray(np.arange(length) * 4 // length + 1, jnp.int32), (batch, length))
  packed = {'causal': True, 'q_segment_ids': segments, 'kv_segment_ids': segments}
  at = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32) % max(length // 4, 1), (batch, length))
  table = jnp.ones((32, heads), jnp.float32)
  options = {
    'causal': {'causal': True}, 'full': {'causal': False}, 'window': {'causal': True, 'window': 512}, 'packed': packed,
    'bias': packed | {'relative_bias': RelativeBias(table, bidirectional=False, max_distance=128)},
    'prefix': packed | {'q_positions': at, 'kv_positions': at, 'prefix_end': jnp.full_like(at, 100)},
  }  # fmt: skip
  return Visibility(**options[case])


def compiled(function, flags, batch: int, length: int, case: str):
  """(the compiled value and gradients, its arguments)."""
  import jax
  import jax.numpy as jnp

  see = visibility(case, batch, length, flags.heads)
  shape = (batch, length, flags.heads, flags.head_dim)
  loss = lambda q, k, v, see: jnp.square(function(q, k, v, see).astype(jnp.float32)).sum()
  run = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
  if flags.memory:
    arrays = (jax.ShapeDtypeStruct(shape, flags.dtype),) * 3
  else:
    arrays = tuple(jax.random.normal(jax.random.key(n), shape, flags.dtype) for n in range(3))
  return run.lower(*arrays, see).compile(), (*arrays, see)


def seconds(program, arguments) -> float:
  import jax

  start = time.process_time()
  jax.block_until_ready(program(*arguments))
  return time.process_time() - start


def compare(flags, length: int, case: str) -> str:
  from pallas_kernels.attention import reference
  from pallas_kernels.attention.blockwise import attention as blockwise

  batch = 1 if flags.memory else max(1, flags.tokens // length)
  tiled = lambda *x: blockwise.attention(*x, blocks=flags.blocks)
  programs = [compiled(f, flags, batch, length, case) for f in (tiled, reference.attention)]
  text = f'{case:<8}{batch:>4} x{length:>7}'
  mib = [program.memory_analysis().temp_size_in_bytes / 2**20 for program, _ in programs]
  text += f'{mib[0]:>12,.0f}{mib[1]:>12,.0f} MiB'
  if flags.memory:
    return text
  rounds = [[seconds(*each) for each in programs] for _ in range(flags.rounds + 1)][1:]
  ours, theirs = (statistics.median(times) for times in zip(*rounds, strict=True))
  ratios = sorted(a / b for a, b in rounds)
  return text + f'{ours:>9.2f}{theirs:>9.2f} s  ratio {ours / theirs:.2f} [{ratios[0]:.2f} .. {ratios[-1]:.2f}]'


def parse(argv: list[str] | None = None) -> argparse.Namespace:
  numbers = lambda text: tuple(map(int, text.split(',')))
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--lengths', type=numbers, default=(1024, 2048, 4096))
  parser.add_argument('--cases', type=lambda text: text.split(','), default=list(CASES))
  parser.add_argument('--blocks', type=numbers, help='queries, keys of a tile')
  parser.add_argument('--tokens', type=int, default=4096, help='of all rows')
  parser.add_argument('--heads', type=int, default=8)
  parser.add_argument('--head_dim', type=int, default=64)
  parser.add_argument('--dtype', default='float32')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--memory', action='store_true', help='compile only')
  return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
  flags = parse(argv)
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  for length in flags.lengths:
    for case in flags.cases:
      print(compare(flags, length, case), flush=True)


if __name__ == '__main__':
  main()
