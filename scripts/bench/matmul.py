"""Quantized products on TPUs that this machine does not have: cycles of compiled programs, ours and XLA's own.

  python scripts/bench/matmul.py --aot [--chips v5e:2x4,v6e:2x4] [--shapes 1024x4096x4096] [--write [--several]]
  python scripts/bench/matmul.py --gpu    the GPU of this machine (gpu/matmul.py)

`schedule.py` defines the cycles. A shape is tokens x inputs x outputs, on one device. For bfloat16 and for codes: the
product alone; `quantized`: of bfloat16 matrices that the product quantizes, with the search for their scales by XLA
(`amax`). Ratios are to the faster bfloat16 product; `added` is what rounding inside our kernel costs it.

`--write` compiles the three products of a weight instead, as the chip's recipe quantizes them, by XLA and by our
kernel, and puts the faster one of each into pallas_kernels/tuning/CHIP.json: kernels.quantized_matmul='auto' runs it.
With `--several` on all devices of the slice, which divide the tokens and where the weight is stored its rows.
"""

import argparse
import functools
import hashlib
import json
import os
import pathlib
import sys
from unittest import mock

sys.path.insert(
  0, str(pathlib.Path(__file__).resolve().parents[2])
)  # before this folder, whose data.py would be `data`

import schedule

from scripts import tune_kernels
from scripts.bench.gpu import matmul as matmul_gpu

SHAPES = '1024x4096x4096'
KERNEL = 'quantized_matmul'
# The formats that pay on a chip: docs/precision.md.
RECIPES = {'v5e': 'int8', 'v5p': 'int8', 'v6e': 'int8', 'tpu7x': 'fp8'}
FORMATS = {'v5e': ('int8', 'int4'), 'v5p': ('int8', 'int4'), 'v6e': ('int8', 'int4'), 'tpu7x': ('fp8_e4m3',)}


def programs(formats: tuple[str, ...]) -> dict:
  """{name: (function of two matrices, their dtype)}."""
  import jax
  import jax.numpy as jnp

  from pallas_kernels.quantized_matmul import sharded, tpu, xla
  from pallas_kernels.quantized_matmul.formats import Operand

  bare = lambda x, w: tpu.matmul(tpu.Matrix(x, 1), tpu.Matrix(w, 0), (None, None), dtype=jnp.bfloat16)
  dot = lambda wide, x, w: jax.lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=wide)
  found = {
    'bf16 kernel': (bare, jnp.bfloat16),
    'bf16 xla': (functools.partial(dot, jnp.bfloat16), jnp.bfloat16),
  }
  for name in formats:
    operand = Operand(name)
    held = jnp.int8 if operand.element.is_integer else operand.element.dtype
    wide = jnp.int32 if operand.element.is_integer else jnp.float32

    def quantized(product, operand, x, w):
      return product((x, None), (w, None), (operand, operand), ((1,), (0,))).astype(jnp.bfloat16)

    found |= {
      f'{name} kernel': (bare, held),
      f'{name} xla': (functools.partial(dot, wide), held),
      f'{name} kernel quantized': (functools.partial(quantized, sharded.product, operand), jnp.bfloat16),
      f'{name} xla quantized': (functools.partial(quantized, xla.product, operand), jnp.bfloat16),
    }
  return found


def products(recipe: str, m: int, k: int, n: int, devices: int = 1) -> dict:
  """{class of the product: (function of an implementation and two bfloat16 matrices, (rows, sum, columns), shapes,
  divisions)} of the three products of a weight [k, n] with m tokens on each device. On several devices they divide the
  tokens, and the rows of the weight where it is stored; `divisions` are those of the arrays as they come.
  """
  import jax
  import jax.numpy as jnp

  from models.precision import RECIPES as known
  from pallas_kernels.quantized_matmul import api
  from pallas_kernels.quantized_matmul.rounding import Noise
  from pallas_kernels.quantized_matmul.sharded import Parts

  whole, axis, tokens = (), ('x',), m * devices
  rows, weight = Parts((axis, whole)), Parts((whole, whole), (axis, whole))
  sides = {
    'forward': (((tokens, k), (k, n)), ((1,), (0,)), (m, k, n), (rows, weight)),
    'dgrad': (((tokens, n), (k, n)), ((1,), (1,)), (m, n, k), (rows, weight)),
    'wgrad': (((tokens, k), (tokens, n)), ((0,), (0,)), (k, m, n), (rows, rows)),
  }
  found = {}
  for name, (shapes, dims, sizes, parts) in sides.items():
    pair = known[recipe].pairs[name]

    def run(implementation, a, b, pair=pair, dims=dims, parts=parts):
      noise = [Noise(jnp.uint32(seed), api.index(x.shape[:1])[:, None], api.index(x.shape[1:])[None])
               for seed, x in enumerate((a, b))]  # fmt: skip
      own = {'parts': parts} if implementation in api.KERNELS else {}
      out = api.IMPLEMENTATIONS[implementation]((a, noise[0]), (b, noise[1]), pair, dims, **own).astype(jnp.bfloat16)
      # Rows are divided: those of tokens, and those of the gradient of the weight, as it is stored.
      return jax.lax.with_sharding_constraint(out, jax.sharding.PartitionSpec('x')) if devices > 1 else out

    stored = tuple(part.stored or part.entries for part in parts)
    found[api.kind_of(pair, dims, parts if devices > 1 else None)] = run, sizes, shapes, stored
  return found


def compare(chip: str, shapes: list[tuple[int, int, int]], several: bool) -> None:
  """Prints one line of JSON for each product and implementation, with the key of its entry."""
  import jax
  import jax.numpy as jnp

  from pallas_kernels.errors import KernelError
  from pallas_kernels.quantized_matmul.api import TUNED
  from pretrain.tools.plan import tpu_devices

  folder, calls, name_of = pathlib.Path(os.environ['DUMP']), recorded(), chip.split(':')[0]
  devices = len(tpu_devices(chip)) if several else 1
  for shape in shapes:
    for kind, (run, sizes, arrays, stored) in products(RECIPES[name_of], *shape, devices).items():
      for name in TUNED:
        row = {'key': f'{kind}_{"x".join(map(str, sizes))}', 'implementation': name}
        calls.clear()
        try:
          program = compiled(chip, functools.partial(run, name), arrays, jnp.bfloat16, stored if several else None)
        except (jax.errors.JaxRuntimeError, KernelError) as error:
          print(json.dumps(row | {'error': str(error).splitlines()[0][:200]}), flush=True)
          continue
        own = newest(calls, folder, name_of) if name == 'tpu' else 0
        print(json.dumps(row | {'cycles': own + schedule.fusion_cycles(program.as_text())}), flush=True)


def winners(rows: list[dict]) -> dict:
  """{key: the implementation with the fewest cycles, and the cycles of each}."""
  found = {}
  for row in sorted((row for row in rows if 'cycles' in row), key=lambda row: row['cycles']):
    entry = found.setdefault(row['key'], {'implementation': row['implementation']})
    entry[row['implementation']] = row['cycles']
  return found


def compiled(chip: str, run, shapes, dtype, divisions=None):
  """`run` on arrays of these shapes on one device, or with `divisions` (mesh axes of each dim) on the slice, with
  the options of a train step.
  """
  import jax

  from pretrain.devices.chip_options import of_chip
  from pretrain.tools.plan import tpu_devices

  devices = tpu_devices(chip) if divisions else tpu_devices(chip)[:1]
  mesh = jax.make_mesh((len(devices),), ('x',), devices=devices, axis_types=(jax.sharding.AxisType.Auto,))
  place = lambda entries: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*(n or None for n in entries)))
  places = map(place, divisions or ((),) * len(shapes))
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    arrays = (jax.ShapeDtypeStruct(shape, dtype, sharding=at) for shape, at in zip(shapes, places, strict=True))
    options = of_chip(chip.split(':')[0]) if divisions else {}
    # A function of its own, so that it is traced, and its kernel recorded, even where an equal one was before.
    return jax.jit(functools.partial(run)).lower(*arrays).compile(compiler_options=options)


def recorded() -> dict:
  """{name: Call}, filled while programs are traced. Kernels that differ in anything have different names, by which they
  go in the compiled text and in the files of their schedules; nothing else of them changes.
  """
  from jax.experimental import pallas as pl

  from pallas_kernels.quantized_matmul import tpu

  found, own, plain = {}, tpu.Call.run, pl.pallas_call

  def run(self, arrays, specs, interpret):
    name = name_of(self, arrays)
    found[name] = self
    with mock.patch.object(pl, 'pallas_call', lambda *args, **options: plain(*args, **options | {'name': name})):
      return own(self, arrays, specs, interpret)

  tpu.Call.run = run
  return found


def name_of(call, arrays) -> str:
  """With a hash of all that the kernel's program depends on: product, tiles, and shapes and dtypes of its operands."""
  operands = [(x.shape, str(x.dtype)) for x in arrays]
  return f'{KERNEL}_{hashlib.sha256(repr((call, operands)).encode()).hexdigest()[:16]}'


def kernel_cycles(call, path: pathlib.Path, chip: str) -> int:
  """The largest of three: bundles over the grid, the bytes that its tiles move over the bandwidth of HBM, and its
  multiplications at the chip's peak.

  Loops inside a step make codes, of the first matrix once for a block of rows, and multiply with some columns at a
  time. Two cores share the blocks of rows.
  """
  import jax.numpy as jnp

  from pallas_kernels.quantized_matmul.blocks import CHIPS

  rows, columns, steps = call.grid
  makers = [side for side in call.sides if side.is_copied and side.turns > 1]
  turns = [side.turns / columns if side.kept else side.turns for side in makers]
  turns += [call.turns] if call.turns > 1 else []
  step, inside = schedule.loops(path, rows * columns * steps, len(turns))
  # The compiler writes out loops of a few turns: they are in `step`.
  for _ in range(len(turns) - len(inside)):
    turns.remove(min(turns))
  bundles = step - sum(inside) + sum(n * size for n, size in zip(turns, inside, strict=True))
  whole = -(-rows // schedule.CORES[chip]) * columns * steps * bundles
  bytes_of = max(jnp.dtype(side.held).itemsize for side in call.sides)  # numbers of two bytes take twice as long
  products = call.of.m * call.of.k * call.of.n * bytes_of / CHIPS[chip].products
  return round(max(whole, call.tiles.bytes_moved(call.of) / CHIPS[chip].rate, products))


def newest(calls: dict, folder: pathlib.Path, chip: str) -> int:
  """The cycles of the only kernel that was traced since the last time."""
  (call,) = calls.values()
  calls.clear()
  return kernel_cycles(call, schedule.dumped(folder, KERNEL), chip)


def of_chip(chip: str, shapes: list[tuple[int, int, int]]) -> None:
  """Prints one line of JSON for each program."""
  import jax

  from pallas_kernels.errors import KernelError

  folder, calls, name_of = pathlib.Path(os.environ['DUMP']), recorded(), chip.split(':')[0]
  for m, k, n in shapes:
    for name, (run, dtype) in programs(FORMATS[chip.split(':')[0]]).items():
      row = {'chip': chip, 'shape': f'{m}x{k}x{n}', 'program': name}
      calls.clear()
      try:
        program = compiled(chip, run, ((m, k), (k, n)), dtype)
      except (jax.errors.JaxRuntimeError, KernelError) as error:
        print(json.dumps(row | {'error': str(error).splitlines()[0][:200]}), flush=True)
        continue
      own = newest(calls, folder, name_of) if 'kernel' in name else 0
      other = schedule.fusion_cycles(program.as_text())
      print(json.dumps(row | {'kernel': own, 'xla': other, 'cycles': own + other}), flush=True)


def shown(row: dict, others: dict, least: int) -> str:
  if 'error' in row:
    return f'{"does not compile":>18}'
  text, name = f'{row["cycles"]:>10}{row["cycles"] / least:>8.3f}', row['program']
  if not name.endswith('kernel quantized'):
    return text
  codes = others[name.removesuffix(' quantized')]['kernel']
  return text + f'{row["xla"]:>10}{row["kernel"] / least:>9.3f}{row["kernel"] / codes - 1:>+8.1%}'


def table(rows: list[dict]) -> str:
  """A line for each program: its cycles, and their ratio to the faster product of bfloat16; `without` that search."""
  lines = [f'{"chip":<13}{"shape":<16}{"program":<28}{"cycles":>10}{"ratio":>8}{"amax":>10}{"without":>9}{"added":>8}']
  for place in dict.fromkeys((row['chip'], row['shape']) for row in rows):
    own = {row['program']: row for row in rows if (row['chip'], row['shape']) == place}
    least = min(own[f'bf16 {by}']['cycles'] for by in ('kernel', 'xla'))
    lines += [f'{place[0]:<13}{place[1]:<16}{name:<28}{shown(row, own, least)}' for name, row in own.items()]
  return '\n'.join(lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  how = parser.add_mutually_exclusive_group(required=True)
  how.add_argument('--aot', action='store_true', help='compile for TPUs that this machine does not have')
  how.add_argument('--gpu', action='store_true', help='measure the GPU of this machine')
  parser.add_argument('--chips', default=','.join(schedule.CHIPS))
  parser.add_argument('--shapes', default=SHAPES)
  parser.add_argument('--several', action='store_true', help='with --write: shapes are those of each of many devices')
  parser.add_argument('--write', action='store_true', help='write the faster implementations to pallas_kernels/tuning/')
  flags = parser.parse_args()
  if flags.several and not flags.write:
    parser.error('--several goes with --write.')
  if flags.gpu:
    for line in matmul_gpu.rows():
      print(line, flush=True)
    return
  if 'DUMP' in os.environ:
    shapes = [tuple(map(int, shape.split('x'))) for shape in flags.shapes.split(',')]
    if flags.write:
      compare(flags.chips, shapes, flags.several)
    else:
      of_chip(flags.chips, shapes)
    return
  found = schedule.at_once(
    __file__, flags.chips, [f'--shapes={flags.shapes}', *(['--write'] * flags.write), *(['--several'] * flags.several)]
  )
  if flags.write:
    for chip, rows in zip(flags.chips.split(','), found, strict=True):
      print(tune_kernels.write(chip.split(':')[0], winners(rows), 'compiled schedule', 'quantized_matmul'), flush=True)
    return
  print(table([row for rows in found for row in rows]))


if __name__ == '__main__':
  main()
