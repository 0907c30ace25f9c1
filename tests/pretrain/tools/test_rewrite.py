"""Steps are compared with each other, and written for another run to resume from."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pretrain.checkpoints.checkpoints import Checkpoints
from pretrain.checkpoints.config import CheckpointConfig
from pretrain.cli.main import main
from pretrain.config import bindings
from pretrain.experiment.experiment import Experiment
from pretrain.experiment.program import build_program
from pretrain.run.train import train
from pretrain.testing import logged_losses
from tests.pretrain import tiny

KEYS = ('checkpoint.every=2', 'checkpoint.keep=9', "averaging.name='ema'", 'averaging.decay=0.5', 'mesh.fsdp=2')


@pytest.fixture(autouse=True)
def without_report(monkeypatch):
  monkeypatch.setattr('pretrain.run.train.write_report', lambda _: None)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A workdir with a config and steps 2 and 4, which differ."""
  workdir, cfg = tmp_path_factory.mktemp('runs') / 'run', tiny.decoder(*KEYS)
  state = build_program(cfg).init()
  moved = state.replace(params=jax.tree.map(lambda x: x * 1.5, state.params))
  position = {'loader': {'examples': 16}, 'data': {'tokenizer': None}}
  with contextlib.closing(Checkpoints(workdir, cfg.checkpoint)) as checkpoints:
    for step, each in ((2, state), (4, moved)):
      checkpoints.save(step, each.replace(step=jnp.int32(step)), position, '')
  (workdir / 'config.gin').write_text(bindings.render(cfg))
  return workdir


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """Steps 2 and 4 of a run."""
  workdir = tmp_path_factory.mktemp('runs') / 'trained'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('pretrain.run.train.write_report', lambda _: None)
    train(tiny.decoder(*KEYS, 'train.steps=4'), workdir)
  return workdir


def state_of(workdir, step: int, *keys: str):
  program = build_program(tiny.decoder(*KEYS, *keys))
  with contextlib.closing(Checkpoints(workdir, CheckpointConfig(), read_only=True)) as checkpoints:
    return checkpoints.restore(program.abstract, step)


def test_a_difference_is_the_largest_of_each_array(run, capsys):
  assert main(['checkpoints', 'diff', f'--inputs={run}/2,{run}/4']) == 0
  *lines, last = capsys.readouterr().out.splitlines()
  a, b = (state_of(run, step).state.params['decoder']['blocks']['mlp']['up'] for step in (2, 4))
  (line,) = [line.split() for line in lines if line.startswith('params/decoder/blocks/mlp/up')]
  assert line[-1] == f'{np.abs(np.float64(a) - np.float64(b)).max():.4g}'
  equal, of, total = last.split()[:3]
  assert (of, int(equal) + len(lines) - 1) == ('of', int(total)), 'one line is the header'


def test_a_step_does_not_differ_from_itself(run, capsys):
  assert main(['checkpoints', 'diff', f'--inputs={run}/4,{run}']) == 0
  count = len(jax.tree.leaves(build_program(tiny.decoder(*KEYS)).abstract))
  assert capsys.readouterr().out == f'{count} of {count} arrays are equal to the bit\n'


@pytest.mark.slow
def test_other_shapes_are_named(run, tmp_path, capsys):
  params = build_program(tiny.decoder('model.mlp.hidden=128')).init().params
  with contextlib.closing(Checkpoints(tmp_path, CheckpointConfig())) as checkpoints:
    checkpoints.save_params(1, params, {}, '')
  assert main(['checkpoints', 'diff', f'--inputs={run}/4,{tmp_path}']) == 0
  lines = capsys.readouterr().out.splitlines()
  (line,) = [line for line in lines if line.startswith('params/decoder/blocks/mlp/up')]
  assert line.split(maxsplit=1)[1].split('  ')[0] == 'float32[2, 32, 64] / float32[2, 32, 128]'
  assert any(line.startswith('extra/ema/') and '/ absent' in line for line in lines)


@pytest.mark.slow
def test_another_optimizer_starts_fresh_from_the_same_parameters(run, tmp_path, capsys):
  new = tmp_path / 'new'
  keys = ("optimizer.name='lion'", "optimizer.state_dtype='bfloat16'", 'schedule.peak=1e-4')
  flags = [f'--gin.{key}' for key in keys]
  assert main(['checkpoints', 'restore-as', f'--input={run}/2', f'--output={new}', *flags]) == 0
  assert capsys.readouterr().out == f'{new} (opt_state starts from its initial state)\n'
  old, moved = state_of(run, 2), state_of(new, 2, *keys)
  assert moved.position == old.position
  for part in ('params', 'extra'):
    jax.tree.map(np.testing.assert_array_equal, getattr(moved.state, part), getattr(old.state, part))
  moments = [x for x in jax.tree.leaves(moved.state.opt_state) if x.ndim]
  assert {str(x.dtype) for x in moments} == {'bfloat16'}
  assert not any(np.any(x) for x in moments)
  assert int(moved.state.opt_state[1].count) == 2, 'the schedule goes on: metrics.jsonl says the rate of this step'


@pytest.mark.slow
def test_a_run_resumes_with_another_optimizer_and_mesh(trained, tmp_path):
  new = tmp_path / 'new'
  flags = ["--gin.optimizer.name='lion'", '--gin.schedule.peak=1e-4', f'--output={new}']
  assert main(['checkpoints', 'restore-as', f'--input={trained}/2', *flags]) == 0
  cfg = bindings.load(Experiment, [str(new / 'config.gin')], ['train.steps=4', 'mesh.tensor=4'])
  assert train(cfg, new) == 0
  assert [step for step, _ in logged_losses(new)] == [3, 4]
  assert logged_losses(new)[0][1] == pytest.approx(logged_losses(trained)[2][1], rel=1e-6), 'parameters and batch'


@pytest.mark.slow
def test_unchanged_parts_are_kept_and_the_run_resumes_bit_for_bit(trained, tmp_path, capsys):
  new = tmp_path / 'new'
  assert main(['checkpoints', 'restore-as', f'--input={trained}/2', f'--output={new}']) == 0
  assert capsys.readouterr().out == f'{new}\n'
  train(tiny.decoder(*KEYS, 'train.steps=4'), new)
  assert logged_losses(new) == logged_losses(trained)[2:]
  assert main(['checkpoints', 'verify', f'--workdir={new}']) == 0


def test_a_changed_average_starts_from_the_parameters(run, tmp_path, capsys):
  new = tmp_path / 'new'
  flags = ['--gin.averaging.decay=0.9', f'--output={new}']
  assert main(['checkpoints', 'restore-as', f'--input={run}/4', *flags]) == 0
  assert capsys.readouterr().out == f'{new} (extra/ema starts from its initial state)\n'
  moved, old = state_of(new, 4, 'averaging.decay=0.9').state, state_of(run, 4).state
  jax.tree.map(np.testing.assert_array_equal, moved.extra['ema'], old.params)
  jax.tree.map(np.testing.assert_array_equal, moved.opt_state, old.opt_state)


def test_moments_that_move_to_the_host_are_kept(run, tmp_path, capsys):
  """Where they are is no other optimizer."""
  new, away = tmp_path / 'new', "optimizer.offload=['moments']"
  assert main(['checkpoints', 'restore-as', f'--input={run}/4', f'--gin.{away}', f'--output={new}']) == 0
  assert capsys.readouterr().out == f'{new}\n'
  jax.tree.map(np.testing.assert_array_equal, state_of(new, 4, away).state.opt_state, state_of(run, 4).state.opt_state)


@pytest.mark.parametrize(
  ('action', 'flags', 'code', 'message'),
  [
    ('restore-as', '--input={run}/2 --output={new} --gin.model.mlp.hidden=128', 64,
     'CONFIG: model.mlp.hidden is 64 in {run}/config.gin, 128 in this command: restore-as changes optimizer., '),
    ('restore-as', '--input={run}/3 --output={new}', 66, 'CKPT-NONE: no step 3 in {run}/checkpoints; it has 2, 4.'),
    ('restore-as', '--input={run}/2 --output={run}', 64, 'CONFIG: --output={run} exists; nothing is overwritten.'),
    ('diff', '--inputs={run}/2', 64, 'CONFIG: --inputs has 1 steps; diff compares two, e.g. RUN/100,RUN/200.'),
    ('verify', '--workdir={new}', 66, 'CKPT-NONE: no such checkpoint in {new}/checkpoints; it has none. Check the'),
    ('verify', '--workdir={run} --steps=3', 66, 'CKPT-NONE: no such checkpoint in {run}/checkpoints; it has 2, 4.'),
  ],
)  # fmt: skip
def test_a_mistake_is_one_line(run, tmp_path, capsys, action, flags, code, message):
  paths = {'run': run, 'new': tmp_path / 'new'}
  assert main(['checkpoints', action, *flags.format(**paths).split()]) == code
  err = capsys.readouterr().err
  assert err.startswith(message.format(**paths)), err
  assert err.count('\n') == 1
  assert not (tmp_path / 'new').exists()


@pytest.mark.slow
def test_a_run_that_starts_to_watch_for_spikes_keeps_its_moments(trained, tmp_path):
  new = tmp_path / 'new'
  flags = ["--gin.spikes.name='skip'", '--gin.spikes.window=8']
  assert main(['checkpoints', 'restore-as', f'--input={trained}/4', f'--output={new}', *flags]) == 0
  before = state_of(trained, 4).state.opt_state
  after = state_of(new, 4, "spikes.name='skip'", 'spikes.window=8').state.opt_state
  assert [np.asarray(x).tobytes() for x in jax.tree.leaves(after[:2])] == [
    np.asarray(x).tobytes() for x in jax.tree.leaves(before)
  ]
  assert (len(after), int(after[2].updates)) == (3, 4), 'step 5 is the fifth update: a phase from step 4 on knows it'
  back = tmp_path / 'back'
  assert main(['checkpoints', 'restore-as', f'--input={new}/4', f'--output={back}', "--gin.spikes.name='none'"]) == 0
  assert len(state_of(back, 4).state.opt_state) == 2


@pytest.mark.slow
def test_counts_of_sparse_training_go_on_beside_another_average(tmp_path):
  run, new, sparse = tmp_path / 'run', tmp_path / 'new', "sparsity.name='fixed'"
  train(tiny.decoder(sparse, 'train.steps=2', 'checkpoint.every=2'), run)
  average = "averaging.name='ema'"
  assert main(['checkpoints', 'restore-as', f'--input={run}/2', f'--gin.{average}', f'--output={new}']) == 0
  cfg = bindings.load(Experiment, [str(new / 'config.gin')], [])
  with contextlib.closing(Checkpoints(new, CheckpointConfig())) as checkpoints:
    moved = checkpoints.restore(build_program(cfg).abstract, 2).state
  assert int(moved.extra['sparsity']['updates']) == 2
  jax.tree.map(np.testing.assert_array_equal, moved.extra['ema'], moved.params)
