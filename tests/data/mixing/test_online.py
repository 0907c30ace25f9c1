"""Online data mixing: weights follow the reference code's formulas; its state is part of the position."""

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.batches.source import MixtureStage, Source, StoreData, Synthetic
from data.mixing.online import Mixing, Odm, begin, check_online, exploration, mix, whole_rows
from data.objectives.objectives import CausalLm
from tests.data.batches.test_source import digest, opened, two_stores  # noqa: F401

NAMES = {'a': 0, 'b': 0, 'c': 0}


def plain_odm(losses, every: int, shares: str, smoothing: float = 0.9):
  """(rewards, probabilities) after each update, computed source by source as in SmoothedMeanWeightUpdater."""
  number = len(losses[0])
  rewards, eps, found = [0.0] * number, 1 / number, []
  for decision, lost in enumerate(losses, 1):
    for i, loss in enumerate(lost):
      if loss is not None:
        rewards[i] = smoothing * rewards[i] + (1 - smoothing) * math.exp(loss)
    before, eps = eps, min(1 / number, math.sqrt(math.log(number) / (number * decision * every)))
    values = [math.exp(r * before) if shares == 'exponential' else r * before for r in rewards]
    scale = (1 - number * eps) / sum(values)
    found.append((list(rewards), [value * scale + eps for value in values]))
  return found


@pytest.mark.parametrize('shares', ['exponential', 'linear'])
def test_weights_equal_the_reference(shares):
  rng = np.random.default_rng(0)
  losses = np.round(rng.uniform(1, 4, (60, 3)), 3).tolist()
  losses[7][1] = losses[30][2] = None  # no rows of this source in this step
  cfg, state = Odm(every=2, shares=shares), begin({'examples': 0}, NAMES)
  for number, (lost, (rewards, weights)) in enumerate(zip(losses, plain_odm(losses, 2, shares), strict=True), 1):
    for tokens in ([0.5, 0.3, 0.2], [0.1, 0.3, 0.6]):
      own = np.array([0.0 if loss is None else n for loss, n in zip(lost, tokens, strict=True)])
      state = state.seen(own * np.array([loss or 0 for loss in lost]), own)
    state = state.decided(cfg, number * 400, NAMES, 200)
    np.testing.assert_allclose(state.rewards, rewards, rtol=1e-12)
    exact = mix(cfg, np.array(state.rewards), 2 * number - 2, 2 * number)
    np.testing.assert_allclose(exact, weights, rtol=1e-9)
    assert np.abs(np.array(state.weights) / 400 - exact).max() < 3 / 400
  assert max(state.weights) > 1.2 * min(state.weights)


def step_losses(steps: int):
  rng = np.random.default_rng(1)
  return [(n * rng.uniform(1, 4, 3), n) for n in rng.dirichlet((5, 5, 5), steps)]


def advanced(state: Mixing, cfg: Odm, first: int, last: int) -> Mixing:
  """`state` after steps first … last - 1 of 8 rows."""
  for step, (loss, tokens) in list(enumerate(step_losses(40)))[first:last]:
    state = state.seen(loss, tokens)
    if (step + 1) * 8 == state.next_start(cfg, 8):
      state = state.decided(cfg, (step + 1) * 8, NAMES, 8)
  return state


def test_a_run_interrupted_anywhere_computes_the_same_weights():
  cfg = Odm(every=3, warmup_steps=6)
  whole = advanced(begin({'examples': 0}, NAMES), cfg, 0, 40)
  assert whole.steps == 39
  for cut in range(40):
    at_cut = advanced(begin({'examples': 0}, NAMES), cfg, 0, cut)
    assert (at_cut.weights is None) == (cut < 9), 'given ones until the warm-up is over'
    saved = json.loads(json.dumps({'examples': cut * 8, 'mixture': dataclasses.asdict(at_cut)}))
    assert dataclasses.asdict(advanced(begin(saved, NAMES), cfg, cut, 40)) == dataclasses.asdict(whole)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(weights=st.lists(st.floats(0, 1), min_size=2, max_size=9), extra=st.integers(0, 9000))
def test_weights_become_whole_rows_and_no_source_is_left_out(weights, extra):
  weights = np.array(weights) + 1e-3
  rows = min(len(weights) + extra, 4096)
  counts = np.array(whole_rows(weights / weights.sum(), len(weights) + extra))
  assert counts.sum() == rows
  assert counts.min() >= 1
  assert (counts == counts.astype(int)).all()
  exact = weights / weights.sum() * rows
  lifted = (exact < 1).sum()  # raised to one row each, taken from other sources
  assert np.abs(counts - exact).max() < (1 + lifted) * (1 + 1e-9)


def test_weights_are_finite_for_every_loss():
  state, tokens = begin({'examples': 0}, NAMES), np.full(3, 1 / 3)
  nothing = state.seen(np.array([np.nan, 1, 1]), tokens)
  assert nothing == dataclasses.replace(state, loss=[0.0] * 3, tokens=[0.0] * 3)
  for worst in (0.0, 11.0, 1e4):
    seen = state.seen(tokens * [worst, 1, 2], tokens)
    for shares in ('exponential', 'linear'):
      found = seen.decided(Odm(every=50, shares=shares), 400, NAMES, 8)
      assert np.isfinite(found.weights).all()
      assert sum(found.weights) == 400
  unseen = state.decided(Odm(every=50), 400, NAMES, 8)
  assert np.ptp(unseen.weights) <= 1
  assert exploration(3, 10**6) < 1e-3 < exploration(3, 10) < exploration(3, 1) == 1 / 3


def test_after_an_update_each_source_continues_with_its_next_rows_on_any_host(two_stores):  # noqa: F811
  cfg, sources = Odm(every=4), tuple(Source(path=str(path)) for path in two_stores)
  data = opened(None, CausalLm(), 0, 64, sources=sources, online=cfg)
  state, used = begin({'examples': 0}, data.used(0)), data.used(32)
  state = dataclasses.replace(state, loss=[3.0, 1.0], tokens=[1.0, 1.0]).decided(cfg, 32, used, 8)
  place = json.loads(json.dumps({'examples': 32, 'mixture': dataclasses.asdict(state)}))
  after = data.at(place)
  shares = np.bincount(after.global_rows(32, 32)['source_index'], minlength=2)
  assert shares.tolist() == state.weights
  assert shares.tolist() != [16, 16]
  assert [after.progress(64)[name]['weight'] for name in after.names] == (shares / 32).tolist()
  rows = [(o.path, o.epoch, o.row) for o in map(data.describe_row, range(32))]
  rows += [(o.path, o.epoch, o.row) for o in map(after.describe_row, range(32, 64))]
  assert len(set(rows)) == 64
  whole = after.batch(5, slice(0, 8))
  parts = [opened(None, CausalLm(), 0, 64, sources=sources, online=cfg).at(place) for _ in range(2)]
  parts = [part.batch(5, slice(4 * i, 4 * i + 4)) for i, part in enumerate(parts)]
  assert digest({name: np.concatenate([part[name] for part in parts]) for name in whole}) == digest(whole)


@pytest.mark.parametrize(
  ('number', 'options', 'message'),
  [
    (1, {}, 'data.online mixes several sources, but there is one'),
    (
      2,
      {'stages': (MixtureStage(start_step=0, weights=(1.0, 2.0)),)},
      'both data.stages and data.online set the shares',
    ),
    (
      5,
      {},
      r'data.online.every=1 steps of data.batch_size=2 have only 2 rows for 5 sources; set data.online.every >= 3',
    ),
  ],
)
def test_invalid_online_mixing_is_refused(number, options, message):
  sources = tuple(Source(path=str(i)) for i in range(number))
  cfg = StoreData(batch_size=2, targets_length=8, sources=sources, online=Odm(every=1), **options)
  with pytest.raises(ValueError, match=message):
    check_online(cfg)
  with pytest.raises(ValueError, match='there is one'):
    check_online(Synthetic(batch_size=2, targets_length=8, online=Odm()))
  check_online(dataclasses.replace(cfg, online=None))
