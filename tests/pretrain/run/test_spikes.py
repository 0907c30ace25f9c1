"""Skipped updates: they change no parameter, how a spike is detected, and how a run rewinds."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pretrain.experiment.program
from pretrain.checkpoints.orbax_files import Files
from pretrain.cli.main import main
from pretrain.errors import NonFiniteError, SpikeError
from pretrain.hosts.skipping import add_skip, read_rewinds, read_skips
from pretrain.optim import spikes as optim_spikes
from pretrain.optim.optimizer import Adafactor, AdamW, Lion, Muon, make_optimizer, skipped
from pretrain.optim.spikes import SkipSpikes
from pretrain.records.metrics import read_metrics
from pretrain.run import rewinding
from pretrain.run.train import train
from pretrain.testing import assert_resumes_exactly
from pretrain.tools.report import rewinds_section
from tests.pretrain import tiny
from tests.pretrain.optim.optimizing import SPECS, draw

OPTIMIZERS = [AdamW(), Lion(), Muon(), Adafactor(momentum=0.9, min_dim_size_to_factor=8), AdamW(state_dtype='int8')]
FEW = {key: SPECS[key] for key in ('embedding', 'norm')} | {'blocks': {'up': SPECS['blocks']['up']}}


def bits(tree) -> list[bytes]:
  return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize('cfg', OPTIMIZERS, ids=lambda cfg: f'{cfg.name}-{cfg.state_dtype}')
def test_a_skipped_update_changes_no_bit_of_parameters_and_moments(cfg):
  params, grads = draw(FEW, 0), draw(FEW, 1)
  tx = make_optimizer(cfg, lambda step: 0.01, FEW, spikes=SkipSpikes(window=4))

  @jax.jit
  def step(params, state, scale, loss):
    updates, state = tx.update(jax.tree.map(lambda x: x * scale, grads), state, params, value=loss)
    return optax.apply_updates(params, updates), state

  state = jax.jit(tx.init)(params)
  for loss in (1.0, 1.1, 1.0):
    params, state = step(params, state, 0.1, loss)
  params['norm'] = jnp.full(64, -0.0)  # 0.0 added to it would be another value
  for scale, loss, wanted in ((np.nan, 1.0, [1, 1, 0, 0]), (0.1, 9.0, [0, 0, 1, 1])):
    after, left = step(params, state, scale, loss)
    assert bits(after) == bits(params)
    assert bits(left[0].inner) == bits(state[0].inner)
    assert int(left[1].count) == int(state[1].count) + 1, 'the schedule goes on'
    counts = skipped(left)
    assert [int(counts[key]) for key in ('skipped', 'skipped_consecutive', 'spikes', 'spikes_consecutive')] == wanted
    moved, _ = step(after, left, 0.1, 1.05)
    assert bits(moved) != bits(after)


def judge(values, window=8, sigmas=6.0, since=0):
  """(spike, limits) of each (loss, gradient norm) in turn."""
  state, out = optim_spikes.empty(window), []
  step = jax.jit(lambda state, now: optim_spikes.judged(state, now, sigmas, since))
  for now in values:
    spike, state = step(state, jnp.asarray(now, jnp.float32))
    out.append((bool(spike), np.asarray(state.limits)))
  return out, state


NORMAL = [(2 + 0.1 * np.sin(7 * i), 1 + 0.1 * np.cos(5 * i)) for i in range(30)]


def test_the_limit_comes_from_the_last_updates_that_were_not_spikes():
  values = [*NORMAL[:20], (9.0, 1.0), (9.0, 1.0), NORMAL[20]]
  out, state = judge(values)
  assert [i for i, (spike, _) in enumerate(out) if spike] == [20, 21], 'a spike does not hide the next one'
  last = np.array(NORMAL[12:20], np.float32)
  for _, limits in out[20:23]:
    np.testing.assert_allclose(limits, last.mean(0) + 6 * last.std(0, ddof=1), rtol=1e-5)
  np.testing.assert_array_equal(state.seen, np.array(NORMAL[13:21], np.float32))
  assert (int(state.total), int(state.consecutive), int(state.updates)) == (2, 0, 23)


def test_no_spike_is_detected_before_half_of_the_window_is_full():
  out, _ = judge([*NORMAL[:3], (99.0, 1.0)])
  assert not any(spike for spike, _ in out)
  assert np.isinf(out[-1][1]).all()
  assert judge([*NORMAL[:4], (99.0, 1.0)])[0][-1][0]


@pytest.mark.parametrize(
  ('now', 'spike'),
  [((1.0, 99.0), True), ((99.0, 1.0), True), ((np.nan, 1.0), True), ((np.inf, 1.0), True), ((np.nan, np.nan), False),
   ((-9.0, 0.0), False)],
)  # fmt: skip
def test_a_norm_alone_is_a_spike_and_a_gradient_that_is_not_finite_is_none(now, spike):
  out, state = judge([*NORMAL[:8], now])
  assert out[-1][0] == spike
  entered = now == (-9.0, 0.0)
  assert (state.seen[-1] == jnp.asarray(now)).all() == entered


def test_losses_of_an_earlier_phase_do_not_count():
  """Another objective has another level: it would be one spike after another."""
  lower = [(v - 1, n) for v, n in NORMAL[:8]]
  assert judge([*lower, *NORMAL[:8]])[0][8][0]
  out, _ = judge([*lower, *NORMAL[:8], (9.0, 1.0)], since=8)
  assert [i for i, (spike, _) in enumerate(out) if spike] == [16]


@pytest.fixture
def poison(monkeypatch):
  """`poison({batch number: factor})`: the loss of that batch, wherever it comes, is times that."""
  make = pretrain.experiment.program.make_loss
  monkeypatch.setattr('pretrain.run.train.write_report', lambda _: None)

  def poisoned(factors):
    def make_loss(*args):
      loss = make(*args)

      def scaled(params, batch, *rest):
        times = jnp.float32(1)
        for number, factor in factors.items():
          times = jnp.where(batch['example_index'][0] == 8 * number, jnp.float32(factor), times)
        value, (metrics, seen) = loss(params, batch, *rest)
        return value * times, (metrics | {'loss': metrics['loss'] * times}, seen)

      return scaled

    monkeypatch.setattr(pretrain.experiment.program, 'make_loss', make_loss)

  return poisoned


KEYS = ('mesh.data=1', 'checkpoint.every=4', 'checkpoint.keep=9', 'spikes.window=4')
SKIP = (*KEYS, "spikes.name='skip'", 'spikes.sigmas=20.0')
REWIND = (*KEYS, "spikes.name='rewind'", 'spikes.sigmas=20.0', 'spikes.steps=3')


@pytest.mark.slow
def test_a_resumed_run_keeps_the_losses_of_the_window(poison, tmp_path):
  """The spike is the first step after the resume: it is detected only if the window was restored."""
  poison({6: 100.0})
  assert_resumes_exactly(tiny.decoder(*SKIP), tmp_path, steps=10, stop_at=6)
  rows = read_metrics(tmp_path / 'resumed')
  assert [row['spikes'] for row in rows] == [0.0] * 6 + [1.0] * 4
  assert rows[6]['loss'] > 100 > rows[6]['loss_limit']
  assert 'loss_limit' not in rows[0], 'none before there is one'


@pytest.mark.slow
def test_a_run_whose_losses_stay_high_stops(poison, tmp_path, monkeypatch):
  poison(dict.fromkeys(range(5, 20), 100.0))
  said = []
  monkeypatch.setattr('pretrain.records.metrics.Metrics.warn', lambda self, text: said.append(text))
  message = r'NONFINITE: loss=6\d\d.* at step 7 \(examples 48..55\). .*\(2 of 2 consecutive\). Stopped; step 4 is saved'
  with pytest.raises(NonFiniteError, match=message) as caught:
    train(tiny.decoder(*SKIP, 'train.steps=20', 'spikes.max_consecutive=2'), tmp_path)
  assert caught.value.exit_code == 71
  assert read_metrics(tmp_path)[-1]['step'] == 7
  (line,) = said
  assert line.startswith('SPIKE: loss=6')
  assert line.endswith('at step 6 (examples 40..47). Update skipped (1 of 2 consecutive).')


def numbers(workdir) -> list[tuple]:
  return [tuple(row[key] for key in ('step', 'loss', 'grad_norm', 'batch_checksum')) for row in read_metrics(workdir)]


def test_a_run_that_rewinds_equals_a_run_that_skips_the_same_examples(poison, tmp_path, own_programs):
  poison({9: 100.0})
  cfg = tiny.decoder(*REWIND, 'train.steps=14', 'checkpoint.every=2')
  with pytest.raises(
    SpikeError, match=r'at step 10 \(examples 72..79\). Returned to step 6; examples 48..79 are skipped'
  ):
    train(cfg, tmp_path / 'back')
  checkpoints = tmp_path / 'back/checkpoints'
  assert sorted(p.name for p in checkpoints.iterdir()) == ['2', '4', '6', '8.undone'], 'nothing is deleted'
  before = numbers(tmp_path / 'back')
  assert train(cfg, tmp_path / 'back') == 0
  (tmp_path / 'told').mkdir()
  add_skip(tmp_path / 'told', 48, 80)
  assert train(cfg, tmp_path / 'told') == 0
  assert numbers(tmp_path / 'back') == numbers(tmp_path / 'told')
  again = {row[3] for row in numbers(tmp_path / 'back')} & {row[3] for row in before[6:]}
  assert len(before) == 10
  assert again == set(), 'no batch after step 6 is used twice'
  place = json.loads((checkpoints / '14/position/metadata').read_text())['loader']
  assert place['skipped'] == [[48, 80]]


@pytest.mark.slow
def test_a_second_spike_rewinds_again_and_a_third_stops_the_run(poison, tmp_path):
  """What was left out before stays out, and the next range begins behind it."""
  poison({5: 100.0, 8: 100.0, 11: 100.0})
  cfg = tiny.decoder(*REWIND, 'train.steps=14', 'spikes.max_rewinds=2', 'spikes.window=5', 'spikes.steps=1')
  codes = []
  for _ in range(2):
    with pytest.raises(SpikeError) as caught:
      train(cfg, tmp_path)
    codes.append(caught.value.exit_code)
  assert codes == [72, 72]
  assert read_skips(tmp_path) == [(32, 48), (48, 72)]
  with pytest.raises(NonFiniteError, match=r'after 2 rewinds \(spikes.max_rewinds=2\). Stopped; step 4 is saved in'):
    train(cfg, tmp_path)
  assert [(r['step'], r['to'], r['examples']) for r in read_rewinds(tmp_path)] == [
    (6, 4, [32, 48]), (7, 4, [48, 72])
  ]  # fmt: skip
  text = rewinds_section(read_rewinds(tmp_path))
  assert 'spike at step 7</td><td class="number">4</td><td>48 to 71</td>' in text


@pytest.mark.slow
def test_a_save_that_fails_at_the_same_time_does_not_prevent_a_rewind(poison, tmp_path, monkeypatch):
  """It is one that would have been tried again: code 66 would end the run."""
  poison({9: 100.0})
  wait, number = Files.wait, iter(range(9))

  def slow_then_fails(files):
    wait(files)
    if next(number) == 3:
      time.sleep(1)
      raise OSError('no such disk')

  monkeypatch.setattr(Files, 'wait', slow_then_fails)
  cfg = tiny.decoder(*REWIND, 'train.steps=12', 'checkpoint.every=2')
  with pytest.raises(SpikeError, match=r'at step 10 .* Returned to step 6; examples 48\.\.79'):
    train(cfg, tmp_path)
  assert sorted(p.name for p in (tmp_path / 'checkpoints').iterdir()) == ['2', '4', '6']


@pytest.mark.slow
def test_an_interrupted_rewind_is_completed_by_the_next_start(poison, tmp_path, monkeypatch):
  """Killed before the later steps are put aside, and after: nothing is left out before they are."""
  poison({9: 100.0})
  cfg = tiny.decoder(*REWIND, 'train.steps=12', 'checkpoint.every=2')
  for owner, name in ((rewinding.step_folders, 'put_aside'), (rewinding, 'add_skip')):
    with monkeypatch.context() as patch:
      patch.setattr(owner, name, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
      with pytest.raises(KeyboardInterrupt):
        train(cfg, tmp_path)
    assert read_skips(tmp_path) == []
  with pytest.raises(SpikeError, match=r'Returned to step 6; examples 48\.\.79'):
    train(cfg, tmp_path)
  assert train(cfg, tmp_path) == 0


@pytest.mark.parametrize(
  ('keys', 'message'),
  [
    (["spikes.name='skip'", 'spikes.sigmas=0'], 'spikes.sigmas=0; it must be > 0.'),
    (["spikes.name='skip'", 'spikes.window=2'], 'spikes.window=2; it must be >= 4.'),
    (["spikes.name='skip'", 'spikes.steps=9'], "unknown key spikes.steps; with spikes.name='skip' the keys are"),
    (["spikes.name='rewind'", 'checkpoint.every=40', 'checkpoint.keep=3'],
     'spikes.steps=100 with checkpoint.keep=3 and checkpoint.every=40: no step so old is kept; set checkpoint.keep >='),
    (["spikes.name='rewind'", "phases=[{'start_step': 9, 'set': {'data.batch_size': 64}}]"],
     "spikes.name='rewind' with data.batch_size=[8, 64] in phases; give all one size, or remove it."),
    (['replicas.every=-1'], 'replicas.every=-1; it must be >= 0.'),
    (['replicas.every=5'], 'replicas.every compares copies, and on 1 devices with this mesh no array has two; set'),
  ],
)  # fmt: skip
def test_impossible_keys_are_refused(keys, message, capsys, tmp_path):
  flags = [f'--gin_file={tiny.DECODER}', f'--workdir={tmp_path / "run"}', *(f'--gin.{key}' for key in keys)]
  assert main(['train', *flags]) == 64
  assert message in capsys.readouterr().err
  assert not (tmp_path / 'run').exists()
