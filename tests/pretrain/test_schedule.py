"""The four schedules, against their formulas."""

import math

import numpy as np
import pytest

from pretrain.schedule import Constant, Cosine, Linear, Rsqrt, check_schedule, make_schedule


def values(cfg, steps):
  return [float(make_schedule(cfg)(np.int32(s))) for s in steps]


@pytest.mark.parametrize(
  'cfg',
  [Constant(peak=0.5, warmup_steps=10), Rsqrt(peak=0.5, warmup_steps=10), Cosine(peak=0.5, warmup_steps=10, steps=50)],
)
def test_warmup_is_linear_and_its_first_update_moves(cfg):
  np.testing.assert_allclose(values(cfg, [0, 4, 9]), [0.05, 0.25, 0.5], rtol=1e-6)


def test_rsqrt_falls_with_the_root_of_the_step():
  np.testing.assert_allclose(values(Rsqrt(peak=1.0, warmup_steps=100), [400, 10_000]), [0.5, 0.1], rtol=1e-6)


def test_linear_and_cosine_end_at_their_fraction_and_stay_there():
  linear = Linear(peak=2.0, warmup_steps=0, steps=10, final_fraction=0.1)
  np.testing.assert_allclose(values(linear, [0, 5, 10, 99]), [2.0, 1.1, 0.2, 0.2], rtol=1e-6)
  cosine = Cosine(peak=2.0, warmup_steps=0, steps=12, final_fraction=0.0)
  np.testing.assert_allclose(values(cosine, [3, 6, 12]), [1 + math.cos(math.pi / 4), 1.0, 0.0], rtol=1e-6, atol=1e-7)


def test_a_decay_without_steps_of_its_own_is_refused():
  with pytest.raises(ValueError, match=r'schedule\.steps=10 does not exceed schedule.warmup_steps=10'):
    check_schedule(Linear(peak=1.0, warmup_steps=10, steps=10))
