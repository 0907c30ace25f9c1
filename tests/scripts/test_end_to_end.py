"""scripts/bench/end_to_end.py: its table for any number of implementations, what it counts, and what it refuses."""

import importlib.util
import pathlib
import sys

import jax
import pytest

from pretrain.tools import plan

BENCH = pathlib.Path(__file__).resolve().parents[2] / 'scripts' / 'bench'
FLAGS = ['--aot', '--chips=v5e:2x4', '--gin_file=configs/t5/tiny.gin', '--gin.model.dropout=0.0']
KERNEL = {
  'attention': 'auto',
  'MiB': 10,
  'fusions': 600,
  'kernels': {'attention_forward': 200},
  'not timed': {'all-gather': 3},
}
REFERENCE = {'attention': 'reference', 'MiB': 40, 'fusions': 1600, 'kernels': {}, 'not timed': {'all-reduce': 2}}
# As the compiler for v5e writes it: one all-gather over the fusions that start it, overlap it and wait for it.
PROGRAM = """HloModule step

%start (p: f32[1]) -> f32[8] {
  %all-gather.1 = f32[8]{0:T(128)} all-gather(%p), channel_id=7, frontend_attributes={chain_id="2"}
  ROOT %custom-call.1 = (f32[1]{0}, f32[8]{0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%overlap (p: f32[1]) -> f32[8] {
  %all-gather.2 = f32[8]{0:T(128)} all-gather(%p), channel_id=7, frontend_attributes={chain_id="2"}
}

%done (p: f32[1]) -> f32[8] {
  %all-gather.3 = f32[8]{0:T(128)} all-gather(%p), channel_id=7, frontend_attributes={chain_id="2"}
  ROOT %custom-call.2 = f32[8]{0} custom-call(%p, %all-gather.3), custom_call_target="AsyncCollectiveDone"
}

%start.2 (p: f32[1]) -> f32[8] {
  ROOT %all-reduce.5 = f32[8]{0:T(128)} all-reduce(%p), channel_id=10, to_apply=%add
}

%step.2 (p: f32[1]) -> f32[8] {
  ROOT %all-reduce.6 = f32[8]{0:T(128)} all-reduce(%p), channel_id=10, to_apply=%add
}

%done.2 (p: f32[1]) -> f32[8] {
  ROOT %all-reduce.7 = f32[8]{0:T(128)} all-reduce(%p), channel_id=10, to_apply=%add
}

%body (p: f32[1]) -> f32[8] {
  %async-collective-start.1 = (f32[1]{0}, f32[8]{0}) fusion(%p), kind=kCustom, calls=%start
  %fusion.1 = f32[8]{0} fusion(%p), kind=kOutput, calls=%overlap
  %async-collective-done.1 = f32[8]{0} fusion(%p), kind=kCustom, calls=%done
  %async-collective-start.2 = (f32[1]{0}, f32[8]{0}) fusion(%p), kind=kCustom, calls=%start.2
  %fusion.2 = f32[8]{0} fusion(%p), kind=kOutput, calls=%step.2
  %async-collective-done.2 = f32[8]{0} fusion(%p), kind=kCustom, calls=%done.2
  %permute-start = (f32[8]{0}, f32[8]{0}) collective-permute-start(%p), channel_id=8
  %permute-done = f32[8]{0} collective-permute-done(%permute-start)
}

ENTRY %main (p: f32[1]) -> f32[8] {
  %while.1 = (s32[]) while(%t), condition=%unread, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %all-gather.4 = f32[8]{0} all-gather(%p), channel_id=9
}

%unread (p: f32[1]) -> pred[] {
  ROOT %any = pred[]{:T(512)} compare(%i, %j), direction=NE
}
"""


@pytest.fixture
def bench(monkeypatch):
  """The script, which must not start a process: that is where programs are compiled."""
  monkeypatch.syspath_prepend(BENCH)
  monkeypatch.delenv('DUMP', raising=False)
  spec = importlib.util.spec_from_file_location('bench_end_to_end', BENCH / 'end_to_end.py')
  module = importlib.util.module_from_spec(spec)
  monkeypatch.setitem(sys.modules, spec.name, module)
  spec.loader.exec_module(module)
  monkeypatch.setattr(module.schedule, 'in_process', lambda *_: pytest.fail('a program was compiled'))
  monkeypatch.setattr(plan, 'tpu_devices', lambda topology: jax.devices())
  return module


def cells(table: str) -> dict[str, list[str]]:
  return {line[:40].strip(): line[40:].split() for line in table.splitlines()}


def test_two_implementations_have_a_ratio(bench):
  found = cells(bench.table([KERNEL, REFERENCE]))
  assert found[''] == ['auto', 'reference', 'ratio']
  assert found['cycles'] == ['800', '1,600', '0.500']
  assert found['cycles of attention_forward'] == ['200', '0']
  assert found['all-reduce, not timed'] == ['0', '2', '0.000']


@pytest.mark.parametrize('rows', [[KERNEL], [KERNEL, REFERENCE, KERNEL | {'attention': 'tpu'}]], ids=['one', 'three'])
def test_any_other_number_has_one_column_each(bench, rows):
  found = cells(bench.table(rows))
  assert found[''] == [row['attention'] for row in rows]
  assert found['MiB per device'] == [str(row['MiB']) for row in rows]


def test_one_name_is_compiled_and_printed(bench, monkeypatch, capsys):
  started = []
  monkeypatch.setattr(
    bench.schedule, 'in_process', lambda script, chip, arguments: started.append(arguments) or [KERNEL]
  )
  assert bench.main([*FLAGS, '--attention=reference']) == 0
  assert started == [['--gin_file=configs/t5/tiny.gin', '--gin.model.dropout=0.0', '--attention=reference']]
  assert cells(capsys.readouterr().out)['cycles'] == ['800']


def test_a_collective_counts_once_however_it_is_split(bench):
  assert bench.collectives(PROGRAM) == {'all-gather': 3 + 1, 'all-reduce': 3, 'collective-permute': 3}


def test_kernels_for_rotary_positions_are_counted_beside(bench):
  """By the compiler's names, as they stand in a loop of three."""
  call = '%jvp_rotary_.1 = bf16[8,128]{1,0} custom-call(%p), custom_call_target="tpu_custom_call"'
  step = PROGRAM.replace('  %permute-done =', f'  {call}\n  %permute-done =')
  assert bench.rotary(step) == {'rotary kernel': 3}
  assert bench.rotary(PROGRAM) == {}


def test_copies_on_other_channels_and_outside_of_fusions_count(bench):
  step = '%all-reduce.6 = f32[8]{0:T(128)} all-reduce(%p), channel_id=1'
  other = PROGRAM.replace(f'{step}0', f'{step}1')
  assert bench.collectives(other)['all-reduce'] == 3 + 3
  peeled = PROGRAM.replace('all-gather(%p), channel_id=9', 'all-gather(%p), channel_id=7')
  assert bench.collectives(peeled)['all-gather'] == 3 + 1


@pytest.mark.parametrize(
  ('more', 'message'),
  [
    (['--attention=fast'], "--attention names 'fast'; give different names of auto, reference, tpu, interpret"),
    (['--attention=auto,auto'], "--attention names 'auto'; give different names"),
    (['--attention='], "--attention names ''"),
    (['--attention=reference,triton'], "kernels.attention='triton' runs on gpu, this mesh has cpu devices"),
    (['--attention=interpret', '--gin.model.dropout=0.1'], "kernels.attention='interpret' has no attention dropout"),
    (['--gin.model.widht=3'], 'model.widht'),
    (['--gin.mesh.data=3'], 'data.batch_size=32 does not divide into'),
    (['--gin_file=none.gin'], 'none.gin'),
  ],
)
def test_wrong_arguments_are_one_line_before_anything_is_compiled(bench, more, message, capsys):
  assert bench.main([*FLAGS, *more]) == 64
  printed = capsys.readouterr().err
  assert message in printed
  assert printed.startswith('CONFIG: ')
  assert printed.count('\n') == 1


@pytest.mark.parametrize('wrong', ['--atention=auto', '--gin.model.heads', 'auto'])
def test_unknown_arguments_are_refused(bench, wrong, capsys):
  with pytest.raises(SystemExit, match='2'):
    bench.main([*FLAGS, wrong])
  assert f'{wrong} is no argument' in capsys.readouterr().err


def test_a_compilation_that_fails_ends_with_its_code(bench, monkeypatch):
  def fail(*_):
    raise bench.subprocess.CalledProcessError(64, 'bench')

  monkeypatch.setattr(bench.schedule, 'in_process', fail)
  assert bench.main([*FLAGS, '--attention=reference']) == 64
