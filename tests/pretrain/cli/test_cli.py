"""The command line: its verbs, its exit codes, and one line for each mistake."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

from pretrain.cli.main import COMMANDS, main
from pretrain.config import bindings
from pretrain.errors import ConfigError
from pretrain.experiment.experiment import Experiment
from pretrain.tools.describe import learning_rates
from tests.pretrain import tiny


def run(capsys, *argv):
  code = main([str(a) for a in argv])
  out = capsys.readouterr()
  return code, out.out, out.err


def test_the_verbs_are_these():
  assert [name for name, _, _ in COMMANDS] == [
    'train',
    'config',
    'data',
    'generate',
    'eval',
    'checkpoints',
    'import',
    'export',
    'report',
    'replay',
    'run',
    'plan',
  ]


def test_config_prints_values_parameters_and_flops_without_a_device(tmp_path):
  code = (
    'import sys; from pretrain.cli.main import main; code = main(sys.argv[1:]); '
    'import jax; assert not jax._src.xla_bridge._backends, "a device was touched"; sys.exit(code)'
  )
  command = [sys.executable, '-c', code, 'config', f'--gin_file={tiny.UL2}', '--gin.train.steps=7']
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  for text in ('train.steps = 7', 'sharding', 'init std', 'total', 'FLOPs per token'):
    assert text in done.stdout


def test_plot_draws_the_schedule_without_an_accelerator_or_a_display(tmp_path):
  code = (
    'import sys; from pretrain.cli.main import main; code = main(sys.argv[1:]); '
    'import jax; assert jax.config.jax_platforms == "cpu"; assert set(jax._src.xla_bridge._backends) == {"cpu"}'
  )
  env = {k: v for k, v in os.environ.items() if k not in ('JAX_PLATFORMS', 'DISPLAY')}
  env['PYTHONPATH'] = os.pathsep.join([str(tiny.ROOT), env.get('PYTHONPATH', '')])
  command = [sys.executable, '-c', code, 'config', f'--gin_file={tiny.UL2}', '--plot']
  done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
  assert (done.returncode, done.stdout) == (0, 'learning_rate.png\n'), done.stderr
  assert (tmp_path / 'learning_rate.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.slow
def test_the_plot_is_of_the_schedule_that_is_given(capsys, tmp_path):
  flags = ("schedule.name='wsd'", 'schedule.decay_steps=1000')
  pictures = []
  for i, more in enumerate(((), ("schedule.decay='linear'",), ('schedule.peak=0.01',), ('train.steps=1500',))):
    path = tmp_path / f'{i}.png'
    overrides = [f'--gin.{o}' for o in (*flags, *more)]
    assert run(capsys, 'config', f'--gin_file={tiny.UL2}', f'--plot={path}', *overrides) == (0, f'{path}\n', '')
    pictures.append(path.read_bytes())
  assert len(set(pictures)) == 4


def test_the_learning_rate_is_that_of_each_phase():
  phase = "{'start_step': 40, 'set': {'schedule.name': 'linear', 'schedule.peak': 1.0, 'schedule.steps': 10, "
  phase += "'schedule.warmup_steps': 0, 'schedule.final_fraction': 0.0}}"
  constant = ("schedule.name='constant'", 'schedule.peak=0.5')
  cfg = tiny.experiment(tiny.DECODER, *constant, f'phases=[{phase}]', 'train.steps=60')
  assert learning_rates(cfg, np.array([0, 39, 40, 45, 50, 59])).tolist() == [0.5, 0.5, 1.0, 0.5, 0.0, 0.0]


@pytest.mark.parametrize(
  ('file', 'reason'),
  [('rate.pdf', 'is no PNG; name a file that ends in .png.'), ('no/rate.png', 'cannot be written (')],
)
def test_a_plot_that_cannot_be_written_is_refused(capsys, tmp_path, file, reason):
  path = tmp_path / file
  code, _, err = run(capsys, 'config', f'--gin_file={tiny.UL2}', f'--plot={path}')
  assert (code, len(err.splitlines())) == (64, 1), err
  assert err.startswith(f'CONFIG: --plot={path} {reason}')


@pytest.mark.parametrize(
  ('override', 'message'),
  [
    ('model.embde=3', 'CONFIG: --gin.model.embde: unknown key model.embde; did you mean model.embed?'),
    ('data.batch_size=30', 'CONFIG: data.batch_size=30 does not divide into'),
    ('data.sentinels=10', 'CONFIG: data.sentinels=10 but denoiser'),
    ('data.inputs_length=0', "CONFIG: data.inputs_length=0 with model.name='encoder_decoder'"),
    ('train.steps=0', 'CONFIG: --gin.train.steps: train.steps=0; it must be >= 1.'),
    ("train.steps='many'", 'CONFIG: --gin.train.steps: train.steps'),
    ("objective.name='causal_lm'", "CONFIG: objective.name='causal_lm' is for model.name='decoder'"),
    ("optimizer.name='adafacter'", "CONFIG: --gin.optimizer.name: optimizer.name='adafacter' is not one of 'adamw', "),
    (
      'optimizer.momentum=0.9',
      "CONFIG: --gin.optimizer.momentum: unknown key optimizer.momentum; with optimizer.name='a",
    ),
    ("optimizer.state_dtype='int4'", "CONFIG: --gin.optimizer.state_dtype: optimizer.state_dtype='int4' is not one of"),
    ('schedule.steps=100', 'CONFIG: schedule.steps=100 does not exceed schedule.warmup_steps'),
  ],
)
def test_a_mistake_is_one_line_and_exit_code_64(capsys, tmp_path, override, message):
  code, _, err = run(capsys, 'train', f'--gin_file={tiny.UL2}', f'--gin.{override}', f'--workdir={tmp_path / "run"}')
  assert (code, len(err.splitlines())) == (64, 1), err
  assert err.startswith(message), err
  assert not (tmp_path / 'run').exists(), 'nothing was written'


@pytest.mark.parametrize(
  ('file', 'overrides', 'message'),
  [
    (
      tiny.DECODER,
      ('objective.loss_on=["bot"]',),
      "objective.loss_on[0]='bot' is not one of 'system', 'user', 'assistant'",
    ),
    (
      tiny.DECODER,
      (),
      "data.name='synthetic' has no conversations for objective.name='instruction'; set data.name='store'",
    ),
    (
      tiny.UL2,
      (),
      "objective.name='instruction' is for model.name='decoder', not 'encoder_decoder'; take a decoder, or mak",
    ),
    (
      tiny.DECODER,
      ("objective.name='causal_lm'", 'data.tags.drop_rate=1.5'),
      'data.tags.drop_rate=1.5; it must be in [0, 1]',
    ),
    (
      tiny.DECODER,
      ('data.tags.drop_rate=0.5',),
      "data.tags requires objective.name='causal_lm'; 'instruction' would corrupt",
    ),
  ],
)
def test_what_conversations_and_tags_cannot_do_is_said_when_the_config_is_loaded(chat_store, file, overrides, message):
  store = tiny.over(chat_store) if overrides and 'tags' in overrides[0] else ()
  with pytest.raises(ConfigError, match=re.escape(message)):
    tiny.experiment(file, "objective.name='instruction'", 'evaluation.every=0', *store, *overrides)


def test_pairs_are_kept_apart(pair_store):
  flags = ("objective.name='supervised'", 'data.attend_across_documents=True')
  with pytest.raises(ConfigError, match=r'data.attend_across_documents=True would mix the pairs of objec'):
    tiny.ul2(pair_store, *flags)


@pytest.mark.parametrize(
  ('file', 'name', 'override', 'message'),
  [
    (tiny.DECODER, 'mixture', "parts=[{'rate': 0, 'objective': {'name': 'fim'}}]",
     '--gin.objective.parts: objective.parts[0].rate=0; it must be > 0.'),
    (tiny.DECODER, 'mixture', "parts=[{'objective': {'name': 'fim', 'rat': 1.0}}]",
     '--gin.objective.parts: unknown key objective.parts[0].objective.rat; did you mean objective.parts[0].obj'),
    (tiny.DECODER, 'mixture', "parts=[{'objective': {'rate': 1.0}}]",
     'objective.parts[0].objective.name is required and not set; add it to objective.parts at --gin.objective.pa'),
    (tiny.DECODER, 'mixture', "parts=[{'objective': 'fim'}]",
     "--gin.objective.parts: objective.parts[0].objective='fim' is str, expected a dict with the keys name, …."),
    (tiny.DECODER, 'mixture', "parts=[{'objective': {'name': 'supervised'}}]",
     "--gin.objective.parts: objective.parts[0].objective.name='supervised' is not one of 'causal_lm', 'prefix_lm'"),
    (tiny.DECODER, 'mixture', "parts=[{'objective': {'name': 'mlm'}}]",
     "objective.name='mixture' cannot train model.name='decoder'; set model.name='encoder', or another objective."),
    (tiny.UL2, 'mixture', "parts=[{'objective': {'name': 'ul2'}}, {'objective': {'name': 'fim'}}]",
     "objective.name='mixture' is for model.name='decoder', not 'encoder_decoder'."),
    (tiny.DECODER, 'fim', 'rate=1.5', '--gin.objective.rate: objective.rate=1.5; it must be in [0, 1].'),
    (tiny.DECODER, 'fim', 'spm_rate=-1', '--gin.objective.spm_rate: objective.spm_rate=-1; it must be in [0, 1].'),
    (tiny.UL2, 'fim', 'rate=1.0', "objective.name='fim' is for model.name='decoder', not 'encoder_decoder'."),
    (tiny.UL2, 'bart', 'mean_noise_span_length=0.5',
     '--gin.objective.mean_noise_span_length: objective.mean_noise_span_length=0.5; it must be in [1, 16].'),
    (tiny.UL2, 'bart', 'noise_density=1.0',
     '--gin.objective.noise_density: objective.noise_density=1.0; it must be in (0, 1).'),
    (tiny.UL2, 'iid_denoising', "hide='masks'", "--gin.objective.hide: objective.hide='masks' is not one of"),
    (tiny.UL2, 'iid_denoising', "targets='all'", "--gin.objective.targets: objective.targets='all' is not one of"),
    (tiny.UL2, 'iid_denoising', 'random=2.0', '--gin.objective.random: objective.random=2.0; it must be in [0, 1].'),
  ],
)  # fmt: skip
def test_a_mistake_in_an_objective_is_one_line(file, name, override, message, capsys):
  flags = [f'--gin_file={file}', f"--gin.objective.name='{name}'", f'--gin.objective.{override}']
  assert main(['config', *flags]) == 64
  err = capsys.readouterr().err
  assert err.startswith('CONFIG: ' + message), err
  assert len(err.splitlines()) == 1


def test_documents_that_fim_takes_apart_must_be_known(capsys):
  flags = ["--gin.objective.name='fim'", '--gin.data.attend_across_documents=True']
  assert main(['config', f'--gin_file={tiny.DECODER}', *flags]) == 64
  assert "data.attend_across_documents=True hides the documents that 'fim' splits" in capsys.readouterr().err


def test_a_mixture_is_read_from_what_a_run_saves(tmp_path):
  parts = "[{'rate': 0.5, 'objective': {'name': 'ul2r'}}, {'rate': 0.5, 'objective': {'name': 'fim', 'rate': 0.9}}]"
  cfg = tiny.decoder("objective.name='mixture'", f'objective.parts={parts}', 'data.sentinels=100')
  (tmp_path / 'config.gin').write_text(bindings.render(cfg))
  assert bindings.load(Experiment, [str(tmp_path / 'config.gin')], []) == cfg
  assert cfg.objective.parts[1].objective.rate == 0.9


@pytest.mark.parametrize(
  ('file', 'override', 'message'),
  [
    (tiny.DECODER, 'model.kv_heads=3', 'model.kv_heads=3 does not divide model.heads=4; each serves equally many.'),
    (tiny.DECODER, 'model.head_dim=7', 'model.head_dim=7 is odd; rotary positions rotate pairs, use 8.'),
    (
      tiny.DECODER,
      "objective.name='mlm'",
      "objective.name='mlm' cannot train model.name='decoder'; set model.name='encoder', or another objective.",
    ),
    (
      tiny.UL2,
      "objective.name='mlm'",
      "objective.name='mlm' cannot train model.name='encoder_decoder'; set model.name='encoder', or another objective.",
    ),
    (
      tiny.ENCODER,
      "objective.name='ul2'",
      "objective.name='ul2' cannot train model.name='encoder'; set objective.name='mlm'.",
    ),
    (
      tiny.ENCODER,
      'data.inputs_length=64',
      "data.inputs_length=64 with model.name='encoder'; remove it (rows have data.targets_length tokens).",
    ),
    (
      tiny.UL2,
      "objective.name='supervised'",
      "data.name='builtin' has no pairs for objective.name='supervised'; set data.name='store', with data.sources made "
      'by pretrain data prepare --inputs_field=inputs --targets_field=targets.',
    ),
    (
      tiny.UL2,
      'evaluation.generate=8',
      "evaluation.generate=8 compares outputs with targets of pairs, objective.name='ul2' has none; set it to 0, or "
      "objective.name='supervised'.",
    ),
    (
      tiny.UL2,
      "evaluation.every=0\nobjective.name='supervised'\ndata.name='store'\ndata.sources=[]\nevaluation.generate=8",
      'evaluation.generate=8 with evaluation.every=0: it would never be used; set evaluation.every.',
    ),
    (
      tiny.UL2,
      "data.name='store'\ndata.sources=[{'path': 'a'}]",
      "evaluation.every=200 with data.name='store' and nothing held out; set data.heldout, or evaluation.every=0.",
    ),
    (
      tiny.DECODER,
      'evaluation.every=5',
      "evaluation.every=5 with data.name='synthetic' and nothing held out; set it to 0.",
    ),
    (
      tiny.UL2,
      "optimizer.name='adafactor'\noptimizer.state_dtype='int8'",
      "optimizer.state_dtype='int8' is of moments of a parameter's size, and optimizer.name='adafactor' with "
      'optimizer.momentum=0.0 has none; remove it.',
    ),
    (tiny.UL2, 'evaluation.generate=-1', '--gin.evaluation.generate: evaluation.generate=-1; it must be >= 0.'),
    (tiny.ENCODER, 'model.head_dim=7', 'model.head_dim=7 is odd; rotary positions rotate pairs, use 8.'),
    (tiny.ENCODER, 'objective.rate=1.0', '--gin.objective.rate: objective.rate=1.0; it must be in (0, 1).'),
    (tiny.ENCODER, 'objective.mask=1.1', '--gin.objective.mask: objective.mask=1.1; it must be in [0, 1].'),
    (tiny.ENCODER, 'objective.random=-0.1', '--gin.objective.random: objective.random=-0.1; it must be in [0, 1].'),
    (
      tiny.ENCODER,
      'objective.random=0.3',
      'objective.mask=0.8 and objective.random=0.3 are shares of the chosen tokens, together 1.1; lower one, so that '
      'they are at most 1.',
    ),
    (
      tiny.ENCODER,
      'data.sentinels=0',
      "objective.name='mlm' hides tokens behind <extra_id_0>, data.sentinels=0; set data.sentinels >= 1.",
    ),
    (tiny.DECODER, 'model.layers=0', '--gin.model.layers: model.layers=0; it must be >= 1.'),
    (tiny.DECODER, 'model.mlp.hidden=0', '--gin.model.mlp.hidden: model.mlp.hidden=0; it must be >= 1.'),
    (tiny.DECODER, 'model.dropout=1.0', '--gin.model.dropout: model.dropout=1.0; it must be in [0, 1).'),
    (tiny.DECODER, 'model.dropout=-0.5', '--gin.model.dropout: model.dropout=-0.5; it must be in [0, 1).'),
    (tiny.UL2, 'model.encoder_layers=0', '--gin.model.encoder_layers: model.encoder_layers=0; it must be >= 1.'),
    (tiny.UL2, 'model.heads=-4', '--gin.model.heads: model.heads=-4; it must be >= 1.'),
    (
      tiny.DECODER,
      "model.positions='learned'\nmodel.max_positions=511",
      'data.targets_length=512 with model.max_positions=511; set model.max_positions >= 512, or shorter rows.',
    ),
    (
      tiny.DECODER,
      'model.max_positions=9',
      "model.max_positions=9 with model.positions='rotary'; it belongs to 'learned', remove it.",
    ),
    (
      tiny.UL2,
      "model.mlp.activation='gelu'",
      "--gin.model.mlp.activation: model.mlp.activation='gelu' is not one of 'gelu_tanh', 'gelu_exact', 'silu', "
      "'relu'; did you mean 'gelu_tanh' or 'gelu_exact'?",
    ),
    (tiny.UL2, 'model.relative_buckets=2', '--gin.model.relative_buckets: model.relative_buckets=2; it must be >= 4.'),
    (
      tiny.UL2,
      'model.relative_max_distance=16',
      'model.relative_max_distance=16 with model.relative_buckets=32, whose first 16 buckets are single distances; '
      'set model.relative_max_distance > 16.',
    ),
    (
      tiny.DECODER,
      "kernels.attention='cudnn'",
      "kernels.attention='cudnn' has no packed rows, which all models train on; use 'auto', 'triton' or 'blockwise'.",
    ),
    (
      tiny.UL2,
      "kernels.attention='fast'",
      "kernels.attention='fast' is not one of 'auto', 'reference', 'tpu', 'interpret', 'triton', 'mosaic_gpu', "
      "'cudnn', 'blockwise', 'ring'.",
    ),
    (
      tiny.UL2,
      "kernels.linear_cross_entropy='fast'",
      "kernels.linear_cross_entropy='fast' is not one of 'auto', 'reference', 'chunked'.",
    ),
    (
      tiny.DECODER,
      "model.remat='save_qkv'",
      "--gin.model.remat: model.remat='save_qkv' is not one of 'none', 'full', 'dots', 'save_out_proj', "
      "'save_qkv_proj', 'save_context', 'save_dot_except_mlp', 'minimal', 'minimal_with_context', 'custom'; did you "
      "mean 'save_qkv_proj'?",
    ),
    (
      tiny.DECODER,
      "model.remat_keep=['wi']",
      "--gin.model.remat_keep: model.remat_keep[0]='wi' is not one of 'input', 'query', 'key', 'value', 'context', "
      "'out', 'gate', 'up', 'down'.",
    ),
    (tiny.UL2, 'evaluation.batches=0', '--gin.evaluation.batches: evaluation.batches=0; it must be >= 1.'),
    (tiny.UL2, 'data.workers=-1', '--gin.data.workers: data.workers=-1; it must be >= 0.'),
    (tiny.UL2, 'data.prefetch=-1', '--gin.data.prefetch: data.prefetch=-1; it must be >= 0.'),
    (tiny.UL2, 'seed=-1', '--gin.seed: seed=-1; it must be in [0, 4294967296).'),
    (tiny.UL2, f'seed={2**64}', f'--gin.seed: seed={2**64}; it must be in [0, 4294967296).'),
    (tiny.UL2, 'checkpoint.keep_every=0', '--gin.checkpoint.keep_every: checkpoint.keep_every=0; it must be >= 1.'),
    (tiny.UL2, 'checkpoint.keep_best=-1', '--gin.checkpoint.keep_best: checkpoint.keep_best=-1; it must be >= 0.'),
    (tiny.UL2, 'checkpoint.retries=-1', '--gin.checkpoint.retries: checkpoint.retries=-1; it must be >= 0.'),
    (
      tiny.UL2,
      'checkpoint.keep_best=2',
      "checkpoint.keep_best=2 and no metric to compare them by; set checkpoint.best_of, e.g. 'eval/<set>/loss'.",
    ),
    (
      tiny.UL2,
      "checkpoint.best_of='eval/a/loss'",
      "checkpoint.best_of='eval/a/loss' with checkpoint.keep_best=0 keeps none; set keep_best >= 1.",
    ),
    (
      tiny.UL2,
      'evaluation.lawa_checkpoints=4',
      'evaluation.lawa_checkpoints=4 but checkpoint.keep=3: older ones are deleted; set checkpoint.keep >= 4.',
    ),
    (
      tiny.DECODER,
      'evaluation.lawa_checkpoints=2',
      'evaluation.lawa_checkpoints=2 with evaluation.every=0: it would never be used; set evaluation.every.',
    ),
    (
      tiny.UL2,
      "checkpoint.initial='RUN'",
      "checkpoint.initial='RUN' has no step; write 'RUN/<step>', one of `pretrain checkpoints list --workdir=RUN`.",
    ),
    (
      tiny.UL2,
      "averaging.name='swa'",
      "--gin.averaging.name: averaging.name='swa' is not one of 'none', 'ema'.",
    ),
    (
      tiny.UL2,
      'averaging.decay=0.9',
      "--gin.averaging.decay: unknown key averaging.decay; with averaging.name='none' the keys are name "
      "(it is a key of 'ema').",
    ),
    (tiny.UL2, 'checkpoint.every=-1', '--gin.checkpoint.every: checkpoint.every=-1; it must be >= 1.'),
    (tiny.UL2, 'optimizer.clip_norm=-1.0', '--gin.optimizer.clip_norm: optimizer.clip_norm=-1.0; it must be >= 0.'),
    (tiny.UL2, 'optimizer.b1=1.0', '--gin.optimizer.b1: optimizer.b1=1.0; it must be in [0, 1).'),
    (tiny.UL2, 'optimizer.eps=0.0', '--gin.optimizer.eps: optimizer.eps=0.0; it must be > 0.'),
    (tiny.UL2, 'schedule.peak=-0.1', '--gin.schedule.peak: schedule.peak=-0.1; it must be >= 0.'),
    (tiny.UL2, 'loss.z_loss=-1.0', '--gin.loss.z_loss: loss.z_loss=-1.0; it must be >= 0.'),
    (
      tiny.UL2,
      'loss.load_balance=0.1',
      'loss.load_balance=0.1 without model.experts, which it is about; set it, or remove loss.load_balance.',
    ),
    (tiny.UL2, 'loss.label_smoothing=1', '--gin.loss.label_smoothing: loss.label_smoothing=1; it must be in [0, 1).'),
    (
      tiny.UL2,
      'train.profile_steps=(5, 5)',
      'train.profile_steps=(5, 5) with train.steps=9; give (first, last) with 0 <= first < last <= train.steps.',
    ),
    (
      tiny.UL2,
      'train.profile_steps=(5, 10)',
      'train.profile_steps=(5, 10) with train.steps=9; give (first, last) with 0 <= first < last <= train.steps.',
    ),
  ],
)
def test_a_value_that_cannot_be_is_refused_before_anything_is_written(capsys, tmp_path, file, override, message):
  flags = [f'--gin_file={file}', '--gin.train.steps=9', f'--gin.{override}']
  code, _, err = run(capsys, 'train', *flags, f'--workdir={tmp_path / "run"}')
  assert (code, err) == (64, f'CONFIG: {message}\n')
  assert not (tmp_path / 'run').exists()


def test_a_batch_that_does_not_fill_all_devices_is_refused(capsys, tmp_path):
  """With -1 the mesh is known only when the devices are: eight in the tests."""
  overrides = [f'--gin.{o}' for o in (*tiny.SMALL_DECODER, 'mesh.data=-1', 'data.batch_size=6')]
  code, _, err = run(capsys, 'train', f'--gin_file={tiny.DECODER}', *overrides, f'--workdir={tmp_path / "run"}')
  assert (code, err) == (
    64,
    'CONFIG: data.batch_size=6 does not divide into replica*data*fsdp*expert=8 shards x train.accumulate=1; '
    'use a multiple of 8, e.g. 8.\n',
  )
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    (('model.experts=8', 'mesh.expert=3'), 'use mesh.expert=2, or a multiple of 3 experts.'),
    (('model.experts=6', 'mesh.expert=-1', 'data.batch_size=8'), 'use mesh.expert=6, or a multiple of 8 experts.'),
  ],
)
def test_experts_that_the_mesh_does_not_divide_are_refused_with_the_nearest_size(capsys, tmp_path, given, message):
  """With -1 the mesh is known only when the devices are: eight in the tests."""
  overrides = [f'--gin.{o}' for o in (*tiny.SMALL_DECODER, 'data.batch_size=12', *given)]
  code, _, err = run(capsys, 'train', f'--gin_file={tiny.DECODER}', *overrides, f'--workdir={tmp_path / "run"}')
  size = {'3': 3, '1': 8}[given[1][-1]]
  assert (code, err) == (64, f'CONFIG: {given[0]} does not divide over mesh.expert={size}; {message}\n')
  assert not (tmp_path / 'run').exists()


RING = ("kernels.attention='ring'",)
MASKS = ('model.dropout=0.1', "model.dropout_sites='bert'")
NO_MASKS = (
  "kernels.attention='ring' has no attention dropout with a mask for each query, which model.dropout > 0 needs with "
  "model.dropout_sites='bert'; use 'auto' or 'reference', or model.dropout=0, or model.dropout_sites='t5'."
)


@pytest.mark.parametrize(
  ('file', 'overrides', 'message'),
  [
    (
      tiny.DECODER,
      ('mesh.data=1', 'mesh.sequence=4', 'data.targets_length=20'),
      'data.targets_length=20 does not divide into 2 x mesh.sequence=4 equal parts, of which each device has an early '
      'and a late one; use a multiple of 8, e.g. 16.',
    ),
    (  # the mesh is known only when the devices are
      tiny.DECODER,
      ('mesh.data=1', 'mesh.sequence=-1', 'data.targets_length=40'),
      'data.targets_length=40 does not divide into 2 x mesh.sequence=8 equal parts, of which each device has an early '
      'and a late one; use a multiple of 16, e.g. 32.',
    ),
    (
      tiny.UL2,
      ('mesh.data=1', 'mesh.sequence=4', 'data.inputs_length=66'),
      'data.inputs_length=66 does not divide into mesh.sequence=4 equal parts; use a multiple of 4, e.g. 64.',
    ),
    (
      tiny.DECODER,
      ('mesh.data=1', 'mesh.sequence=4', "data.packing.name='length_buckets'", 'data.packing.min_length=12',
       'data.targets_length=96'),
      'data.packing.min_length=12 does not divide into 2 x mesh.sequence=4 equal parts, of which each device has an '
      'early and a late one; use a multiple of 8, e.g. 16.',
    ),
    (
      tiny.DECODER,
      ('mesh.data=1', 'mesh.sequence=4', "kernels.attention='blockwise'"),
      "kernels.attention='blockwise' needs whole rows, which mesh.sequence > 1 divides: each device would do all of "
      "the work; use kernels.attention='ring', or mesh.sequence=1 with mesh.fsdp or mesh.tensor.",
    ),
    (
      tiny.DECODER,
      ('mesh.data=1', 'mesh.sequence=4', *RING, *MASKS),
      NO_MASKS,
    ),
  ],
)  # fmt: skip
def test_rows_that_a_ring_cannot_share_are_refused(capsys, tmp_path, file, overrides, message):
  flags = [f'--gin_file={file}', *(f'--gin.{o}' for o in overrides), f'--workdir={tmp_path / "run"}']
  code, _, err = run(capsys, 'train', *flags)
  assert (code, err) == (64, f'CONFIG: {message}\n')
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('file', 'overrides', 'message'),
  [
    (tiny.DECODER, (*RING, *MASKS), NO_MASKS),
    (tiny.ENCODER, (*RING, *MASKS), NO_MASKS),
    (tiny.UL2, (*RING, *MASKS), NO_MASKS),
    (  # the size of the axis is not known yet, the missing feature is
      tiny.DECODER,
      (*RING, *MASKS, 'mesh.data=1', 'mesh.sequence=-1'),
      NO_MASKS,
    ),
    (
      tiny.DECODER,
      (*RING, MASKS[1], "phases=[{'start_step': 4, 'set': {'model.dropout': 0.1}}]"),
      f'phases[0]: {NO_MASKS}',
    ),
    (
      tiny.ENCODER,
      (*RING, "model.positions='disentangled'"),
      "kernels.attention='ring' has no disentangled attention, which model.positions='disentangled' needs; use 'auto' "
      "or 'reference'.",
    ),
    (
      tiny.UL2,
      ("kernels.attention='blockwise'", 'model.dropout=0.1'),
      "kernels.attention='blockwise' has no attention dropout, which model.dropout > 0 needs; use 'auto' or "
      "'reference', or model.dropout=0.",
    ),
  ],
)  # fmt: skip
def test_attention_that_lacks_what_the_model_needs_is_refused_on_any_mesh(capsys, tmp_path, file, overrides, message):
  flags = [f'--gin_file={file}', *(f'--gin.{o}' for o in overrides), f'--workdir={tmp_path / "run"}']
  code, _, err = run(capsys, 'train', *flags)
  assert (code, err) == (64, f'CONFIG: {message}\n')
  assert not (tmp_path / 'run').exists()


def test_a_ring_of_one_device_is_accepted_with_what_a_ring_has():
  """A run on a ring may be resumed, and is read, on one device."""
  for more in ((), ('model.dropout=0.1', "model.dropout_sites='t5'"), ('model.windows=(9, None)',)):
    assert tiny.decoder(*RING, *more).kernels.attention == 'ring'


def test_a_vocabulary_that_tensor_does_not_divide_is_refused(capsys, tmp_path):
  given = (*tiny.SMALL_DECODER, 'model.vocab_size=510', 'mesh.data=2', 'mesh.tensor=4')
  overrides = [f'--gin.{o}' for o in given]
  code, _, err = run(capsys, 'train', f'--gin_file={tiny.DECODER}', *overrides, f'--workdir={tmp_path / "run"}')
  assert (code, len(err.splitlines())) == (64, 1), err
  assert 'vocab=510 of parameter ' in err
  assert 'does not divide over mesh.tensor=4; make model.vocab_size a multiple of 4, or mesh.tensor smaller.' in err
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    ([], 'the following arguments are required: COMMAND; see pretrain --help.'),
    (['trian'], "argument COMMAND: invalid choice: 'trian'"),
    (['config'], 'the following arguments are required: --gin_file; see pretrain config --help.'),
    (['run', '--hosts=two'], "argument --hosts: invalid int value: 'two'; see pretrain run --help."),
    (['data'], 'the following arguments are required: ACTION; see pretrain data --help.'),
  ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_64(capsys, argv, message):
  code, _, err = run(capsys, *argv)
  assert (code, len(err.splitlines())) == (64, 1), err
  assert err.startswith(f'CONFIG: {message}')


@pytest.mark.parametrize(
  ('workdir', 'reason'),
  [('file', 'Not a directory'), ('file/run', 'Not a directory'), ('x' * 300, 'File name too long')],
)
def test_a_workdir_that_cannot_be_one_is_refused(capsys, tmp_path, workdir, reason):
  (tmp_path / 'file').write_text('mine')
  code, _, err = run(capsys, 'train', f'--gin_file={tiny.DECODER}', f'--workdir={tmp_path / workdir}')
  assert (code, len(err.splitlines())) == (64, 1), err
  assert err.startswith(f'CONFIG: --workdir={tmp_path / workdir} cannot be written ({reason}). Nothing was changed;')
  assert [path.name for path in tmp_path.iterdir()] == ['file']


@pytest.mark.skipif(not os.path.isdir('/proc'), reason='needs /proc')
def test_a_workdir_on_a_file_system_that_takes_no_files_is_refused(capsys):
  code, _, err = run(capsys, 'train', f'--gin_file={tiny.DECODER}', '--workdir=/proc/nope')
  assert (code, len(err.splitlines())) == (64, 1), err


def in_folder(folder, *command, **options):
  """A command started in `folder`, where `python -m` looks for packages first."""
  env = os.environ | {'PYTHONPATH': str(tiny.ROOT)}
  return subprocess.run(
    [sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True, check=False, **options
  )


@pytest.mark.parametrize('name', ['data/__init__.py', 'models.py', 'pallas_kernels/__init__.py'])
def test_a_package_of_the_same_name_is_named(tmp_path, name):
  (tmp_path / name).parent.mkdir(exist_ok=True)
  (tmp_path / name).write_text('raise RuntimeError("not ours")')
  done = in_folder(tmp_path, '-m', 'pretrain', 'config', f'--gin_file={tiny.UL2}')
  package = name.split('/')[0].removesuffix('.py')
  assert (done.returncode, len(done.stderr.splitlines())) == (64, 1), done.stderr
  assert done.stderr.startswith(f'CONFIG: import {package} finds {tmp_path / name}, not {tiny.ROOT / package}. Nothing')


@pytest.mark.slow
def test_the_command_takes_its_own_packages_in_any_folder(tmp_path):
  """Also after it has started itself again, and in the processes of `pretrain run`."""
  script = tmp_path / 'bin' / 'pretrain'
  script.parent.mkdir()
  script.write_text('import sys; from pretrain.cli.main import main; sys.exit(main())')
  (tmp_path / 'data').mkdir()
  (tmp_path / 'data/__init__.py').write_text('raise RuntimeError("not ours")')
  done = in_folder(tmp_path, str(script), 'train', f'--gin_file={tiny.UL2}', '--workdir=bin/pretrain')
  assert done.stderr.startswith('CONFIG: --workdir=bin/pretrain cannot be written'), done.stderr
  done = in_folder(tmp_path, str(script), 'run', '--hosts=1', '--', 'config', f'--gin_file={tiny.UL2}')
  assert (done.returncode, done.stdout.splitlines()[0]) == (0, "[0] model.name = 'encoder_decoder'"), done.stdout


def test_output_into_a_closed_pipe_ends_without_an_error(tmp_path):
  command = f'{sys.executable} -m pretrain config --gin_file={tiny.UL2} | true; exit ${{PIPESTATUS[0]}}'
  done = subprocess.run(['bash', '-c', command], cwd=tiny.ROOT, capture_output=True, text=True, check=False)
  assert (done.returncode, done.stderr) == (141, '')


def test_an_override_without_a_value_is_named(capsys):
  assert run(capsys, 'config', f'--gin_file={tiny.UL2}', '--gin.train.steps')[2].startswith(
    'CONFIG: --gin.train.steps has no value; write --gin.train.steps=VALUE.'
  )


def test_a_missing_store_is_exit_code_65(capsys, tmp_path):
  flags = ["--gin.data.name='store'", f"--gin.data.sources=[{{'path': '{tmp_path}/none'}}]"]
  flags += ['--gin.evaluation.every=0']
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
