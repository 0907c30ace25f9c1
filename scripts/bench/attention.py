"""Attention on TPUs that are not there: cycles of whole compiled programs, ours and jax's splash_attention.

  python scripts/bench/attention.py --aot [--chips v5e:2x4,v6e:2x4] [--blocks 512,1024] [--length 8192]

A program's cycles are those of its Mosaic kernels (bundles of the final VLIW schedule times how often the grid runs
them) and of its XLA fusions (`estimated_cycles`). As a model of time it was calibrated on splash's forward kernels only
(within -5/+13% on v5p, v6e and v7x): backward passes can be compared with each other, no more. A process per chip,
because libtpu reads its options once. Bias, segments: 8 heads of 128, bfloat16, one row, causal.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # in front of this folder, where `data` is data.py

CHIPS = ('v5e:2x4', 'v5p:2x2x1', 'v6e:2x4', 'tpu7x:2x2x1')
CLOCK_GHZ = {'v5e': 1.5, 'v5p': 1.75, 'v6e': 1.75, 'tpu7x': 1.9}
CORES = {'v5e': 1, 'v5p': 2, 'v6e': 1, 'tpu7x': 1}  # that share a program; a device of tpu7x is one core
HEADS, HEAD_DIM, COMPUTE = 8, 128, 512
FORWARD, QUERIES, KEYS = 'forward', 'grad_queries', 'grad_keys_values'
# Regions outside tiles that run once for a head: Toeplitz tiles are built first, their gradient is folded last.
ONCE = {FORWARD: (0,), QUERIES: (0, -1), KEYS: (0,)}
SPLASH = {FORWARD: 'fwd', QUERIES: 'dq', KEYS: 'dkv'}


def regions(path: pathlib.Path) -> tuple[list[int], list[int], int]:
  """(bundles of each innermost region with matrix products, of regions before and after those, of the rest)."""
  bundles, products, start, end = 0, [], {}, {}
  for line in path.read_text().splitlines():
    if re.match(r'\s*(0x[0-9a-f]+|0)\b[^:]*:', line):
      bundles += 1
      products.append('vmatmul' in line)
    for r in re.findall(r'Start region (\d+)', line):
      start.setdefault(int(r), bundles - 1)
    for r in re.findall(r'End region (\d+)', line):
      end[int(r)] = bundles - 1
  spans = sorted({(max(s, 0), end.get(r, s)) for r, s in start.items()})
  within = lambda a, b: a != b and b[0] <= a[0] and a[1] <= b[1]
  matrix = [span for span in spans if any(products[span[0] : span[1] + 1])]
  inner = [span for span in matrix if not any(within(other, span) for other in matrix)]
  plain = [s for s in spans if s not in matrix and s[1] - s[0] >= 60 and not any(within(s, m) for m in inner)]
  outer = [s for s in plain if not any(within(s, other) for other in plain)]
  sizes = lambda found: [e - s + 1 for s, e in found]
  return sizes(inner), sizes(outer), max(0, max(sizes(spans)) - sum(sizes(inner)) - sum(sizes(outer)))


def dumped(folder: pathlib.Path, name: str) -> pathlib.Path:
  found = [p for p in folder.glob(f'*{name}*final_bundles*') if 'sched' not in p.name]
  return max(found, key=lambda p: p.stat().st_mtime)


def tiles_by_class(spec, by_keys: bool) -> tuple[list[int], int, int]:
  """(tiles of each class in the order of the code, blocks, steps) of one head."""
  import numpy as np

  from pallas_kernels.attention import tiles

  words, steps = tiles.walk(spec, tiles.Vectors(), by_keys=by_keys)
  flags = words & (tiles.LIVE | tiles.NEAR | tiles.MASKED | tiles.CUT)
  counts = [int(np.sum(flags == each)) for each in spec.tile_classes]
  return counts, spec.num_kv if by_keys else spec.num_q, steps


def kernel_cycles(
  sizes: tuple[list[int], list[int], int], bias: tuple[int, ...], counts: list[int], blocks, steps
) -> int:
  """`bias`: which of the regions before and after the tiles run once for a head, not for each block."""
  inner, side, rest = sizes
  if len(inner) != len(counts):  # splash: masked and clear tiles in one region or two, in no known order
    inner = [min(inner), max(inner)][: len(counts)]
  once = sum(side[n] for n in bias)
  tiles = sum(n * size for n, size in zip(counts, inner, strict=True))
  return HEADS * (tiles + steps * rest + blocks * (sum(side) - once) + once)


def fusion_cycles(text: str) -> int:
  return sum(int(n) for n in re.findall(r'"estimated_cycles":"(\d+)"', text))


def measure(chip: str, length: int, block: int, causal: bool, bias: bool, splash: bool, folder: pathlib.Path) -> dict:
  """Compiles forward and forward + backward; {'forward': cycles, 'backward': cycles, …}."""
  import jax
  import jax.numpy as jnp

  from pretrain.plan import tpu_devices

  mesh = jax.make_mesh((1,), ('x',), devices=tpu_devices(chip)[:1])
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  q = jax.ShapeDtypeStruct((1, HEADS, length, HEAD_DIM), jnp.bfloat16, sharding=place)
  table = jax.ShapeDtypeStruct((32, HEADS), jnp.float32, sharding=place)
  spec, run = (splash_program if splash else our_program)(length, block, causal, bias)
  arrays = (q, q, q, q, *([table] if bias else []))
  programs = {'forward': lambda q, k, v, do, *table: run(q, k, v, *table)}

  def both(q, k, v, do, *table):
    out, back = jax.vjp(run, q, k, v, *table)
    return out, back(do)

  programs['both'] = both
  found = {'chip': chip, 'length': length, 'block': block, 'causal': causal, 'bias': bias, 'splash': splash}
  for name, program in programs.items():
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      compiled = jax.jit(program).lower(*arrays).compile()
    found |= {f'{name}_xla': fusion_cycles(compiled.as_text())}
    found |= {f'{name}_mib': round(compiled.memory_analysis().temp_size_in_bytes / 2**20, 1)}
  for kernel in (FORWARD, QUERIES, KEYS):
    sizes = regions(dumped(folder, SPLASH[kernel] if splash else f'attention_{kernel}'))
    counts = tiles_by_class(spec, by_keys=kernel == KEYS)
    found |= {f'{kernel}_tile': sizes[0], kernel: kernel_cycles(sizes, ONCE[kernel] if bias else (), *counts)}
  found['forward_total'] = found[FORWARD] + found['forward_xla']
  found['backward_total'] = found[QUERIES] + found[KEYS] + found['both_xla']
  work = 4 * HEADS * length**2 * HEAD_DIM / (2 if causal else 1)
  generation = chip.split(':')[0]
  seconds = found['forward_total'] / CORES[generation] / CLOCK_GHZ[generation] / 1e9
  return found | {'forward_tflops': round(work / seconds / 1e12, 1)}


def our_program(length: int, block: int, causal: bool, bias: bool):
  """(the tiles that it visits, a function of arrays [1, heads, length, head_dim])."""
  import jax.numpy as jnp

  from pallas_kernels.attention import tpu
  from pallas_kernels.attention.reference import RelativeBias
  from pallas_kernels.attention.tiles import Spec

  blocks = tpu.Blocks(q=block, kv=block, compute=min(block, COMPUTE))
  spec = Spec(
    heads=HEADS, group=1, q_length=length, kv_length=length, block_q=block, block_kv=block, compute=blocks.compute,
    causal=causal, segmented=False, positioned=False, scale=1.0, max_distance=128 if bias else None,
    buckets=32 if bias else 0,
  )  # fmt: skip

  def run(q, k, v, *table):
    options = {'relative_bias': RelativeBias(table[0], not causal, 128)} if bias else {}
    turn = lambda x: jnp.moveaxis(x, 1, 2)
    return turn(tpu.attention(turn(q), turn(k), turn(v), causal=causal, **options, blocks=blocks))

  return spec, run


def splash_program(length: int, block: int, causal: bool, bias: bool):
  """The same of splash, which has no bias; its separate backward kernels."""
  import jax
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

  assert not bias
  mask = splash_attention_mask.CausalMask if causal else splash_attention_mask.FullMask
  sizes = splash_attention_kernel.BlockSizes(
    block_q=block, block_kv=block, block_kv_compute=min(block, COMPUTE), block_q_dkv=block, block_kv_dkv=block,
    block_kv_dkv_compute=min(block, COMPUTE), block_q_dq=block, block_kv_dq=block, use_fused_bwd_kernel=False,
  )  # fmt: skip
  kernel = splash_attention_kernel.make_splash_mha_single_device(
    splash_attention_mask.MultiHeadMask([mask((length, length))] * HEADS), block_sizes=sizes
  )
  return our_program(length, block, causal, bias=False)[0], lambda q, k, v: jax.vmap(kernel)(q * HEAD_DIM**-0.5, k, v)


def of_chip(chip: str, length: int, blocks: list[int]) -> None:
  """Prints one line of JSON for each program."""
  folder = pathlib.Path(os.environ['DUMP'])
  cases = [(c, False, s) for c in (True, False) for s in (False, True)] + [(True, True, False), (False, True, False)]
  for block in blocks:
    for causal, bias, splash in cases:
      print(json.dumps(measure(chip, length, block, causal, bias, splash, folder)), flush=True)


def packed(length: int = 16384, mean: int = 2048, rows: int = 32) -> str:
  """Tiles visited in packed rows, as a share of the causal ones, which splash visits whatever the segments are.

  Lengths of documents are uniform in [mean / 2, 3 mean / 2]; `exact`: the share of pairs that see each other.
  """
  import jax.numpy as jnp
  import numpy as np

  from pallas_kernels.attention import tiles

  rng = np.random.default_rng(0)
  sizes = rng.integers(mean // 2, 3 * mean // 2 + 1, (rows, 2 * length // mean + 1))
  ids = np.stack([np.repeat(np.arange(len(own)) + 1, own)[:length] for own in sizes]).astype(np.int32)
  counts = np.stack([np.bincount(own, minlength=sizes.shape[1] + 1) for own in ids]).astype(float)
  lines = [f'packed: exact {(counts * (counts + 1)).sum(1).mean() / length / (length + 1):.3f}']
  for block in (256, 512, 1024):
    spec = dataclasses.replace(our_program(length, block, True, False)[0], segmented=True)
    vectors = tiles.Vectors(q_segments=jnp.asarray(ids), kv_segments=jnp.asarray(ids))
    words, steps = tiles.walk(spec, vectors, by_keys=False)
    causal, live = spec.num_q * (spec.num_q + 1) / 2, np.asarray((words & tiles.LIVE) != 0).sum(1).mean()
    lines.append(
      f'  block {block}: {live / causal:.3f} of {causal:.0f}; the grid, of the longest row: {int(steps) / causal:.3f}'
    )
  return '\n'.join(lines)


def ratios(rows: list[dict]) -> str:
  """One line for a chip and mask, each program at its own best blocks."""
  best = lambda key, bias, splash: min(r[key] for r in rows if (r['bias'], r['splash']) == (bias, splash))
  found = [best(f'{side}_total', False, False) / best(f'{side}_total', False, True) for side in ('forward', 'backward')]
  found += [
    best(f'{side}_total', True, False) / best(f'{side}_total', False, False) for side in ('forward', 'backward')
  ]
  speed = max(row['forward_tflops'] for row in rows if not row['bias'] and not row['splash'])
  mask = 'causal' if rows[0]['causal'] else 'full'
  return f'{rows[0]["chip"]:<13}{mask:<8}' + ''.join(f'{x:>17.3f}' for x in found) + f'{speed:>13.0f}'


def table(rows: list[dict]) -> str:
  lines = ['chip         mask      forward/splash  backward/splash   bias fwd/plain   bias bwd/plain     TFLOP/s']
  for place in dict.fromkeys((row['chip'], row['causal']) for row in rows):
    lines.append(ratios([row for row in rows if (row['chip'], row['causal']) == place]))
  return '\n'.join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--aot', action='store_true', required=True, help='compile for TPUs that are not there')
  parser.add_argument('--chips', default=','.join(CHIPS))
  parser.add_argument('--blocks', default='512,1024')
  parser.add_argument('--length', type=int, default=8192)
  flags = parser.parse_args()
  if 'DUMP' in os.environ:
    of_chip(flags.chips, flags.length, [int(b) for b in flags.blocks.split(',')])
    return
  rows = []
  for chip in flags.chips.split(','):
    with tempfile.TemporaryDirectory() as folder:
      options = (
        f'--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles'
      )
      own = {'LIBTPU_INIT_ARGS': options, 'DUMP': folder, 'JAX_PLATFORMS': 'cpu'}
      command = [
        sys.executable,
        __file__,
        '--aot',
        f'--chips={chip}',
        f'--blocks={flags.blocks}',
        f'--length={flags.length}',
      ]
      done = subprocess.run(command, env=os.environ | own, stdout=subprocess.PIPE, text=True, check=True)
    rows += [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{')]
    print(done.stdout, flush=True)
  print(table(rows))
  print(packed())


if __name__ == '__main__':
  main()
