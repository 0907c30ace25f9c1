"""A run that reads longer rows than the weights that it starts from."""

import jax
import numpy as np
import pytest

import pretrain.run.train
from pretrain.errors import CheckpointError
from pretrain.experiment.program import build_program
from pretrain.run.train import train
from pretrain.tools import weights
from tests.pretrain import tiny

CLEX = (
  "model.rope_scaling.name='clex'", 'model.rope_scaling.original_max_positions=32', 'model.rope_scaling.max_factor=2',
)  # fmt: skip
LONGER = (*CLEX, 'model.windows=[16]', 'model.sinks=2')


def config_of(*overrides: str):
  return tiny.decoder('train.steps=1', 'schedule.peak=0.0', 'checkpoint.every=1', 'mesh.data=1', *overrides)


def params_of(workdir, cfg):
  return jax.device_get(weights.Step(workdir, 1).read(build_program(cfg).abstract.params))


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """{name: workdir} of a run from nothing and of one that starts from it."""
  folder = tmp_path_factory.mktemp('runs')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pretrain.run.train, 'write_report', lambda _: None)
    train(config_of(), folder / 'plain')
    train(config_of(f"checkpoint.initial='{folder}/plain/1'", *LONGER), folder / 'longer')
  return {name: folder / name for name in ('plain', 'longer')}


@pytest.mark.slow
def test_a_run_may_add_what_longer_rows_need(runs):
  """All parameters are those of the other run, which has no learned frequencies; these are drawn."""
  before, after = params_of(runs['plain'], config_of()), params_of(runs['longer'], config_of(*LONGER))
  drawn = after.pop('frequencies')
  jax.tree.map(np.testing.assert_array_equal, after, before)
  assert np.std(drawn['up']) == pytest.approx((3 * 8) ** -0.5, rel=0.3)
  assert not drawn['down'].any()


@pytest.mark.slow
@pytest.mark.parametrize(
  ('keys', 'message'),
  [
    (('model.windows=[16]', 'model.sinks=2'), "model.rope_scaling.name is 'clex' in {longer}/config.gin, 'none' in"),
    (CLEX, r'model.windows is \(16,\) in {longer}/config.gin, \(\) in this command'),
    ((*LONGER, 'model.sinks=3'), 'model.sinks is 2 in {longer}/config.gin, 3 in this command'),
  ],
)
def test_what_the_other_run_had_may_not_be_left_out(runs, tmp_path, keys, message):
  with pytest.raises(CheckpointError, match=f'CKPT-MISMATCH: {message.format(**runs)}'):
    train(config_of(f"checkpoint.initial='{runs['longer']}/1'", *keys), tmp_path / 'run')
  assert not (tmp_path / 'run/config.gin').exists()


@pytest.mark.slow
def test_learned_frequencies_are_taken_from_the_other_run(runs, tmp_path, monkeypatch):
  monkeypatch.setattr(pretrain.run.train, 'write_report', lambda _: None)
  cfg = config_of(f"checkpoint.initial='{runs['longer']}/1'", 'seed=7', *LONGER)
  train(cfg, tmp_path / 'run')
  jax.tree.map(np.testing.assert_array_equal, params_of(tmp_path / 'run', cfg), params_of(runs['longer'], cfg))
