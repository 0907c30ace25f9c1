"""The share of positions that hold tokens, and the share of FLOPs that padding takes, as metrics of a step."""

import jax
import numpy as np
import pytest

from pretrain.devices.mesh import MeshConfig, make_mesh, to_global
from pretrain.records.stopwatch import MEANS, Stopwatch
from pretrain.step.fill import make_fill
from tests.pretrain import tiny
from tests.pretrain.tools.test_data_plan import DECODER, flops_by_hand


def segments(rows: int, length: int, used: int) -> np.ndarray:
  """int32[rows, length], of which the first `used` positions in order of rows are in segments."""
  return (np.arange(rows * length).reshape(rows, length) < used).astype(np.int32) * 3


def test_an_encoder_decoder_has_both_sides_over_the_global_batch():
  model = tiny.experiment(tiny.UL2, *tiny.SMALL_UL2).model
  batch = {'encoder_segment_ids': segments(8, 64, 480), 'decoder_segment_ids': segments(8, 32, 100)}
  found = jax.jit(make_fill(model))(to_global(batch, make_mesh(MeshConfig(data=8))))
  encoder, decoder = flops_by_hand(64, 32)
  share = (32 * encoder + 156 * decoder) / (8 * (64 * encoder + 32 * decoder))
  assert {key: float(value) for key, value in found.items()} == pytest.approx(
    {'fill/encoder': 480 / 512, 'fill/decoder': 100 / 256, 'padding_flops': share}, rel=1e-6
  )


@pytest.mark.parametrize(
  ('base', 'overrides', 'side'), [(tiny.ENCODER, tiny.SMALL_ENCODER, 'encoder'), (tiny.DECODER, DECODER, 'decoder')]
)
def test_one_stack_has_one_side(base, overrides, side):
  found = make_fill(tiny.experiment(base, *overrides).model)({f'{side}_segment_ids': segments(4, 64, 64)})
  assert {key: float(value) for key, value in found.items()} == {f'fill/{side}': 0.25, 'padding_flops': 0.75}
  assert set(found) < set(MEANS)


def test_a_row_has_the_mean_since_the_row_before():
  watch = Stopwatch()
  for share in (0.5, 0.25, 1.0):
    watch.count({})
    watch.add({'loss': 3.0, 'fill/decoder': share})
  assert watch.report()['fill/decoder'] == pytest.approx(1.75 / 3)
  watch.add({'fill/decoder': 0.5})
  found = watch.report()
  assert found['fill/decoder'] == 0.5
  assert 'loss' not in found, 'the row has that of its own step'
  assert 'fill/decoder' not in watch.report()
