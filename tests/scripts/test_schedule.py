"""Cycles of compiled programs: loops count once for each iteration, kernels by the branches of their schedules."""

import importlib.util
import pathlib
import sys

import pytest

BENCH = pathlib.Path(__file__).resolve().parents[2] / 'scripts' / 'bench'
PROGRAM = """HloModule step

%inner_body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %f.1 = f32[8]{0} fusion(%p), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"10"}
}

%inner_cond (p: (s32[], f32[8])) -> pred[] {
  %n = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%fused (p: f32[8]) -> f32[8] {
  %f.0 = f32[8]{0} fusion(%p), kind=kLoop, calls=%other, backend_config={"estimated_cycles":"1000"}
}

%outer_body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %while.1 = (s32[], f32[8]) while(%t), condition=%inner_cond, body=%inner_body
  %f.2 = f32[8]{0} fusion(%p), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"7"}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %while.2 = (s32[]) while(%t), condition=%unread, body=%outer_body, backend_config={"known_trip_count":{"n":"3"}}
  %f.3 = f32[8]{0} fusion(%p), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"1"}
}

%unread (p: (s32[], f32[8])) -> pred[] {
  ROOT %any = pred[]{:T(512)} compare(%i, %j), direction=NE
}
"""


@pytest.fixture(scope='module')
def schedule():
  spec = importlib.util.spec_from_file_location('bench_schedule', BENCH / 'schedule.py')
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module  # dataclasses look themselves up
  spec.loader.exec_module(module)
  yield module
  del sys.modules[spec.name]


def test_the_body_of_a_loop_counts_once_for_each_iteration(schedule):
  assert schedule.fusion_cycles(PROGRAM) == 3 * (5 * 10 + 7) + 1


def test_a_loop_without_a_known_number_of_iterations_is_refused(schedule):
  with pytest.raises(ValueError, match='has no known number of iterations'):
    schedule.fusion_cycles(PROGRAM.replace('"known_trip_count":{"n":"3"}', ''))


def listing(tmp_path, *blocks: tuple[str, int]) -> pathlib.Path:
  """A schedule of (text, number of bundles); the text goes into the first bundle."""
  lines, path = [], tmp_path / 'kernel-final_bundles.txt'
  for text, count in blocks:
    first = len(lines)
    lines += [f' {hex(first + n)} : > {{ {text if n == 0 else ""} }}' for n in range(count)]
  path.write_text('\n'.join(lines))
  return path


def branch(n: int, *inside: tuple[str, int]) -> list[tuple[str, int]]:
  """A branch, the four bundles that run even if it is taken, and the bundles that it may skip."""
  return [(f'sbr.rel (%p1) target = $region{n}', 5), *inside, (f'/* Start/End empty region {n} */', 1)]


def test_bodies_of_branches_are_separated_from_each_other_and_from_the_rest_of_a_step(schedule, tmp_path):
  first = branch(2, ('x', 20), *branch(3, ('build', 100)), ('y', 14))
  tile = branch(4, ('/* Start region 9 */ vmatmul', 199), ('/* End region 9 */', 1))
  copies, few = branch(5, ('dma.hbm_to_vmem', 30)), branch(6, ('z', 10))
  loop = [('/* Start region 1 */', 1), *first, *tile, *copies, *few, ('sbr.rel (!%p2) target = $region1', 5)]
  inner, sides, rest = schedule.regions(listing(tmp_path, ('before', 7), *loop, ('after', 3)))
  assert (inner, sides) == ([200], [20 + 6 + 14, 100])
  assert rest == 1 + (5 + 1) + (5 + 1) + (5 + 30 + 1) + (5 + 10 + 1) + 5
