"""Adafactor is T5X's: fifty updates of five kinds of parameters, with and without momentum."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pretrain.optim import adafactor, shared
from pretrain.optim.adafactor import Factored, scale_by_adafactor
from pretrain.optim.optimizer import Adafactor, make_optimizer
from tests.pretrain.optim.optimizing import spec

# Parameters of t5x/adafactor.py after 1, 10 and 50 updates at a learning rate of 0.01, min_dim_size_to_factor 8, its
# standard factor rules; inputs as `inputs` draws them.
GOLDEN = pathlib.Path(__file__).parents[1] / 'golden/adafactor_t5x.npz'
SPECS = {
  'dense': spec((16, 24), ('embed', 'mlp')),
  'bias': spec((10,), ('mlp',)),
  'stacked': spec((3, 16, 24), ('layers', 'embed', 'mlp')),
  'heads': spec((16, 4, 6), ('embed', 'heads', 'head_dim')),
  'stacked_bias': spec((3, 10), ('layers', 'mlp')),
}


def inputs(steps=50):
  """(initial values, gradients of each step)."""
  rng = np.random.RandomState(7)
  draw = lambda: {name: rng.randn(*s.shape).astype(np.float32) for name, s in SPECS.items()}
  start = {name: x * np.float32(0.3) for name, x in draw().items()}
  return start, [{name: x * np.float32(1 + 0.1 * i) for name, x in draw().items()} for i in range(steps)]


def furthest(momentum=0.0, name='t5') -> dict[str, float]:
  """The largest distance of each parameter from T5X's, over the steps that the golden has."""
  params, grads = inputs()
  tx = make_optimizer(Adafactor(momentum=momentum, min_dim_size_to_factor=8), lambda step: 0.01, SPECS)
  state, update, golden = tx.init(params), jax.jit(tx.update), np.load(GOLDEN)
  far = dict.fromkeys(SPECS, 0.0)
  for step, grad in enumerate(grads, 1):
    updates, state = update(grad, state, params)
    params = {k: params[k] + np.asarray(updates[k]) for k in params}
    if step in (1, 10, 50):
      far = {k: np.maximum(far[k], np.abs(params[k] - golden[f'{name}/{step}/{k}']).max()) for k in SPECS}
  return far


@pytest.mark.parametrize(('momentum', 'name'), [(0.0, 't5'), (0.9, 'momentum')])
def test_fifty_updates_are_those_of_t5x(momentum, name):
  far = furthest(momentum, name)
  assert all(x < 1e-6 for x in far.values()), far


def test_heads_that_are_not_merged_are_not_t5x(monkeypatch):
  monkeypatch.setattr(shared, 'COLUMNS', ('heads', 'mlp'))
  monkeypatch.setattr(shared, 'ROWS', ('embed', 'head_dim'))
  far = furthest()
  assert far['heads'] > 1e-3
  assert far['dense'] < 1e-6


def test_layers_that_are_not_separate_are_not_t5x(monkeypatch):
  monkeypatch.setattr(adafactor, 'own_dims', lambda spec: tuple(range(len(spec.axes))))
  far = furthest()
  assert min(far['stacked'], far['stacked_bias']) > 1e-5, far
  assert far['heads'] < 1e-6


def test_a_parameter_scale_over_all_layers_is_not_t5x(monkeypatch):
  monkeypatch.setattr(shared, 'own_dims', lambda spec: tuple(range(len(spec.axes))))
  far = furthest()
  assert far['stacked_bias'] > 1e-5, far


def test_factoring_follows_axes():
  """A row and a column each layer; heads joined with head_dim; small, lone or incomplete ones whole."""
  specs = {
    'out': spec((2, 4, 6, 16), ('layers', 'heads', 'head_dim', 'embed')),
    'experts': spec((2, 5, 16, 24), ('layers', 'experts', 'embed', 'mlp')),
    'small': spec((16, 24), ('embed', 'mlp')),
    'norms': spec((2, 200), ('layers', 'embed')),
    'table': spec((32, 12), ('buckets', 'heads')),
  }
  params = jax.tree.map(lambda s: jnp.zeros(s.shape), specs)
  statistics = scale_by_adafactor(Adafactor(), specs).init(params).statistics
  shapes = {k: [x.shape for x in s] if isinstance(s, Factored) else s.shape for k, s in statistics.items()}
  assert shapes == {
    'out': [(2, 1, 1, 16), (2, 4, 6, 1)],
    'experts': [(2, 5, 16, 1), (2, 5, 1, 24)],
    'small': (16, 24),
    'norms': (2, 200),
    'table': (32, 12),
  }
