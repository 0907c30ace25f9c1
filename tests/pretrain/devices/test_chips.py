"""The table of chips: what JAX calls them, which slices exist, which of their sides are rings."""

import pytest

from pretrain.devices.chips import CHIPS, flops_of_kind, of_kind, parse
from pretrain.errors import ConfigError


def test_a_device_has_the_peak_of_its_part_of_the_chip():
  """459 TFLOP/s a v5p chip, one device; 2,307 an Ironwood chip, whose two cores are two devices."""
  assert flops_of_kind('TPU v5') == flops_of_kind('TPU v5p') == 459e12
  assert flops_of_kind('TPU7x') == 2307e12 / 2
  assert flops_of_kind('cpu') is None
  assert of_kind('NVIDIA H100 80GB HBM3') is None


def test_no_two_chips_share_a_kind():
  kinds = [kind for chip in CHIPS.values() for kind in chip.kinds]
  assert len(kinds) == len(set(kinds))


@pytest.mark.parametrize(
  ('topology', 'rings'),
  [
    ('v5p:4x4x4', (True, True, True)), ('v5p:4x4x8', (True, True, True)), ('v5p:2x4x4', (False, False, False)),
    ('v5e:16x16', (True, True)), ('v5e:8x16', (False, True)), ('v6e:4x8', (False, False)),
  ],
)  # fmt: skip
def test_sides_are_rings_where_the_slice_is_a_torus(topology, rings):
  assert parse(topology).rings == rings


def test_devices_are_counted_over_slices():
  assert parse('v5p:4x4x8').devices == 128
  assert parse('v5p:4x4x8', 2).devices == 256
  assert parse('tpu7x:2x2x1').devices == 8


@pytest.mark.parametrize(
  ('topology', 'message'),
  [
    ('v9:1', r'^CONFIG: --topology=v9:1 is not a TPU slice; write CHIP:SIZES with a chip of v5e, v5p, v6e, tpu7x'),
    ('v5p', 'write CHIP:SIZES'),
    ('v5p:4x4', r'one of v5p has 3 sides, .* Known: v5p:2x2x1, .*v5p:4x4x8'),
    ('v5e:3x4', r'multiples of a host \(2x2\), at most 16x16\. Known: v5e:2x2'),
    ('v5e:16x32', 'at most 16x16'),
    ('v5p:0x4x4', 'v5p has 3 sides'),
  ],
)
def test_a_slice_that_does_not_exist_is_refused_with_those_that_do(topology, message):
  with pytest.raises(ConfigError, match=message):
    parse(topology)


def test_no_slices_are_refused():
  with pytest.raises(ConfigError, match='--num_slices=0'):
    parse('v5e:2x4', 0)
