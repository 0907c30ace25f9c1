"""The command line: its verbs, its exit codes, and one line for each mistake."""

import subprocess
import sys

import pytest

from pretrain.cli import COMMANDS, main
from tests.pretrain import tiny


def run(capsys, *argv):
  code = main([str(a) for a in argv])
  out = capsys.readouterr()
  return code, out.out, out.err


def test_the_verbs_are_these():
  assert [name for name, _, _ in COMMANDS] == ['train', 'config', 'data', 'generate', 'report', 'run', 'plan']


def test_config_prints_values_parameters_and_flops_without_a_device(tmp_path):
  code = (
    'import sys; from pretrain.cli import main; code = main(sys.argv[1:]); '
    'import jax; assert not jax._src.xla_bridge._backends, "a device was touched"; sys.exit(code)'
  )
  command = [sys.executable, '-c', code, 'config', f'--gin_file={tiny.UL2}', '--gin.train.steps=7']
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  for text in ('train.steps = 7', 'sharding', 'init std', 'total', 'FLOPs per token'):
    assert text in done.stdout


@pytest.mark.parametrize(
  ('override', 'message'),
  [
    ('model.embde=3', 'CONFIG: --gin.model.embde: unknown key model.embde; did you mean model.embed?'),
    ('data.batch_size=30', 'CONFIG: data.batch_size=30 does not divide into'),
    ('data.sentinels=10', 'CONFIG: data.sentinels=10 but denoiser'),
    ('data.inputs_length=0', "CONFIG: data.inputs_length=0 with model.name='encoder_decoder'"),
    ('train.steps=0', 'CONFIG: train.steps=0; it must be at least 1.'),
    ("train.steps='many'", 'CONFIG: --gin.train.steps: train.steps'),
    ("objective.name='causal_lm'", "CONFIG: objective.name='causal_lm' is for model.name='decoder'"),
    ('schedule.steps=100', 'CONFIG: schedule.steps=100 does not exceed schedule.warmup_steps'),
  ],
)
def test_a_mistake_is_one_line_and_exit_code_64(capsys, tmp_path, override, message):
  code, _, err = run(capsys, 'train', f'--gin_file={tiny.UL2}', f'--gin.{override}', f'--workdir={tmp_path / "run"}')
  assert (code, len(err.splitlines())) == (64, 1), err
  assert err.startswith(message), err
  assert not (tmp_path / 'run').exists(), 'nothing was written'


def test_an_override_without_a_value_is_named(capsys):
  assert run(capsys, 'config', f'--gin_file={tiny.UL2}', '--gin.train.steps')[2].startswith(
    'CONFIG: --gin.train.steps has no value; write --gin.train.steps=VALUE.'
  )


def test_a_missing_store_is_exit_code_65(capsys, tmp_path):
  flags = ["--gin.data.name='store'", f"--gin.data.sources=[{{'path': '{tmp_path}/none'}}]"]
  code, _, err = run(capsys, 'train', f'--gin_file={tiny.UL2}', *flags, f'--workdir={tmp_path / "run"}')
  assert code == 65
  assert 'no token store at' in err
  assert not (tmp_path / 'run').exists()


def test_generating_without_a_run_is_exit_code_66(capsys, tmp_path):
  code, _, err = run(capsys, 'generate', f'--workdir={tmp_path}', '--text=hello')
  assert code == 66
  assert err.startswith('CKPT-NONE: no run in')


def test_run_needs_a_command(capsys):
  assert run(capsys, 'run', '--hosts=2')[2].startswith('CONFIG: pretrain run needs a command after --')
