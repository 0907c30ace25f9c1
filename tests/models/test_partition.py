"""Logical axes to mesh axes: every axis has a rule, and no two dims of an array share a mesh axis."""

import pytest
from jax.sharding import PartitionSpec

from models.partition import ACTIVATION_RULES, PARAMETER_RULES, spec_for


def test_an_axis_may_be_sharded_differently_in_parameters_and_activations():
  assert spec_for(('embed', 'mlp'), PARAMETER_RULES) == PartitionSpec('fsdp', 'tensor')
  assert spec_for(('batch', 'length', 'embed'), ACTIVATION_RULES) == PartitionSpec(
    ('replica', 'data', 'fsdp', 'expert'), 'sequence', None
  )


def test_an_unknown_axis_is_an_error():
  with pytest.raises(KeyError, match="unknown logical axis 'widht'"):
    spec_for(('widht',), PARAMETER_RULES)


def test_two_dims_on_one_mesh_axis_are_an_error():
  with pytest.raises(ValueError, match='two dims on one mesh axis'):
    spec_for(('heads', 'mlp'), PARAMETER_RULES)
