"""Cycles of kernels of quantized products, in schedules written by hand; and which schedule belongs to which kernel."""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels.attention import tpu as attention_tpu
from pallas_kernels.attention.reference import Visibility
from pallas_kernels.errors import KernelError
from pallas_kernels.quantized_matmul import sharded, tpu
from pallas_kernels.quantized_matmul.blocks import Blocks, Shape
from pallas_kernels.quantized_matmul.formats import Operand

BENCH = pathlib.Path(__file__).resolve().parents[2] / 'scripts' / 'bench'
sys.path.insert(0, str(BENCH))
try:
  from scripts.bench import end_to_end
finally:
  sys.path.remove(str(BENCH))
matmul, schedule = end_to_end.matmul, end_to_end.schedule

INT8, E4M3 = Operand('int8'), Operand('fp8_e4m3', scale='tensor')


def written(path: pathlib.Path, *blocks: tuple[str, int]) -> pathlib.Path:
  """A schedule of (text, number of bundles); the text goes into the first bundle."""
  lines = [f'{{ {text if n == 0 else ""} }}' for text, count in blocks for n in range(count)]
  path.write_text('\n'.join(f' {hex(n)} : > {line}' for n, line in enumerate(lines)))
  return path


def loop(number: int, size: int, *inside: tuple[str, int]) -> list[tuple[str, int]]:
  """`size` bundles, of which the last five are the branch back, and what runs even if it is taken."""
  rest = size - 1 - 5 - sum(count for _, count in inside)
  return [(f'/* Start region {number} */', 1), *inside, ('x', rest), (f'sbr.rel (!%p2) target = $region{number}', 5)]


def step(codes: int, copy: int, products: int) -> list[tuple[str, int]]:
  """A loop over the grid with three loops inside, of which each has so many bundles (0: none), and 39 beside them."""
  sizes = {2: codes, 3: copy, 4: products}
  inner = [block for number, size in sizes.items() if size for block in loop(number, size)]
  return [*loop(5, 12), ('before', 7), *loop(1, 39 + sum(sizes.values()), ('y', 10), *inner), ('after', 3)]


def test_a_step_has_its_longest_loops_in_the_order_of_the_code(tmp_path):
  """The loop over the grid is the outermost; one before it is no part of a step."""
  path = written(tmp_path / 'kernel', *step(50, 20, 30))
  found = [schedule.loops(path, 8, number) for number in range(5)]
  assert found == [(139, []), (139, [50]), (139, [50, 30]), (139, [50, 20, 30]), (139, [50, 20, 30])]


def test_a_grid_of_one_step_has_no_loop(tmp_path):
  path = written(tmp_path / 'kernel', ('before', 7), *loop(2, 30), ('y', 4), *loop(3, 50), ('after', 3))
  whole = 7 + 30 + 4 + 50 + 3
  assert [schedule.loops(path, 1, number) for number in (1, 2)] == [(whole, [50]), (whole, [30, 50])]


def call(of: Shape, tiles: Blocks, held=jnp.int8, operand: Operand | None = INT8) -> tpu.Call:
  """x[m, k], which is rounded in the kernel if it has an `operand`, times codes of w[k, n]."""
  x = tpu.Side(operand, 1, (tiles.m, tiles.k), 0, held, kept=1 if operand else 0)
  w = tpu.Side(None, 0, (tiles.k, tiles.n), 1, held)
  return tpu.Call(of, tiles, (x, w), False, jnp.int32, jnp.bfloat16, None)


# Two blocks of rows and two of columns. Codes of 128 rows, made in two turns for the first of both columns alone;
# columns of 1,024 are multiplied in two turns of 512.
QUANTIZED = call(Shape(256, 256, 2048, 2, 1, 2, kept=True, copied=False), Blocks(128, 256, 1024))
BYTES = 256 * 256 * 2 + 2 * 256 * 2048 + 256 * 2048 * 2  # w is read for each block of rows


@pytest.mark.parametrize(
  ('chip', 'blocks', 'expected'),
  [
    ('v6e', step(3000, 20, 5000), 4 * (39 + 20 + 3000 * 2 / 2 + 5000 * 2)),
    ('v5p', step(3000, 20, 5000), 2 * (39 + 20 + 3000 * 2 / 2 + 5000 * 2)),  # its cores have one block of rows each
    ('v6e', step(0, 0, 5000), 4 * (39 + 5000 * 2)),  # the loop that makes codes is written out
    ('v6e', step(30, 0, 50), BYTES / (1640 / 1.75)),  # what is read and written takes longer
  ],
  ids=['bundles', 'cores', 'written out', 'bytes'],
)
def test_a_kernel_takes_its_bundles_or_its_bytes(tmp_path, chip, blocks, expected):
  assert matmul.kernel_cycles(QUANTIZED, written(tmp_path / 'kernel', *blocks), chip) == round(expected)


@pytest.mark.parametrize(('held', 'bytes_of'), [(jnp.int8, 1), (jnp.bfloat16, 2)], ids=str)
def test_a_kernel_takes_no_less_than_its_products_at_the_peak(tmp_path, held, bytes_of):
  """1,836 TOPS of int8 at 1.75 GHz, half of them in bfloat16."""
  own = call(Shape(4096, 4096, 4096, 1, 1, 2, kept=False, copied=False), Blocks(2048, 4096, 2048), held, operand=None)
  path = written(tmp_path / 'kernel', *step(0, 0, 50))
  assert matmul.kernel_cycles(own, path, 'v6e') == round(4096**3 * bytes_of / (1836e12 / 1.75e9 / 2))


@pytest.fixture
def calls(monkeypatch):
  monkeypatch.setattr(tpu.Call, 'run', tpu.Call.run)  # is put back after the test
  return matmul.recorded()


def test_products_of_a_square_weight_have_a_name_for_each_program(calls):
  """x w and x w^T in fp8 have operands of equal shapes (codes of w are made before, for there are more rows than a tile
  has), and sum over another dim of w. The text that is compiled has the names.
  """
  mesh = AbstractMesh((1,), ('x',), abstract_device=AbstractDevice(device_kind='TPU7x', num_cores=1, platform='tpu'))
  product = lambda x, w, dim: sharded.product((x, None), (w, None), (E4M3, E4M3), ((1,), (dim,)))

  def run(x, w):
    return product(product(product(x, w, 0), w, 1), w, 0)

  x, w = (jax.ShapeDtypeStruct((rows, 256), jnp.bfloat16) for rows in (4096, 256))
  with jax.sharding.use_abstract_mesh(mesh):
    text = jax.jit(run).trace(x, w).lower(lowering_platforms=('tpu',)).as_text()
  assert sorted(own.sides[1].summed for own in calls.values()) == [0, 1]
  assert all(name.startswith('quantized_matmul_') for name in calls)
  assert sorted(text.count(f'kernel_name = "{name}"') for name in calls) == [1, 2]


STEP = """HloModule step

%body (p: f32[1]) -> f32[8] {
  %quantized_matmul_0a.3 = bf16[256,2048]{1,0} custom-call(%x, %w), custom_call_target="tpu_custom_call"
  %quantized_matmul_0b = bf16[256,2048]{1,0} custom-call(%x, %w), custom_call_target="tpu_custom_call"
}

%cond (p: f32[1]) -> pred[] {
  ROOT %any = pred[]{:T(512)} compare(%i, %j), direction=NE
}

ENTRY %main (p: f32[1]) -> f32[8] {
  %while.1 = (s32[]) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %copy.1 = bf16[256,2048]{1,0} copy(%quantized_matmul_0a.4)
  ROOT %quantized_matmul_0a.4 = bf16[256,2048]{1,0} custom-call(%x, %w), custom_call_target="tpu_custom_call"
}
"""


def test_kernels_of_equal_shapes_have_schedules_of_their_own(tmp_path):
  """Three iterations of both, and one more of the first, whose two calls share a schedule."""
  for name, blocks in (('0a.4', step(3000, 0, 5000)), ('0b', step(4000, 0, 7000))):
    written(tmp_path / f'17-quantized_matmul_{name}-01-final_bundles.txt', *blocks)
    (tmp_path / f'17-quantized_matmul_{name}-00-schedule-analysis_final_bundles.txt').write_text('no schedule')
  own = {'quantized_matmul_0a': QUANTIZED, 'quantized_matmul_0b': QUANTIZED, 'quantized_matmul_0c': QUANTIZED}
  first, second = 4 * (39 + 3000 + 2 * 5000), 4 * (39 + 4000 + 2 * 7000)
  assert end_to_end.products(STEP, own, tmp_path, 'v6e') == {'quantized_matmul': (3 + 1) * first + 3 * second}
  assert end_to_end.products(STEP.replace('quantized_matmul', 'other'), own, tmp_path, 'v6e') == {}


def test_a_product_that_is_refused_is_a_row_and_the_next_one_is_tried(tmp_path, monkeypatch, capsys):
  """As one that does not compile; `KernelError` comes while the program is traced."""
  monkeypatch.setenv('DUMP', str(tmp_path))
  monkeypatch.setattr(tpu.Call, 'run', tpu.Call.run)

  def refused(*_):
    raise KernelError('no tiles\nfor it')

  monkeypatch.setattr(matmul, 'compiled', refused)
  matmul.compare('v6e:2x4', [(256, 128, 128)], several=False)
  matmul.of_chip('v6e:2x4', [(256, 128, 128)])
  rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert len(rows) > 2 * 3
  assert {row['error'] for row in rows} == {'CONFIG: no tiles'}


def test_attention_has_a_name_for_each_mask(monkeypatch):
  """A causal and a full kernel of one tile have operands of equal shapes. Two equal calls have one name."""
  monkeypatch.setattr(attention_tpu.Call, 'run', attention_tpu.Call.run)
  specs = end_to_end.recorded()
  mesh = AbstractMesh((1,), ('x',), abstract_device=AbstractDevice(device_kind='TPU v5p', num_cores=2, platform='tpu'))
  blocks = attention_tpu.Blocks(q=512, kv=512, compute=512)
  seen = lambda x, causal: attention_tpu.attention(x, x, x, Visibility(causal=causal), blocks=blocks)
  x = jax.ShapeDtypeStruct((1, 512, 2, 128), jnp.bfloat16)
  with jax.sharding.use_abstract_mesh(mesh):
    run = jax.jit(lambda x: seen(seen(seen(x, True), False), True))
    text = run.trace(x).lower(lowering_platforms=('tpu',)).as_text()
  assert sorted((kernel, spec.causal, rows) for kernel, spec, rows in specs.values()) == [
    ('forward', False, 2), ('forward', True, 2)]  # fmt: skip
  assert {spec.causal: text.count(f'kernel_name = "{name}"') for name, (_, spec, _) in specs.items()} == {
    True: 2, False: 1}  # fmt: skip
