"""Reading compiled programs: sizes, loops, memory in use, collectives."""

import pytest

from pretrain.devices.chips import parse
from pretrain.planner import hlo
from pretrain.planner.compiled import Collective, by_source, collected, quantized_seconds, timed_collectives
from pretrain.planner.torus import Time, places

# As libtpu writes it: a loop of three turns, a gather split over two fusions, an array in VMEM.
PROGRAM = """HloModule step, is_scheduled=true

%start (p: f32[1024]) -> f32[8192] {
  %p = f32[1024]{0:T(1024)} parameter(0)
  ROOT %all-gather.1 = f32[8192]{0:T(1024)} all-gather(%p), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
}

%done (p: f32[1024]) -> f32[8192] {
  %p = f32[1024]{0:T(1024)} parameter(0)
  ROOT %all-gather.3 = f32[8192]{0:T(1024)} all-gather(%p), channel_id=7, replica_groups=[1,8]<=[8], dimensions={0}
}

%body (state: (f32[1024], f32[4096])) -> (f32[1024], f32[4096]) {
  %state = (f32[1024]{0:T(1024)}, f32[4096]{0:T(1024)}) parameter(0)
  %get-tuple-element.1 = f32[1024]{0:T(1024)} get-tuple-element(%state), index=0
  %get-tuple-element.2 = f32[4096]{0:T(1024)} get-tuple-element(%state), index=1
  %fusion.1 = f32[8192]{0:T(1024)} fusion(%get-tuple-element.1), kind=kCustom, calls=%start
  %fusion.2 = f32[8192]{0:T(1024)} fusion(%get-tuple-element.1), kind=kCustom, calls=%done
  %convert.1 = f32[65536]{0:T(1024)S(1)} convert(%fusion.1)
  %all-reduce.1 = f32[1024]{0:T(1024)} all-reduce(%get-tuple-element.1), channel_id=9, replica_groups={}, to_apply=%add
  ROOT %tuple.1 = (f32[1024]{0:T(1024)}, f32[4096]{0:T(1024)}) tuple(%all-reduce.1, %get-tuple-element.2)
}

%condition (state: (f32[1024], f32[4096])) -> pred[] {
  %state = (f32[1024]{0:T(1024)}, f32[4096]{0:T(1024)}) parameter(0)
  ROOT %any = pred[]{:T(512)} constant(true)
}

ENTRY %main (a: f32[1024]) -> f32[1024] {
  %a = f32[1024]{0:T(1024)} parameter(0)
  %broadcast.1 = f32[4096]{0:T(1024)} broadcast(%a), dimensions={}, metadata={op_name="jit(train_step)/kept"}
  %fusion.9 = f32[2048]{0:T(1024)} fusion(%a), kind=kLoop, calls=%other, backend_config={"estimated_cycles":"500"}
  %tuple.2 = (f32[1024]{0:T(1024)}, f32[4096]{0:T(1024)}) tuple(%a, %broadcast.1)
  %while.1 = (f32[1024]{0:T(1024)}, f32[4096]{0:T(1024)}) while(%tuple.2), condition=%condition, body=%body, TURNS
  %get-tuple-element.9 = f32[1024]{0:T(1024)} get-tuple-element(%while.1), index=0
  ROOT %add.1 = f32[1024]{0:T(1024)} add(%get-tuple-element.9, %get-tuple-element.9)
}
""".replace('TURNS', 'backend_config={"known_trip_count":{"n":"3"}}')


@pytest.mark.parametrize(
  ('shape', 'size'),
  [
    ('f32[2,3]', 24),
    ('f32[3,5]{1,0:T(8,128)}', 8 * 128 * 4),
    ('f32[5,3]{0,1:T(8,128)}', 8 * 128 * 4),
    ('bf16[4,64,12,64]{1,3,0,2:T(8,128)(2,1)}', 4 * 128 * 12 * 64 * 2),
    ('u32[]{:T(128)}', 4),
    ('pred[16]{0}', 16),
  ],
)
def test_sizes_have_the_padding_of_tiles(shape, size):
  assert hlo.sizes(shape) == [size]


def test_other_memories_are_left_out():
  assert hlo.sizes('(bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, f32[8,128]{1,0:T(8,128)})', hbm_only=True) == [0, 4096]


def test_elements_of_nested_tuples():
  assert hlo.elements('((f32[2]{0:T(128)}, f32[3]{0}), f32[4,5]{1,0})') == [
    '(f32[2]{0:T(128)}, f32[3]{0})', ' f32[4,5]{1,0}',
  ]  # fmt: skip


def test_a_loop_counts_for_each_turn():
  times = {one.name: times for times, one in hlo.parse(PROGRAM).executed()}
  assert (times['while.1'], times['all-reduce.1'], times['fusion.9']) == (1, 3, 1)
  assert sum(times * one.cycles for times, one in hlo.parse(PROGRAM).executed()) == 500


def test_a_loop_without_a_number_of_turns_is_refused():
  program = hlo.parse(PROGRAM.replace('known_trip_count', 'unknown'))
  with pytest.raises(ValueError, match=r'no known number of iterations: while\.1'):
    list(program.executed())


def test_memory_in_use_at_the_peak():
  """In the loop: what is kept and both parts of the gather; not VMEM, not arguments, not what is dead."""
  found = hlo.at_peak(hlo.parse(PROGRAM))
  assert [(b.bytes, b.source) for b in found][-1] == (4096 * 4, 'jit(train_step)/kept')
  assert sum(b.bytes for b in found) == 4 * (4096 + 8192 + 8192)


def test_what_a_loop_leaves_is_gone_unless_it_is_read():
  """Behind the loop, 18,432 numbers beside one of its results; the other result, 4,096 numbers, is read by nobody."""
  late = '  %get-tuple-element.9 = f32[1024]{0:T(1024)} get-tuple-element(%while.1), index=0\n'
  assert late in PROGRAM
  more = '  %later = f32[18432]{0:T(1024)} broadcast(%fusion.9), dimensions={}\n'
  used = '  %sum = f32[1024]{0:T(1024)} add(%later, %get-tuple-element.9)\n'
  found = hlo.at_peak(hlo.parse(PROGRAM.replace(late, more + late + used)))
  assert sum(b.bytes for b in found) == 4 * (4096 + 8192 + 8192 + 2048), 'in the loop, with what is read behind it'


COPIES = """HloModule copies, is_scheduled=true

ENTRY %main (a: f32[1024]) -> f32[1024] {
  %a = f32[1024]{0:T(1024)} parameter(0)
  %kept = f32[4096]{0:T(1024)} broadcast(%a), dimensions={}
  %copy-start.1 = (f32[4096]{0:T(1024)S(1)}, f32[4096]{0:T(1024)}, u32[]{:S(2)}) copy-start(%kept)
  %slice-start.1 = ((f32[4096]{0:T(1024)}), f32[2048]{0:T(1024)}, s32[]{:S(2)}) slice-start(%kept), slice={[0:2048]}
  %copy-done.1 = f32[4096]{0:T(1024)S(1)} copy-done(%copy-start.1)
  %slice-done.1 = f32[2048]{0:T(1024)} slice-done(%slice-start.1)
  ROOT %add.1 = f32[1024]{0:T(1024)} add(%copy-done.1, %slice-done.1)
}
"""


def test_a_copy_that_begins_does_not_double_what_it_copies():
  """The tuple of its start has the source again: here an array that goes to VMEM, and one of which a half is cut."""
  found = hlo.at_peak(hlo.parse(COPIES))
  assert sorted(b.bytes for b in found) == [2048 * 4, 4096 * 4]


def test_a_gather_in_parts_counts_once():
  gather, reduce = collected(hlo.parse(PROGRAM), 8)[:2]
  assert (gather.kind, gather.bytes, gather.times, len(gather.devices)) == ('all-gather', 8192 * 4, 3, 8)
  assert (reduce.kind, reduce.bytes, reduce.times) == ('all-reduce', 1024 * 4, 3)


def test_the_devices_of_a_group_are_read_with_its_groups():
  """Two copies of four devices, which are named behind the mesh."""
  one = 'replica_groups=[1,8]<=[8], dimensions={0}'
  mesh = "replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}, dimensions={0}"
  assert collected(hlo.parse(PROGRAM.replace(one, mesh)), 8)[0].devices == (0, 1, 2, 3)


SEND = (
  '  %send.1 = (f32[256,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%get-tuple-element.1, %after-all.1), '
  'channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
  '_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}'
)


def test_what_a_device_sends_to_other_slices_is_counted():
  """In a loop of three turns, as libtpu 0.0.42 writes the sum over two slices: no collective of the program has it."""
  text = PROGRAM.replace('  %convert.1', f'{SEND}\n  %convert.1')
  (found,) = (one for one in collected(hlo.parse(text), 8) if one.crosses)
  assert found == Collective('all-reduce', 256 * 8 * 128 * 4, 3, (), None, '')
  with pytest.raises(ValueError, match='a transfer between slices of a kind that is not known: ALL_MIX'):
    collected(hlo.parse(text.replace('ALL_REDUCE', 'ALL_MIX')), 8)


def test_bytes_to_other_slices_are_timed_over_their_network_alone():
  of = parse('v5e:2x2', 2)
  text = PROGRAM.replace('  %convert.1', f'{SEND}\n  %convert.1')
  timed = list(timed_collectives(hlo.parse(text), places(of), of))
  ((_, sent),) = ((one, time) for one, time in timed if one.crosses)
  assert sent == Time(dcn=pytest.approx(256 * 8 * 128 * 4 / of.chip.dcn))  # twice half of it
  assert ('all-reduce', 'between slices', 3) in [row[:3] for row in by_source(timed)]


KERNEL = """HloModule step, is_scheduled=true

ENTRY %main (x: bf16[8192,4096]) -> bf16[4,32,2048,128] {
  %x = bf16[8192,4096]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %quantized_matmul.29 = bf16[4,32,2048,128]{3,2,1,0:T(8,128)(2,1)} custom-call(%x, %up, %scale, %codes, %of_w), \
custom_call_target="tpu_custom_call", operand_layout_constraints={bf16[8192,4096]{1,0}, f32[8192,1]{1,0}, \
f32[8192,1]{1,0}, s8[4096,4096]{1,0}, f32[1,4096]{1,0}}, frontend_attributes={kernel_metadata={}}
}
"""


def test_a_kernel_of_quantized_products_takes_its_multiplications_or_its_bytes():
  of = parse('v6e:4x4')
  products = 8192 * 4096 * 4096 / of.flops  # two operations each, at twice the peak of bf16
  assert quantized_seconds(hlo.parse(KERNEL), of) == pytest.approx(products)
  short = KERNEL.replace('8192,', '256,').replace('4,32,2048,128', '4,32,64,128')
  moved = 2 * 256 * 4096 + 2 * 256 * 4 + 4096 * 4096 + 4096 * 4 + 2 * 256 * 4096
  assert quantized_seconds(hlo.parse(short), of) == pytest.approx(moved / of.chip.hbm_rate)
