"""Policies of rematerialisation: what is kept, what is computed again, and that no gradient changes."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from models.build import KernelsConfig, build, check_model
from models.layers import remat
from models.layers.mlp import MlpConfig
from models.specs import initialize
from pretrain.devices.mesh import AXES
from pretrain.tools.plan import compile_for, tpu_devices
from tests.models.small import EXPERTS, LLAMA, T5, T5_1_0, batch

slow = lambda *values: pytest.param(*values, marks=pytest.mark.slow)


def gradient(cfg, implementation: str = 'auto', **keys):
  """(the gradient's function, parameters)."""
  model = build(dataclasses.replace(cfg, **keys), KernelsConfig(attention=implementation))
  data = batch()
  loss = lambda params: jnp.square(model.apply(params, data)[0]).sum()
  return jax.grad(loss), initialize(model.specs, jax.random.key(0))


def primitives(function, *args) -> list:
  """Names of all equations with a result that is used; the body of a loop counts once."""
  found = []

  def visit(jaxpr):
    used = {id(x) for eqn in jaxpr.eqns for x in eqn.invars} | set(map(id, jaxpr.outvars))
    for eqn in jaxpr.eqns:
      if any(id(x) in used for x in eqn.outvars):
        found.append(eqn.primitive.name)
      for inner in jaxprs_in_params(eqn.params):
        visit(inner)

  visit(jax.make_jaxpr(function)(*args).jaxpr)
  return found


# Products of a block: q, k, v, scores, mix, out, gate, up, down; a gradient needs the results of all but the last.
# The reference divides what it has mixed by the sum of weights: its gradient needs the result before this division.
@pytest.mark.parametrize(
  ('keys', 'again'),
  [
    ({'remat': 'full'}, 'q k v scores mix out gate up'),
    slow({'remat': 'save_out_proj'}, 'q k v scores mix gate up'),
    slow({'remat': 'save_qkv_proj'}, 'scores mix out gate up'),
    slow({'remat': 'save_context'}, 'q k v scores mix out gate up'),
    slow({'remat': 'save_dot_except_mlp'}, 'scores mix gate up'),
    ({'remat': 'minimal'}, 'scores mix'),
    slow({'remat': 'minimal_with_context'}, 'scores mix'),
    ({'remat': 'custom', 'remat_keep': ('query', 'up')}, 'k v scores mix out gate'),
  ],
  ids=lambda x: x['remat'] if isinstance(x, dict) else '',
)
def test_what_is_not_kept_is_computed_again(keys, again):
  count = lambda **keys: primitives(*gradient(LLAMA, **keys)).count('dot_general')
  assert count(**keys) - count(remat='none') == len(again.split())


@pytest.mark.parametrize(('policy', 'runs'), [slow('none', 1), slow('full', 2), ('minimal', 2), ('save_context', 1)])
def test_a_kernel_whose_context_is_kept_runs_forward_once(policy, runs):
  gradients = 2  # kernels: of queries, of keys and values
  assert primitives(*gradient(LLAMA, 'interpret', remat=policy)).count('pallas_call') - gradients == runs


@pytest.mark.parametrize(
  'policy', ['minimal_with_context', *(slow(p) for p in remat.KEPT if p != 'minimal_with_context')]
)
@pytest.mark.parametrize('cfg', [LLAMA, slow(T5_1_0), slow(EXPERTS)], ids=['llama', 't5_1_0', 'experts'])
def test_no_gradient_changes(cfg, policy):
  found, wanted = (jax.jit(function)(params) for function, params in (gradient(cfg, remat=p) for p in (policy, 'none')))
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), found, wanted)


def kept_by_loops(function, params) -> list[set]:
  """For each loop over layers that goes forward: shapes of what it keeps, [layers, …, batch, …]."""
  loops = [eqn for eqn in jax.make_jaxpr(function)(params).jaxpr.eqns if eqn.primitive.name == 'scan']
  results = [[x.aval.shape for x in eqn.outvars] for eqn in loops if not eqn.params['reverse']]
  return [{shape for shape in shapes if len(shape) > 3} for shapes in results]  # what is carried has three dims


def test_an_encoder_and_a_decoder_of_one_size_keep_arrays_of_different_shapes():
  """But for inputs of layers. Without `distinct_shapes` all are alike, and the TPU compiler writes zeros (below)."""
  encoder, decoder = kept_by_loops(*gradient(T5, decoder_layers=T5.encoder_layers, remat='minimal_with_context'))
  inputs = (2, 2, 14, 32)
  assert encoder == {(2, 2, 4, 14, 8), (2, 2, 14, 48), inputs}  # of heads, of MLPs
  assert decoder == {(2, 1, *shape[1:]) for shape in encoder} | {inputs}


@pytest.mark.slow
@pytest.mark.aot
def test_no_named_array_is_filled_with_zeros():
  """Compiled for a TPU. With the policy 'dots', which keeps products without names, those of both stacks are."""

  def filled(policy: str) -> int:
    sizes = {'embed': 256, 'encoder_layers': 12, 'decoder_layers': 12, 'head_dim': 64, 'mlp': MlpConfig(hidden=512)}
    cfg = dataclasses.replace(T5, **sizes, remat=policy, dtype='bfloat16')
    mesh = jax.make_mesh((1,) * 7, AXES, axis_types=(AxisType.Auto,) * 7, devices=tpu_devices('v5e:2x4')[:1])
    model = build(cfg, KernelsConfig(), mesh)
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec()))
    loss = lambda params, data: jnp.square(model.apply(params, data)[0].astype(jnp.float32)).sum()
    params = jax.eval_shape(lambda: initialize(model.specs, jax.random.key(0)))
    data = batch(((200, 300),) * 16, 512)
    text = compile_for(jax.jit(jax.grad(loss)), jax.tree.map(place, (params, data)))[1].as_text()
    found = re.findall(r'= bf16\[(12,(?:1,)?16,[\d,]*)\]\S* broadcast\(', text)
    return len([shape for shape in found if shape != '12,16,512,256'])  # inputs of layers are alike in both

  assert filled('minimal') == 0
  assert filled('dots') > 0


@pytest.mark.slow
def test_names_of_experts_are_kept():
  count = lambda policy: primitives(*gradient(EXPERTS, remat=policy)).count('ragged_dot_general')
  assert count('full') - count('none') == 3, 'down too: its sum is weighted by the router'
  assert count('minimal') == count('none')


@pytest.mark.parametrize('names', [slow(('query', 'key', 'value')), ('input',)])
def test_offloaded_activations_go_to_the_host_and_come_back_equal(names):
  keys = {'remat': 'save_qkv_proj', 'remat_offload': names}
  kept = jax.jit(gradient(LLAMA, remat='save_qkv_proj')[0])
  moved, params = gradient(LLAMA, **keys)
  kinds = [str(x.aval) for eqn in jax.make_jaxpr(moved)(params).jaxpr.eqns for x in eqn.outvars]
  assert sum('<host>' in kind for kind in kinds) == len(names)
  jax.tree.map(np.testing.assert_array_equal, jax.jit(moved)(params), kept(params))


@pytest.mark.parametrize(
  ('cfg', 'keys', 'message'),
  [
    (T5, {'remat': 'custom'}, r"model.remat='custom' with model.remat_keep=\[\]; model.remat='custom' keeps the names"),
    (T5, {'remat': 'full', 'remat_keep': ('up',)}, r"model.remat='full' with model.remat_keep=\['up'\]"),
    (T5_1_0, {'remat': 'custom', 'remat_keep': ('gate',)}, "has 'gate', and model.mlp.gated=False; remove it"),
    (T5, {'remat': 'dots', 'remat_offload': ('out',)}, "has 'out', and model.remat='dots' has no names that cou"),
    (
      T5,
      {'remat_offload': ('out',)},
      r"remat='none' has no names that could be moved; use one that has \('minimal'",
    ),
    (T5, {'remat': 'save_qkv_proj', 'remat_offload': ('out',)}, "keeps 'query', 'key', 'value', 'input'; choose"),
  ],
)
def test_names_without_effect_are_refused(cfg, keys, message):
  with pytest.raises(ValueError, match=message):
    check_model(dataclasses.replace(cfg, **keys))
