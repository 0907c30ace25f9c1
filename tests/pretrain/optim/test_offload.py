"""Moments in the host's memory: no bit of a step changes, and XLA is given an order in which few are on the device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from models import partition
from models.host_memory import brought
from pretrain.devices.mesh import MeshConfig, make_mesh
from pretrain.optim.offload import HOST, IN_FLIGHT, on_host, params_on_host, streamed
from pretrain.optim.optimizer import Adafactor, AdamW, Lion, Muon, make_optimizer
from pretrain.optim.spikes import SkipSpikes
from pretrain.optim.state import state_shardings
from pretrain.planner import hlo
from pretrain.step import from_host
from pretrain.tools.plan import compile_for, tpu_devices
from tests.pretrain.optim.optimizing import SPECS, draw, spec

SMALL = {name: SPECS['blocks'][name] for name in ('up', 'down', 'norm')}  # two matrices are enough to be out of order


def placed(cfg, specs, *, offloaded: bool, devices: int = 1):
  """(optimizer, parameters, shardings of parameters, those of its state)."""
  mesh = make_mesh(MeshConfig(fsdp=devices), jax.devices()[:devices])
  own = partition.shardings(specs, mesh)
  params = jax.device_put(draw(specs, 0), own)
  tx = make_optimizer(cfg, lambda step: 0.01, specs, mesh, spikes=SkipSpikes())
  places = state_shardings(tx, params, own, mesh)
  if offloaded:
    places = on_host(('moments',), specs, jax.eval_shape(tx.init, params), places)
    tx = streamed(tx, places)
  return tx, params, own, places


def trained(cfg, specs, *, offloaded: bool, devices: int = 1):
  """Parameters and state after three updates, the second of which is not finite."""
  tx, params, own, places = placed(cfg, specs, offloaded=offloaded, devices=devices)
  state = jax.jit(tx.init, out_shardings=places)(params)

  def step(params, state, grads):
    updates, state = tx.update(grads, state, params, value=jnp.float32(1))
    return optax.apply_updates(params, updates), state

  step = jax.jit(step, out_shardings=(own, places), donate_argnums=(0, 1))
  for seed, factor in ((1, 1.0), (2, np.nan), (3, 1.0)):
    params, state = step(params, state, jax.tree.map(lambda x, c=factor: c * x, draw(specs, seed)))
  return params, state


@pytest.mark.parametrize(
  ('cfg', 'specs', 'devices'),
  [
    (AdamW(parameter_scale=True), SMALL, 1),
    *(
      pytest.param(cfg, SPECS, 4, marks=pytest.mark.slow)
      for cfg in (
        AdamW(), AdamW(state_dtype='int8'), AdamW(state_dtype='bfloat16'), Lion(), Muon(),
        Adafactor(min_dim_size_to_factor=16, momentum=0.9),
      )
    ),
  ],
  ids=lambda x: f'{x.name}-{x.state_dtype}' if hasattr(x, 'name') else '',
)  # fmt: skip
def test_no_bit_of_parameters_or_state_changes(cfg, specs, devices):
  wanted, found = (trained(cfg, specs, offloaded=offloaded, devices=devices) for offloaded in (False, True))
  jax.tree.map(np.testing.assert_array_equal, found, wanted)
  kinds = {x.sharding.memory_kind for x in jax.tree.leaves(found[1]) if x.ndim > 2}
  assert HOST in kinds


@pytest.mark.parametrize(
  ('cfg', 'away'),
  [
    (AdamW(), {'.mu', '.nu'}),
    (AdamW(state_dtype='int8'), {'.mu.codes', '.nu.codes'}),
    (Lion(), {'.mu'}),
    (Adafactor(min_dim_size_to_factor=16, momentum=0.9), {'.ema'}),
  ],
  ids=lambda x: f'{x.name}-{x.state_dtype}' if hasattr(x, 'name') else '',
)
def test_moments_of_matrices_move_and_what_is_small_stays(cfg, away):
  places = placed(cfg, SMALL, offloaded=True)[-1]
  found = {}
  for path, place in jax.tree_util.tree_flatten_with_path(places)[0]:
    keys = [part for part in path if not isinstance(part, jax.tree_util.SequenceKey)]
    name = next((str(part.key) for part in keys if isinstance(part, jax.tree_util.DictKey)), '')
    fields = ''.join(
      str(part) for part in keys if not isinstance(part, jax.tree_util.DictKey) and str(part) != '.inner'
    )
    found.setdefault(name, set()).update({fields} if place.memory_kind == HOST else set())
  assert found['up'] == found['down'] == away
  assert found['norm'] == found[''] == set()


def test_a_chunk_comes_after_the_one_before():
  """In the program that XLA gets: each barrier reads what went back to the host `IN_FLIGHT` chunks earlier."""
  matrices = 4
  tx, params, _, places = placed(
    AdamW(), {str(i): spec((8, 8), ('embed', 'mlp')) for i in range(matrices)}, offloaded=True
  )
  shape = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
  state = jax.tree.map(shape, jax.eval_shape(tx.init, params), places)
  eqns = jax.make_jaxpr(lambda p, s: tx.update(p, s, p, value=jnp.float32(1)))(params, state).eqns
  comes = [set(map(str, eqn.invars)) for eqn in eqns if eqn.primitive.name == 'optimization_barrier']
  puts = [eqn for eqn in eqns if eqn.primitive.name == 'device_put']
  back = [set(map(str, eqn.outvars)) for eqn in puts if '<host>' in str(eqn.outvars[0].aval)]
  assert (len(comes), len(back)) == (matrices, matrices)
  for number, one in enumerate(comes):
    earlier = [i for i, chunk in enumerate(back) if chunk & one]
    assert earlier == ([number - IN_FLIGHT] if number >= IN_FLIGHT else [])


def test_nothing_to_move_is_the_optimizer_itself():
  tx, _, _, places = placed(AdamW(), SMALL, offloaded=False)
  assert streamed(tx, places) is tx


@pytest.mark.aot
@pytest.mark.slow
def test_two_chunks_are_on_a_tpu_at_most():
  """Ten matrices of 16 MiB a device, with gradients and two moments, are 640 MiB."""
  matrices, size, one = 10, 16 * 2**20, spec((2, 4096, 4096), ('layers', 'embed', 'mlp'))
  specs = {str(i): one for i in range(matrices)}
  mesh = make_mesh(MeshConfig(fsdp=8), tpu_devices('v5e:2x4'))
  own = partition.shardings(specs, mesh)
  tx = make_optimizer(AdamW(), lambda step: 0.01, specs, mesh)
  shapes = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), specs)
  places = on_host(('moments',), specs, jax.eval_shape(tx.init, shapes), state_shardings(tx, shapes, own, mesh))
  tx = streamed(tx, places)

  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  shape = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
  state = jax.tree.map(shape, jax.eval_shape(tx.init, shapes), places)
  params, grads = (jax.tree.map(shape, shapes, own) for _ in range(2))
  program = jax.jit(step, out_shardings=(own, places), donate_argnums=(0, 1))
  memory, compiled = compile_for(program, (params, state, grads))
  assert memory.host == 2 * matrices * size
  assert memory.peak < (2 * matrices + 2 * 2 * 2) * size  # and two chunks before and after their update
  starts = [one for _, one in hlo.parse(compiled.as_text()).executed() if one.op == 'copy-start']
  assert sum('S(5)' in one.shape for one in starts) == 2 * 2 * matrices, 'each once there and once back'


@pytest.mark.aot
@pytest.mark.slow
def test_no_whole_parameter_is_on_a_tpu():
  """The loss, AdamW and the sum read layers of it: 64 MiB a device are on the host, once, and come in slices."""
  layers, size, one = 8, 32 * 2**20, spec((8, 2048, 4096), ('layers', 'embed', 'mlp'))
  specs = {'up': one, 'down': one}
  mesh = make_mesh(MeshConfig(fsdp=8), tpu_devices('v5e:2x4'))
  own = partition.shardings(specs, mesh)
  homes = params_on_host(('parameters',), specs, own)
  tx = make_optimizer(AdamW(), lambda step: 0.01, specs, mesh)
  shapes = jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), specs)
  places = state_shardings(tx, shapes, own, mesh)
  tx = streamed(tx, places, homes)

  def loss(params, x, key, weight, read):
    layer = lambda x, own: (x + jnp.tanh(x @ own['up']) @ own['down'].T, None)
    run = jax.checkpoint(lambda x, own: layer(x, jax.tree.map(lambda w: w.astype(x.dtype), brought(own))))
    return jnp.square(jax.lax.scan(run, x, params)[0].astype(jnp.float32)).mean(), ({}, {})

  def step(params, state, x):
    _, (grads, _) = from_host.value_and_grad(loss)(params, x, None, 1.0, {})
    grads = jax.lax.with_sharding_constraint(grads, own)
    updates, state = tx.update(grads, state, params)
    return from_host.apply_updates(params, updates), state

  shape = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
  arguments = jax.tree.map(shape, shapes, homes), jax.tree.map(shape, jax.eval_shape(tx.init, shapes), places)
  x = jax.ShapeDtypeStruct((64, 2048), jnp.bfloat16, sharding=jax.NamedSharding(mesh, jax.P('fsdp')))
  program = jax.jit(step, out_shardings=(homes, places), donate_argnums=(0, 1))
  memory, compiled = compile_for(program, (*arguments, x))
  assert memory.host == 2 * size
  executed = [*hlo.parse(compiled.as_text()).executed()]
  assert not [one for _, one in executed if one.op == 'copy-start' and 'S(5)' in one.shape]
  times = sum(times for times, one in executed if one.op == 'dynamic-slice-start' and 'S(5)' in one.shape)
  assert times == 2 * 4 * layers, 'each layer for the forward and the backward pass, the update, and the sum with it'
