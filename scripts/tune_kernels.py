"""Finds the block sizes of the attention kernels, for pallas_kernels/tuning/CHIP.json.

  python scripts/tune_kernels.py --aot [--chips v5e:2x4] [--shapes d128_causal,d128_full]   any TPU
  python scripts/tune_kernels.py --gpu                                                      the GPU of this machine

Blocks for TPUs are compared by the cycles of compiled schedules (scripts/bench/schedule.py), forward and backward
together; this machine needs no TPU. Those for a GPU are compared by time. Only the tuned entries are replaced.
"""

import argparse
import concurrent.futures
import dataclasses
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
GPU_BLOCKS = [(q, kv, w, s) for q in (32, 64, 128) for kv in (32, 64, 128) for w in (4, 8) for s in (2, 3)]
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
  """(chip, entries) of the GPU of this machine, causal. Candidates are compiled together and timed one by one."""
  import jax

  from pallas_kernels import tuned

  device = jax.devices()[0]
  chip = tuned.chip_of(device.device_kind)
  if device.platform != 'gpu' or chip is None:
    sys.exit(f'--gpu tunes the GPU of this machine, which has {device.device_kind}; use --aot for TPUs.')
  found = {}
  for head_dim in (64, 128):
    arrays = _arrays(head_dim)
    for part in (of_triton, of_triton_gradients, *([of_hopper] if chip in ('h100', 'h200') else [])):
      shape, candidates = part(head_dim)
      sizes, seconds = fastest(candidates, arrays)
      entry = found.setdefault(shape, {'length': LENGTH})
      entry |= sizes | {f'{part.__name__.removeprefix("of_")}_ms': round(seconds * 1e3, 4)}
  return chip, found


def fastest(candidates, arrays) -> tuple[dict, float]:
  """(sizes, seconds) of the fastest of (sizes, jitted function); those that do not compile are left out."""
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    compiled = list(pool.map(lambda candidate: _compiled(*candidate, arrays), candidates))
  programs = [(sizes, run) for (sizes, _), run in zip(candidates, compiled, strict=True) if run is not None]
  seconds, best = min((_time(run, arrays), n) for n, (_, run) in enumerate(programs))
  return programs[best][0], seconds


def _compiled(sizes: dict, run, arrays):
  """None, and a line on stderr, for sizes that do not fit a multiprocessor."""
  import jax

  try:
    return run.lower(*arrays).compile()
  except jax.errors.JaxRuntimeError as error:
    print(f'{sizes}: {str(error).splitlines()[0][:120]}', file=sys.stderr)
    return None


def _arrays(head_dim: int):
  import jax
  import jax.numpy as jnp

  shape = (1, LENGTH, attention.HEADS, head_dim)
  return tuple(jax.random.normal(jax.random.key(n), shape, jnp.bfloat16) for n in range(3))


def of_triton(head_dim: int):
  """(class of shapes, (sizes, a function of q, k, v) of each candidate): the forward pass."""
  return _of_triton(head_dim, '', lambda run: run)


def of_triton_gradients(head_dim: int):
  """The same, forward and backward."""
  import jax
  import jax.numpy as jnp

  return _of_triton(
    head_dim, 'grad_', lambda run: jax.grad(lambda *x: run(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2))
  )


def _of_triton(head_dim: int, prefix: str, function):
  import jax
  import jax.numpy as jnp

  from pallas_kernels.attention import gpu
  from pallas_kernels.attention.reference import Visibility

  usual, found = gpu.choose_blocks(LENGTH, LENGTH, head_dim, jnp.bfloat16), []
  for values in GPU_BLOCKS:
    sizes = dict(zip((f'{prefix}{name}' for name in ('q', 'kv', 'warps', 'stages')), values, strict=True))
    run = functools.partial(gpu.attention, see=Visibility(causal=True), blocks=dataclasses.replace(usual, **sizes))
    found.append((sizes, jax.jit(function(run))))
  return gpu.shape_class(head_dim, jnp.bfloat16), found


def of_hopper(head_dim: int):
  """The same for the forward pass of 'mosaic_gpu' (its gradient is Triton's), without candidates that do not fit."""
  import jax
  import jax.numpy as jnp

  from pallas_kernels.attention import gpu_mosaic
  from pallas_kernels.attention.reference import Visibility
  from pallas_kernels.errors import KernelError

  found = []
  for q, kv, stages in HOPPER_BLOCKS:
    blocks = gpu_mosaic.Blocks(q=q, kv=kv, stages=stages)
    try:
      gpu_mosaic.check_blocks(blocks, head_dim, LENGTH, LENGTH)
    except KernelError:
      continue
    run = functools.partial(gpu_mosaic.attention, see=Visibility(causal=True), blocks=blocks)
    found.append((vars(blocks), jax.jit(run)))
  return gpu_mosaic.shape_class(head_dim, jnp.bfloat16), found


def _time(run, arrays) -> float:
  import jax

  jax.block_until_ready(run(*arrays))
  seconds = []
  for _ in range(10):
    start = time.perf_counter()
    jax.block_until_ready(run(*arrays))
    seconds.append(time.perf_counter() - start)
  return statistics.median(seconds)


def write(chip: str, entries: dict, how: str, op: str = 'attention') -> pathlib.Path:
  """Adds `entries` of `op` to the file of `chip`."""
  path = ROOT / 'pallas_kernels' / 'tuning' / f'{chip}.json'
  path.parent.mkdir(exist_ok=True)
  whole = json.loads(path.read_text()) if path.exists() else {}
  made = {'by': how, 'date': datetime.date.today().isoformat(), 'jax': importlib.metadata.version('jax')}
  if how == 'compiled schedule':
    made['libtpu'] = importlib.metadata.version('libtpu')
  own = whole.get(op, {}) | {name: entry | made for name, entry in entries.items()}
  path.write_text(json.dumps(dict(sorted((whole | {op: dict(sorted(own.items()))}).items())), indent=2) + '\n')
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
