"""The estimated memory of shipped configs beside the compiler's."""

import dataclasses
import time

import pytest

from models.build import build
from models.layers.remat import Policy
from pretrain.config import bindings
from pretrain.devices.chips import parse
from pretrain.devices.mesh import AXES
from pretrain.experiment.experiment import Experiment
from pretrain.planner import compiled, layouts, memory, roofline, search, tables, workload
from pretrain.tools import plan
from tests.pretrain import tiny

MIB = 2**20
NONE = "model.remat='none'"
SMALL_UL2 = (
  'model.encoder_layers=4', 'model.decoder_layers=4', 'data.batch_size=64', 'mesh.fsdp=4', "optimizer.name='adamw'",
)  # fmt: skip
MOMENTS = "optimizer.offload=['moments']"
LAYERS = "optimizer.offload=['parameters']"
BOTH = "optimizer.offload=['moments', 'parameters']"
LONG = ('data.targets_length=131072', 'data.batch_size=8', 'train.accumulate=1')
# (config, slice, changed keys) -> (arguments, arguments and temporaries in use at once) in MiB of a device, as libtpu
# 0.0.42.1 says of the compiled step (memory_analysis: argument_size and peak_memory).
COMPILED = {
  ('ul2/20b', 'v5p:4x4x8'): (602.7, 4639.2),
  ('decoder/7b', 'v5p:4x4x4'): (1206.2, 6159.9),
  ('decoder/llama3_8b', 'v5p:4x4x4'): (1437.2, 10360.3),
  ('decoder/mixtral_8x7b', 'v5p:4x8x8'): (2088.3, 12959.0),
  ('decoder/1b', 'v5e:4x8'): (468.9, 1953.8),
  ('decoder/gemma2_9b', 'v5p:4x4x4'): (1654.0, 18300.0),
  ('decoder/qwen3_8b', 'v5p:4x4x4'): (1466.1, 11835.2),
  ('t5/xl', 'v5p:4x4x4'): (250.0, 8018.0),
  ('t5/xxl', 'v5p:4x4x8'): (491.0, 3020.0),
  ('ul2/20b_full_rows', 'v5p:4x4x8'): (603.0, 3970.0),
  ('ul2/flan_20b', 'v5p:4x4x8'): (603.0, 2041.0),
  ('t5/base', 'v5e:4x4'): (82.2, 3198.0),
  ('decoder/125m', 'v5e:2x4'): (195.3, 1965.0),
  ('encoder/deberta_v3_base', 'v5e:2x4'): (280.5, 7794.0),
  ('prefix/1b', 'v5e:4x8'): (468.9, 1953.8),
  ('t5_1_0/base', 'v5e:4x4'): (75.0, 517.0),
  ('t5_1_0/large', 'v5e:4x8'): (128.0, 760.0),
  ('t5_1_0/small', 'v5e:2x4'): (38.7, 314.3),
  ('t5/finetune_small', 'v5e:2x4'): (46.8, 769.0),
  ('t5/large', 'v5e:4x8'): (134.3, 7898.3),
  ('t5/lora_small', 'v5e:2x4'): (53.8, 681.0),
  ('t5/small', 'v5e:2x4'): (48.6, 1361.4),
  ('ul2/base', 'v5e:4x4'): (81.3, 999.0),
  ('ul2/base_full_rows', 'v5e:4x4'): (81.0, 813.0),
  ('decoder/7b', 'v5p:4x4x4', 'mesh.fsdp=16', 'mesh.tensor=4', "model.remat='dots'"): (1210.1, 38630.0),
  ('decoder/7b', 'v5p:4x4x4', 'mesh.fsdp=16', 'mesh.data=4', 'train.accumulate=4'): (4820.9, 16255.0),
  ('decoder/mixtral_8x7b', 'v5p:4x4x4', 'mesh.fsdp=8', 'mesh.expert=8', 'train.accumulate=8'): (10361.0, 29032.0),
  ('decoder/7b', 'v5p:4x4x4', 'mesh.fsdp=8', 'mesh.sequence=8', *LONG): (9642.0, 23293.0),
  ('decoder/125m', 'v5e:2x4', NONE): (195.3, 4302.4),
  ('ul2/20b', 'v5p:2x2x1', *SMALL_UL2): (7665.6, 13250.0),
  ('ul2/20b', 'v5p:2x2x1', *SMALL_UL2, MOMENTS): (2555.6, 8140.0),
  ('ul2/20b', 'v5p:2x2x1', *SMALL_UL2, LAYERS): (5362.0, 11765.0),
  ('ul2/20b', 'v5p:2x2x1', *SMALL_UL2, BOTH): (252.0, 6783.0),
  ('ul2/20b', 'v5p:2x2x1', 'mesh.fsdp=4', 'train.accumulate=16', "optimizer.name='adamw'", MOMENTS): (18688.9, 74612.4),
  ('ul2/20b', 'v5p:4x4x8', 'mesh.fsdp=32', 'mesh.tensor=4', 'train.accumulate=4', NONE): (589.4, 49639.0),
  ('decoder/125m', 'v5e:2x4', 'data.batch_size=208', 'train.accumulate=2'): (195.3, 9839.4),
}


def load(name: str, *overrides: str) -> Experiment:
  return bindings.load(Experiment, [str(tiny.ROOT / 'configs' / f'{name}.gin')], list(overrides))


def estimated(name: str, topology: str, *overrides: str):
  cfg = load(name, *overrides)
  work = workload.describe(cfg)
  layout = layouts.of_config(cfg, parse(topology).devices)
  return memory.arguments(work, layout) / MIB, memory.estimate(work, layout).total / MIB


@pytest.mark.parametrize('case', COMPILED, ids=' '.join)
def test_the_estimate_is_near_the_compilers_memory(case):
  """Arguments within a MiB, everything within 10%."""
  arguments, total = estimated(*case)
  assert arguments == pytest.approx(COMPILED[case][0], abs=1.5)
  assert total == pytest.approx(COMPILED[case][1], rel=0.1)


# MiB that a policy adds to the temporaries of 'full', of the compiled step of decoder/7b for v5e:16x16 (minimal:
# v5p:4x4x4), 4 rows of 2,048 a device; by libtpu 0.0.42.1.
MORE = {
  'save_context': 2080, 'save_out_proj': 2123, 'save_qkv_proj': 6143, 'save_dot_except_mlp': 8192, 'minimal': 19035,
  'minimal_with_context': 21115,
}  # fmt: skip


def test_what_a_policy_keeps_is_what_the_compiler_keeps():
  work = workload.describe(load('decoder/7b', 'data.targets_length=2048', 'data.batch_size=1024'))
  layout = layouts.of_config(load('decoder/7b', 'mesh.fsdp=256', 'train.accumulate=1'), 256)
  kept = lambda remat: memory.kept_by(work, dataclasses.replace(layout, remat=remat), work.stacks[0]) / MIB
  assert kept('full') == 2048
  for name, more in MORE.items():
    assert kept(name) - kept('full') == pytest.approx(more, rel=0.05), name
  one = dataclasses.replace(layout, remat='custom', keep=('query', 'down'))
  assert memory.kept_by(work, one, work.stacks[0]) / MIB == 2048 + 2048  # no gradient reads what 'down' makes
  moved = dataclasses.replace(one, offload=('query', 'input'))
  assert memory.kept_by(work, moved, work.stacks[0]) == 0


@pytest.mark.parametrize(
  ('offload', 'moved'),
  [
    (MOMENTS, '5.36 GB to the device and 5.36 GB back: 357 and 357 ms'),
    # A layer's parameters come four times, for the forward and the backward pass, the update and the sum with it.
    (LAYERS, '9.66 GB to the device and 2.42 GB back: 644 and 161 ms'),
  ],
)
def test_what_lies_on_the_host_is_printed_with_its_way_there(offload, moved):
  cfg, of = load('ul2/20b', *SMALL_UL2, offload), parse('v5p:2x2x1')
  work, layout = workload.describe(cfg), layouts.of_config(cfg, 4)
  step = roofline.Step(1.0, 0.0, 0.0, 0.0, 0.0)
  lines = lambda host: tables.explanation(
    work, of, compiled.Compiled(layout, step, plan.Memory(0, 0, 0, 0, 0, 0, host), (), ())
  ).splitlines()
  assert lines(5110 * MIB)[-1] == (
    f'5,110 MiB of a device in the memory of its host; a step moves {moved} at 15 GB/s each way, not in the times '
    'above.'
  )
  assert not any('its host' in line for line in lines(0))


def test_what_a_norm_or_a_router_reads_is_kept():
  """The result of 'down' is a part of no gradient, unless a norm follows (Gemma 2) or an expert's weight (Mixtral)."""
  for name, read in (('decoder/7b', False), ('decoder/gemma2_9b', True), ('decoder/mixtral_8x7b', True)):
    work = workload.describe(load(name))
    layout = layouts.Layout(dict.fromkeys(AXES, 1), 1, 'custom', ('down',))
    assert ('down' in memory.kept(work, layout)) is read, name


def test_devices_of_experts_divide_matrices_and_hold_rows_for_the_worst_case():
  """Mixtral's 8 experts of 3 x 4096 x 14336 on 4 devices. Without a capacity all tokens of the 4 may choose both."""
  sizes = dict.fromkeys(AXES, 1) | {'fsdp': 2, 'expert': 4}
  for capacity, rows, masked in ((None, 8, 2), (1.25, 2.5, 1)):
    work = workload.describe(load('decoder/mixtral_8x7b', f'model.expert_capacity={capacity}'))
    assert memory.choices(work, 4) == rows
    assert memory.choices(work, 1) == (2 if capacity is None else 2.5)
    found = {p.name: p for p in memory.products(work, layouts.Layout(sizes, 1, 'full'), work.stacks[0])}
    assert (found['up'].values, found['up'].experts, found['up'].masked) == (2 * 4096 * 14336, 2, masked)
    assert found['up'].tokens == 4096 * rows
    mesh = memory.of_mesh(work, layouts.Layout(sizes, 1, 'full'))
    assert mesh.whole - mesh.dense == 32 * 2 * 3 * 4096 * 14336


def test_logits_in_chunks_need_less():
  """32,768 tokens and 65,536 words of a device: 8 GiB of logits, and a gradient of the table in bf16, 512 MiB; chunked,
  512 MiB of logits, and 4 GiB of their gradient."""
  keys = 'data.targets_length=2048', 'data.batch_size=32', 'model.vocab_size=262144', 'train.accumulate=1'
  layout = layouts.Layout(layouts.of_config(load('decoder/7b'), 64).sizes | {'fsdp': 2, 'tensor': 4}, 1, 'full')
  by = {
    n: workload.describe(load('decoder/7b', *keys, f"kernels.linear_cross_entropy='{n}'")) for n in ('auto', 'chunked')
  }
  spared = memory.head(by['auto'], layout) - memory.head(by['chunked'], layout)
  assert spared / MIB == (8192 + 512) - (512 + 4096)


def test_the_search_has_every_policy_with_a_name_and_the_configs_own():
  cfg = load('decoder/7b', "model.remat='custom'", "model.remat_keep=['query']", "model.remat_offload=['query']")
  found = list(layouts.candidates(cfg, build(cfg.model).specs, parse('v5p:2x2x1')))
  assert {layout.remat for layout in found} == {*Policy.__args__}
  own = {(layout.policy, layout.keep, layout.offload) for layout in found if layout.remat == 'custom'}
  assert own == {('custom(query)+offload(query)', ('query',), ('query',))}
  assert all(layout.of(cfg).model.remat_keep == layout.keep for layout in found)


def test_every_way_to_keep_activations_is_known():
  assert set(memory.KEPT) == {*Policy.__args__} - {'custom'}


def test_all_layouts_of_the_largest_config_are_estimated_in_seconds():
  cfg, of = load('ul2/20b'), parse('v5p:4x4x8')
  began = time.process_time()
  found = search.estimates(workload.describe(cfg), of, layouts.candidates(cfg, build(cfg.model).specs, of))
  assert time.process_time() - began < 5
  assert len(found) == 510 * len(layouts.REMATS) // 3
  assert [e.step.total for e in found] == sorted(e.step.total for e in found)


def test_layouts_divide_rows_parameters_and_devices():
  cfg, of = load('decoder/llama3_8b'), parse('v5p:4x4x4')
  for layout in layouts.candidates(cfg, build(cfg.model).specs, of):
    sizes = layout.sizes
    assert sizes['data'] * sizes['fsdp'] * sizes['tensor'] == of.devices
    assert cfg.data.batch_size == layout.rows(cfg.data.batch_size) * layout.shards * layout.accumulate
    assert sizes['tensor'] <= cfg.model.kv_heads  # eight heads of keys cannot be cut in sixteen


def test_slices_are_joined_by_replica():
  cfg, of = load('ul2/20b'), parse('v5p:4x4x8', 2)
  found = list(layouts.candidates(cfg, build(cfg.model).specs, of))
  assert found
  assert {layout.sizes['replica'] for layout in found} == {2}


def test_a_layout_written_to_a_file_is_the_layout_that_is_read(tmp_path):
  cfg = load('ul2/20b')
  layout = layouts.Layout(layouts.of_config(cfg, 128).sizes | {'fsdp': 64, 'data': 2}, 4, 'dots')
  (tmp_path / 'mesh.gin').write_text(layouts.gin(layout, ['chosen']))
  files = [str(tiny.ROOT / 'configs/ul2/20b.gin'), str(tmp_path / 'mesh.gin')]
  read = bindings.load(Experiment, files, [])
  assert read == layout.of(cfg)
  assert layouts.of_config(read, 128) == layout
