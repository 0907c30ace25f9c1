"""Logical axes to mesh axes: total, and never two dims on one mesh axis."""

import pytest
from jax.sharding import PartitionSpec

from models.partition import ACTIVATION_RULES, PARAMETER_RULES, spec_for


def test_parameters_and_activations_use_the_same_words_differently():
  assert spec_for(('embed', 'mlp'), PARAMETER_RULES) == PartitionSpec('fsdp', 'tensor')
  assert spec_for(('batch', 'length', 'embed'), ACTIVATION_RULES) == PartitionSpec(
    ('replica', 'data', 'fsdp'), 'sequence', None
  )


def test_an_unknown_axis_is_an_error():
  with pytest.raises(KeyError, match="unknown logical axis 'widht'"):
    spec_for(('widht',), PARAMETER_RULES)


def test_two_dims_on_one_mesh_axis_are_an_error():
  with pytest.raises(ValueError, match='two dims on one mesh axis'):
    spec_for(('heads', 'mlp'), PARAMETER_RULES)
