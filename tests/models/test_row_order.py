"""The order of a row's tokens on the devices that share it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from models.build import KernelsConfig, row_order
from models.layers.positions.rotary import Clex
from models.row_order import RowOrder
from tests.models import small

BATCH = {
  'encoder_input_tokens': jnp.arange(24).reshape(2, 12),
  'decoder_target_tokens': jnp.arange(24).reshape(2, 12),
  'decoder_loss_weights': jnp.arange(24.0).reshape(2, 12),
  'example_index': jnp.arange(2),
}


def test_each_device_has_a_part_and_the_same_one_from_the_end():
  order, parts = RowOrder(3), [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7]
  found = order.arrange(BATCH)
  np.testing.assert_array_equal(found['decoder_places'], [parts, parts])
  for name in ('decoder_target_tokens', 'decoder_loss_weights'):
    np.testing.assert_array_equal(found[name], BATCH[name][:, jnp.array(parts)])
    np.testing.assert_array_equal(order.restore(found[name]), BATCH[name])
  for name in ('encoder_input_tokens', 'example_index'):
    np.testing.assert_array_equal(found[name], BATCH[name])


def test_causal_work_is_equal():
  places = np.asarray(RowOrder(4).arrange({'decoder_target_tokens': jnp.zeros((1, 32))})['decoder_places'])
  assert (places[0] + 1).reshape(4, -1).sum(1).tolist() == [32 * 33 / 2 / 4] * 4


@pytest.mark.parametrize(
  ('changes', 'attention', 'devices'),
  [
    ({}, 'auto', 4), ({}, 'ring', 4), ({}, 'reference', 1), ({'dropout': 0.1}, 'auto', 4),
    ({'experts': 4, 'expert_capacity': 1.0}, 'auto', 1), ({'experts': 4}, 'auto', 4),
    ({'dropout': 0.1, 'dropout_sites': 'bert'}, 'auto', 1), ({'dropout_sites': 'bert'}, 'auto', 4),
    ({'rope_scaling': Clex(original_max_positions=4, max_factor=3)}, 'auto', 1),
  ],
)  # fmt: skip
def test_rows_stay_in_order_where_a_model_reads_indices(changes, attention, devices):
  cfg = dataclasses.replace(small.LLAMA, **changes)
  assert row_order(cfg, KernelsConfig(attention=attention), 4) == RowOrder(devices)
  assert row_order(small.ENCODER, KernelsConfig(), 4) == RowOrder()
