"""Parameters in the host's memory: their gradients are those of the formula; after an update they stay there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.host_memory import DEVICE, HOST, brought
from pretrain.step import from_host

LAYERS, WIDTH = 3, 4


@pytest.fixture(scope='module')
def given():
  """(parameters, of which the stack is on the host, rows, what the outputs are multiplied with)."""
  draw = np.random.default_rng(0).normal
  sizes = {'stack': (LAYERS, WIDTH, WIDTH), 'scale': (WIDTH,)}
  params = {name: draw(size=size).astype(np.float32) for name, size in sizes.items()}
  place = lambda kind: jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind=kind)
  placed = {'stack': jax.device_put(params['stack'], place(HOST)), 'scale': jax.device_put(params['scale'])}
  return placed, *(draw(size=(5, WIDTH)).astype(np.float32) for _ in range(2))


def loss(params, rows, key, weight, read):
  """sum(c * y) / weight of y = tanh(… tanh(x * scale @ W_0) … @ W_2)."""
  body = lambda x, w: (jnp.tanh(x @ brought(w)), None)
  y = jax.lax.scan(jax.checkpoint(body), rows['x'] * params['scale'], params['stack'])[0]
  return (y * rows['c']).sum() / weight, ({}, {})


def formula(params, x, c, weight):
  """(value, gradients), float64."""
  stack, scale = (np.asarray(params[name], np.float64) for name in ('stack', 'scale'))
  ys = [x.astype(np.float64) * scale]
  for w in stack:
    ys.append(np.tanh(ys[-1] @ w))
  grads, back = [], c / weight
  for w, before, y in zip(stack[::-1], ys[-2::-1], ys[::-1], strict=False):
    back = back * (1 - y * y)
    grads.append(before.T @ back)
    back = back @ w.T
  return (ys[-1] * c).sum() / weight, {'stack': np.stack(grads[::-1]), 'scale': (back * x).sum(0)}


def test_gradients_are_those_of_the_formula_and_lie_on_the_device(given):
  params, x, c = given
  found = jax.jit(from_host.value_and_grad(loss))(params, {'x': x, 'c': c}, None, jnp.float32(2), {})
  (value, _), (grads, _) = found
  wanted, of_params = formula(params, x, c, 2)
  np.testing.assert_allclose(value, wanted, rtol=1e-5)
  for name, grad in grads.items():
    np.testing.assert_allclose(grad, of_params[name], rtol=1e-4, atol=1e-5, err_msg=name)
    assert grad.sharding.memory_kind in (DEVICE, jax.devices()[0].default_memory().kind)


def test_an_updated_parameter_stays_where_it_was(given):
  params = given[0]
  updates = jax.tree.map(lambda x: np.arange(x.size, dtype=np.float32).reshape(x.shape), params)
  found = jax.jit(from_host.apply_updates)(params, updates)
  for name, x in found.items():
    np.testing.assert_array_equal(x, np.asarray(params[name]) + updates[name])
    assert x.sharding.memory_kind == params[name].sharding.memory_kind
  assert found['stack'].sharding.memory_kind == HOST
