"""Attention on TPUs that this machine does not have: cycles of compiled programs, ours and jax's splash_attention.

  python scripts/bench/attention.py --aot [--chips v5e:2x4,v6e:2x4] [--blocks 512,1024] [--length 8192]
  python scripts/bench/attention.py --gpu [--length 8192]    the GPU of this machine (gpu/attention.py)

`schedule.py` defines the cycles. 8 heads of 128, bfloat16, one row; each implementation at its best blocks, the bias
also at block 512. Then rows of packed documents: the tiles that the kernel visits when it runs in an interpreter.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import sys

sys.path.insert(
  0, str(pathlib.Path(__file__).resolve().parents[2])
)  # before this folder, whose data.py would be `data`

import schedule

from scripts.bench.gpu import attention as attention_gpu

HEADS, HEAD_DIM, COMPUTE = 8, 128, 512
FORWARD, QUERIES, KEYS = 'forward', 'grad_queries', 'grad_keys_values'
# Indices of the bodies that run once for each head: they build the Toeplitz tiles first and fold their gradient last.
# They are inside the bodies of a block's first and last tile; without causality one more body surrounds the first.
ONCE = {FORWARD: (1,), QUERIES: (1, -1), KEYS: (1,)}
ONCE_FULL = {FORWARD: (2,), QUERIES: (2, -1), KEYS: (1,)}
PROGRAMS = {'forward': (FORWARD,), 'backward': (QUERIES, KEYS)}  # the second runs forward too, which is not counted
SPLASH = {FORWARD: 'fwd', QUERIES: 'dq', KEYS: 'dkv'}
DOCUMENT, PACKED, ROWS = 2048, 16384, 32  # mean length of documents, length of packed rows, number of rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  length: int
  q: int
  kv: int
  causal: bool
  bias: bool = False
  splash: bool = False
  packed: bool = False
  head_dim: int = HEAD_DIM

  @property
  def compute(self) -> int:
    return min(self.q, self.kv, COMPUTE)

  @property
  def spec(self):
    from pallas_kernels.attention.tiles import Spec

    return Spec(
      heads=HEADS, group=1, q_length=self.length, kv_length=self.length, block_q=self.q, block_kv=self.kv,
      compute=self.compute, causal=self.causal, segmented=self.packed, positioned=False, scale=1.0,
      max_distance=128 if self.bias else None, buckets=32 if self.bias else 0,
    )  # fmt: skip


def documents(length: int = PACKED, mean: int = DOCUMENT, rows: int = ROWS):
  """Segment ids int32[rows, length] of documents whose lengths are uniform in [mean / 2, 3 mean / 2]."""
  import numpy as np

  rng = np.random.default_rng(0)
  sizes = rng.integers(mean // 2, 3 * mean // 2 + 1, (rows, 2 * length // mean + 1))
  return np.stack([np.repeat(np.arange(len(own)) + 1, own)[:length] for own in sizes]).astype(np.int32)


def tiles_by_class(case: Case, by_keys: bool) -> tuple[list[float], float, float]:
  """`count` for one head; for packed rows the mean over rows."""
  import jax.numpy as jnp

  from pallas_kernels.attention import tiles

  if not case.packed:
    return count(case.spec, tiles.Vectors(), by_keys)
  ids = jnp.asarray(documents(case.length))
  return count(case.spec, tiles.Vectors(q_segments=ids, kv_segments=ids), by_keys)


def count(spec, vectors, by_keys: bool) -> tuple[list[float], float, float]:
  """(tiles of each class in the order of the code, blocks, steps), the mean over rows."""
  import numpy as np

  from pallas_kernels.attention import tiles

  words = np.asarray(tiles.walk(spec, vectors, by_keys=by_keys)[0])
  flags = words & (tiles.LIVE | tiles.NEAR | tiles.MASKED | tiles.CUT)
  counts = [float(np.sum(flags == each) / len(words)) for each in spec.tile_classes]
  steps = float(np.sum((words & (tiles.LIVE | tiles.FIRST)) != 0) / len(words))
  return counts, spec.num_kv if by_keys else spec.num_q, steps


def kernel_cycles(spec, kernel: str, sizes: tuple[list[int], list[int], int], counted, rows: int = HEADS) -> int:
  """The cycles of a kernel over `rows` heads, from the sizes of its regions and `count`."""
  (inner, side, rest), (counts, blocks, steps) = sizes, counted
  single = sum(side[n] for n in (ONCE if spec.diagonal else ONCE_FULL)[kernel]) if spec.biased else 0
  tiles = sum(n * size for n, size in zip(counts, inner, strict=True))
  return round(rows * (tiles + steps * rest + blocks * (sum(side) - single) + single))


def of_splash(sizes, case: Case, counts: list[float]):
  """(regions of splash, tiles of each): one region for all tiles, or two, clear and masked, in unknown order."""
  inner, side, rest = sizes
  clear = sum(n for n, flags in zip(counts, case.spec.tile_classes, strict=True) if flags == case.spec.tile_classes[0])
  both = [clear, sum(counts) - clear]
  return ([min(inner), max(inner)], side, rest), both if len(inner) > 1 else [sum(counts), 0]


def our_program(case: Case):
  """A function of arrays [1, heads, length, head_dim], and of a table or of segment ids."""
  import jax.numpy as jnp

  from pallas_kernels.attention import tpu
  from pallas_kernels.attention.reference import RelativeBias, Visibility

  blocks = tpu.Blocks(q=case.q, kv=case.kv, compute=case.compute)

  def run(q, k, v, *more):
    own = {'relative_bias': RelativeBias(more[0], not case.causal, 128)} if case.bias else {}
    own |= {'q_segment_ids': more[-1], 'kv_segment_ids': more[-1]} if case.packed else {}
    see = Visibility(causal=case.causal, **own)
    turn = lambda x: jnp.moveaxis(x, 1, 2)
    return turn(tpu.attention(turn(q), turn(k), turn(v), see, blocks=blocks))

  return run


def splash_program(case: Case):
  """The same for splash, without a bias, with separate backward kernels."""
  import jax
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

  assert not case.bias
  assert not case.packed
  mask = splash_attention_mask.CausalMask if case.causal else splash_attention_mask.FullMask
  sizes = splash_attention_kernel.BlockSizes(
    block_q=case.q, block_kv=case.kv, block_kv_compute=case.compute, block_q_dkv=case.q, block_kv_dkv=case.kv,
    block_kv_dkv_compute=case.compute, block_q_dq=case.q, block_kv_dq=case.kv, use_fused_bwd_kernel=False,
  )  # fmt: skip
  kernel = splash_attention_kernel.make_splash_mha_single_device(
    splash_attention_mask.MultiHeadMask([mask((case.length, case.length))] * HEADS), block_sizes=sizes
  )
  return lambda q, k, v: jax.vmap(kernel)(q * case.head_dim**-0.5, k, v)


def compile_case(chip: str, case: Case, *, backward: bool):
  import jax
  import jax.numpy as jnp

  from pretrain.tools.plan import tpu_devices

  mesh = jax.make_mesh((1,), ('x',), devices=tpu_devices(chip)[:1])
  place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  shape = lambda dims, dtype: jax.ShapeDtypeStruct(dims, dtype, sharding=place)
  q = shape((1, HEADS, case.length, case.head_dim), jnp.bfloat16)
  more = [shape((32, HEADS), jnp.float32)] if case.bias else []
  more += [shape((1, case.length), jnp.int32)] if case.packed else []
  run = (splash_program if case.splash else our_program)(case)

  def both(q, k, v, do, *more):
    out, back = jax.vjp(lambda q, k, v, *table: run(q, k, v, *table, *more[len(table) :]), q, k, v, *more[: case.bias])
    return out, back(do)

  program = both if backward else lambda q, k, v, do, *more: run(q, k, v, *more)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    return jax.jit(program).lower(q, q, q, q, *more).compile()


def measure(chip: str, case: Case, folder: pathlib.Path, programs=PROGRAMS) -> dict:
  """Compiles forward, and forward with backward; {'forward_total': cycles, 'backward_total': cycles, …}.

  A program that does not fit the memory of a core is left out.
  """
  import jax

  found = {'chip': chip, **dataclasses.asdict(case)}
  for name, kernels in programs.items():
    try:
      compiled = compile_case(chip, case, backward=name != 'forward')
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error) and 'vmem' not in str(error).lower():
        raise
      continue
    # Fusions that build lists of tiles cannot be separated from others: packed rows count only kernels.
    total = 0 if case.packed else schedule.fusion_cycles(compiled.as_text())
    found |= {f'{name}_xla': total}
    for kernel in kernels:
      sizes = schedule.regions(schedule.dumped(folder, SPLASH[kernel] if case.splash else f'attention_{kernel}'))
      counts, *rest = tiles_by_class(case, by_keys=kernel == KEYS)
      sizes, counts = of_splash(sizes, case, counts) if case.splash else (sizes, counts)
      found |= {f'{kernel}_{name}': x for name, x in zip(('tile', 'side', 'rest'), sizes, strict=True)}
      found[kernel] = kernel_cycles(case.spec, kernel, sizes, (counts, *rest))
      total += found[kernel]
    found[f'{name}_total'] = total
  return found


def tflops(row: dict) -> float:
  """Predicted, of the forward pass."""
  work = 4 * HEADS * row['length'] ** 2 * row['head_dim'] / (2 if row['causal'] else 1)
  generation = row['chip'].split(':')[0]
  seconds = row['forward_total'] / schedule.CORES[generation] / schedule.CLOCK_GHZ[generation] / 1e9
  return work / seconds / 1e12


def of_chip(chip: str, length: int, blocks: list[int]) -> None:
  """Prints one line of JSON for each program."""
  folder = pathlib.Path(os.environ['DUMP'])
  for block in sorted(blocks, reverse=True):
    for causal in (True, False):
      for bias, splash in ((False, False), (False, True), (True, False)):
        case = Case(length=length, q=block, kv=block, causal=causal, bias=bias, splash=splash)
        print(json.dumps(measure(chip, case, folder)), flush=True)


def visited(ids, block: int) -> tuple[list[int], list[int]]:
  """(tiles, scores) that the forward kernel computes for each row of segment ids, reported by the running kernel."""
  import jax
  import jax.numpy as jnp

  from pallas_kernels.attention import tpu, tpu_kernels
  from pallas_kernels.attention.reference import Visibility

  counts, sums, own = [], [], tpu_kernels._forward_piece
  blocks = tpu.Blocks(q=block, kv=block, compute=min(block, COMPUTE))

  def counted(tile, piece):
    size = (piece.queries.stop - piece.queries.start) * (piece.keys.stop - piece.keys.start)
    jax.debug.callback(lambda word: seen.append((int(word), size)), tile.word)
    own(tile, piece)

  tpu_kernels._forward_piece = counted
  try:
    for row in ids:
      seen = []
      x, segments = jnp.zeros((1, len(row), 1, 128), jnp.float32), jnp.asarray(row)[None]
      see = Visibility(causal=True, q_segment_ids=segments, kv_segment_ids=segments)
      jax.block_until_ready(tpu.attention(x, x, x, see, blocks=blocks, interpret=True))
      jax.effects_barrier()
      counts.append(len({word for word, _ in seen}))
      sums.append(sum(size for _, size in seen))
  finally:
    tpu_kernels._forward_piece = own
  return counts, sums


def packed(rows: int = 4) -> str:
  """Tiles visited in packed rows and scores computed in them, as shares of all causal tiles, which splash computes in
  full for any segments. `exact`: the share of pairs in which the query sees the key.
  """
  import numpy as np

  ids = documents()[:rows]
  counts = np.stack([np.bincount(own, minlength=ids.max() + 1) for own in ids]).astype(float)
  length = ids.shape[1]
  lines = [f'packed, {rows} rows: exact {(counts * (counts + 1)).sum(1).mean() / length / (length + 1):.3f}']
  for block in (256, 512, 1024):
    number = length // block
    causal, (found, scores) = number * (number + 1) / 2, map(np.mean, visited(ids, block))
    lines.append(
      f'  block {block}: the kernel visits {found:.1f} tiles of {causal:.0f}, {found / causal:.3f}, and computes '
      f'{scores / block**2 / causal:.3f} of the scores'
    )
  return '\n'.join(lines)


def ratios(rows: list[dict]) -> str:
  """One line for a chip and mask, each program at its best blocks; with a bias also at block 512."""

  def best(key, bias, splash, blocks=None):
    own = [r for r in rows if (r['bias'], r['splash']) == (bias, splash) and (blocks is None or r['q'] == blocks)]
    return min((r[key] for r in own if key in r), default=float('nan'))

  sides = ('forward_total', 'backward_total')
  found = [best(side, False, False) / best(side, False, True) for side in sides]
  for blocks in (None, 512):
    found += [best(side, True, False, blocks) / best(side, False, False, blocks) for side in sides]
  speed = max(tflops(row) for row in rows if not row['bias'] and not row['splash'])
  mask = 'causal' if rows[0]['causal'] else 'full'
  return f'{rows[0]["chip"]:<13}{mask:<8}' + ''.join(f'{x:>14.3f}' for x in found) + f'{speed:>10.0f}'


def table(rows: list[dict]) -> str:
  names = ('fwd/splash', 'bwd/splash', 'bias fwd', 'bias bwd', 'fwd at 512', 'bwd at 512')
  lines = ['chip         mask    ' + ''.join(f'{name:>14}' for name in names) + '   TFLOP/s']
  for place in dict.fromkeys((row['chip'], row['causal']) for row in rows):
    lines.append(ratios([row for row in rows if (row['chip'], row['causal']) == place]))
  return '\n'.join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  how = parser.add_mutually_exclusive_group(required=True)
  how.add_argument('--aot', action='store_true', help='compile for TPUs that this machine does not have')
  how.add_argument('--gpu', action='store_true', help='measure the GPU of this machine')
  parser.add_argument('--chips', default=','.join(schedule.CHIPS))
  parser.add_argument('--blocks', default='512,1024')
  parser.add_argument('--length', type=int, default=8192)
  flags = parser.parse_args()
  if flags.gpu:
    print(*attention_gpu.rows(flags.length), sep='\n')
    return
  if 'DUMP' in os.environ:
    of_chip(flags.chips, flags.length, [int(b) for b in flags.blocks.split(',')])
    return
  found = schedule.at_once(__file__, flags.chips, [f'--blocks={flags.blocks}', f'--length={flags.length}'])
  print(table([row for rows in found for row in rows]))
  print(packed())


if __name__ == '__main__':
  main()
