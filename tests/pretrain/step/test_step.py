"""The train step over a toy loss: accumulation, normalisation, skipped updates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pretrain.optim.averaging import Ema, averaging_tracks
from pretrain.optim.optimizer import skip_nonfinite, skipped
from pretrain.step.train_step import Track, TrainState, init_state, make_train_step


def no_fill(batch):
  return {}


def toy_loss(params, batch, key, weight, read):
  noise = (
    0.0 if key is None else jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i)))(batch['example_index'])
  )
  error = (batch['x'] @ params['w'] + noise - batch['y']) ** 2
  loss = (error * batch['decoder_loss_weights']).sum() / weight
  return loss, ({'loss': loss}, {})


def toy_batch(rows=8):
  rng = np.random.default_rng(0)
  return {
    'x': jnp.asarray(rng.normal(size=(rows, 3)), jnp.float32),
    'y': jnp.asarray(rng.normal(size=rows), jnp.float32),
    'decoder_loss_weights': jnp.asarray(rng.random(rows) * np.array([1, 0] * (rows // 2)), jnp.float32),
    'example_index': jnp.arange(rows),
  }


def run(batch, num_microbatches=1, steps=3, tx=None):
  tx = optax.chain(skip_nonfinite(optax.adam(0.1)), optax.identity()) if tx is None else tx
  state = init_state(lambda key: {'w': jax.random.normal(key, (3,))}, tx, 0)
  step = jax.jit(
    make_train_step(toy_loss, tx, lambda s: 0.1, skipped, 1, fill=no_fill, num_microbatches=num_microbatches)
  )
  out = []
  for _ in range(steps):
    state, metrics = step(state, batch)
    out.append(float(metrics['loss']))
  return state, out


@pytest.mark.parametrize('num_microbatches', [2, 4])
def test_accumulation_does_not_change_the_losses(num_microbatches):
  """Rows have unequal weights, so that a mean of microbatch means would differ."""
  _, whole = run(toy_batch())
  _, parts = run(toy_batch(), num_microbatches)
  np.testing.assert_allclose(parts, whole, rtol=1e-5)


def test_loss_is_divided_by_the_sum_of_weights():
  batch = toy_batch()
  doubled = batch | {'decoder_loss_weights': batch['decoder_loss_weights'] * 2}
  np.testing.assert_allclose(run(batch)[1], run(doubled)[1], rtol=1e-6)


def test_a_nonfinite_gradient_changes_nothing_and_is_counted():
  good = toy_batch()
  bad = good | {'y': good['y'].at[0].set(jnp.nan)}
  tx = optax.chain(skip_nonfinite(optax.adam(0.1)), optax.identity())
  state, _ = run(good, tx=tx)
  step = jax.jit(make_train_step(toy_loss, tx, lambda s: 0.1, skipped, 1, fill=no_fill))
  after, metrics = step(state, bad)
  np.testing.assert_array_equal(after.params['w'], state.params['w'])
  for a, b in zip(jax.tree.leaves(after.opt_state[0].inner), jax.tree.leaves(state.opt_state[0].inner), strict=True):
    np.testing.assert_array_equal(a, b)
  assert (int(metrics['skipped']), int(metrics['skipped_consecutive']), int(after.step)) == (1, 1, 4)
  _, metrics = step(after, good)
  assert (int(metrics['skipped']), int(metrics['skipped_consecutive'])) == (1, 0)


def test_extra_is_unchanged_and_the_key_depends_on_the_step():
  state, losses = run(toy_batch(), tx=optax.chain(skip_nonfinite(optax.set_to_zero()), optax.identity()))
  assert isinstance(state, TrainState)
  assert state.extra == {}
  assert len(set(losses)) == 3, 'the parameters stood still, so only the noise can have moved the loss'


def test_a_nonfinite_gradient_does_not_reach_the_average():
  """The average still moves towards the parameters, which did not change."""
  good = toy_batch()
  bad = good | {'y': good['y'].at[0].set(jnp.nan)}
  tx, tracks = optax.chain(skip_nonfinite(optax.adam(0.1)), optax.identity()), averaging_tracks(Ema(decay=0.75))
  state = init_state(lambda key: {'w': jax.random.normal(key, (3,))}, tx, 0, tracks)
  step = jax.jit(make_train_step(toy_loss, tx, lambda s: 0.1, skipped, 1, fill=no_fill, tracks=tracks))
  state, _ = step(state, good)
  after, _ = step(state, bad)
  expected = 0.75 * state.extra['ema']['w'] + 0.25 * state.params['w']
  np.testing.assert_allclose(after.extra['ema']['w'], expected, rtol=1e-6)


def observed(batch, num_microbatches):
  """A step with two entries of `extra`: a sum that the loss returns, and the largest |x| as a gradient."""

  @jax.custom_vjp
  def passed(x, largest):
    return x

  passed.defvjp(lambda x, largest: (x, x), lambda x, g: (g, jnp.abs(x).max()))

  def loss(params, batch, key, weight, read):
    own = batch | {'x': passed(batch['x'], read['largest'])}
    value, (metrics, _) = toy_loss(params, own, None, weight, {})
    return value, (metrics | {'scale': read['largest'] / weight}, {'rows': batch['y'].size / weight})

  place = lambda params, everywhere: everywhere
  newest = lambda entry, seen, params, step: jnp.stack([entry[1], seen['largest']])
  counted = lambda entry, seen, params, step: entry + seen['rows'] * step
  tracks = {
    'largest': Track(lambda params: jnp.ones(2), newest, place, read=lambda entry: entry[0], join=jnp.maximum),
    'rows': Track(lambda params: jnp.zeros(()), counted, place),
  }
  tx = optax.chain(skip_nonfinite(optax.adam(0.1)), optax.identity())
  state = init_state(lambda key: {'w': jnp.ones(3)}, tx, 0, tracks)
  step = make_train_step(
    loss, tx, lambda s: 0.1, skipped, 1, fill=no_fill, tracks=tracks, num_microbatches=num_microbatches
  )
  return jax.jit(step)(*jax.jit(step)(state, batch)[:1], batch)


@pytest.mark.parametrize('num_microbatches', [1, 4])
def test_extra_gets_what_a_step_observes_forward_and_backward(num_microbatches):
  batch = toy_batch()
  state, metrics = observed(batch, num_microbatches)
  largest, weight = np.abs(batch['x']).max(), float(batch['decoder_loss_weights'].sum())
  np.testing.assert_array_equal(state.extra['largest'], [largest, largest])
  assert float(state.extra['rows']) == pytest.approx((1 + 2) * 8 / weight, rel=1e-6)
  assert float(metrics['scale']) == pytest.approx(num_microbatches / weight, rel=1e-6), 'what was read: 1, of step 0'
