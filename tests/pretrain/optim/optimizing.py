"""A small model's parameters, with every kind of axes, and a few updates of them by any optimizer."""

import jax
import jax.numpy as jnp
import numpy as np

from models import partition
from models.specs import Normal, ParamSpec
from pretrain.optim.optimizer import make_optimizer
from pretrain.optim.state import state_shardings


def spec(shape, axes):
  return ParamSpec(shape, jnp.float32, axes, Normal())


SPECS = {
  'embedding': spec((128, 64), ('vocab', 'embed')),
  'head': spec((64, 128), ('embed', 'vocab')),
  'bias': spec((32, 4), ('buckets', 'heads')),
  'norm': spec((64,), ('embed',)),
  'blocks': {
    'query': spec((3, 64, 4, 32), ('layers', 'embed', 'heads', 'head_dim')),
    'out': spec((3, 4, 32, 64), ('layers', 'heads', 'head_dim', 'embed')),
    'up': spec((3, 64, 96), ('layers', 'embed', 'mlp')),
    'down': spec((3, 96, 64), ('layers', 'mlp', 'embed')),
    'norm': spec((3, 64), ('layers', 'embed')),
  },
}


def draw(specs, seed: int, scale: float = 1.0):
  """Values of each parameter, layer l of a stack `1 + 2 l` times as large: a mean over layers would show."""

  def one(path, spec):
    x = scale * np.random.default_rng([seed, len(str(path)) * spec.shape[-1]]).standard_normal(spec.shape)
    sizes = 1 + 2 * np.arange(spec.shape[0]).reshape(-1, *(1 for _ in spec.shape[1:]))
    return jnp.float32(x * sizes if spec.axes[0] == 'layers' else x)

  return jax.tree_util.tree_map_with_path(one, specs)


def separate(tree):
  """The same tree with each layer of `blocks` on its own: arrays, or specs without `layers`."""
  one = lambda x, i: spec(x.shape[1:], x.axes[1:]) if isinstance(x, ParamSpec) else x[i]
  return tree | {'blocks': [jax.tree.map(lambda x, i=i: one(x, i), tree['blocks']) for i in range(3)]}


def updated(cfg, specs, params, grads, mesh=None):
  """`params` after an update by each of `grads`, on a mesh where one is given; the optimizer's state."""
  tx = make_optimizer(cfg, lambda step: 0.01, specs, mesh)
  places = {}
  if mesh is not None:
    own = partition.shardings(specs, mesh)
    places = {'out_shardings': (own, state_shardings(tx, params, own, mesh))}
    params = jax.device_put(params, own)
  state = jax.jit(tx.init, **({'out_shardings': places['out_shardings'][1]} if places else {}))(params)

  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return jax.tree.map(jnp.add, params, updates), state

  step = jax.jit(step, **places)
  for grad in grads:
    params, state = step(params, state, grad)
  return params, state
