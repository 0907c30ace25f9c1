"""Runs whose rows a ring of devices shares: the losses of one device, also after a kill and on another layout."""

import dataclasses
import re

import numpy as np
import pytest

import pretrain.run.train
from data.batches.loader import loader
from data.batches.source import open_data
from pretrain.devices.compilation_cache import cache_dir
from pretrain.devices.mesh import MeshConfig, host_rows, to_global
from pretrain.experiment.experiment import Experiment
from pretrain.experiment.program import build_program
from pretrain.run.train import train
from pretrain.testing import assert_layout_invariant, logged_losses
from tests.pretrain import tiny
from tests.pretrain.run.test_online import killed_at

PREFIX = tiny.ROOT / 'configs/prefix/tiny.gin'
BOTH = ('model.dropout=0.1', 'train.accumulate=2', 'train.steps=20')  # text_store's rows are packed
LAYOUTS = (MeshConfig(), MeshConfig(sequence=4, tensor=2), MeshConfig(fsdp=2, sequence=2, tensor=2))


def configured(model: str, store, *more: str) -> Experiment:
  if model == 'ul2':
    return tiny.ul2(store, *BOTH, *more)
  sizes = (*tiny.SMALL, 'model.vocab_size=512', 'model.layers=2', 'data.targets_length=64', 'data.sentinels=32')
  return tiny.experiment(PREFIX, *tiny.over(store), *sizes, 'model.kv_heads=2', 'mesh.data=1', *BOTH, *more)


@pytest.mark.slow
@pytest.mark.parametrize('model', ['ul2', 'prefix'])
def test_twenty_steps_have_the_losses_of_one_device(text_store, model):
  assert_layout_invariant(configured(model, text_store), LAYOUTS, steps=20)


@pytest.mark.slow
def test_windows_with_sinks_have_the_losses_of_one_device(text_store):
  cfg = configured('prefix', text_store, 'model.windows=(9, None)', 'model.sinks=3')
  assert_layout_invariant(cfg, LAYOUTS[:2], steps=6)


@pytest.mark.slow
def test_bf16_agrees_to_a_thousandth(text_store):
  cfg = configured('prefix', text_store, "model.dtype='bfloat16'")
  assert_layout_invariant(cfg, LAYOUTS[:2], steps=6, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(('before', 'after'), [(1, 2), (2, 0), (0, 1)])
def test_a_killed_run_resumes_on_another_layout(text_store, tmp_path, monkeypatch, before, after):
  monkeypatch.setattr(pretrain.run.train, 'write_report', lambda _: None)
  cfg = configured('ul2', text_store, 'checkpoint.every=4')
  on = lambda layout: dataclasses.replace(cfg, mesh=LAYOUTS[layout])
  train(on(0), tmp_path / 'one')
  killed_at(on(before), tmp_path / 'run', 11, monkeypatch)
  train(on(after), tmp_path / 'run')
  one, found = (dict(logged_losses(tmp_path / name)) for name in ('one', 'run'))
  assert list(found) == list(range(1, 21))
  np.testing.assert_allclose([*found.values()], [*one.values()], rtol=1e-5)


def compiled(cfg: Experiment) -> str:
  """The HLO of a train step."""
  program = build_program(cfg)
  data = open_data(cfg.data, cfg.objective, seed=0, vocab_size=cfg.model.vocab_size, cache_dir=cache_dir())
  _, batch = next(loader(data, {'examples': 0}, host_rows(program.mesh, cfg.data.batch_size)))
  return program.train_step.lower(program.abstract, to_global(batch, program.mesh)).compile().as_text()


@pytest.mark.slow
def test_a_step_sends_what_the_ring_says_and_replicates_nothing(text_store, compiler_output):
  """Forward keys, values and vectors go round in one loop; backward these and two gradients, and the gradients once
  more to go home. The model's layers are scanned, so the program has each of them once for each kind of attention.
  """
  cfg = dataclasses.replace(configured('prefix', text_store, "model.remat='none'"), mesh=MeshConfig(sequence=4))
  text = compiled(cfg)
  forward, backward = 3, 3 + 2 + 2
  assert len(re.findall(r' collective-permute(?:-start)?\(', text)) == forward + backward
  assert 'Involuntary full rematerialization' not in compiler_output()
