"""Pipelines: the schedule against its rules, buffers against JAX's own gradients, stacks against one device."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.layers.pipeline.groups import exchange
from models.layers.pipeline.program import pipelined
from models.layers.pipeline.schedule import Pipeline, Schedule
from models.layers.pipeline.slots import for_each, lend, put, take
from models.partition import on, shardings
from pretrain.devices.mesh import MeshConfig, batch_sharding, make_mesh, replicated
from tests.models.small import EXPERTS, LLAMA, T5, batch, model_and_params, shaken

SCHEDULES = [Schedule(*sizes) for sizes in itertools.product((1, 2, 4), (1, 3, 4, 8), (1, 2, 3))]


@pytest.mark.parametrize('schedule', SCHEDULES, ids=str)
def test_each_stage_works_once_on_each_microbatch_and_repeat_after_the_stage_before_it(schedule):
  """One tick earlier, if it is the stage before; at any earlier tick, if it is the last stage of the round before."""
  done = {}
  for tick, row in enumerate(np.stack(schedule.table(), -1).tolist()):
    for stage, (microbatch, repeat, active) in enumerate(row):
      if active:
        assert (stage, repeat, microbatch) not in done
        done[stage, repeat, microbatch] = tick
  every = itertools.product(range(schedule.stages), range(schedule.repeats), range(schedule.microbatches))
  assert done.keys() == set(every)
  for (stage, repeat, microbatch), tick in done.items():
    if stage:
      assert done[stage - 1, repeat, microbatch] == tick - 1
    elif repeat:
      assert done[schedule.stages - 1, repeat - 1, microbatch] < tick
  assert max(done.values()) == schedule.ticks - 1
  assert schedule.bubble == pytest.approx(1 - len(done) / schedule.stages / schedule.ticks)


def test_the_bubble_is_that_of_interleaved_stages():
  """(S - 1) / (S - 1 + M R): Narayanan et al. 2021, §2.2.2, whose bubble is a share of the work, (S - 1) / (M R)."""
  for stages, each, repeats in itertools.product((2, 4, 8), (1, 4), (1, 2, 5)):
    schedule = Schedule(stages, stages * each, repeats)
    assert schedule.bubble == pytest.approx((stages - 1) / (stages - 1 + stages * each * repeats))


def test_rows_that_do_not_divide_into_microbatches_have_the_most_that_divide_them():
  assert Pipeline(8).of(12, 2).microbatches == 6
  assert Pipeline(None).of(12, 2).microbatches == 6
  assert Pipeline(None, 3).of(64, 4) == Schedule(4, 16, 3)


@pytest.mark.parametrize(('stages', 'repeats'), list(itertools.product((1, 2, 3, 4, 6), repeat=2)))
def test_an_exchange_gives_each_stage_its_groups(stages, repeats):
  """Group q of the stack is for stage q % stages, in repeat q // stages; in one transfer each stage gets one group."""
  got = {}
  for sends in exchange(stages, repeats):
    assert sorted(to for _, to, _ in sends) == list(range(stages))
    got |= {(to, repeat): i * repeats + which for i, (which, to, repeat) in enumerate(sends)}
  assert got == {(s, r): r * stages + s for s in range(stages) for r in range(repeats)}


# (slot to take from or None: idle, slot to put into or None) of each tick: each is empty when something is put there.
TICKS = [(0, None), (1, 0), (None, 1), (2, None), (0, 2), (None, 0)]


def test_slots_have_the_values_and_gradients_of_indices():
  rng = np.random.default_rng(0)
  store, w = rng.normal(size=(2, 3, 4)), rng.normal(size=(4, 4))

  def run(take, put, store, w):
    total, x = 0.0, jnp.zeros((2, 4))
    for slot, into in TICKS:
      store, fresh = take(store, jnp.int32(slot or 0), jnp.bool(slot is not None))
      y = jnp.sin((fresh + x) @ w)
      store = put(store, jnp.int32(into or 0), jnp.bool(into is not None), x)
      total, x = total + (y**2).sum(), y
    return total + (store**3).sum()

  plain_take = lambda store, slot, active: (store, jnp.where(active, store[:, slot], 0))
  plain_put = lambda store, slot, active, x: jnp.where(active, store.at[:, slot].set(x), store)
  grad = lambda *ops: jax.jit(jax.value_and_grad(lambda *a: run(*ops, *a), argnums=(0, 1)))(store, w)
  for own, expected in zip(jax.tree.leaves(grad(take, put)), jax.tree.leaves(grad(plain_take, plain_put)), strict=True):
    np.testing.assert_allclose(own, expected, rtol=1e-5, atol=1e-6)


def test_what_is_lent_has_the_sum_of_its_gradients():
  store, slots = np.arange(12.0, dtype=np.float32).reshape(4, 3), [2, 0, 2]

  def of_account(account):
    total = 0.0
    for slot in slots:
      account, x = lend(account, jax.lax.stop_gradient(store), jnp.int32(slot))
      total += (jnp.sin(x) * (1 + slot)).sum()
    return total

  plain = lambda store: sum((jnp.sin(store[slot]) * (1 + slot)).sum() for slot in slots)
  np.testing.assert_allclose(jax.grad(of_account)(store), jax.grad(plain)(store), rtol=1e-6)


def test_largest_sizes_are_joined_by_their_maximum():
  gradient = jax.grad(lambda x: (for_each(x, 3) * jnp.array([[1.0], [5.0], [2.0]])).sum())(jnp.zeros(2))
  np.testing.assert_array_equal(gradient, [5, 5])


TOY = Schedule(4, 3, 2)


def toy_layers(x, rows, inputs):
  """Layers of one number each, which read a number of each row; the inverse of a mean, infinite where x is 0."""
  (weights,), seen = inputs

  def layer(x, own):
    w, seen = own
    x = jnp.tanh(w * x + rows['shift'][:, None, None] + w * seen)
    return x, {'inverse': 1 / jax.lax.stop_gradient(jnp.square(x * w).mean()), 'mean': x.mean()}

  return jax.lax.scan(layer, x, (weights, seen))


def toy(pipelines: bool):
  """(value, (hidden, aux), gradients) of eight layers over six rows, shares of microbatches being unequal."""
  rng = np.random.default_rng(0)
  x, shift, weights = rng.normal(size=(6, 2, 4)), np.zeros(6), rng.normal(size=8) + 2
  mesh, keeping = make_mesh(MeshConfig(stage=4)), lambda f: jax.checkpoint(f)
  shares, parts = np.float32([0.5, 0.2, 0.3]), [slice(m, None, 3) for m in range(3)]

  def loss(x, shift, weights, seen):
    if pipelines:
      with on(mesh):
        y, aux = pipelined(toy_layers, x, {'shift': shift}, (weights,), seen, TOY, jnp.asarray(shares), keeping)
    else:
      found = [toy_layers(x[part], {'shift': shift[part]}, ((weights,), seen)) for part in parts]
      y = jnp.zeros(x.shape)
      for part, (own, _) in zip(parts, found, strict=True):
        y = y.at[part].set(own)
      aux = jax.tree.map(lambda *a: sum(s * b for s, b in zip(shares, a, strict=True)), *(a for _, a in found))
    return jnp.sin(3 * y).sum() + (aux['mean'] * np.arange(8, dtype=np.float32)).sum(), (y, aux)

  run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
  given = [np.float32(a) for a in (x, shift, weights, np.zeros(8))]
  return jax.device_get(run(*(jax.device_put(given, replicated(mesh)) if pipelines else given)))


@pytest.mark.slow
def test_a_pipeline_of_toy_layers_equals_a_loop_and_idle_ticks_count_nowhere():
  """Auxiliary values of an idle stage are infinite here; rows have shares of their own."""
  own, expected = toy(True), toy(False)
  for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(own), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5, err_msg=jax.tree_util.keystr(path))


ROWS = batch([(5, 7), (9, 3), (14,), (2, 4), (6,), (3, 3, 3), (10, 2), (1, 2)])


def evaluate(cfg, mesh: MeshConfig | None, rows=ROWS):
  """(value, (hidden, aux), gradients), with dropout."""
  placed = None if mesh is None else make_mesh(mesh)
  model, params = model_and_params(cfg, placed)
  params = shaken(params)

  def loss(params, rows):
    hidden, aux = model.apply(params, rows, jax.random.key(3))
    return jnp.sin(hidden).sum() + sum(x for name, x in aux.items() if name in ('load_balance', 'router_z')), (
      hidden,
      aux,
    )

  if placed is not None:
    params = jax.device_put(params, shardings(model.specs, placed))
    rows = jax.device_put(rows, batch_sharding(placed))
  (value, rest), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, rows)
  return jax.device_get((value, rest, gradients))


def assert_same(cfg, *meshes: MeshConfig, rows=ROWS, **changes):
  expected = evaluate(cfg, None, rows)
  for mesh in meshes:
    found = evaluate(dataclasses.replace(cfg, **changes), mesh, rows)
    for (path, one), other in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
      scale = max(1e-2, np.abs(other).max())
      np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * scale, err_msg=f'{mesh} {jax.tree_util.keystr(path)}')


DROPS = {'dropout': 0.1, 'kurtosis': True}
STACKS = {
  'microbatches': (LLAMA, {}, MeshConfig(stage=2), {'pipeline_microbatches': 4}),
  'repeats': (LLAMA, {'layers': 4}, MeshConfig(stage=2, tensor=2), {'pipeline_repeats': 2, 'remat': 'full'}),
  'dots': (LLAMA, {'layers': 4}, MeshConfig(stage=2, fsdp=2), {'pipeline_repeats': 2, 'remat': 'dots'}),
  'four stages': (LLAMA, {'layers': 4}, MeshConfig(stage=4, fsdp=2), {}),
  'windows': (LLAMA, {'layers': 4, 'windows': (3, None), 'sinks': 2}, MeshConfig(stage=2, sequence=2), {}),
  'tables': (T5, {'decoder_layers': 4, 'relative_layers': 'each'}, MeshConfig(stage=2, data=2), {}),
  'capacity': (EXPERTS, {'expert_capacity': 1.0}, MeshConfig(stage=2, expert=2), {'pipeline_microbatches': 2}),
  'experts': (EXPERTS, {}, MeshConfig(stage=2, expert=2), {'pipeline_microbatches': 2}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('name', STACKS)
def test_a_pipeline_has_the_values_gradients_and_metrics_of_one_device(name):
  """Packed rows, dropout, and what layers tell; with microbatches of unequal numbers of tokens."""
  cfg, own, mesh, changes = STACKS[name]
  assert_same(dataclasses.replace(cfg, **DROPS, **own), mesh, **changes)
