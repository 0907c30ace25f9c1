"""Runs over the stages of a mesh: the losses of one device, also after a kill on another layout; what is refused."""

import dataclasses
import re

import jax
import numpy as np
import pytest

import pretrain.run.train
from pretrain.devices.mesh import MeshConfig
from pretrain.errors import ConfigError
from pretrain.experiment.experiment import Experiment
from pretrain.experiment.pipelines import schedule_of
from pretrain.experiment.program import build_program
from pretrain.run.train import train
from pretrain.testing import assert_layout_invariant, logged_losses, losses
from pretrain.tools.plan import pipeline
from tests.pretrain import tiny
from tests.pretrain.run.test_online import killed_at
from tests.pretrain.run.test_ring_runs import compiled

PREFIX = tiny.ROOT / 'configs/prefix/tiny.gin'
BOTH = (
  'model.dropout=0.1',
  'train.accumulate=2',
  'train.steps=20',
  'data.batch_size=16',
)  # text_store's rows are packed
ONE, TWO, FOUR = MeshConfig(), MeshConfig(stage=2, tensor=2), MeshConfig(stage=4, fsdp=2)
ROUTED = ('model.experts=4', 'model.experts_per_token=2', 'loss.load_balance=0.01', 'loss.router_z=0.001')


def configured(model: str, store, *more: str) -> Experiment:
  if model == 'ul2':
    return tiny.ul2(store, *BOTH, 'model.encoder_layers=4', 'model.decoder_layers=4', *more)
  sizes = (*tiny.SMALL, 'model.vocab_size=512', 'model.layers=4', 'data.targets_length=64', 'data.sentinels=32')
  return tiny.experiment(PREFIX, *tiny.over(store), *sizes, 'model.kv_heads=2', 'mesh.data=1', *BOTH, *more)


@pytest.mark.slow
@pytest.mark.parametrize('model', ['prefix', 'ul2'])
def test_twenty_steps_have_the_losses_of_one_device(text_store, model, compiler_output):
  assert_layout_invariant(configured(model, text_store), (ONE, MeshConfig(stage=2), FOUR), steps=20)
  assert 'Involuntary full rematerialization' not in compiler_output()


@pytest.mark.slow
@pytest.mark.parametrize('model', ['prefix', 'ul2'])
def test_repeats_have_the_losses_of_one_device(text_store, model, compiler_output):
  more = ('model.pipeline_repeats=2', "model.remat='full'")
  assert_layout_invariant(configured(model, text_store, *more), (ONE, TWO), steps=20)
  assert 'Involuntary full rematerialization' not in compiler_output()


@pytest.mark.slow
@pytest.mark.parametrize('metric', ['loss', 'load_balance'])
def test_experts_have_the_losses_and_the_balance_of_one_device(text_store, metric):
  """The balance is no mean over tokens: it is made once, of all microbatches of the pipeline."""
  cfg = configured('prefix', text_store, *ROUTED, 'model.pipeline_microbatches=2')
  found = losses(dataclasses.replace(cfg, mesh=MeshConfig(stage=2, expert=2)), 6, metric)
  np.testing.assert_allclose(found, losses(dataclasses.replace(cfg, mesh=ONE), 6, metric), rtol=1e-5)


@pytest.mark.slow
def test_delayed_scales_have_the_losses_of_one_device(text_store):
  """The largest sizes that a step observes are those of all microbatches."""
  cfg = configured('prefix', text_store, "precision.recipe='fp8_delayed'", 'precision.amax_history=4')
  assert_layout_invariant(cfg, (ONE, MeshConfig(stage=2)), steps=3)  # then rounding tips some codes over


@pytest.mark.slow
@pytest.mark.parametrize(('before', 'after'), [(TWO, FOUR), (FOUR, ONE), (ONE, TWO)])
def test_a_killed_run_resumes_on_another_layout(text_store, tmp_path, monkeypatch, before, after):
  monkeypatch.setattr(pretrain.run.train, 'write_report', lambda _: None)
  cfg = configured('prefix', text_store, 'checkpoint.every=4')
  train(cfg, tmp_path / 'one')
  killed_at(dataclasses.replace(cfg, mesh=before), tmp_path / 'run', 11, monkeypatch)
  train(dataclasses.replace(cfg, mesh=after), tmp_path / 'run')
  one, found = (dict(logged_losses(tmp_path / name)) for name in ('one', 'run'))
  assert list(found) == list(range(1, 21))
  np.testing.assert_allclose([*found.values()], [*one.values()], rtol=1e-5)


@pytest.mark.slow
def test_a_step_hands_activations_on_once_in_each_tick_of_each_pass(text_store):
  """The program has one loop over ticks forward and one backward, each with one collective-permute."""
  cfg = dataclasses.replace(configured('prefix', text_store, 'train.accumulate=1'), mesh=MeshConfig(stage=2))
  assert len(re.findall(r' collective-permute(?:-start)?\(', compiled(cfg))) == 2


@pytest.mark.slow
@pytest.mark.parametrize('implementation', ['reference', 'chunked'])
def test_stages_compute_the_loss_of_their_part_of_the_rows(text_store, implementation):
  """16 rows of 64 over 2 shards and 4 stages, 512 words: 128 tokens of a device; 3 rows of a device stay whole."""
  given = ('train.accumulate=1', f"kernels.linear_cross_entropy='{implementation}'")
  of = lambda rows: dataclasses.replace(configured('prefix', text_store, *given, f'data.batch_size={rows}'), mesh=FOUR)
  logits = lambda text: {int(found) for found in re.findall(r'f32\[(\d+),512\][^ ]* (?:dot|fusion)\(', text)}
  widest = lambda text: max(logits(text) - {32})  # 32 wide: the gradient of the head's matrix
  assert widest(compiled(of(16))) == 128
  assert widest(compiled(of(6))) == 192


@pytest.mark.slow
def test_parameters_and_the_optimizer_are_divided_over_stages(text_store):
  state = build_program(dataclasses.replace(configured('prefix', text_store), mesh=MeshConfig(stage=2))).abstract
  up = state.params['decoder']['blocks']['mlp']['up']
  assert up.sharding.shard_shape(up.shape)[0] == 2
  whole, own = (sum(np.prod(f(x)) for x in jax.tree.leaves(state.opt_state)) for f in (
    lambda x: x.shape, lambda x: x.sharding.shard_shape(x.shape)))  # fmt: skip
  assert own < 0.8 * whole


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    (
      ('model.layers=6', 'mesh.stage=4'),
      'model.layers=6 does not divide into mesh.stage=4 x model.pipeline_repeats=1 equal groups; use 8 layers, or '
      'mesh.stage=3.',
    ),
    (
      ('model.layers=8', 'mesh.stage=2', 'model.pipeline_repeats=3', "model.remat='full'"),
      'model.layers=8 does not divide into mesh.stage=2 x model.pipeline_repeats=3 equal groups; use 6 layers.',
    ),
    (
      ('model.layers=8', 'model.windows=(4, 4, 4, None)', 'mesh.stage=4'),
      'model.layers=8 does not divide into mesh.stage=4 x model.pipeline_repeats=1 equal groups, each with whole '
      'patterns of 4 model.windows; use 16 layers, or mesh.stage=2.',
    ),
    (
      ('mesh.stage=2', 'model.pipeline_microbatches=3'),
      'model.pipeline_microbatches=3 does not divide the 4 rows per device of data.batch_size=8 on 1 shards '
      'with train.accumulate=2; use model.pipeline_microbatches=2, or remove it.',
    ),
    (
      ('mesh.stage=2', 'precision.first_layers=1', "precision.recipe='fp8'"),
      'precision.first_layers=1 and precision.last_layers=0 with mesh.stage=2: all stages run one program, so their '
      'layers have one recipe; use 0 of both, or mesh.stage=1.',
    ),
    *(
      (
        ('mesh.stage=2', f"kernels.quantized_matmul='{name}'", *recipe),
        f"kernels.quantized_matmul='{name}' with mesh.stage=2 and precision recipe 'int8': the kernel cannot divide a "
        "product over stages; use kernels.quantized_matmul='auto' or 'xla', whose products the partitioner divides, or "
        'mesh.stage=1.',
      )
      for name, recipe in (
        ('tpu', ["precision.recipe='int8'"]),
        ('interpret', ["precision.overrides={'mlp': 'int8', 'attention': 'bf16'}"]),
      )
    ),
    (
      ('mesh.stage=2', 'model.layers=4', 'model.pipeline_repeats=2'),
      "model.pipeline_repeats=2 with model.remat='none', which would keep the parameters of a stage once for each "
      "microbatch; use model.remat='minimal_with_context' or 'full', or model.pipeline_repeats=1.",
    ),
  ],
)
def test_what_stages_cannot_share_is_refused_with_the_nearest_size(given, message):
  with pytest.raises(ConfigError) as error:
    tiny.decoder('mesh.data=1', 'train.accumulate=2', *given)
  assert str(error.value) == f'CONFIG: {message}'


@pytest.mark.parametrize(
  'given',
  [
    ("kernels.quantized_matmul='tpu'",),
    ("kernels.quantized_matmul='auto'", "precision.recipe='int8'"),
    ("kernels.quantized_matmul='xla'", "precision.recipe='int8'"),
  ],
)
def test_stages_share_products_that_no_kernel_computes(given):
  assert tiny.decoder('mesh.data=1', 'mesh.stage=2', *given).mesh.stage == 2


def test_both_stacks_of_an_encoder_decoder_must_divide():
  with pytest.raises(ConfigError, match=r'model\.encoder_layers=3 does not divide into mesh\.stage=2 .* mesh\.stage=1'):
    tiny.experiment(tiny.UL2, *tiny.SMALL_UL2, 'model.encoder_layers=3', 'mesh.stage=2')


def test_an_axis_that_takes_the_remaining_devices_is_checked_when_they_are_known():
  cfg = tiny.decoder('mesh.data=1', 'mesh.stage=-1')
  with pytest.raises(ConfigError, match=r'model\.layers=2 does not divide into mesh\.stage=8 x .* mesh\.stage=2\.'):
    build_program(cfg)
  named = ("kernels.quantized_matmul='interpret'", "precision.recipe='int8'", 'model.layers=8')
  with pytest.raises(
    ConfigError, match=r"='interpret' with mesh\.stage=8 and precision recipe 'int8'.* mesh\.stage=1\."
  ):
    build_program(tiny.decoder('mesh.data=1', 'mesh.stage=-1', *named))


def test_plan_says_how_long_stages_are_idle():
  cfg = tiny.decoder('mesh.data=1', 'mesh.stage=2', 'train.accumulate=2', 'model.pipeline_microbatches=4')
  assert pipeline(cfg, 2, 1) == [
    'pipeline: 2 stages, 4 microbatches, 1 repeats: 5 ticks in each pass of a stack, of which a stage is idle in 20.0%'
  ]
  assert pipeline(cfg, 1, 1) == []
  assert schedule_of(cfg, 2, 1).ticks == 5
