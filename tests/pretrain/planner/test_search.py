"""The search without a compiler: which layouts it compiles, what it prints and writes, what it refuses."""

import dataclasses
import functools
import math
import re
from typing import Any

import pytest

from models.build import build
from models.layers.remat import KEPT
from pretrain.cli.main import main
from pretrain.config import bindings
from pretrain.devices.chips import parse
from pretrain.devices.compiler import options_for
from pretrain.devices.mesh import AXES
from pretrain.errors import ConfigError
from pretrain.experiment.experiment import Experiment
from pretrain.experiment.rules.offload import check_offload
from pretrain.planner import compiled, layouts, roofline, search, tables, torus
from pretrain.planner.layouts import Layout
from pretrain.tools import plan
from tests.pretrain import tiny

UL2 = str(tiny.ROOT / 'configs/ul2/20b.gin')
SLICE = 'v5p:4x4x8'
FLAGS = ['plan', f'--gin_file={UL2}', f'--topology={SLICE}', '--search']


@pytest.fixture
def compiler(monkeypatch):
  """A compiler whose programs cost what is estimated, times `slower` of the layout; `refuses` is what does not fit."""

  class Fake:
    asked: list[Layout]
    options: dict[str, Any]

    def __init__(self):
      self.asked, self.slower, self.refuses = [], lambda layout: 1.0, lambda layout: False

    def measure(self, work, layout, of):
      self.asked.append(layout)
      self.options = options_for(work.cfg.compiler, of.chip.kinds[0])
      if self.refuses(layout):
        raise ConfigError('RESOURCE_EXHAUSTED: too large.')
      step = roofline.estimate(work, layout, of, torus.groups(layout.sizes, of))
      step = dataclasses.replace(step, products=step.products * self.slower(layout))
      return compiled.Compiled(layout, step, plan.Memory(2**30, 0, 0, 2**30, 0, 2**31), (), ())

  fake = Fake()
  monkeypatch.setattr(compiled, 'measure', fake.measure)
  monkeypatch.setattr(layouts, 'REMATS', ('none', 'dots', 'full'))  # a third of the time; test_memory.py has all
  return fake


def load(*overrides: str) -> Experiment:
  return bindings.load(Experiment, [UL2], list(overrides))


def test_meshes_come_first_then_other_ways_on_the_best_of_them(compiler):
  found = search.search(load(), parse(SLICE), 4)
  meshes = [layout.mesh for layout in compiler.asked]
  assert len(set(meshes[:3])) == 3
  assert compiler.asked[3].mesh == found.best.layout.mesh
  assert compiler.asked[3].remat != compiler.asked[meshes.index(meshes[3])].remat
  assert found.best.step.total == min(c.step.total for _, c in found.tried)


def test_the_compiler_decides_not_the_estimate(compiler):
  first = search.search(load(), parse(SLICE), 2).best.layout
  compiler.slower = lambda layout: 10.0 if layout.mesh == first.mesh else 1.0
  assert search.search(load(), parse(SLICE), 3).best.layout.mesh != first.mesh


def test_the_layout_of_the_config_is_compiled_second(compiler):
  """So that a choice is never slower than what is there."""
  own = Layout(dict.fromkeys(AXES, 1) | {'data': 2, 'fsdp': 64}, 2, 'full')
  compiler.slower = lambda layout: 0.1 if layout == own else 1.0
  found = search.search(load(), parse(SLICE), 4, own=own)
  assert compiler.asked[1] == own
  assert compiler.asked.count(own) == 1
  assert len(compiler.asked) == 4
  assert found.best.layout == own


def test_a_search_compiles_without_the_options_that_are_slow_and_says_so(compiler):
  """Those that a config names itself are kept."""
  lines, slow, of = [], 'xla_tpu_scoped_vmem_limit_kib', parse('v5e:16x16')
  assert slow in options_for(load().compiler, of.chip.kinds[0])
  search.search(load(), of, 1, lines.append)
  assert slow not in compiler.options
  assert compiler.options
  assert f'compiling 1 without {slow}, a default of v5e that makes compiling slow.' in lines[0]
  search.search(load(f"compiler.options={{'{slow}': 65536}}"), of, 1, lines.append)
  assert compiler.options[slow] == 65536
  assert lines[-2].endswith('compiling 1.')


def test_a_layout_of_another_slice_is_left_out(compiler):
  own = Layout(dict.fromkeys(AXES, 1) | {'fsdp': 64}, 1, 'full')
  search.search(load(), parse(SLICE), 3, own=own)
  assert own not in compiler.asked
  assert len(compiler.asked) == 3


def test_a_layout_with_an_axis_that_is_not_searched_is_named(compiler):
  """It is not compared, so the choice may be slower than it."""
  lines, own = [], Layout(dict.fromkeys(AXES, 1) | {'fsdp': 16, 'sequence': 8}, 1, 'full')
  search.search(load(), parse(SLICE), 1, lines.append, own=own)
  wanted = (
    "the config's own layout, fsdp=16 sequence=8, is not among them: mesh.sequence is not searched, it is for rows too "
    'long for one device.'
  )
  assert wanted in lines
  search.search(
    load(), parse(SLICE), 1, (plain := []).append, own=dataclasses.replace(own, sizes={**own.sizes, 'sequence': 1})
  )
  assert not any('is not among them' in line for line in plain)


def test_layouts_that_leave_no_room_come_last(compiler):
  """UL2 20B with everything kept is estimated at 92% of a v5p, and compiled slower than with products kept."""
  found = search.search(load(), parse(SLICE), 1)
  full = [e.memory.total > 0.9 * parse(SLICE).chip.hbm for e in found.estimates]
  assert full == sorted(full)
  assert any(full)
  assert not full[0]
  assert compiler.asked == [found.estimates[0].layout]


def test_a_layout_that_does_not_fit_when_compiled_makes_room_for_the_next(compiler, monkeypatch):
  """Also with all policies, which are many for one mesh: the next on a mesh that was refused needs clearly less."""
  monkeypatch.setattr(layouts, 'REMATS', ('none', 'dots', *KEPT))
  compiler.refuses = lambda layout: layout.mesh == 'fsdp=128'
  found = search.search(load(), parse(SLICE), 2)
  assert found.best.layout.mesh != 'fsdp=128'
  assert 'refused: ' in tables.table(found)


def test_where_none_of_the_best_fits_it_says_so(compiler):
  compiler.refuses = lambda layout: True
  with pytest.raises(ConfigError, match=r'none of the 4 best layouts fits v5p:4x4x8 when compiled; .*too large'):
    search.search(load(), parse(SLICE), 2)


def test_the_command_prints_the_table_and_writes_the_layout(compiler, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(plan, 'check_libtpu', lambda topology: None)
  path = tmp_path / 'mesh.gin'
  assert main([*FLAGS, '--compile=2', f'--output={path}', '--explain']) == 0
  out, err = capsys.readouterr()
  assert 'layouts estimated in' in err
  assert 'Not searched: sequence (it is for rows too long for one device).' in out
  assert f'--gin_file={UL2} --gin_file={path}' in out
  cfg = bindings.load(Experiment, [UL2, str(path)], [])
  assert compiler.asked[0].of(load()) == cfg
  star = next(line for line in out.splitlines() if line.startswith('* '))
  assert star.split()[1:3] == ['fsdp=128', cfg.model.remat]
  assert main([*FLAGS, '--compile=1', f'--output={path}']) == 0  # its own file it replaces


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--topology=v5p:4x4'], r'^CONFIG: --topology=v5p:4x4 is not a TPU slice.* Known: v5p:2x2x1'),
    (['--num_slices=0'], r'^CONFIG: --num_slices=0'),
    (['--compile=0'], r'^CONFIG: --compile=0 compiles no layout'),
    (['--global_batch=100'], r'^CONFIG: data.batch_size=100 with 128 devices .*e\.g\. --global_batch=128\.'),
    (['--topology=v5e:2x2'], r'no layout fits 1 x v5e:2x2, .* 16,128 MiB a device\. Closest: .*MiB, .* too many'),
    (['--output=no/such/folder.gin'], r'^CONFIG: --output=no/such/folder\.gin: the folder .* does not exist'),
    ([f'--output={UL2}'], r'^CONFIG: --output=.*20b\.gin exists and was not written by pretrain plan'),
  ],
)  # fmt: skip
def test_mistakes_are_refused_before_anything_is_compiled(compiler, capsys, tmp_path, monkeypatch, flags, message):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(plan, 'check_libtpu', lambda topology: None)
  flag = flags[0].split('=')[0]
  assert main([*(f for f in FLAGS if not f.startswith(f'{flag}=')), *flags]) == 64
  err = capsys.readouterr().err
  assert re.search(message, err), err
  assert len(err.splitlines()) == 1
  assert not compiler.asked
  assert not list(tmp_path.iterdir())


def test_what_would_help_is_the_largest_part():
  with pytest.raises(ConfigError, match=r"Most is the state \(\w+ take \d+%\): more chips, optimizer.name='adafactor'"):
    search.search(load("optimizer.name='adamw'"), parse('v5p:2x2x1'), 1)


def test_a_step_is_the_sum_of_its_parts():
  step = roofline.Step(products=2.0, kernels=1.0, hbm=0.5, ici=4.0, dcn=0.25)
  assert step.total == 7.75
  assert step.overlapped == 4.0
  assert step.binds == 'ICI'


def test_model_flops_count_nothing_twice():
  """MFU of a step at the peak of all devices is 1."""
  from pretrain.planner import workload

  work, of = workload.describe(load()), parse(SLICE)
  seconds = roofline.model_flops(work) / (128 * 459e12)
  assert math.isclose(roofline.mfu(work, of, seconds), 1.0)
  assert math.isclose(roofline.tokens_per_chip(work, of, 2.0), 1024 * 1024 / 2 / 128)


def test_products_in_loops_are_dear_unless_an_option_ends_them():
  """The option is a default of v5p and v6e."""
  from pretrain.planner import workload

  def products(*keys: str, chips: str = 'v5p:2x2x4', **sizes: int) -> float:
    work, of = workload.describe(load('data.batch_size=64', 'train.accumulate=1', *keys)), parse(chips)
    layout = Layout(dict.fromkeys(AXES, 1) | sizes, 1, 'full')
    return roofline.estimate(work, layout, of, torus.groups(layout.sizes, of)).products

  option = "compiler.options={'xla_jf_spmd_threshold_for_windowed_einsum_mib': '1000000'}"
  assert math.isclose(products(fsdp=16), products(data=2, fsdp=8))
  assert math.isclose(products('compiler.chip_defaults=False', fsdp=16), 3 * products(data=2, fsdp=8))
  on_v6e, off = functools.partial(products, chips='v6e:4x4'), 'compiler.chip_defaults=False'
  assert math.isclose(on_v6e(fsdp=16), on_v6e(data=2, fsdp=8))
  assert math.isclose(on_v6e(off, fsdp=16), 3 * on_v6e(data=2, fsdp=8))
  assert math.isclose(on_v6e(off, option, fsdp=16), on_v6e(data=2, fsdp=8))


def test_no_layout_is_tried_that_parameters_on_the_host_refuse():
  cfg = tiny.decoder("optimizer.offload=['parameters']", "model.remat='full'")
  found = list(layouts.candidates(cfg, build(cfg.model).specs, parse('v5e:2x4')))
  assert found
  for layout in found:
    check_offload(layout.of(cfg), stages=layout.sizes['stage'])
