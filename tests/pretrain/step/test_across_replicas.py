"""Gradients over replicas, of a toy loss: the values of the whole batch, and what crosses the axis."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pretrain.config import bindings
from pretrain.devices.mesh import MeshConfig, batch_sharding, make_mesh, replicated
from pretrain.errors import ConfigError
from pretrain.planner import hlo
from pretrain.planner.compiled import collected
from pretrain.step.across_replicas import across_replicas, parts_of
from pretrain.step.train_step import Track, accumulate
from tests.pretrain import tiny

MESH = MeshConfig(replica=2, data=2, fsdp=2)
SPECS = {'w': PartitionSpec('fsdp'), 'b': PartitionSpec()}
SHAPES = {'w': (4, 6), 'b': (5,)}
FIRST = range(4)  # the devices of the first replica


@jax.custom_vjp
def passed(x, largest):
  """x; the gradient of `largest` is the largest |x|."""
  return x


passed.defvjp(lambda x, largest: (x, x), lambda x, g: (g, jnp.abs(x).max()))


def loss(params, batch, key, weight, read):
  """Dropout by example, unequal weights, a metric, an observation, and something read."""
  kept = jax.vmap(lambda i: jax.random.bernoulli(jax.random.fold_in(key, i), 0.7, (6,)))(batch['example_index'])
  x = passed(batch['x'], read['largest'])
  own = (jnp.tanh(x @ params['w']) * kept).sum(1) + (batch['x'] @ jnp.ones((4, 5)) * params['b']).sum(1)
  each = own**2 * batch['decoder_loss_weights'] / weight
  return each.sum(), ({'loss': each.sum()}, {'rows': own.size / weight})


TRACKS = {
  'largest': Track(
    lambda params: jnp.ones(()), lambda *args: args[0], lambda params, everywhere: everywhere, lambda entry: entry,
    join=jnp.maximum,
  )
}  # fmt: skip


@pytest.fixture(scope='module')
def arguments():
  rng = np.random.default_rng(0)
  batch = {
    'x': rng.normal(size=(16, 4)).astype(np.float32),
    'decoder_loss_weights': rng.random(16).astype(np.float32),
    'example_index': np.arange(16, dtype=np.int32),
  }
  params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
  return params, batch, jax.random.key(3), batch['decoder_loss_weights'].sum(), {'largest': np.float32(0)}


def lowered(dtype: str, arguments):
  """The gradients over two replicas with two microbatches; and their arguments, placed."""
  mesh = make_mesh(MESH)
  shardings, everywhere = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}, replicated(mesh)
  run = across_replicas(accumulate(loss, 2, TRACKS), mesh, shardings, dtype, TRACKS)
  params, batch, *others = arguments
  placed = jax.device_put(params, shardings), jax.device_put(batch, batch_sharding(mesh)), *others
  return jax.jit(run, out_shardings=(everywhere, (shardings, everywhere))).lower(*placed), placed


@pytest.fixture(scope='module')
def found(arguments):
  """(text of the program, results)."""
  program, placed = lowered('float32', arguments)
  program = program.compile()
  return program.as_text(), jax.device_get(program(*placed))


def test_values_are_those_of_one_device(arguments, found):
  expected = jax.device_get(jax.jit(jax.value_and_grad(loss, argnums=(0, 4), has_aux=True))(*arguments))
  (value, (metrics, seen)), (grads, _) = expected
  (own, (own_metrics, own_seen)), (own_grads, own_felt) = found[1]
  np.testing.assert_allclose(own, value, rtol=1e-6)
  np.testing.assert_allclose(own_metrics['loss'], metrics['loss'], rtol=1e-6)
  np.testing.assert_allclose(own_seen['rows'], seen['rows'], rtol=1e-6)
  np.testing.assert_array_equal(own_felt['largest'], np.abs(arguments[1]['x']).max())
  for name in grads:
    np.testing.assert_allclose(own_grads[name], grads[name], rtol=2e-5, atol=1e-6, err_msg=name)


def crossing(text: str) -> list[tuple[str, int, int]]:
  """(kind, bytes, how often it runs) of each collective between replicas."""
  program = hlo.parse(text)
  between = lambda one: {i in FIRST for i in one.devices} == {True, False}
  return sorted((one.kind, one.bytes, one.times) for one in collected(program, 8) if between(one))


def test_a_device_sends_its_own_part_once_a_step(found):
  """w float32[4, 6] in 2 parts over fsdp and 2 over data; b[5], which nothing divides, whole; three numbers; once each,
  after both microbatches. The largest |x| of each of the two replicas is gathered."""
  assert crossing(found[0]) == [('all-gather', 2 * 4, 1), ('all-reduce', 4 * (4 * 6 // 4 + 5 + 3), 1)]


def test_gradients_alone_are_sent_in_the_stated_dtype(arguments):
  """As written: XLA for CPU has no sums in bfloat16, and makes them float32."""
  text = lowered('bfloat16', arguments)[0].as_text()
  sums = re.findall(r'"stablehlo\.all_reduce".*?\}\) : \(tensor<([\dx]*)(\w+)>\)', text, re.DOTALL)
  assert sorted(sums) == [('', 'f32')] * 3 + [('1x6x', 'bf16'), ('5x', 'bf16')]


@pytest.mark.parametrize(
  ('shape', 'spec', 'parts'),
  [
    ((8, 6), ('fsdp',), (('fsdp', 'data', 'tensor'), None)),
    ((4, 6), ('fsdp',), (('fsdp', 'data'), 'tensor')),
    ((8, 6), (None, 'tensor'), (('data', 'fsdp'), 'tensor')),
    ((3, 8), (), (None, ('data', 'fsdp', 'tensor'))),
    ((2, 2, 2), (), ('data', 'fsdp', 'tensor')),
    ((3, 5), (), ()),
    ((2,), ('fsdp',), ('fsdp',)),
    ((), (), ()),
  ],
)
def test_a_part_is_on_one_device_of_a_slice_where_the_sizes_allow_it(shape, spec, parts):
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  whole = NamedSharding(mesh, parts_of(shape, PartitionSpec(*spec), mesh))
  assert whole.is_equivalent_to(NamedSharding(mesh, PartitionSpec(*parts)), len(shape))


def test_a_dtype_that_is_not_known_is_refused_with_those_that_are():
  with pytest.raises(ConfigError, match=r"train\.replica_dtype='float8' is not one of 'float32', 'bfloat16'"):
    tiny.decoder("train.replica_dtype='float8'")


def test_a_config_saves_the_dtype_only_where_it_was_set():
  """Those of runs before the key stay as they were."""
  assert 'replica_dtype' not in bindings.render(tiny.decoder())
  assert "train.replica_dtype = 'bfloat16'" in bindings.render(tiny.decoder("train.replica_dtype='bfloat16'"))
