"""Pipelines in the programs that libtpu compiles: ticks of their loops, the cycles of idle ones, what is sent."""

import functools

import pytest

from pretrain.devices.chips import parse
from pretrain.experiment.pipelines import schedule_of
from pretrain.planner import hlo
from pretrain.planner.compiled import compile_step
from tests.pretrain import tiny

pytestmark = [
  pytest.mark.aot, pytest.mark.slow,
  pytest.mark.filterwarnings('ignore:Error reading persistent compilation cache'),  # programs for TPUs cannot be read
]  # fmt: skip
SIZES = (
  'model.embed=256', 'model.heads=2', 'model.head_dim=128', 'model.mlp.hidden=512', 'model.layers=8', 'mesh.data=1',
  "model.dtype='bfloat16'", "model.remat='full'", 'data.targets_length=256',
)  # fmt: skip
# Else the compiler keeps other arrays in VMEM with more microbatches, and the cycles of a tick differ by some percent.
NOTHING_IN_VMEM = "compiler.options={'xla_vf_vmem_memory_space_assignment': False}"


@functools.cache
def step(*given: str):
  """(the config, the program of its step on four chips)."""
  cfg = tiny.decoder(*SIZES, *given)
  return cfg, hlo.parse(compile_step(cfg, parse('v5p:2x2x1', 1))[1].as_text())


def loops(program: hlo.Program, ticks: int) -> list[hlo.Program]:
  """The loops that run so often, each as a program: one iteration."""
  found = [one for _, one in program.executed() if one.op == 'while' and program.turns(one) == ticks]
  return [hlo.Program(program.computations, one.of_loop('body')) for one in found]


def cycles(program: hlo.Program) -> int:
  return sum(times * one.cycles for times, one in program.executed())


@pytest.mark.parametrize('repeats', [1, 2])
def test_cycles_of_the_loops_over_ticks_grow_as_the_bubble_says(repeats):
  """With the rows of a microbatch fixed, cycles are t (M R + S - 1): t is known from M and 2 M, the rest is idle."""
  found, bubbles = {}, {}
  for number in (8, 16):
    own = (f'data.batch_size={2 * number}', f'model.pipeline_microbatches={number}')
    cfg, program = step('mesh.stage=4', NOTHING_IN_VMEM, *own, f'model.pipeline_repeats={repeats}')
    schedule = schedule_of(cfg, 4, 1)
    both = loops(program, schedule.ticks)
    assert len(both) == 2, 'forward and backward'
    found[number], bubbles[number] = schedule.ticks * sum(map(cycles, both)), 3 / (number * repeats + 3)
  each = (found[16] - found[8]) / 8
  for number, total in found.items():
    idle = 1 - number * each / total
    print(f'{number} microbatches, {repeats} repeats: {total} cycles, {idle:.4f} idle, formula {bubbles[number]:.4f}')
    assert idle == pytest.approx(bubbles[number], rel=0.05)
