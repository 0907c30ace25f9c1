"""Where mesh axes lie on a slice, and the time of collectives there, by hand."""

import jax
import pytest

from pretrain.devices.chips import parse
from pretrain.devices.mesh import AXES, arrange
from pretrain.errors import ConfigError
from pretrain.planner.torus import Group, between, groups, members, places, rate, seconds


def sizes(**own: int) -> dict[str, int]:
  return dict.fromkeys(AXES, 1) | own


def test_one_axis_over_a_torus_uses_six_links():
  """9e10 bytes/s a link: three rings of two links each."""
  of = parse('v5p:4x4x8')
  whole = groups(sizes(fsdp=128), of)['fsdp',]
  assert whole == Group((4, 4, 8), 1, 1)
  assert rate(of, whole) == 6 * 9e10


def test_axes_have_sides_of_their_own():
  of = parse('v5p:4x4x8')
  found = groups(sizes(fsdp=32, tensor=4), of)
  assert sorted(found['tensor',].sides) == [1, 1, 4]
  assert rate(of, found['tensor',]) == 2 * 9e10
  assert rate(of, found['fsdp',]) == 4 * 9e10


def test_half_of_a_side_is_a_line():
  of = parse('v5p:4x4x8')
  assert rate(of, groups(sizes(fsdp=64, tensor=2), of)['tensor',]) == 9e10


def test_a_mesh_without_rings_has_one_link_a_side():
  of = parse('v5e:4x8')
  assert rate(of, groups(sizes(fsdp=32), of)['fsdp',]) == 2 * 4.5e10


def test_an_all_reduce_is_two_passes():
  of, over = parse('v5p:4x4x4'), Group((4, 4, 4), 1, 1)
  gather, reduce = (seconds(kind, 1e9, of, over).ici for kind in ('all-gather', 'all-reduce'))
  assert reduce == pytest.approx(2 * gather)
  assert gather == pytest.approx(1e9 * 63 / 64 / 5.4e11 + 6e-6)


def test_between_slices_only_a_devices_part_moves():
  """1e9 bytes over 128 devices of each of two slices; half of a sum crosses, twice; 6.25e9 bytes/s a chip."""
  of = parse('v5p:4x4x8', 2)
  over = groups(sizes(replica=2, fsdp=128), of)['replica', 'fsdp']
  assert over == Group((4, 4, 8), 1, 2)
  assert seconds('all-reduce', 1e9, of, over).dcn == pytest.approx(2 * 1e9 / 128 / 2 / 6.25e9)


@pytest.mark.parametrize(
  ('kind', 'passes'),
  [('all-reduce', 2 * 3 / 4), ('all-gather', 3), ('reduce-scatter', 3 / 4), ('all-to-all', 3 / 4),
   ('collective-permute', 1)],
)  # fmt: skip
def test_bytes_between_four_slices(kind, passes):
  """What a chip sends of 1e9 bytes, by hand; 6.25e9 bytes/s a chip, of which tpu7x has two devices."""
  assert between(kind, 1e9, parse('v5p:2x2x1', 4)).dcn == pytest.approx(passes * 1e9 / 6.25e9)
  assert between(kind, 1e9, parse('tpu7x:2x2x1', 4)).dcn == pytest.approx(passes * 1e9 / 6.25e9)
  assert between(kind, 1e9, parse('v5p:2x2x1', 4)).ici == 0


def test_only_replica_crosses_slices():
  of = parse('v5p:2x2x1', 2)
  with pytest.raises(ConfigError, match=r'on 2 slices and mesh\.replica=1; set mesh\.replica to a multiple of 2'):
    arrange((1, 1, 8, 1, 1, 1, 1), places(of), 2)
  grid = arrange((2, 1, 4, 1, 1, 1, 1), places(of), 2)
  assert [{d.slice_index for d in part.flat} for part in grid] == [{0}, {1}]


@pytest.mark.parametrize(
  ('text', 'ids'),
  [
    ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", [0, 2, 4, 6]),
    ("mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}", [0, 1, 2, 3, 4, 5, 6, 7]),
    ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_0'}", [0, 1, 2, 3]),
    ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_1','axis_2'}", [0, 4]),
    ("mesh['axis_0'=2,'axis_1'=4], device_ids=(7,6,5,4,3,2,1,0) {'axis_1'}", [7, 6, 5, 4]),
    ('[4,2]<=[8]', [0, 1]),
    ('[2,4]<=[4,2]T(1,0)', [0, 2, 4, 6]),
    ('{{0,4},{1,5},{2,6},{3,7}}', [0, 4]),
    ('{}', [0, 1, 2, 3, 4, 5, 6, 7]),
  ],
)
def test_groups_of_devices_are_read(text, ids):
  assert members(text, 8) == ids


def test_groups_in_a_form_that_is_not_known_are_refused():
  with pytest.raises(ValueError, match=r'in a form that is not known: mesh\[a=8\]'):
    members('mesh[a=8]', 8)


def test_a_part_of_a_side_is_gathered_over_one_ring():
  """As libtpu names its gathers of UL2 20B on v5p:4x4x8: fsdp=64 1DAllGather, fsdp=16 2DAllGather, fsdp=128 3D."""
  of = parse('v5p:4x4x8')
  found = {n: groups(sizes(data=128 // n, fsdp=n), of)['fsdp',] for n in (64, 16)}
  assert (found[64].sides, found[16].sides) == ((4, 2, 8), (4, 4, 1))
  moved = {n: seconds('all-gather', 1e9, of, over).ici for n, over in found.items()}
  assert moved[64] == pytest.approx(1e9 * 63 / 64 / (2 * 9e10), rel=0.01)
  assert moved[16] == pytest.approx(1e9 * 15 / 16 / (4 * 9e10), rel=0.01)


@pytest.mark.aot
def test_places_are_those_of_the_compiler():
  """The devices that libtpu has for a slice, in its order."""
  from pretrain.tools.plan import tpu_devices

  for topology in ('v5p:4x4x8', 'v5e:4x8', 'tpu7x:2x2x2'):
    real, ours = tpu_devices(topology), places(parse(topology))
    spot = lambda d: (tuple(d.coords), d.core_on_chip, d.device_kind)
    assert sorted(map(spot, real)) == sorted(map(spot, ours))


@pytest.mark.aot
def test_two_axes_may_share_a_side():
  """fsdp=128 and tensor=4 on sides of eight, which JAX itself refuses."""
  from pretrain.devices.mesh import MeshConfig, make_mesh
  from pretrain.tools.plan import tpu_devices

  mesh = make_mesh(MeshConfig(fsdp=128, tensor=4), tpu_devices('v5p:8x8x8'))
  assert (mesh.shape['fsdp'], mesh.shape['tensor']) == (128, 4)
  assert isinstance(mesh, jax.sharding.Mesh)
