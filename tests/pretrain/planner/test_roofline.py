"""The estimated step beside compiled ones: near, and with the same fastest layout."""

import pytest

from pretrain.config import bindings
from pretrain.devices.chips import parse
from pretrain.experiment.experiment import Experiment
from pretrain.planner import layouts, roofline, torus, workload
from tests.pretrain import tiny

SLICE = 'v5p:4x4x8'
# (data, fsdp, remat) of UL2 20B -> seconds as `planner/compiled.py` measures the program of libtpu 0.0.42.1: cycles and
# the bytes of collectives over the bandwidth of their links.
COMPILED = {
  (1, 128, 'full'): 1.961,
  (1, 128, 'dots'): 1.967,
  (2, 64, 'dots'): 2.294,
  (8, 16, 'dots'): 2.174,
  (8, 16, 'full'): 2.210,
}


@pytest.fixture(scope='module')
def estimated():
  cfg, of = bindings.load(Experiment, [str(tiny.ROOT / 'configs/ul2/20b.gin')], []), parse(SLICE)
  work, own = workload.describe(cfg), layouts.of_config(cfg, of.devices)

  def seconds(data: int, fsdp: int, remat: str) -> float:
    layout = layouts.Layout({**own.sizes, 'data': data, 'fsdp': fsdp}, 1, remat)
    return roofline.estimate(work, layout, of, torus.groups(layout.sizes, of)).total

  return {case: seconds(*case) for case in COMPILED}


def test_the_estimated_step_is_near_the_compiled_one(estimated):
  for case, seconds in COMPILED.items():
    assert estimated[case] == pytest.approx(seconds, rel=0.05), case


def test_the_layout_that_is_estimated_fastest_is_compiled_fastest(estimated):
  first = min(estimated, key=lambda case: estimated[case])
  assert COMPILED[first] <= 1.02 * min(COMPILED.values())
