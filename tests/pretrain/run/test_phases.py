"""Phases: their steps follow each other with one state and one count of examples."""

import dataclasses
import re
import signal

import numpy as np
import pytest

from data.batches.source import open_data
from data.prepare.prepare import prepare
from pretrain.cli.main import main
from pretrain.config import bindings
from pretrain.errors import ConfigError
from pretrain.experiment.checks import check
from pretrain.experiment.experiment import Experiment
from pretrain.experiment.phases import phase_at, phases_of
from pretrain.records.metrics import read_metrics
from pretrain.run.phase_program import PhaseProgram
from pretrain.run.train import DONE, PREEMPTED, train
from pretrain.step.train_step import checksum
from pretrain.testing import assert_resumes_exactly
from tests.pretrain import tiny

pytestmark = pytest.mark.usefixtures('shared_programs')

RAMP = "phases=[{'start_step': 3, 'set': {'data.batch_size': 16}}, {'start_step': 5, 'set': {'schedule.peak': 1e-4}}]"
ADAPT = (
  "phases=[{'start_step': 2, 'set': {'objective.name': 'prefix_lm', 'model.dtype': 'bfloat16'}}, "
  "{'start_step': 4, 'set': {'objective.name': 'ul2r', 'data.targets_length': 64, 'data.batch_size': 4}}]"
)


def column(workdir, key):
  return [row[key] for row in read_metrics(workdir) if key in row]


@pytest.mark.slow
def test_a_phase_begins_with_the_example_after_the_last_one(tmp_path):
  """Three batches of 8, then examples 24 to 39."""
  cfg = tiny.decoder('train.steps=6', RAMP)
  assert [s.first_example for s in phases_of(cfg)] == [0, 24, 56]
  train(cfg, tmp_path / 'ramp')
  assert column(tmp_path / 'ramp', 'phase') == [0, 0, 0, 1, 1, 2]
  assert column(tmp_path / 'ramp', 'loss_weight') == [256.0] * 3 + [512.0] * 3
  assert column(tmp_path / 'ramp', 'learning_rate') == pytest.approx([1e-3] * 5 + [1e-4])
  data = open_data(cfg.data, cfg.objective, seed=0, vocab_size=512, cache_dir=tmp_path)
  sums = [int(checksum(data.global_rows(start, count))) for start, count in ((16, 8), (24, 16), (40, 16), (56, 16))]
  assert column(tmp_path / 'ramp', 'batch_checksum')[2:] == sums
  train(tiny.decoder('train.steps=3'), tmp_path / 'before')
  for key in ('batch_checksum', 'loss'):
    assert column(tmp_path / 'ramp', key)[:3] == column(tmp_path / 'before', key)


def test_a_schedule_that_a_phase_sets_begins_with_it(tmp_path):
  again = "phases=[{'start_step': 3, 'set': {'schedule.name': 'linear', 'schedule.peak': 0.5, 'schedule.steps': 4}}]"
  train(tiny.decoder('train.steps=5', again), tmp_path)
  assert column(tmp_path, 'learning_rate') == pytest.approx([1e-3] * 3 + [0.5, 0.375])


@pytest.mark.slow
def test_a_run_in_phases_resumes_exactly(text_store, tmp_path):
  """Stopped in the second phase, which ends with another objective, length, batch size and dtype than the first."""
  cfg = adapted(text_store, 'checkpoint.every=3', 'model.dropout=0.1')
  assert_resumes_exactly(cfg, tmp_path, steps=6, stop_at=3)
  rows = read_metrics(tmp_path / 'resumed')
  assert [row['loss_weight'] for row in rows] == column(tmp_path / 'whole', 'loss_weight')
  assert len({row['batch_checksum'] for row in rows}) == 6


def test_a_run_stopped_at_the_border_of_two_phases_resumes_in_the_second(text_store, tmp_path):
  assert_resumes_exactly(adapted(text_store, 'checkpoint.every=4'), tmp_path, steps=5, stop_at=4)
  assert column(tmp_path / 'resumed', 'phase') == [0, 0, 1, 1, 2]


def test_a_run_stopped_while_the_next_phase_opens_its_data_resumes(text_store, tokenizer_model, tmp_path, monkeypatch):
  (tmp_path / 'other.txt').write_text('Another store, of the same tokenizer.\n' * 99)
  (tmp_path / 'm').write_bytes(tokenizer_model)
  prepare([tmp_path / 'other.txt'], tmp_path / 'other', tokenizer=tmp_path / 'm', sentinels=32)
  other = f"phases=[{{'start_step': 1, 'set': {{'data.sources': [{{'path': '{tmp_path}/other'}}]}}}}]"
  source = ("data.name='store'", f"data.sources=[{{'path': '{text_store}'}}]", 'data.sentinels=32', other)
  cfg = tiny.decoder(*source, 'train.steps=2')

  class Stopped(PhaseProgram):
    def __init__(self, phase):
      super().__init__(phase)
      if phase.index:
        signal.raise_signal(signal.SIGTERM)

  with monkeypatch.context() as patch:
    patch.setattr('pretrain.run.loop.PhaseProgram', Stopped)
    assert train(cfg, tmp_path / 'run') == PREEMPTED
  assert column(tmp_path / 'run', 'phase') == [0]
  assert train(cfg, tmp_path / 'run') == DONE
  assert column(tmp_path / 'run', 'phase') == [0, 1]


def adapted(store, *overrides) -> Experiment:
  """A decoder from causal to prefix to denoising."""
  source = ("data.name='store'", f"data.sources=[{{'path': '{store}'}}]", 'data.sentinels=32')
  return tiny.decoder(*source, 'train.steps=6', ADAPT, *overrides)


def test_show_prints_rows_of_the_phase_of_their_step(text_store, capsys, tmp_path):
  file = tmp_path / 'phases.gin'
  file.write_text(bindings.render(adapted(text_store)))
  shown = {}
  for step in (1, 3, 5):
    assert main(['data', 'show', f'--gin_file={file}', f'--step={step}', '--row=1']) == 0
    shown[step] = capsys.readouterr().out
  assert 'task causal' in shown[1]
  assert 'prefix (' in shown[3]
  assert re.search(r'row 1 \(example 37\)', shown[5]), '4 steps of 8 and one of 4 come before'


def test_the_resolved_config_reads_back():
  cfg = tiny.decoder('train.steps=6', RAMP)
  assert [phase_at(cfg, step).index for step in range(6)] == [0, 0, 0, 1, 1, 2]
  again = tiny.decoder(*bindings.render(cfg).splitlines())
  assert again == cfg


@pytest.mark.parametrize(
  ('phases', 'message'),
  [
    ("[{'start_step': 0, 'set': {}}]", r'phases\[0\].start_step=0; it must be >= 1'),
    ("[{'start_step': 9, 'set': {}}, {'start_step': 9, 'set': {}}]", r'phases\[1\].start_step=9 is not after 9'),
    ("[{'start_step': 9, 'set': {'model.embed': 8}}]", r'phases\[0\].set: model.embed is the same in all phases'),
    ("[{'start_step': 9, 'set': {'data.batch': 8}}]", r'phases\[0\].set: unknown key data.batch; .* data.batch_size\?'),
    (
      "[{'start_step': 9, 'set': {'schedule.peak': 'x'}}]",
      r"phases\[0\].set: schedule.peak='x' is str, expected float",
    ),
    ("[{'start_step': 9, 'set': {'schedule.name': 'cosine'}}]", r'schedule.peak is required .* to phases\[0\].set'),
    ("[{'start_step': 9, 'set': {'data.batch_size': 3}}]", r'phases\[0\]: data.batch_size=3 does not divide'),
    ("[{'start_step': 9, 'set': 3}]", r'phases\[0\].set=3 is int, expected a dict of keys and values'),
  ],
)
def test_an_impossible_phase_is_refused_in_one_sentence(phases, message):
  with pytest.raises(ConfigError, match=message):
    check(tiny.decoder('mesh.data=2', f'phases={phases}'))


def test_a_phase_may_keep_other_activations():
  custom = "model.remat='custom'", "model.remat_keep=['query']", 'train.steps=30'
  cfg = tiny.decoder(*custom, "phases=[{'start_step': 5, 'set': {'model.remat': 'full', 'model.remat_keep': []}}, "
    "{'start_step': 9, 'set': {'model.remat': 'save_qkv_proj', 'model.remat_offload': ['key']}}]")  # fmt: skip
  found = [(own.remat, own.remat_keep, own.remat_offload) for own in (phase.cfg.model for phase in phases_of(cfg))]
  assert found == [('custom', ('query',), ()), ('full', (), ()), ('save_qkv_proj', (), ('key',))]


def test_sentinels_have_the_same_ids_in_all_phases():
  causal, ul2r = "'objective.name': 'causal_lm'", "'objective.name': 'ul2r', 'data.sentinels': 64"
  first, back = f"{{'start_step': 3, 'set': {{{ul2r}}}}}", f"{{'start_step': 5, 'set': {{{causal}}}}}"
  check(tiny.decoder(f'phases=[{first}, {back}]'))  # none before it
  again = "{'start_step': 7, 'set': {'objective.name': 'ul2r', 'data.sentinels': 32}}"
  with pytest.raises(
    ConfigError, match=r'phases\[2\]: data.sentinels=32, 64 in an earlier phase .* data.sentinels=64 from the begin'
  ):
    check(tiny.decoder(f'phases=[{first}, {back}, {again}]'))


def test_a_resumed_run_keeps_its_phases(tmp_path):
  cfg = tiny.decoder('train.steps=2', RAMP)
  train(cfg, tmp_path)
  with pytest.raises(ConfigError, match=r'phases is .* A resumed run keeps'):
    train(dataclasses.replace(cfg, phases=cfg.phases[:1]), tmp_path)
  assert np.isfinite(column(tmp_path, 'loss')).all()
