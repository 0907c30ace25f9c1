"""No optimizer knows on how many devices it runs, or that layers are stacked."""

import functools
import re

import jax
import numpy as np
import pytest

from models import partition
from pretrain.devices.mesh import MeshConfig, make_mesh
from pretrain.optim import adafactor, muon
from pretrain.optim.optimizer import Adafactor, AdamW, Lion, Muon, make_optimizer
from pretrain.optim.shared import sides
from pretrain.optim.state import state_shardings
from tests.pretrain.optim.optimizing import SPECS, draw, separate, spec, updated

GRADS = [draw(SPECS, seed) for seed in (1, 2)]
ADAFACTOR = Adafactor(min_dim_size_to_factor=16, momentum=0.9)
OPTIMIZERS = (AdamW(parameter_scale=True), ADAFACTOR, Muon())
BF16, INT8 = AdamW(state_dtype='bfloat16'), AdamW(state_dtype='int8')
slow = lambda *values: pytest.param(*values, marks=pytest.mark.slow)
FSDP, MIXED = MeshConfig(fsdp=8), MeshConfig(data=2, fsdp=2, tensor=2)
name_of = lambda cfg: cfg.name if hasattr(cfg, 'name') else 'fsdp' if cfg == FSDP else 'mixed'


def distance(a, b) -> float:
  """The largest difference of any value, relative to the largest update of its array."""
  one = lambda x, y, start: float(np.abs(np.asarray(x) - y).max() / np.abs(np.asarray(y) - start).max())
  return np.max(jax.tree.leaves(jax.tree.map(one, a, b, draw(SPECS, 0))))


@functools.cache
def alone(cfg):
  """Parameters after two updates on one device."""
  return updated(cfg, SPECS, draw(SPECS, 0), GRADS)[0]


def close(cfg) -> float:
  """Where something is rounded, a value at the threshold may go the other way."""
  return {'bfloat16': 0.01, 'int8': 0.02}.get(cfg.state_dtype, 0.02 if cfg.name == 'muon' else 1e-4)


@pytest.mark.parametrize(
  ('cfg', 'layout'),
  [
    (OPTIMIZERS[0], FSDP),
    (Muon(), MIXED),
    *(slow(cfg, MIXED) for cfg in (ADAFACTOR, INT8)),
    *(slow(cfg, FSDP) for cfg in (Lion(), ADAFACTOR, Muon())),
    slow(BF16, MIXED),
  ],
  ids=name_of,
)
def test_updates_are_those_of_one_device(cfg, layout):
  mesh = make_mesh(layout)
  params, state = updated(cfg, SPECS, draw(SPECS, 0), GRADS, mesh)
  assert distance(params, alone(cfg)) < close(cfg)
  own = partition.shardings(SPECS, mesh)['blocks']['up']
  moments = [x for path, x in jax.tree_util.tree_leaves_with_path(state) if "'up'" in jax.tree_util.keystr(path)]
  whole = [x.shape for x in moments if x.shape == (3, 64, 96) and x.sharding != own]
  assert whole == [], 'a moment lies where its parameter does'


@pytest.mark.parametrize('cfg', [*OPTIMIZERS, slow(Lion())], ids=name_of)
def test_stacked_layers_are_separate_layers(cfg):
  lone = updated(cfg, separate(SPECS), separate(draw(SPECS, 0)), [separate(g) for g in GRADS])[0]
  assert distance(restacked(lone), alone(cfg)) < close(cfg)


def restacked(params):
  return params | {'blocks': jax.tree.map(lambda *layers: np.stack(layers), *params['blocks'])}


def test_an_rms_across_layers_would_be_seen(monkeypatch):
  right = alone(ADAFACTOR)
  monkeypatch.setattr(adafactor, 'own_dims', lambda spec: tuple(range(len(spec.axes))))
  assert distance(updated(ADAFACTOR, SPECS, draw(SPECS, 0), GRADS)[0], right) > 10 * close(ADAFACTOR)


def test_one_matrix_of_all_layers_would_be_seen(monkeypatch):
  right = alone(Muon())
  both = lambda spec: ((0, 1), tuple(range(2, len(spec.axes)))) if sides(spec) else None
  monkeypatch.setattr(muon, 'num_stacked', lambda spec: 0)
  monkeypatch.setattr(muon, 'sides', both)
  assert distance(updated(Muon(), SPECS, draw(SPECS, 0), GRADS)[0], right) > 5 * close(Muon())


def collectives(cfg, specs, mesh) -> list[tuple[str, str]]:
  """(operation, first result type) of every collective in the compiled update."""
  tx, params = make_optimizer(cfg, lambda step: 0.01, specs, mesh), draw(specs, 0)
  own = partition.shardings(specs, mesh)
  places = (own, state_shardings(tx, params, own, mesh), own)
  update = jax.jit(lambda g, s, p: tx.update(g, s, p), in_shardings=places, out_shardings=(own, places[1]))
  text = update.lower(params, jax.eval_shape(tx.init, params), params).compile().as_text()
  found = re.findall(
    r'= \(?(\w+\[[\d,]*\]).*? (all-gather|all-to-all|all-reduce|collective-permute)(?:-start)?\(', text
  )
  return [(operation, kind) for kind, operation in found]


def size(kind: str) -> int:
  return int(np.prod([int(n) for n in re.findall(r'\d+', kind.split('[')[1])] or [1]))


STACK = {name: spec((8, *s.shape[1:]), s.axes) for name, s in SPECS['blocks'].items()}


def test_muon_spreads_layers_over_fsdp_and_gathers_no_stack():
  found = collectives(Muon(), STACK, make_mesh(MeshConfig(fsdp=8)))
  assert {operation for operation, _ in found} == {'all-to-all', 'all-reduce'}, found
  assert max(size(kind) for operation, kind in found if operation == 'all-reduce') <= 8, 'norms only'


def test_without_its_layout_muon_would_gather_the_stack(monkeypatch):
  monkeypatch.setattr(muon, 'by_layer', lambda x, f, mesh: f(x))
  found = collectives(Muon(), STACK, make_mesh(MeshConfig(fsdp=8)))
  assert max(size(kind) for _, kind in found) >= 8 * 64 * 64, found


EXPERTS = {
  'up': spec((3, 4, 64, 96), ('layers', 'experts', 'embed', 'mlp')),
  'down': spec((3, 4, 96, 64), ('layers', 'experts', 'mlp', 'embed')),
}


@pytest.mark.slow
@pytest.mark.parametrize('cfg', OPTIMIZERS, ids=name_of)
def test_experts_on_their_own_devices_are_updated_as_separate_parameters(cfg):
  """Twelve matrices of very different sizes, each a parameter by itself on one device."""
  sizes = 10.0 ** np.arange(-3, 1)[:, None, None]
  drawn = lambda seed: jax.tree.map(lambda x: x * np.float32(sizes), draw(EXPERTS, seed))
  apart = lambda tree: {f'{k}_{i}_{j}': x[i, j] for k, x in tree.items() for i in range(3) for j in range(4)}
  alone_specs = {
    f'{k}_{i}_{j}': spec(s.shape[2:], s.axes[2:]) for k, s in EXPERTS.items() for i in range(3) for j in range(4)
  }
  mesh, grads = make_mesh(MeshConfig(expert=4, fsdp=2)), [drawn(1), drawn(2)]
  found = apart(updated(cfg, EXPERTS, drawn(0), grads, mesh)[0])
  wanted = updated(cfg, alone_specs, apart(drawn(0)), [apart(g) for g in grads])[0]
  for name, own in wanted.items():
    largest = np.abs(np.asarray(own) - apart(drawn(0))[name]).max()
    assert np.abs(np.asarray(found[name]) - own).max() < close(cfg) * largest, name


@pytest.mark.slow
def test_muon_leaves_experts_on_their_devices():
  found = collectives(Muon(), EXPERTS, make_mesh(MeshConfig(expert=4, fsdp=2)))
  assert {operation for operation, _ in found} <= {'all-to-all', 'all-reduce', 'collective-permute'}, found
  assert max(size(kind) for operation, kind in found if operation == 'all-reduce') <= 8, 'norms only'


@pytest.mark.parametrize('dtype', ['bfloat16', 'int8'])
def test_smaller_state_is_made_where_it_lies(dtype):
  found = collectives(AdamW(state_dtype=dtype), STACK, make_mesh(MeshConfig(fsdp=4, tensor=2)))
  assert all(operation == 'all-reduce' and size(kind) == 1 for operation, kind in found), found
