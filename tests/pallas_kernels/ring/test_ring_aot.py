"""The ring compiled for TPUs without one: every hop of the backward pass is under way while the kernels run."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.attention import api
from pallas_kernels.attention.reference import Visibility
from pretrain.tools.plan import compile_for, tpu_devices

pytestmark = pytest.mark.aot
HEADS, LENGTH, DEVICES = 8, 4096, 4
OPS = r'\s+(?:ROOT )?%([\w.\-]+) = .*? (collective-permute-start|collective-permute-done|custom-call)\('


def compiled() -> str:
  """Value and gradients of a packed causal row of four devices, on v5p."""
  devices = tpu_devices('v5p:2x2x1')[:DEVICES]
  mesh = jax.make_mesh((DEVICES,), ('sequence',), axis_types=(AxisType.Auto,), devices=devices)
  rows, vectors = P(None, None, 'sequence'), P(None, 'sequence')
  shape = lambda spec, dtype, *dims: jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, spec))
  arrays = [shape(rows, jnp.bfloat16, 1, HEADS, DEVICES * LENGTH, 128)] * 3
  ids = [shape(vectors, jnp.int32, 1, DEVICES * LENGTH)] * 2

  def own(q, k, v, segments, places):
    see = Visibility(
      causal=True, q_segment_ids=segments, kv_segment_ids=segments, q_positions=places, kv_positions=places
    )
    return api.attention(q, k, v, see, implementation='ring', heads_first=True, axis='sequence')

  def loss(*given):
    ins = (*[rows] * 3, *[vectors] * 2)
    return jax.shard_map(own, in_specs=ins, out_specs=rows, check_vma=False)(*given).astype(jnp.float32).sum()

  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    return compile_for(jax.jit(jax.grad(loss, (0, 1, 2))), (*arrays, *ids))[1].as_text()


@pytest.mark.slow
def test_hops_hide_behind_the_kernels():
  """In the order of the schedule: five arrays start, both kernels run, five arrays arrive."""
  text = compiled()
  bodies = re.split(r'\n(?=%?[\w.\-]+ \(|ENTRY )', text)
  backward = next(body for body in bodies if '%attention_grad_queries' in body and 'collective-permute-start' in body)
  order = [(found[2], found[1]) for line in backward.splitlines() if (found := re.match(OPS, line))]
  kernels = [place for place, (_, name) in enumerate(order) if name.startswith('attention_grad')]
  places = {
    op: [n for n, (own, _) in enumerate(order) if own == f'collective-permute-{op}'] for op in ('start', 'done')
  }
  assert len(kernels) == 2
  assert [len(found) for found in places.values()] == [5, 5]
  assert max(places['start']) < min(kernels) < max(kernels) < min(places['done'])
