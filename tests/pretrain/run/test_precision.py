"""Runs in low precision: recipes by phase, resumed exactly; checkpoints that move between recipes; what is refused."""

import contextlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.batches.loader import loader
from data.batches.source import open_data
from pretrain.checkpoints.checkpoints import Checkpoints
from pretrain.checkpoints.config import CheckpointConfig
from pretrain.cli.main import main
from pretrain.config import bindings
from pretrain.devices.mesh import host_rows, to_global
from pretrain.errors import ConfigError
from pretrain.experiment.experiment import Experiment
from pretrain.experiment.phases import phases_of
from pretrain.experiment.program import build_program
from pretrain.records.metrics import read_metrics
from pretrain.run.train import train
from pretrain.testing import assert_resumes_exactly, logged_losses, losses
from tests.pretrain import tiny

pytestmark = pytest.mark.usefixtures('shared_programs')

TO_BF16 = "phases=[{'start_step': 3, 'set': {'precision.recipe': 'bf16'}}]"
NVFP4 = "precision.recipe='nvfp4'"


@pytest.mark.slow
def test_a_run_that_ends_in_another_recipe_resumes_exactly(tmp_path):
  """nvfp4 with random rounding, stopped in it; the last steps are of 'bf16' with the same state."""
  cfg = tiny.decoder(NVFP4, TO_BF16, 'train.steps=5', 'checkpoint.every=2', 'mesh.data=2')
  assert_resumes_exactly(cfg, tmp_path, steps=5, stop_at=2)
  rows = read_metrics(tmp_path / 'resumed')
  assert [row['phase'] for row in rows] == [0, 0, 0, 1, 1]
  plain = losses(tiny.decoder('mesh.data=2'), 1)
  assert rows[0]['loss'] != plain[0]
  assert rows[0]['loss'] == pytest.approx(float(plain[0]), rel=0.02)


DELAYED = ("precision.recipe='fp8_delayed'", 'precision.amax_history=2', 'checkpoint.every=2', 'mesh.fsdp=2')


@pytest.mark.slow
def test_histories_of_delayed_scaling_are_saved_and_resumed_exactly(tmp_path):
  """In two microbatches; stopped when every entry of the history comes from a step, and none from the start."""
  cfg = tiny.decoder(*DELAYED, 'train.accumulate=2')
  assert_resumes_exactly(cfg, tmp_path, steps=5, stop_at=3)


@pytest.mark.slow
def test_a_phase_in_another_recipe_leaves_the_history_as_it_is(tmp_path):
  """fp8_delayed, bf16, fp8_delayed, stopped at the border: the last phase scales by steps of the first."""
  phases = "phases=[{'start_step': 2, 'set': {'precision.recipe': 'bf16'}}, {'start_step': 4, 'set': "
  back = phases + "{'precision.recipe': 'fp8_delayed', 'precision.overrides': {'mlp': 'bf16'}}}]"
  cfg = tiny.decoder(*DELAYED, back, "averaging.name='ema'", "model.remat='full'", 'train.steps=6')
  assert_resumes_exactly(cfg, tmp_path, steps=6, stop_at=4)
  with contextlib.closing(Checkpoints(tmp_path / 'whole', CheckpointConfig(), read_only=True)) as checkpoints:
    at = lambda step, name: checkpoints.arrays(step, [f'extra/amax/decoder/blocks/{name}'])
    for name in ('mlp/up', 'self_attention/query'):
      ((_, two), (_, four), (_, six)) = (next(iter(at(step, name).items())) for step in (2, 4, 6))
      np.testing.assert_array_equal(two, four)
      assert (np.asarray(two) > 0).all()
      assert (np.asarray(six) != np.asarray(four)).any() == (name != 'mlp/up')


@pytest.mark.slow
def test_a_checkpoint_moves_between_recipes(tmp_path):
  """Weights of an int8 run start one in 'bf16': its parameters are those, as are its shapes."""
  assert train(tiny.decoder("precision.recipe='int8'", 'train.steps=2', 'checkpoint.every=2'), tmp_path / 'int8') == 0
  begun = tiny.decoder(f"checkpoint.initial='{tmp_path}/int8/2'", 'train.steps=1', 'checkpoint.every=2')
  assert train(begun, tmp_path / 'bf16') == 0
  first = [read_metrics(tmp_path / name)[0]['loss'] for name in ('int8', 'bf16')]
  assert first[1] != first[0]
  shapes = lambda cfg: jax.tree.map(lambda x: (x.shape, x.dtype), build_program(cfg).abstract)
  assert shapes(tiny.decoder(NVFP4)) == shapes(tiny.decoder())


@pytest.mark.slow
def test_a_resumed_run_keeps_its_recipe(tmp_path, capsys):
  assert train(tiny.decoder("precision.recipe='fp8'", 'train.steps=1'), tmp_path) == 0
  arguments = [f'--gin_file={tiny.DECODER}', *(f'--gin.{key}' for key in tiny.SMALL_DECODER)]
  assert main(['train', *arguments, f'--workdir={tmp_path}', '--gin.train.steps=2']) == 64
  assert "precision.recipe is 'fp8' in" in capsys.readouterr().err


@pytest.mark.parametrize('recipe', ['int8', *(pytest.param(name, marks=pytest.mark.slow) for name in ('fp8', 'nvfp4'))])
def test_a_gradient_that_is_not_finite_still_skips_the_update(recipe, tmp_path):
  """A NaN in one weight comes through the quantized products to the norm of the gradients."""
  cfg = tiny.decoder(f"precision.recipe='{recipe}'", 'mesh.data=1')
  program, data = build_program(cfg), open_data(cfg.data, cfg.objective, seed=0, vocab_size=512, cache_dir=tmp_path)
  state = program.init()
  params = jax.tree.map(lambda x: x, dict(state.params))
  up = params['decoder']['blocks']['mlp']['up']
  params['decoder']['blocks']['mlp']['up'] = up.at[0, 1, 2].set(jnp.nan)
  _, batch = next(loader(data, {'examples': 0}, host_rows(program.mesh, cfg.data.batch_size)))
  before = jax.tree.map(np.asarray, params)
  state, metrics = program.train_step(state.replace(params=params), to_global(batch, program.mesh))
  assert np.isnan(float(metrics['grad_norm']))
  assert float(metrics['skipped']) == 1
  jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, dict(state.params)))


def test_phases_schedule_recipes_by_step():
  cfg = tiny.decoder(
    NVFP4, 'train.steps=30', "phases=[{'start_step': 10, 'set': {'precision.overrides': {'mlp': 'fp8'}}}, "
    "{'start_step': 20, 'set': {'precision.recipe': 'bf16', 'precision.overrides': {}}}]",
  )  # fmt: skip
  found = [(phase.start, phase.cfg.precision.recipe, phase.cfg.precision.overrides) for phase in phases_of(cfg)]
  assert found == [(0, 'nvfp4', {}), (10, 'nvfp4', {'mlp': 'fp8'}), (20, 'bf16', {})]
  assert tiny.decoder(*bindings.render(cfg).splitlines()) == cfg


def test_the_config_against_outliers_has_all_of_its_parts():
  cfg = bindings.load(Experiment, [str(tiny.ROOT / 'configs/decoder/tiny_osp.gin')])
  assert (cfg.model.norm.scale, cfg.model.embedding_rotation, cfg.model.kurtosis) == ('single', True, True)
  assert cfg.optimizer.name == 'muon'


@pytest.mark.slow
def test_a_run_with_all_parts_against_outliers_learns_and_logs_kurtosis(tmp_path):
  """Muon takes the rotations; a run in four bits resumes exactly."""
  parts = ("model.norm.scale='single'", 'model.embedding_rotation=True', 'model.kurtosis=True', "optimizer.name='muon'")
  cfg = tiny.decoder(*parts, NVFP4, 'mesh.fsdp=2', 'mesh.tensor=2', 'train.accumulate=2', 'checkpoint.every=2')
  assert_resumes_exactly(cfg, tmp_path, steps=6, stop_at=4)
  rows = read_metrics(tmp_path / 'resumed')
  assert rows[-1]['loss'] < rows[0]['loss']
  assert all(np.isfinite(row[f'kurtosis/decoder/{layer}']) for row in rows for layer in (0, 1))


SHIPPED_RECIPES = {'tiny_fp8': ('fp8', {}), 'tiny_fp4': ('nvfp4_fp8', {'attention': 'fp8'})}


@pytest.mark.parametrize('name', SHIPPED_RECIPES)
def test_shipped_configs_differ_from_tiny_in_precision_alone(name):
  folder = tiny.ROOT / 'configs/decoder'
  own, plain = (bindings.flatten(bindings.load(Experiment, [str(folder / f'{n}.gin')])) for n in (name, 'tiny'))
  assert {key for key in own if own[key] != plain[key]} <= {'precision.recipe', 'precision.overrides', 'phases'}
  assert (own['precision.recipe'], own['precision.overrides']) == SHIPPED_RECIPES[name]


SHIPPED = """
import os, pathlib, signal, sys, time
from pretrain.run import step_numbers, train
from tests.pretrain import tiny
name, workdir = sys.argv[1], pathlib.Path(sys.argv[2])
overrides = ["data.name='synthetic'", 'data.batch_size=8', 'data.targets_length=64', 'train.steps=6',
             'train.log_every=1', 'checkpoint.every=2', 'evaluation.every=0', 'mesh.data=2', 'watchdog.step=1e4']
if name == 'tiny_fp4': overrides.append("phases=[{'start_step': 5, 'set': {'precision.recipe': 'bf16'}}]")
log = step_numbers.log
def kill(run, step, *rest):
  log(run, step, *rest)
  while step == 4 and not (workdir / 'checkpoints/2/MANIFEST.json').exists(): time.sleep(0.01)
  if step == 4: os.kill(os.getpid(), signal.SIGKILL)
if len(sys.argv) == 4: step_numbers.log = kill
train.train(tiny.experiment(tiny.ROOT / f'configs/decoder/{name}.gin', *overrides), workdir)
"""


@pytest.mark.slow
@pytest.mark.parametrize('name', ['tiny_fp8', 'tiny_fp4'])
def test_shipped_configs_are_killed_and_resume_exactly(name, tmp_path):
  """SIGKILL in step 4, whose checkpoint may be there or not; fp4 ends in 'bf16', as its schedule says of step 1800."""

  def run(workdir: str, *kill: str) -> int:
    command = [sys.executable, '-c', SHIPPED, name, tmp_path / workdir, *kill]
    return subprocess.run(command, cwd=tiny.ROOT, check=False).returncode

  assert run('whole') == 0
  assert run('killed', 'kill') == -signal.SIGKILL
  assert len(logged_losses(tmp_path / 'killed')) < 6
  assert run('killed') == 0
  whole, resumed = (logged_losses(tmp_path / workdir) for workdir in ('whole', 'killed'))
  assert [step for step, _ in whole] == [1, 2, 3, 4, 5, 6]
  assert resumed == whole
  assert len({loss for _, loss in whole}) == 6


@pytest.mark.parametrize(
  ('overrides', 'message'),
  [
    (["precision.recipe='fp9'"], "precision.recipe='fp9' is not one of 'bf16', 'int8', 'fp8', .*; did you mean 'fp8'"),
    (
      ["precision.overrides={'mpl': 'fp8'}"],
      "precision.overrides has 'mpl', .* did you mean 'mlp'",
    ),
    (["precision.overrides={'mlp': 8}"], r"precision.overrides\['mlp'\]=8 is not one of 'bf16'"),
    (
      ["precision.recipe='mxfp8'", 'data.targets_length=40'],
      'blocks of 32, .* divide data.targets_length=40',
    ),
    (
      ["precision.recipe='mxfp8'", 'data.targets_length=128', 'mesh.data=1', 'mesh.sequence=4'],
      'blocks of 32, .* divide data.targets_length / 8=16; use a multiple of 32, e.g. 32',
    ),
    (
      ["precision.recipe='mxfp8'", 'model.mlp.hidden=48'],
      'of decoder.mlp.down has blocks of 32, .* mlp=48; use a mult',
    ),
    (["precision.recipe='fp8_delayed'"], 'with precision.amax_history=0, so there are no earlier steps .* set it, e.g'),
    ([*DELAYED, "kernels.quantized_matmul='tpu'"], "quantized_matmul='tpu' has no delayed scaling; use 'auto', 'xla'"),
    (
      [NVFP4, "kernels.quantized_matmul='interpret'"],
      "quantized_matmul='interpret' has no nvfp4 with scales of blocks; it has int8, int4 and fp8 .* Use 'auto'",
    ),
    (
      ["precision.overrides={'mlp': 'mxfp8'}", "kernels.quantized_matmul='tpu'"],
      "kernels.quantized_matmul='tpu' has no mxfp8 with scales of blocks",
    ),
    (
      ['precision.amax_history=4'],
      "amax_history=4 and no recipe is 'fp8_delayed', which alone reads it; set precision",
    ),
    (
      [*DELAYED, "phases=[{'start_step': 5, 'set': {'precision.amax_history': 4}}]"],
      r'phases\[0\].set: precision.amax_history is the same in all phases of a run; a phase may set .*precision.recipe',
    ),
    (
      [NVFP4, 'precision.first_layers=2', 'precision.last_layers=1'],
      'first_layers=2 and precision.last_layers=1, but the decoder has 2 layers; use at most 2 together',
    ),
    ([NVFP4, "precision.edge_recipe='fp8'"], "edge_recipe='fp8' without precision.first_layers or precision.last_lay"),
    (
      [NVFP4, 'precision.first_layers=1', 'model.windows=(8,None)'],
      'first_layers=1 and precision.last_layers=0 with 2 entries of model.windows; use multiples of 2',
    ),
    (
      ['precision.last_layers=1', "precision.edge_recipe='mxfp8'", 'model.mlp.hidden=48'],
      "recipe 'mxfp8' of decoder.mlp.down has blocks of 32",
    ),
    (
      ["phases=[{'start_step': 5, 'set': {'precision.recipe': 'int4_weights'}}]"],
      r"phases\[0\]: precision: recipe 'int4_weights' is for trained models: it has no gradients, and no float32 copy",
    ),
    (["kernels.quantized_matmul='cuda'"], "kernels.quantized_matmul='cuda' is not one of 'auto', 'reference', 'xla'"),
    (
      [NVFP4, "phases=[{'start_step': 5, 'set': {'precision.recipe': 'fp8'}}, {'start_step': 5, 'set': {}}]"],
      r'phases\[1\].start_step=5 is not after 5; list phases in order',
    ),
    (
      ["phases=[{'start_step': 5, 'set': {'precision.recipe': 'mxfp8', 'data.targets_length': 40}}]"],
      r'phases\[0\]: precision: .* data.targets_length=40',
    ),
  ],
)
def test_what_cannot_be_is_refused_before_anything_is_built(overrides, message):
  with pytest.raises(ConfigError, match=message):
    tiny.decoder(*overrides)


def test_blocks_divide_the_distances_of_disentangled_attention(text_store):
  """Gradients of its keys and queries also sum over the table of distances."""
  parts = ("precision.recipe='mxfp8'", "model.positions='disentangled'", 'model.embed=64', 'model.mlp.hidden=64')
  with pytest.raises(ConfigError, match=r'blocks of 32, which do not divide model\.relative_buckets=48; use a'):
    tiny.encoder(text_store, *parts, 'data.targets_length=64', 'model.relative_buckets=48')
  tiny.encoder(text_store, *parts, 'data.targets_length=64', 'model.relative_buckets=64')
