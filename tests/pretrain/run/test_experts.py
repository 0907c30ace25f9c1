"""Runs with experts on several devices: the same losses as one device, also after a resume on another mesh."""

import dataclasses

import numpy as np
import pytest

import pretrain.run.train
from pretrain.devices.mesh import MeshConfig
from pretrain.records.metrics import read_metrics
from pretrain.records.plots import plots_of
from pretrain.run.train import train
from pretrain.testing import losses
from tests.pretrain import tiny
from tests.pretrain.run.test_online import killed_at

ROUTED = (
  'model.experts=4', 'model.experts_per_token=2', 'model.dropout=0.1', 'loss.load_balance=0.01', 'loss.router_z=0.001',
  'train.accumulate=2', 'data.batch_size=16', 'data.targets_length=64', 'data.sentinels=32',
)  # fmt: skip
ONE, ANOTHER = MeshConfig(), MeshConfig(expert=2, tensor=2, data=2)
LAYOUTS = (MeshConfig(expert=2), MeshConfig(expert=4), MeshConfig(expert=2, fsdp=2, sequence=2), ANOTHER)
CAPACITIES = {None: 'dropless', 1.0: 'capacity'}


def config(text_store, capacity: float | None, mesh: MeshConfig = ONE, *overrides: str):
  """Packed rows, dropout and two microbatches."""
  cfg = tiny.decoder(*tiny.over(text_store), *ROUTED, f'model.expert_capacity={capacity}', *overrides)
  return dataclasses.replace(cfg, mesh=mesh)


@pytest.mark.slow
@pytest.mark.parametrize('capacity', CAPACITIES, ids=CAPACITIES.values())
def test_experts_on_several_devices_have_the_losses_of_one(text_store, capacity, compiler_output):
  expected = losses(config(text_store, capacity), 20)
  assert expected[0] - expected[-1] > 0.3, 'it learns'
  for mesh in LAYOUTS:
    np.testing.assert_allclose(losses(config(text_store, capacity, mesh), 20), expected, rtol=1e-5, err_msg=str(mesh))
  assert 'Involuntary full rematerialization' not in compiler_output()


@pytest.mark.slow
@pytest.mark.parametrize('capacity', CAPACITIES, ids=CAPACITIES.values())
def test_a_killed_run_with_experts_resumes_on_another_mesh(text_store, capacity, tmp_path, monkeypatch):
  """Killed in step 11 with four devices of experts, and resumed from step 8 on another mesh, as on one device."""
  monkeypatch.setattr(pretrain.run.train, 'write_report', lambda _: None)
  own = 'train.steps=20', 'checkpoint.every=4'
  killed_at(config(text_store, capacity, LAYOUTS[1], *own), tmp_path, 11, monkeypatch)
  train(config(text_store, capacity, ANOTHER, *own), tmp_path)
  rows = read_metrics(tmp_path)
  found = [row['loss'] for row in rows if 'loss' in row]
  np.testing.assert_allclose(found, losses(config(text_store, capacity), 20), rtol=1e-5)
  for layer in range(2):
    assert sum(rows[-1][f'expert_load/decoder/{layer}/{expert}'] for expert in range(4)) == pytest.approx(1, abs=1e-5)
    assert 0 < rows[-1][f'router_entropy/decoder/{layer}'] < np.log(4)
    assert (capacity is not None) == (f'expert_dropped/decoder/{layer}' in rows[-1])
  assert plots_of(rows).keys() >= {'expert_load', 'router_entropy'}
