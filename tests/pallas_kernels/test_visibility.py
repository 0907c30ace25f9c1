"""`Visibility`: defined once, the second argument of every implementation, and a tree that jit and shard_map take."""

import ast
import dataclasses
import inspect
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from models.layers import attention as model
from pallas_kernels.attention import api, cudnn, gpu, gpu_mosaic, reference, tpu
from pallas_kernels.attention.blockwise import attention as blockwise
from pallas_kernels.attention.reference import Visibility
from tests.pallas_kernels.attention_cases import attend, draw, packed, row

FIELDS = {field.name: field.default for field in dataclasses.fields(Visibility)}
MODULES = (api, blockwise, cudnn, gpu, gpu_mosaic, reference, tpu)
FOLDER = pathlib.Path(api.__file__).parent
IDS = jnp.asarray(row(5, 3)[None])


def arguments(function: ast.FunctionDef) -> set[str]:
  own = function.args
  return {each.arg for each in (*own.posonlyargs, *own.args, *own.kwonlyargs)}


@pytest.mark.parametrize(
  'module', MODULES, ids=lambda module: module.__name__.removeprefix('pallas_kernels.attention.')
)
def test_implementations_take_one_visibility_after_the_arrays(module):
  parameters = inspect.signature(module.attention).parameters
  assert list(parameters)[:4] == ['q', 'k', 'v', 'see']
  assert parameters['see'].annotation is Visibility
  assert not parameters.keys() & FIELDS.keys()
  assert not any(each.kind == each.VAR_KEYWORD for each in parameters.values()), 'fields could pass as **options'


def test_only_flash_attention_lists_the_fields():
  listed = {}
  for path in FOLDER.glob('*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.FunctionDef) and len(arguments(node) & FIELDS.keys()) > 2:
        listed[node.name] = path.stem
  assert listed == {'flash_attention': 'api'}


def test_flash_attention_has_every_field_with_its_default():
  parameters = inspect.signature(api.flash_attention).parameters
  required = {inspect.Parameter.empty: dataclasses.MISSING}
  assert {name: required.get(parameters[name].default, parameters[name].default) for name in FIELDS} == FIELDS


def test_flash_attention_passes_every_field_on(monkeypatch):
  given = {name: object() for name in FIELDS}
  monkeypatch.setattr(api, 'attention', lambda q, k, v, see, **options: see)
  see = api.flash_attention(1, 2, 3, **given)
  assert {name: getattr(see, name) for name in FIELDS} == given


@pytest.mark.parametrize('kind', [Visibility, model.Visibility])
def test_arrays_are_data_and_the_rest_is_structure(kind):
  see = kind(causal=True, window=3, num_sinks=1, q_segment_ids=IDS, kv_segment_ids=2 * IDS)
  leaves, structure = jax.tree.flatten(see)
  assert all(isinstance(leaf, jax.Array) for leaf in leaves)
  assert len(leaves) == 2
  other = [{'causal': False}, {'window': 4}, {'window': None}, {'num_sinks': 2}]
  other += [{'cached': True}] if kind is model.Visibility else []
  for change in other:
    assert jax.tree.structure(dataclasses.replace(see, **change)) != structure, change
  again = jax.tree.unflatten(structure, leaves)
  assert (type(again), again.window, again.q_segment_ids is IDS) == (kind, 3, True)


def test_jit_and_shard_map_pass_it():
  arrays, see = draw(8, batch=8), Visibility(causal=True, window=3, **packed(np.repeat(IDS, 8, 0)))
  want = reference.attention(*arrays, see)
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  own = jax.shard_map(reference.attention, mesh=mesh, in_specs=P('data'), out_specs=P('data'))
  for run in (jax.jit(reference.attention), jax.jit(own)):
    np.testing.assert_allclose(run(*arrays, see), want, atol=2e-6)
  full = attend(reference.attention, *arrays, causal=False)
  assert np.abs(want - full).max() > 1e-2
