"""'ring' against attention in float64: values and gradients of rows that a mesh divides, in order and balanced."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from models.row_order import RowOrder
from pallas_kernels.attention.blockwise import scan
from pallas_kernels.attention.reference import RelativeBias, Visibility
from pallas_kernels.attention.ring.attention import attention
from tests.pallas_kernels.attention_cases import SMALL, draw, row
from tests.pallas_kernels.blockwise.test_blockwise import OWN, differences
from tests.pallas_kernels.test_flash import CASES, MORE, slow

VECTORS = ('q_positions', 'kv_positions', 'q_segment_ids', 'kv_segment_ids', 'prefix_end')


def on_a_ring(devices: int, balanced: bool, **more):
  """`ring` on whole arrays: laid out over `devices`, and back. Keys of another length than queries stay in order."""
  mesh = jax.make_mesh((devices,), ('sequence',), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])

  def run(q, k, v, see: Visibility, *, return_lse: bool, sink_logits=None, **options):
    order = RowOrder(devices if balanced and q.shape[1] == k.shape[1] and q.shape[1] % (2 * devices) == 0 else 1)
    row = lambda x: order._taken(jnp.broadcast_to(x, (q.shape[0], x.shape[1])), order.parts())
    index = lambda x: jnp.arange(x.shape[1])[None]
    vectors = {name: getattr(see, name) for name in VECTORS}
    if order.devices > 1:
      for name, x in (('q_positions', q), ('kv_positions', k)):
        vectors[name] = index(x) if vectors[name] is None else vectors[name]
    vectors = {name: row(x) for name, x in vectors.items() if x is not None}
    table = None if see.relative_bias is None else see.relative_bias.table
    rest = {'table': table, 'alibi': see.alibi, 'sinks': sink_logits}

    def own(q, k, v, vectors, rest):
      bias = None if rest['table'] is None else RelativeBias(
        rest['table'], see.relative_bias.bidirectional, see.relative_bias.max_distance
      )  # fmt: skip
      mine = dataclasses.replace(see, **vectors, relative_bias=bias, alibi=rest['alibi'])
      return attention(q, k, v, mine, axis='sequence', return_lse=True, sink_logits=rest['sinks'], **options, **more)

    of_tokens = P(None, 'sequence')
    ins = (of_tokens, of_tokens, of_tokens, of_tokens, P())
    divided = jax.shard_map(own, mesh=mesh, in_specs=ins, out_specs=(of_tokens, of_tokens), check_vma=False)
    arrays = (order._taken(x, order.parts()) for x in (q, k, v))
    return tuple(order.restore(x) for x in divided(*arrays, vectors, rest))

  return run


FAST = ('every feature',)
WITH_BIAS = {name for name, case in (OWN | CASES | MORE).items() if 'relative_bias' in case[2]}


def near(case: str) -> float:
  """The gradient of a table of biases sums over all pairs of tokens: 2.6e-6 from float64 on some CPUs."""
  return 5e-6 if case in WITH_BIAS else 2e-6


@pytest.mark.parametrize('case', [*FAST, *(slow(case) for case in OWN | CASES | MORE if case not in FAST)])
def test_values_and_gradients_are_those_of_float64(case):
  wrong = differences(case, run=on_a_ring(4, balanced=True), blocks=(32, 16))
  assert max(wrong.values()) < near(case), wrong


@pytest.mark.slow
@pytest.mark.parametrize(('devices', 'balanced'), [(2, True), (2, False), (4, False)])
@pytest.mark.parametrize('case', OWN | CASES | MORE)
def test_neither_devices_nor_order_change_the_answer(case, devices, balanced):
  wrong = differences(case, run=on_a_ring(devices, balanced), blocks=(64, 64))
  assert max(wrong.values()) < near(case), wrong


BY_KERNEL = [case for case in OWN | CASES | MORE if case not in WITH_BIAS]


@pytest.mark.slow
@pytest.mark.parametrize('case', BY_KERNEL)
def test_by_the_kernel_for_tpus_too(case):
  """In its interpreter; slopes have no gradient there."""
  run = on_a_ring(2, balanced=True, kernel=True, interpret=True)
  wrong = differences(case, run=run, blocks=SMALL)
  wrong.pop('dalibi', None)
  assert max(wrong.values()) < 3e-6, wrong


def tiles_of(segments: np.ndarray, devices: int, balanced: bool, block: int) -> list[int]:
  """How many tiles of `block` x `block` scores of one causal row some query of each device sees, by the definition."""
  length = segments.shape[1]
  parts = RowOrder(devices).parts() if balanced else np.arange(2 * devices)
  places = np.arange(length).reshape(2 * devices, -1)[parts].reshape(-1)
  ids = segments[0][places]
  seen = (ids[:, None] == ids) & (ids[:, None] != 0) & (places <= places[:, None])
  tiles = seen.reshape(length // block, block, length // block, block).any((1, 3))
  return tiles.reshape(devices, -1).sum(1).tolist()


@pytest.mark.slow
@pytest.mark.parametrize('balanced', [True, False])
@pytest.mark.parametrize('lengths', [(256,), (100, 30, 100)])
def test_a_device_computes_exactly_the_tiles_that_its_queries_see(lengths, balanced, monkeypatch):
  """Counted in the running program. Balanced, four devices have equally many of one long document."""
  found, own = [0] * 4, scan._scores

  def counted(*args):
    def count(device):
      found[device] += 1

    jax.debug.callback(count, jax.lax.axis_index('sequence'))
    return own(*args)

  monkeypatch.setattr(scan, '_scores', counted)
  segments = row(*lengths, padding=256 - sum(lengths))[None]
  see = Visibility(causal=True, q_segment_ids=jnp.asarray(segments), kv_segment_ids=jnp.asarray(segments))
  run = on_a_ring(4, balanced)
  program = jax.jit(lambda *x: run(*x, see, return_lse=True, blocks=(16, 16)))
  jax.block_until_ready(program(*draw(256, heads=1, kv_heads=1)))
  jax.effects_barrier()
  assert found == tiles_of(segments, 4, balanced, 16)
  if len(lengths) == 1:
    assert (len({*found}) == 1) == balanced, found
    assert sum(found) == 16 * 17 / 2
