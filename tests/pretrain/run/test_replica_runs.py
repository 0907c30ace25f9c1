"""Runs over replicas: the losses of one device, also after a kill and on another layout, and in a stated dtype."""

import dataclasses

import numpy as np
import pytest

import pretrain.run.train
from pretrain.devices.mesh import MeshConfig
from pretrain.run.train import train
from pretrain.testing import assert_layout_invariant, logged_losses, losses
from tests.pretrain import tiny
from tests.pretrain.run.test_online import killed_at

BOTH = ('model.dropout=0.1', 'train.accumulate=2', 'train.steps=20', 'data.batch_size=16')  # rows are packed
LAYOUTS = (MeshConfig(), MeshConfig(replica=2, fsdp=4), MeshConfig(replica=2, fsdp=2, tensor=2))
MORE = (
  MeshConfig(replica=4, data=2),
  MeshConfig(replica=2, sequence=2, fsdp=2),
  MeshConfig(replica=2, stage=2, fsdp=2),
)


@pytest.mark.slow
def test_twenty_steps_have_the_losses_of_one_device(text_store, compiler_output):
  """Also with rows on a ring, with stages of a pipeline, and with nothing that divides parameters."""
  assert_layout_invariant(tiny.ul2(text_store, *BOTH), LAYOUTS + MORE, steps=20)
  assert 'Involuntary full rematerialization' not in compiler_output()


@pytest.mark.slow
def test_replicas_of_a_pipeline_with_repeats_have_the_losses_of_one_device(text_store):
  more = ('model.encoder_layers=4', 'model.decoder_layers=4', 'model.pipeline_repeats=2', "model.remat='full'")
  cfg = tiny.ul2(text_store, *BOTH, *more)
  assert_layout_invariant(cfg, (LAYOUTS[0], MeshConfig(replica=2, stage=2)), steps=4)


@pytest.mark.slow
def test_activations_in_bfloat16_agree_to_a_thousandth(text_store):
  cfg = tiny.ul2(text_store, *BOTH, "model.dtype='bfloat16'")
  assert_layout_invariant(cfg, LAYOUTS, steps=6, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(('before', 'after'), [(1, 2), (2, 0), (0, 1)])
def test_a_killed_run_resumes_on_another_layout(text_store, tmp_path, monkeypatch, before, after):
  monkeypatch.setattr(pretrain.run.train, 'write_report', lambda _: None)
  cfg = tiny.ul2(text_store, *BOTH, 'checkpoint.every=4')
  on = lambda layout: dataclasses.replace(cfg, mesh=LAYOUTS[layout])
  killed_at(on(before), tmp_path / 'run', 11, monkeypatch)
  train(on(after), tmp_path / 'run')
  found = dict(logged_losses(tmp_path / 'run'))
  assert list(found) == list(range(1, 21))
  np.testing.assert_allclose([*found.values()], losses(on(0), 20), rtol=1e-5)


@pytest.mark.slow
def test_sums_in_bfloat16_differ_a_little(text_store):
  """A gradient is rounded to eight bits: by 2**-9 of itself at most, so are the first updates."""
  cfg = dataclasses.replace(tiny.ul2(text_store, *BOTH), mesh=LAYOUTS[1])
  rounded = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, replica_dtype='bfloat16'))
  exact, found = losses(cfg, 20), losses(rounded, 20)
  assert found[0] == exact[0], 'the first loss is that of the initial parameters'
  assert (found[1:] != exact[1:]).any()
  np.testing.assert_allclose(found, exact, rtol=1e-3)
  norms = [losses(each, 1, 'grad_norm')[0] for each in (cfg, rounded)]
  assert 0 < abs(norms[1] / norms[0] - 1) < 2**-8


BESIDE = {
  'adapters': ('lora.rank=4', "lora.modules=['attention', 'down']", "checkpoint.initial='unread/2'"),
  'delayed scales': ("precision.recipe='fp8_delayed'", 'precision.amax_history=4'),
}


@pytest.mark.slow
@pytest.mark.parametrize('keys', BESIDE.values(), ids=BESIDE)
def test_state_beside_the_parameters_is_that_of_one_device(keys):
  """Frozen weights; and the largest sizes of operands, those of all replicas. After more steps in fp8 a number falls on
  the other side of a rounding."""
  assert_layout_invariant(tiny.decoder(*BOTH, *keys), LAYOUTS[:2], steps=4)


@pytest.mark.slow
@pytest.mark.parametrize('capacity', [None, 1.0], ids=['dropless', 'capacity'])
def test_experts_over_replicas_have_the_losses_of_one_device(text_store, capacity):
  """Without the weights of the router's means, which are over the rows of a microbatch on one replica."""
  sizes = ('model.experts=4', 'model.experts_per_token=2', 'data.targets_length=64', 'data.sentinels=32')
  cfg = tiny.decoder(*tiny.over(text_store), *BOTH, *sizes, f'model.expert_capacity={capacity}')
  layouts = (LAYOUTS[0], MeshConfig(replica=2, expert=4), MeshConfig(replica=2, expert=2, tensor=2))
  assert_layout_invariant(cfg, layouts, steps=20)
