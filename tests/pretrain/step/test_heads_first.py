"""In the step that libtpu compiles, arrays of heads are written and read in the order of the attention kernel."""

import dataclasses
import re

import pytest

from pretrain.config import bindings
from pretrain.devices.compiler import quick
from pretrain.experiment.checks import check
from pretrain.experiment.experiment import Experiment
from pretrain.planner import hlo
from pretrain.tools import plan
from tests.pretrain import tiny

pytestmark = [pytest.mark.aot, pytest.mark.slow]  # a compilation each
ROWS, LENGTH = 4, 2048  # on one device
STEP = (f'data.batch_size={4 * ROWS}', 'mesh.fsdp=4', 'train.accumulate=1', "model.remat='full'")
# The shipped widths and two layers, which are scanned: a deeper step runs the same instructions more often.
CONFIG = ('decoder/7b', 'model.layers=2', f'data.targets_length={LENGTH}')
MOVES = {'copy', 'transpose', 'copy-start', 'bitcast', 'parameter', 'reshape', 'tuple', 'get-tuple-element'}


def dims(shape: str) -> list[int]:
  """The sides above 1 of an array, in ascending order."""
  found = re.search(r'\[([\d,]+)\]', shape)
  return sorted(int(n) for n in (found[1] if found else '1').split(',') if int(n) > 1)


def only_moves(program: hlo.Program, one: hlo.Instruction) -> bool:
  """Whether an instruction, or all that is fused to it, changes an array's order alone (a copy to VMEM does not)."""
  if one.op != 'fusion':
    return one.op in ('copy', 'transpose')
  return all(inner.op in MOVES for name in one.called for inner in program.computations[name])


def arrays_of_heads(program: hlo.Program, heads: int, head_dim: int) -> list[hlo.Instruction]:
  """What is written to memory with rows, heads, length and head_dim as its sides."""
  sides = [sorted((ROWS, heads, LENGTH, head_dim)), sorted((ROWS * heads, LENGTH, head_dim))]
  return [one for _, one in program.executed() if dims(one.shape) in sides]


def test_arrays_of_heads_are_not_moved_or_f32():
  """But one: the compiler copies the gradient of what attention makes to the kernel's order (0.45 of a layer's 100
  million cycles). With heads of 64, as in t5/base, it copies queries, keys and values too."""
  name, *keys = CONFIG
  cfg = bindings.load(Experiment, [str(tiny.ROOT / f'configs/{name}.gin')], [*STEP, *keys])
  cfg = dataclasses.replace(cfg, compiler=quick(cfg.compiler, 'v5e'))  # a fifth of the time: what moves is the same
  check(cfg)
  program = hlo.parse(plan.compile_train_step(cfg, 'v5e:2x2')[1].as_text())
  found = arrays_of_heads(program, cfg.model.heads, cfg.model.head_dim)
  assert len([one for one in found if one.op == 'fusion']) >= 4, 'products that make queries, keys, values, gradients'
  moved = [f'{one.name}: {one.shape} for {one.source}' for one in found if only_moves(program, one)]
  assert len(moved) <= 1, moved
  assert all('transpose(jvp' in one for one in moved)
  wide = [f'{one.name}: {one.shape} for {one.source}' for one in found if one.shape.lstrip('(').startswith('f32')]
  assert wide == []
