"""The largest configs on 64 and 256 chips of v5p, with the layout that `pretrain plan --search` names: as compiled they
fit and cost what they cost when these numbers were written (libtpu 0.0.42).
"""

import pytest

from pretrain.config import bindings
from pretrain.devices.chips import parse
from pretrain.experiment.experiment import Experiment
from pretrain.planner import search
from tests.pretrain import tiny

MIB = 2**20
# (config, slice): the layout, MiB in use at once on a device, cycles of its fusions.
GOLDEN = {
  ('decoder/70b', 'v5p:4x4x4'): ('fsdp=64 accumulate=2 remat=full', 76085, 157760313895),
  ('decoder/70b', 'v5p:4x8x8'): ('fsdp=256 accumulate=1 remat=save_dot_except_mlp', 77692, 38711873104),
  ('decoder/mixtral_8x7b', 'v5p:4x4x4'): ('fsdp=64 accumulate=1 remat=save_qkv_proj', 80014, 75497230142),
  ('decoder/mixtral_8x7b', 'v5p:4x8x8'): ('fsdp=256 accumulate=1 remat=save_dot_except_mlp', 26460, 19608061704),
  ('ul2/20b', 'v5p:4x4x4'): ('fsdp=64 accumulate=1 remat=minimal', 66028, 5451174889),
  ('ul2/20b', 'v5p:4x8x8'): ('fsdp=256 accumulate=1 remat=minimal', 16617, 1262706907),
}  # fmt: skip


@pytest.mark.aot
@pytest.mark.hours
@pytest.mark.parametrize(('name', 'of'), GOLDEN, ids=map(' '.join, GOLDEN))
def test_the_layout_that_is_named_fits_and_costs_what_it_did(name, of):
  layout, mib, cycles = GOLDEN[name, of]
  cfg, chips = bindings.load(Experiment, [str(tiny.ROOT / f'configs/{name}.gin')], []), parse(of)
  best = search.search(cfg, chips, 1).best
  assert best.layout.text == layout
  assert best.memory.peak < chips.chip.hbm
  assert best.memory.peak / MIB == pytest.approx(mib, rel=0.03)
  assert best.step.products * chips.chip.clock == pytest.approx(cycles, rel=0.03)
