"""Each family against logits that `transformers` wrote (scripts/make_interchange_goldens.py)."""

import functools

import jax
import pytest

from pretrain.config import bindings
from pretrain.interchange.families import family_for, lost
from pretrain.interchange.importing import flat
from tests.pretrain.interchange import goldens

TOLERANCE = 3e-6  # of the logits' scale; wrong eps, theta and distances are further away


@pytest.fixture(scope='module', params=goldens.FAMILIES)
def golden(request):
  return request.param, *goldens.read(request.param), goldens.expected(request.param)


def test_logits_are_those_of_transformers(golden):
  _, source, params, expected = golden
  assert goldens.worst(source.model, params, expected) < TOLERANCE


def test_a_model_that_is_nearly_right_is_told_apart(golden):
  _, source, params, expected = golden
  values = {key: value for key, value in bindings.flatten(source.model).items() if key in WRONG}
  for key, value in values.items():
    if changed := WRONG[key](value):
      wrong = bindings.override(source.model, {key: changed}, 'test')
      assert goldens.worst(wrong, params, expected) > TOLERANCE, key


WRONG = {
  'norm.eps': lambda eps: 1.01 * eps,
  'relative_max_distance': lambda distance: None if distance == 128 else distance - 5,
}


def test_a_transposed_matrix_is_told_apart(golden):
  _, source, params, expected = golden
  paths = [path for path, x in flat(params).items() if path.endswith('self_attention/out')]
  wrong = jax.tree.map(lambda x: x, params)
  *parents, leaf = paths[0].split('/')
  node = functools.reduce(dict.__getitem__, parents, wrong)
  layers, heads, head_dim, embed = node[leaf].shape
  node[leaf] = node[leaf].reshape(layers, embed, heads * head_dim).swapaxes(1, 2).reshape(node[leaf].shape)
  assert goldens.worst(source.model, wrong, expected) > TOLERANCE


def test_the_parts_of_a_model_find_its_family(golden):
  _, source, _, _ = golden
  assert not lost(source.family, source.model)
  assert not lost(family_for(source.model), source.model)
