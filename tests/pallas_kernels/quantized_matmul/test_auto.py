"""kernels.quantized_matmul='auto' runs what was the fastest in the nearest tuned shape of the chip."""

import json

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from models.precision import RECIPES
from pallas_kernels import tuned
from pallas_kernels.errors import KernelError
from pallas_kernels.quantized_matmul.api import OP, TUNED, fastest, kind_of, quantized_matmul
from pallas_kernels.quantized_matmul.sharded import Parts
from scripts import tune_kernels
from scripts.bench import matmul

ENTRIES = {
  'forward_int8_1024x512x2048': 'tpu', 'forward_int8_8192x512x2048': 'xla',
  'dgrad_int8_stochastic_1024x2048x512': 'tpu', 'wgrad_int8_stochastic_512x1024x2048': 'xla',
}  # fmt: skip


@pytest.fixture
def write(tmp_path, monkeypatch):
  """A function that makes these the entries of v5e."""
  monkeypatch.setattr(tuned, 'FOLDER', tmp_path)
  tuned._missing.cache_clear()
  tuned._read.cache_clear()
  return lambda entries: (tmp_path / 'v5e.json').write_text(json.dumps({OP: entries}))


def on(devices: int = 1, kind: str = 'TPU v5 lite'):
  device = AbstractDevice(device_kind=kind, num_cores=1, platform='tpu')
  return jax.sharding.use_abstract_mesh(AbstractMesh((devices,), ('data',), abstract_device=device))


def bf16(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


def chosen(tokens: int, recipe: str = 'int8', divided: bool = False, **mesh) -> dict[str, str]:
  """What runs the products of `tokens` x 512 x 2048: forward, and the gradients of x and w; `divided`: with a
  description of how the mesh divides them.
  """
  x, w, g = bf16(4, tokens // 4, 512), bf16(512, 2048), bf16(4, tokens // 4, 2048)
  of_x, of_w = Parts((('data',), (), ())), Parts(((), ()), (('data',), ()))
  sides = {
    'forward': (x, w, ((2,), (0,)), (of_x, of_w)), 'dgrad': (g, w, ((2,), (1,)), (of_x, of_w)),
    'wgrad': (x, g, ((0, 1), (0, 1)), (of_x, of_x)),
  }  # fmt: skip
  with on(**mesh):
    return {
      name: fastest(a, b, RECIPES[recipe].pairs[name], dims, parts if divided else None)
      for name, (a, b, dims, parts) in sides.items()
    }


def test_a_product_without_an_entry_is_logged_with_the_program_that_writes_one(write, caplog):
  write({})
  with caplog.at_level('INFO', 'pallas_kernels.tuned'):
    assert set(chosen(1024).values()) == {'xla'}
  (said,) = [line for line in caplog.messages if 'forward_int8' in line]
  assert said.endswith('on TPU v5 lite, the default is used; scripts/bench/matmul.py --aot --write finds one.')


def test_each_product_runs_what_its_own_entry_names(write):
  write({key: {'implementation': name} for key, name in ENTRIES.items()})
  assert chosen(1024) == {'forward': 'tpu', 'dgrad': 'tpu', 'wgrad': 'xla'}
  assert chosen(2048)['forward'] == 'tpu'  # nearer to 1024 than to 8192, as ratios
  assert chosen(4096)['forward'] == 'xla'
  run = lambda tokens: quantized_matmul(
    jnp.zeros((tokens, 512), jnp.bfloat16), jnp.zeros((512, 2048), jnp.bfloat16), RECIPES['int8']
  )
  with on():
    assert ['pallas_call' in str(jax.make_jaxpr(lambda own=n: run(own))()) for n in (1024, 8192)] == [True, False]


@pytest.mark.parametrize(
  'options', [{'devices': 4}, {'recipe': 'mxfp8'}, {'recipe': 'fp8'}, {'recipe': 'fp8_delayed'}, {'kind': 'TPU v2'}],
  ids=str,
)  # fmt: skip
def test_xla_runs_where_the_kernel_cannot_or_nothing_was_tuned(write, options):
  write({key: {'implementation': 'tpu'} for key in ENTRIES})
  assert chosen(1024, **options) == {'forward': 'xla', 'dgrad': 'xla', 'wgrad': 'xla'}


@pytest.mark.parametrize(('devices', 'prefix'), [(1, ''), (4, 'divided_')])
@pytest.mark.parametrize(
  ('entry', 'expected'),
  [
    ('1024x512x2048', 'tpu'), ('8192x512x2048', 'tpu'), ('128x512x2048', 'tpu'),
    ('8193x512x2048', 'xla'), ('127x512x2048', 'xla'), ('1024x63x2048', 'xla'), ('1024x4097x2048', 'xla'),
    ('1024x512x255', 'xla'), ('1024x512x16385', 'xla'), ('8192x4096x256', 'tpu'),
  ],
)  # fmt: skip
def test_an_entry_counts_up_to_a_factor_of_eight_in_each_size(write, entry, expected, devices, prefix, caplog):
  """Of 1,024 x 512 x 2,048 on a device. Beyond, XLA's own product runs, which is logged once for each shape."""
  write({f'{prefix}forward_int8_{entry}': {'implementation': 'tpu'}})
  with caplog.at_level('INFO', 'pallas_kernels.tuned'):
    own = [chosen(1024 * devices, devices=devices, divided=devices > 1)['forward'] for _ in range(2)]
  assert own == [expected] * 2
  said = [line for line in caplog.messages if f'{prefix}forward_int8' in line]
  assert said == (expected == 'xla') * [
    f'quantized_matmul: no tuned entry for {prefix}forward_int8 within a factor of 8 of 1024x512x2048 on TPU v5 lite, '
    'the default is used; scripts/bench/matmul.py --aot --write finds one.'
  ]


def test_of_far_and_near_entries_the_near_ones_count(write):
  write({f'forward_int8_{key}': {'implementation': name} for key, name in (
    ('64x512x2048', 'xla'), ('4096x4096x16384', 'tpu'), ('128x64x256', 'xla'))})  # fmt: skip
  assert chosen(1024)['forward'] == 'tpu'
  assert chosen(128)['forward'] == 'xla'


def test_xla_runs_where_no_tiles_fit(write):
  """Codes of 128 rows and all tokens, which the gradient of w keeps, take 128 MiB of the 90 that tiles may have."""
  kinds = (
    'forward_fp8_e4m3_{0}x512x2048',
    'dgrad_fp8_e5m2_fp8_e4m3_{0}x2048x512',
    'wgrad_fp8_e4m3_fp8_e5m2_512x{0}x2048',
  )
  write({kind.format(2**19): {'implementation': 'tpu'} for kind in kinds})
  assert chosen(2**19, 'fp8') == {'forward': 'tpu', 'dgrad': 'tpu', 'wgrad': 'tpu'}
  assert chosen(2**20, 'fp8') == {'forward': 'tpu', 'dgrad': 'tpu', 'wgrad': 'xla'}


def test_several_devices_have_entries_of_their_own_by_the_shape_of_one_part(write):
  """Tokens are divided by four."""
  write(
    {f'divided_{key}': {'implementation': name} for key, name in ENTRIES.items()}
    | {key: {'implementation': 'xla'} for key in ENTRIES}
  )
  assert chosen(4096, devices=4, divided=True) == {'forward': 'tpu', 'dgrad': 'tpu', 'wgrad': 'xla'}
  assert chosen(16384, devices=4, divided=True)['forward'] == 'xla'
  assert set(chosen(1024, devices=1, divided=True).values()) == {'xla'}
  assert set(chosen(4096, devices=3, divided=True).values()) == {'xla'}, 'three do not divide the rows'
  assert set(chosen(480, devices=4, divided=True).values()) == {'xla'}, 'a part has 120 tokens, no whole lanes'


@pytest.mark.parametrize(
  ('key', 'entry'),
  [
    ('forward_int8_1024x512x2048', {'implementation': 'cuda'}),
    ('forward_int8_1024x512', {'implementation': 'tpu'}),
    ('forward_int8_1024x0x5', {'implementation': 'tpu'}),
    ('forward_int8_1024x512x2048', 'tpu'),
  ],
)
def test_a_damaged_entry_is_a_one_line_error(write, key, entry):
  write({key: entry})
  with pytest.raises(
    KernelError, match=rf'are damaged \(quantized_matmul.{key} = .* lacks one of xla, tpu, or a shape'
  ):
    chosen(1024)


def test_the_bench_writes_the_faster_implementation_beside_other_entries(write, tmp_path, monkeypatch):
  kinds = list(matmul.products('int8', 1024, 512, 2048))
  assert kinds == ['forward_int8', 'dgrad_int8_stochastic', 'wgrad_int8_stochastic']
  assert list(matmul.products('int8', 1024, 512, 2048, devices=4)) == [f'divided_{kind}' for kind in kinds]
  rows = [
    {'key': f'{kind}_1024x512x2048', 'implementation': name, 'cycles': cycles}
    for kind, cycles_of in zip(kinds, ((7, 5), (5, 7), (9, 8)), strict=True)
    for name, cycles in zip(TUNED, cycles_of, strict=True)
  ]
  rows.append({'key': 'forward_int8_1x1x1', 'implementation': 'tpu', 'error': 'does not compile'})
  monkeypatch.setattr(tune_kernels, 'ROOT', tmp_path)
  (tmp_path / 'pallas_kernels/tuning').mkdir(parents=True)
  path = tmp_path / 'pallas_kernels/tuning/v5e.json'
  path.write_text(json.dumps({'attention': {'d128_full': {'q': 512}}}))
  assert tune_kernels.write('v5e', matmul.winners(rows), 'time', OP) == path
  found = json.loads(path.read_text())
  assert found['attention'] == {'d128_full': {'q': 512}}
  assert {key: entry['implementation'] for key, entry in found[OP].items()} == {
    'forward_int8_1024x512x2048': 'tpu', 'dgrad_int8_stochastic_1024x512x2048': 'xla',
    'wgrad_int8_stochastic_1024x512x2048': 'tpu',
  }  # fmt: skip
  assert found[OP]['forward_int8_1024x512x2048'] | {'date': ''} == {
    'implementation': 'tpu', 'tpu': 5, 'xla': 7, 'by': 'time', 'jax': jax.__version__, 'date': ''
  }  # fmt: skip


def test_shipped_entries_name_an_implementation_of_a_product_that_a_recipe_has():
  dims = {'forward': ((1,), (0,)), 'dgrad': ((1,), (1,)), 'wgrad': ((0,), (0,))}
  pairs = [(name, pair) for recipe in RECIPES.values() if recipe for name, pair in recipe.pairs.items()]
  known = {kind_of(pair, dims[name], parts) for name, pair in pairs for parts in (None, (Parts(()), Parts(())))}
  for path in tuned.FOLDER.glob('*.json'):
    for key, entry in json.loads(path.read_text()).get(OP, {}).items():
      kind, _, shape = key.rpartition('_')
      assert kind in known
      assert len([int(n) for n in shape.split('x')]) == 3
      assert entry['implementation'] == min(TUNED, key=lambda name, own=entry: own.get(name, float('inf')))
