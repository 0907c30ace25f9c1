"""The TPU kernels, forward and backward, compiled without a TPU, and the temporary memory that they need."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from pallas_kernels.attention import tpu
from pallas_kernels.attention.api import choose
from pallas_kernels.attention.reference import RelativeBias
from pretrain.tools.plan import MIB, compile_for, tpu_devices
from tests.pallas_kernels.attention_cases import attend

pytestmark = pytest.mark.aot
CHIPS = ('v5e:2x4', 'v5p:2x2x1', 'v6e:2x4', 'tpu7x:2x2x1')
HEADS = 8


def compile_both(
  chip: str, length: int, *, head_dim=128, kv_heads=HEADS, block=512, dtype=jnp.bfloat16, batch=1, **options
):
  """Memory of forward and backward for packed rows with T5's bias, and prefixes if asked."""
  mesh = jax.make_mesh((1,), ('data',), axis_types=(AxisType.Auto,), devices=tpu_devices(chip)[:1])
  place = NamedSharding(mesh, PartitionSpec())
  shape = lambda dims, dtype: jax.ShapeDtypeStruct(dims, dtype, sharding=place)
  arrays = [shape((batch, n, length, head_dim), dtype) for n in (HEADS, kv_heads, kv_heads)]
  vector, table = shape((batch, length), jnp.int32), shape((32, HEADS), jnp.float32)
  blocks = tpu.Blocks(q=block, kv=block, compute=min(block, 512))

  def loss(q, k, v, table, segments, positions):
    turn = lambda x: jnp.moveaxis(x, 1, 2)
    bias = RelativeBias(table, bidirectional=False, max_distance=128)
    own = {'q_segment_ids': segments, 'kv_segment_ids': segments, 'relative_bias': bias} | options
    if own.pop('prefix', False):
      own |= {'q_positions': positions, 'kv_positions': positions, 'prefix_end': positions}
    return attend(tpu.attention, turn(q), turn(k), turn(v), causal=True, **own, blocks=blocks).astype(jnp.float32).sum()

  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    assert choose('auto', dropout=False) == 'tpu'
    assert choose('auto', dropout=True) == 'reference'
    return compile_for(jax.jit(jax.grad(loss, (0, 1, 2, 3))), (*arrays, table, vector, vector))[0]


@pytest.mark.slow
@pytest.mark.parametrize('chip', [CHIPS[0], *(pytest.param(c, marks=pytest.mark.slow) for c in CHIPS[1:])])
def test_forward_and_backward_need_memory_linear_in_the_length(chip):
  length = 2048
  memory = compile_both(chip, length)
  assert memory.temporaries < 8 * MIB, 'the scores alone would be 128 MiB in float32'


@pytest.mark.slow
@pytest.mark.parametrize('chip', CHIPS)
def test_every_feature_compiles(chip):
  narrow = compile_both(chip, 2048, head_dim=64, kv_heads=2, prefix=True, softcap=3.0, window=300, num_sinks=4)
  wide = compile_both(chip, 2048, head_dim=256, prefix=True, alibi=jnp.ones(HEADS), sink_logits=jnp.zeros(HEADS))
  odd = compile_both(chip, 1000, head_dim=48, dtype=jnp.float32)
  assert max(memory.temporaries for memory in (narrow, wide, odd)) < 12 * MIB, 'the scores alone would be 128 MiB'
  for length, dtype in ((99, jnp.bfloat16), (114, jnp.float32), (3, jnp.bfloat16)):  # end inside the only block
    compile_both(chip, length, head_dim=64, block=128, dtype=dtype, softcap=3.0)


@pytest.mark.slow
@pytest.mark.parametrize('chip', CHIPS)
def test_long_rows_need_little_memory(chip):
  """q, k and v are 64 MiB each at the larger length."""
  assert compile_both(chip, 8192).temporaries < 60 * MIB
  assert compile_both(chip, 32768).temporaries < 200 * MIB


@pytest.mark.slow
def test_lists_of_tiles_fit_scalar_memory_for_any_number_of_rows():
  memory = compile_both('v5e:2x4', 8192, head_dim=64, block=128, batch=64)
  assert memory.temporaries < 12_288 * MIB, 'the scores alone would be 128 GiB in float32'
