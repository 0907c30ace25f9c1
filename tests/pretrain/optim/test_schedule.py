"""Schedules, against numbers worked out by hand at the steps where their phases meet."""

import dataclasses
import math
import re

import numpy as np
import pytest

from pretrain.optim.schedule import (
  Constant,
  Cosine,
  Cyclic,
  Infinite,
  Linear,
  Multistep,
  Rewarm,
  Rsqrt,
  Wsd,
  check_schedule,
  make_schedule,
)

LARGEST = 2**31 - 1


def values(cfg, steps):
  return [float(make_schedule(cfg)(np.int32(s))) for s in steps]


@pytest.mark.parametrize(
  'cfg',
  [
    Constant(peak=0.5, warmup_steps=10),
    Rsqrt(peak=0.5, warmup_steps=10),
    Cosine(peak=0.5, warmup_steps=10, steps=50),
    Wsd(peak=0.5, warmup_steps=10, steps=50, decay_steps=40),
    Infinite(peak=0.5, warmup_steps=10, cooldown_steps=5),
    Cyclic(peak=0.5, warmup_steps=10, cycle_steps=5),
    Multistep(peak=0.5, warmup_steps=10, steps=50),
  ],
)
def test_warmup_is_linear_and_its_first_update_moves(cfg):
  np.testing.assert_allclose(values(cfg, [0, 4, 9]), [0.05, 0.25, 0.5], rtol=1e-6)


def test_rsqrt_falls_with_the_root_of_the_step():
  np.testing.assert_allclose(values(Rsqrt(peak=1.0, warmup_steps=100), [399, 9_999]), [0.5, 0.1], rtol=1e-6)


def test_rsqrt_can_stay_at_its_peak_as_t5_does():
  t5 = Rsqrt(peak=0.01, warmup_steps=10_000, warmup='constant')
  wanted = [1 / math.sqrt(max(step, 10_000)) for step in (0, 1, 9_999, 10_000, 40_000, 1_000_000)]
  np.testing.assert_allclose(values(t5, [0, 1, 9_999, 10_000, 40_000, 1_000_000]), wanted, rtol=1e-6)


def test_linear_and_cosine_end_at_their_fraction_and_stay_there():
  linear = Linear(peak=2.0, warmup_steps=0, steps=10, final_fraction=0.1)
  np.testing.assert_allclose(values(linear, [0, 5, 10, 99]), [2.0, 1.1, 0.2, 0.2], rtol=1e-6)
  cosine = Cosine(peak=2.0, warmup_steps=0, steps=12, final_fraction=0.0)
  np.testing.assert_allclose(values(cosine, [3, 6, 12]), [1 + math.cos(math.pi / 4), 1.0, 0.0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
  ('decay', 'quarter', 'half'),
  [('linear', 1.55, 1.1), ('cosine', 1.1 + 0.9 * math.sqrt(0.5), 1.1), ('sqrt', 1.1, 0.7272078)],
)
def test_wsd_is_stable_until_its_last_steps(decay, quarter, half):
  cfg = Wsd(peak=2.0, warmup_steps=4, steps=100, decay_steps=20, decay=decay, final_fraction=0.1)
  np.testing.assert_allclose(values(cfg, [3, 4, 79, 84, 89, 99, 150]), [2, 2, 2, quarter, half, 0.2, 0.2], rtol=2e-6)


def test_infinite_cools_down_stays_and_anneals():
  cfg = Infinite(peak=2.0, warmup_steps=10, cooldown_steps=20, constant_fraction=0.5, final_fraction=0.125)
  np.testing.assert_allclose(values(cfg, [8, 9, 19, 29, 10**6]), [1.8, 2, 1.5, 1, 1], rtol=1e-6)
  annealed = dataclasses.replace(cfg, anneal_start=40, anneal_steps=10)
  np.testing.assert_allclose(values(annealed, [29, 39, 44, 49, 99]), [1, 1, 0.5, 0.25, 0.25], rtol=1e-6)


def test_rewarm_waits_at_the_floor_climbs_and_falls_again():
  cfg = Rewarm(peak=2.0, start=100, warmup_steps=10, steps=150, final_fraction=0.1)
  steps, wanted = [0, 99, 104, 109, 129, 149, 200], [0.2, 0.2, 1.1, 2, 1.1, 0.2, 0.2]
  np.testing.assert_allclose(values(cfg, steps), wanted, rtol=1e-6)


def test_cosine_cycles_restart_and_grow():
  cfg = Cyclic(peak=2.0, warmup_steps=5, cycle_steps=10, growth=3, final_fraction=0.1)
  starts = [4, 14, 44, 134, 4 + 10 * (3**12 - 1) // 2]  # the last is where a logarithm in f32 is off by one
  np.testing.assert_allclose(values(cfg, starts), 2.0, rtol=1e-6)
  np.testing.assert_allclose(values(cfg, [9, 29, 89]), 1.1, rtol=1e-6)
  assert max(values(cfg, [s - 1 for s in starts[1:]])) < 0.25
  same = Cyclic(peak=2.0, cycle_steps=10)
  np.testing.assert_allclose(values(same, [0, 5, 10, 10_005]), [2, 1, 2, 1], rtol=1e-6)


def cosine(done, floor):
  return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1)))


# The rate of step n, counted from 1, after a warm-up of 3 steps: the formulas of the papers.
AFTER_WARMUP = [
  (Linear(peak=1.0, warmup_steps=3, steps=10), lambda n: (10 - n) / 7),
  (Cosine(peak=1.0, warmup_steps=3, steps=10, final_fraction=0.1), lambda n: cosine((n - 3) / 7, 0.1)),
  (Wsd(peak=1.0, warmup_steps=3, steps=10, decay_steps=7), lambda n: 1 - math.sqrt((n - 3) / 7)),
  (Wsd(peak=1.0, warmup_steps=3, steps=10, decay_steps=7, decay='linear'), lambda n: (10 - n) / 7),
  (Rsqrt(peak=1.0, warmup_steps=3), lambda n: math.sqrt(3 / n)),
  (Infinite(peak=1.0, warmup_steps=3, cooldown_steps=7, constant_fraction=0.5), lambda n: cosine((n - 3) / 7, 0.5)),
  (Cyclic(peak=1.0, warmup_steps=3, cycle_steps=8), lambda n: cosine((n - 3) / 8, 0)),
  (Cyclic(peak=1.0, warmup_steps=3, cycle_steps=14, shape='triangular'), lambda n: (10 - n) / 7),
]


@pytest.mark.parametrize(('cfg', 'decay'), AFTER_WARMUP, ids=lambda value: getattr(value, 'name', ''))
def test_the_peak_comes_once_and_the_next_step_has_a_lower_rate(cfg, decay):
  rates = values(cfg, range(10))
  wanted = [1 / 3, 2 / 3, 1, *map(decay, range(4, 11))]
  np.testing.assert_allclose(rates, wanted, rtol=1e-5, atol=1e-7)
  assert [step for step, rate in enumerate(rates) if rate >= 1 - 1e-6] == [2]


@pytest.mark.parametrize(
  'cfg',
  [
    Rsqrt(peak=1.0, warmup_steps=LARGEST),
    Linear(peak=1.0, warmup_steps=3, steps=LARGEST),
    Cosine(peak=1.0, warmup_steps=LARGEST - 1, steps=LARGEST),
    Wsd(peak=1.0, steps=LARGEST, decay_steps=LARGEST),
    Infinite(peak=1.0, cooldown_steps=9, anneal_start=LARGEST, anneal_steps=LARGEST),
    Rewarm(peak=1.0, start=9, warmup_steps=9, steps=LARGEST),
    Cyclic(peak=1.0, cycle_steps=LARGEST),
    Multistep(peak=1.0, steps=LARGEST),
  ],
  ids=lambda cfg: cfg.name,
)
def test_the_largest_number_of_steps_that_a_config_may_have_is_no_overflow(cfg):
  assert 0 <= values(cfg, [5])[0] <= 1


def test_cosine_by_hand():
  rates = values(Cosine(peak=1.0, warmup_steps=3, steps=10), range(10))
  np.testing.assert_allclose(rates[:5] + rates[-1:], [0.3333, 0.6667, 1, 0.9554, 0.8306, 0.1], atol=1e-4)


@pytest.mark.parametrize('warmup_steps', [1, 3])
def test_each_rewarm_has_its_peak_once(warmup_steps):
  cfg = Rewarm(peak=1.0, start=4, warmup_steps=warmup_steps, steps=14)
  rates = values(cfg, range(14))
  peak = 4 + warmup_steps
  assert [step + 1 for step, rate in enumerate(rates) if rate >= 1 - 1e-6] == [peak]
  wanted = [cosine((n - peak) / (14 - peak), 0.1) for n in range(peak, 15)]
  np.testing.assert_allclose(rates[peak - 1 :], wanted, rtol=1e-5)


@pytest.mark.parametrize(
  'cfg', [Linear(peak=1.0, steps=10), Cosine(peak=1.0, steps=10), Cyclic(peak=1.0, cycle_steps=10)]
)
def test_without_warmup_the_first_step_has_the_peak(cfg):
  rates = values(cfg, range(10))
  assert [step for step, rate in enumerate(rates) if rate == 1] == [0]


@pytest.mark.parametrize('cfg', [cfg for cfg, _ in AFTER_WARMUP], ids=lambda cfg: cfg.name)
def test_a_run_of_an_earlier_version_has_each_rate_of_the_decay_a_step_later(cfg):
  late, now = (make_schedule(cfg, decay_delay=delay)(np.arange(20)) for delay in (1, 0))
  assert np.array_equal(late[:3], now[:3])
  assert np.array_equal(late[3:], now[2:-1])
  assert late[2] == late[3] == 1


def test_triangles_have_no_jump():
  cfg = Cyclic(peak=2.0, cycle_steps=10, shape='triangular', final_fraction=0.1)
  np.testing.assert_allclose(values(cfg, [0, 1, 5, 9, 10, 15]), [2, 1.64, 0.2, 1.64, 2, 0.2], rtol=1e-6)


def test_multistep_drops_at_its_steps():
  cfg = Multistep(peak=2.0, warmup_steps=5, steps=100)
  np.testing.assert_allclose(values(cfg, [4, 79, 80, 89, 90, 200]), [2, 2, 0.632, 0.632, 0.2, 0.2], rtol=1e-6)


CONTINUOUS = (
  Constant(peak=1.0, warmup_steps=50),
  Rsqrt(peak=1.0, warmup_steps=50),
  Linear(peak=1.0, warmup_steps=50, steps=900),
  Cosine(peak=1.0, warmup_steps=50, steps=900),
  Wsd(peak=1.0, warmup_steps=50, steps=900, decay_steps=200, decay='cosine'),
  Wsd(peak=1.0, warmup_steps=50, steps=900, decay_steps=200, decay='linear'),
  Infinite(peak=1.0, warmup_steps=50, cooldown_steps=100, anneal_start=500, anneal_steps=100),
  Rewarm(peak=1.0, start=300, warmup_steps=50, steps=900),
  Cyclic(peak=1.0, warmup_steps=50, cycle_steps=200, growth=2, shape='triangular'),
)


@pytest.mark.parametrize('cfg', CONTINUOUS, ids=lambda cfg: cfg.name)
def test_no_step_is_a_jump(cfg):
  rates = np.asarray(make_schedule(cfg)(np.arange(1000)))
  assert np.abs(np.diff(rates)).max() <= 0.0201
  assert rates.min() >= 0


def test_the_jumps_are_seen_as_such():
  """The mutation: a schedule with a jump would not pass the test above."""
  for cfg in (Multistep(peak=1.0, steps=900), Cyclic(peak=1.0, cycle_steps=200)):
    assert np.abs(np.diff(make_schedule(cfg)(np.arange(1000)))).max() > 0.1


@pytest.mark.parametrize(
  ('cfg', 'message'),
  [
    (Linear(peak=1.0, warmup_steps=10, steps=10), 'schedule.steps=10 does not exceed schedule.warmup_steps=10'),
    (Multistep(peak=1.0, warmup_steps=10, steps=10), 'schedule.steps=10 does not exceed schedule.warmup_steps=10'),
    (Wsd(peak=1.0, warmup_steps=10, steps=50, decay_steps=41), 'begins at step 9, in the warm-up; lower decay_steps'),
    (Rewarm(peak=1.0, start=30, warmup_steps=10, steps=40), 'schedule.steps=40 does not exceed schedule.start=30 + '),
    (Infinite(peak=1.0, cooldown_steps=9, anneal_start=10), 'schedule.anneal_steps=None; set both, or neither'),
    (Infinite(peak=1.0, warmup_steps=4, cooldown_steps=9, anneal_start=12, anneal_steps=1), 'set it to 13 or later'),
    (
      Infinite(peak=1.0, cooldown_steps=9, anneal_start=9, anneal_steps=1, constant_fraction=0.05),
      'an anneal goes down',
    ),
    (Multistep(peak=1.0, steps=99, drops=(0.5,)), 'schedule.drops has 1 values, schedule.factors 2'),
    (
      Multistep(peak=1.0, steps=100, drops=(0.9, 0.8)),
      'are the steps [90, 80] of schedule.steps=100; they must ascend',
    ),
    (Multistep(peak=1.0, warmup_steps=90, steps=100), 'after schedule.warmup_steps=90'),
  ],
)
def test_phases_that_overlap_are_refused(cfg, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    check_schedule(cfg)
