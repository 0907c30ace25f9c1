"""Finds the block sizes of the attention kernels, for pallas_kernels/tuning/CHIP.json.

  python scripts/tune_kernels.py --aot [--chips v5e:2x4] [--shapes d128_causal,d128_full]   any TPU
  python scripts/tune_kernels.py --gpu                                                      the GPU of this machine

Blocks for TPUs are compared by the cycles of compiled schedules (scripts/bench/schedule.py), forward and backward
together; this machine needs no TPU. Those for a GPU are compared by time. Only the tuned entries are replaced.
"""

import argparse
import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
import statistics
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / 'bench'))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # first, because bench/ has a file data.py

import attention
import schedule

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHAPES = [f'd{n}_{packed}{mask}' for n in (64, 128, 256) for packed in ('', 'packed_') for mask in ('causal', 'full')]
LENGTH = 8192
SQUARES = ((512, 512), (1024, 1024))
GPU_BLOCKS = [(q, kv, grad, grad) for q in (64, 128) for kv in (32, 64, 128) for grad in (32, 64)]
HOPPER_BLOCKS = [(q, kv, stages) for q in (128, 256) for kv in (64, 128, 256) for stages in (1, 2, 3, 4)]


def cases(shape: str) -> list[attention.Case]:
  """The candidates of a class of shapes. Packed rows are documents of 2,048 in 16,384. Blocks of 256 are no candidates
  there: they compute fewer scores than 512, but take 1.3 to 1.8 times the cycles.
  """
  causal, packed = shape.endswith('causal'), 'packed' in shape
  length = attention.PACKED if packed else LENGTH
  head_dim = int(shape.split('_')[0][1:])
  return [
    attention.Case(length=length, q=q, kv=kv, causal=causal, packed=packed, head_dim=head_dim)
    for q, kv in (*SQUARES, *(() if packed else ((512, 1024),)))
  ]


def of_chip(chip: str, shapes: list[str]) -> None:
  """Prints one line of JSON for each candidate that fits."""
  folder = pathlib.Path(os.environ['DUMP'])
  for shape in shapes:
    for case in cases(shape):
      row = attention.measure(chip, case, folder, {'step': (attention.FORWARD, attention.QUERIES, attention.KEYS)})
      if 'step_total' in row:
        found = {'shape': shape, 'cycles': row['step_total'], 'compute': case.compute}
        print(json.dumps(found | row), flush=True)


def best(rows: list[dict]) -> dict:
  """{shape: the blocks with the fewest cycles, their length and cycles}."""
  found = {}
  for row in sorted(rows, key=lambda row: row['cycles'], reverse=True):
    found[row['shape']] = {name: row[name] for name in ('q', 'kv', 'compute', 'length', 'cycles')}
  return found


def by_time() -> tuple[str, dict]:
  """(chip, entries) of the GPU of this machine, causal."""
  import jax

  from pallas_kernels import tuned

  device = jax.devices()[0]
  chip = tuned.chip_of(device.device_kind)
  if device.platform != 'gpu' or chip is None:
    sys.exit(f'--gpu tunes the GPU of this machine, which has {device.device_kind}; use --aot for TPUs.')
  found = {}
  for head_dim in (64, 128):
    for shape, blocks, run in [*of_triton(head_dim), *(of_hopper(head_dim) if chip in ('h100', 'h200') else [])]:
      entry = vars(blocks) | {'length': LENGTH, 'seconds': _time(run, _arrays(head_dim))}
      found[shape] = min(found.get(shape, entry), entry, key=lambda entry: entry['seconds'])
  return chip, found


def _arrays(head_dim: int):
  import jax.numpy as jnp

  return (jnp.ones((1, LENGTH, attention.HEADS, head_dim), jnp.bfloat16),) * 3


def of_triton(head_dim: int):
  """(class of shapes, blocks, a function of q, k, v: forward and backward) of each candidate."""
  import jax
  import jax.numpy as jnp

  from pallas_kernels.attention import gpu
  from pallas_kernels.attention.reference import Visibility

  see = Visibility(causal=True)
  for sizes in GPU_BLOCKS:
    blocks = gpu.Blocks(**dict(zip(('q', 'kv', 'grad_q', 'grad_kv'), sizes, strict=True)))
    loss = lambda q, k, v, blocks=blocks: gpu.attention(q, k, v, see, blocks=blocks).astype(jnp.float32).sum()
    yield gpu.shape_class(head_dim, jnp.bfloat16), blocks, jax.jit(jax.grad(loss, (0, 1, 2)))


def of_hopper(head_dim: int):
  """The same for the forward pass of 'mosaic_gpu' (its gradient is Triton's), without candidates that do not fit."""
  import jax
  import jax.numpy as jnp

  from pallas_kernels.attention import gpu_mosaic
  from pallas_kernels.attention.reference import Visibility
  from pallas_kernels.errors import KernelError

  for q, kv, stages in HOPPER_BLOCKS:
    blocks = gpu_mosaic.Blocks(q=q, kv=kv, stages=stages)
    try:
      gpu_mosaic.check_blocks(blocks, head_dim, LENGTH, LENGTH)
    except KernelError:
      continue
    run = functools.partial(gpu_mosaic.attention, see=Visibility(causal=True), blocks=blocks)
    yield gpu_mosaic.shape_class(head_dim, jnp.bfloat16), blocks, jax.jit(run)


def _time(run, arrays) -> float:
  import jax

  jax.block_until_ready(run(*arrays))
  seconds = []
  for _ in range(10):
    start = time.perf_counter()
    jax.block_until_ready(run(*arrays))
    seconds.append(time.perf_counter() - start)
  return statistics.median(seconds)


def write(chip: str, entries: dict, how: str) -> pathlib.Path:
  """Adds `entries` of attention to the file of `chip`."""
  path = ROOT / 'pallas_kernels' / 'tuning' / f'{chip}.json'
  path.parent.mkdir(exist_ok=True)
  old = json.loads(path.read_text()).get('attention', {}) if path.exists() else {}
  made = {'by': how, 'date': datetime.date.today().isoformat(), 'jax': importlib.metadata.version('jax')}
  if how == 'compiled schedule':
    made['libtpu'] = importlib.metadata.version('libtpu')
  own = {'attention': dict(sorted((old | {name: entry | made for name, entry in entries.items()}).items()))}
  path.write_text(json.dumps(own, indent=2) + '\n')
  return path


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  how = parser.add_mutually_exclusive_group(required=True)
  how.add_argument('--aot', action='store_true', help='for TPUs that this machine does not have, by compiled schedule')
  how.add_argument('--gpu', action='store_true', help='for the GPU of this machine, by time')
  parser.add_argument('--chips', default=','.join(schedule.CHIPS))
  parser.add_argument('--shapes', default=','.join(SHAPES))
  flags = parser.parse_args()
  if 'DUMP' in os.environ:
    of_chip(flags.chips, flags.shapes.split(','))
    return
  if flags.gpu:
    print(write(*by_time(), 'time'))
    return
  found = schedule.at_once(__file__, flags.chips, [f'--shapes={flags.shapes}'])
  for chip, rows in zip(flags.chips.split(','), found, strict=True):
    print(write(chip.split(':')[0], best(rows), 'compiled schedule'), flush=True)


if __name__ == '__main__':
  main()
