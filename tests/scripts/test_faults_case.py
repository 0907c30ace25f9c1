"""The checks of scripts/faults.py detect a run that is wrong."""

import argparse
import importlib
import importlib.util
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import pytest

from pretrain.checkpoints import manifest
from pretrain.checkpoints.manifest import Leaf, Manifest

SCRIPTS = pathlib.Path(__file__).parents[2] / 'scripts'
ROWS = [{'step': step, 'loss': 6.5 / step, 'grad_norm': 1.0, 'batch_checksum': 7} for step in (1, 2, 3)]


@pytest.fixture
def module(monkeypatch):
  """A file of scripts/ by its name, as it is imported there."""
  monkeypatch.syspath_prepend(SCRIPTS)
  return importlib.import_module


def run(case_module, folder: pathlib.Path, rows=ROWS, digest: str = 'a1', shape=(2,)):
  """A run of three steps, as a Case reads it."""
  case = case_module.Known('run', argparse.Namespace(workdir=folder), steps=3)
  step = case.workdir / 'checkpoints/3'
  step.mkdir(parents=True)
  (case.workdir / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  manifest.write(step, Manifest(3, {}, {'params/w': Leaf(shape, 'float32', digest)}))
  return case


def test_the_last_step_is_read_while_its_row_is_written_again(module, tmp_path):
  """A row to which values are added may become shorter: for a moment the end of its old text follows it."""
  case = run(module('faults.case'), tmp_path)
  assert case.logged() == 3
  with (case.workdir / 'metrics.jsonl').open('a') as file:
    file.write('0.1234567890, "save_mib": 7}\n')
  assert case.logged() == 3
  (case.workdir / 'metrics.jsonl').write_text('{"step": 1, "lo')
  assert case.logged() == 0


def test_an_equal_run_does_not_differ(module, tmp_path):
  found = module('faults.case')
  assert run(found, tmp_path / 'a').differs(run(found, tmp_path / 'b')) == ''


@pytest.mark.parametrize(
  ('change', 'said'),
  [
    (
      lambda rows: rows[1].update(loss=math.nextafter(rows[1]['loss'], 9)),
      'loss 3.2500000000000004 for 3.25 at step 2',
    ),
    (lambda rows: rows[2].update(batch_checksum=8), 'batch_checksum 8 for 7 at step 3'),
    (lambda rows: rows.insert(1, rows[0]), 'steps [1, 2, 3] of 4'),
    (lambda rows: rows.pop(), 'steps [1, 2] of 2'),
  ],
)
def test_another_loss_batch_or_step_is_detected(module, tmp_path, change, said):
  found, rows = module('faults.case'), [dict(row) for row in ROWS]
  change(rows)
  assert run(found, tmp_path / 'a', rows).differs(run(found, tmp_path / 'b')) == said


def test_another_final_array_is_detected(module, tmp_path):
  found = module('faults.case')
  wrong = run(found, tmp_path / 'a', digest='a2').differs(run(found, tmp_path / 'b'))
  assert wrong == 'params/w of step 3 is another array (first of 1)'


def test_the_parts_of_a_fault_are_all_of_its_trials(module):
  count = module('faults.case').count
  for total, parts in ((200, 4), (30, 3), (10, 3), (1, 1)):
    options = [argparse.Namespace(times=0, full=True, part=part, parts=parts) for part in range(parts)]
    assert sum(count(one, 6, total) for one in options) == total
  assert count(argparse.Namespace(times=20, full=True, part=0, parts=4), 6, 200) == 5


def test_a_failed_part_shows_in_the_line(module):
  found = module('faults.case')
  line = found.joined([found.Line(2, 2, 'fine', [1.0, 2.0], {'save': 2}), found.Line(3, 0, 'lost', [9.0], {'save': 1})])
  assert (line.tried, line.survived, line.worst, line.whole) == (5, 2, 'lost', False)
  assert str(line) == 'tried 5, survived 2; lost; recovered in 2.0 s (p95 9.0 s); in save 3'
  assert not found.Line(0, 0).whole, 'what was not tried was not survived'


@pytest.mark.parametrize(
  ('act', 'said'),
  [
    (lambda path: (66, 'CKPT: none'), ''),
    (lambda path: (0, 'CKPT: none'), 't: code 0 for 66, without []: CKPT: none'),
    (lambda path: (66, 'CKPT'), "t: code 66 for 66, without ['none']: CKPT"),
    (lambda path: (66, 'Traceback\nCKPT: none'), 't: code 66 for 66, without []: CKPT: none'),
    (
      lambda path: int('CKPT: none'),
      't: it raised ValueError("invalid literal for int() with base 10: \'CKPT: none\'")',
    ),
    (lambda path: (66, f'CKPT: none {path.write_text("other")}'), 't: {path} was changed'),
    (lambda path: (66, f'CKPT: none {path.unlink()}'), 't: {path} was changed'),
    (lambda path: (66, f'CKPT: none {path.with_name("new").touch()}'), 't: {new} was changed'),
  ],
)
def test_a_refusal_has_a_code_and_words_and_changes_nothing(module, tmp_path, act, said):
  (path := tmp_path / 'file').write_text('as it was')
  trial = module('faults.refusals').Trial('t', lambda: act(path), 66, ['CKPT', 'none'], tmp_path)
  assert trial.problem() == said.format(path=path, new=path.with_name('new'))


def test_a_kill_hits_the_planned_part_of_a_save(module):
  kills = module('faults.kills')
  at = lambda note: types.SimpleNamespace(note=lambda name: note)
  assert kills.in_save(at('2 hash'), 2, 'hash')
  assert kills.in_save(at('5 hash'), 3, 'hash'), 'a later one'
  assert not kills.in_save(at('1 hash'), 2, 'hash')
  assert not kills.in_save(at('2 files'), 2, 'hash')
  assert not kills.in_save(at(''), 1, 'files')


def test_every_fault_of_the_matrix_exists_once(module, monkeypatch):
  spec = importlib.util.spec_from_file_location('faults_script', SCRIPTS / 'faults.py')  # not the package beside it
  faults = importlib.util.module_from_spec(spec)
  monkeypatch.setitem(sys.modules, spec.name, faults)
  spec.loader.exec_module(faults)
  assert {f'F{n}' for n in range(1, 31)} | {'MTTR'} == faults.FAULTS.keys()
  assert all(fault.__doc__ and '\n' not in fault.__doc__ for fault in faults.FAULTS.values())


@pytest.mark.parametrize('full', [False, True])
def test_what_is_refused_in_a_run_of_120_steps_names_step_120(module, tmp_path, full):
  case, options = module('faults.case'), argparse.Namespace(full=full, alone=tmp_path)
  for name in ('alone_1_120', 'alone_1_800', 'alone_1_130', 'alone_3_620'):
    (tmp_path / f'{name}.done').touch()
  alone = case.references(options)
  assert alone(1, 120).workdir.name == alone(1, 60).workdir.name == 'alone_1_120'
  assert alone(1, 130).workdir.name == ('alone_1_800' if full else 'alone_1_130')
  assert alone(3, 620).workdir.name == 'alone_3_620'


def test_an_interrupted_run_is_not_a_reference(module, tmp_path, monkeypatch):
  case = module('faults.case')
  monkeypatch.setattr(case.Case, 'command', lambda self: [sys.executable, '-c', 'import sys; sys.exit(1)'])
  with pytest.raises(SystemExit, match='the uninterrupted run ended with 1'):
    case.references(argparse.Namespace(full=False, alone=tmp_path))(1, 60)
  assert not (tmp_path / 'alone_1_120.done').exists()


def test_the_largest_loss_difference_is_measured(module, tmp_path):
  found, rows = module('faults.case'), [dict(row) for row in ROWS]
  rows[1]['loss'] *= 1 + 2e-6
  own, other = run(found, tmp_path / 'a', rows), run(found, tmp_path / 'b')
  assert own.apart(other) == pytest.approx(2e-6, rel=1e-3)
  assert other.apart(other) == 0


def broken(module, folder: pathlib.Path, *incidents, fault=None):
  """A run of three steps with these incidents [(step reached, step resumed), …], as `verdict` reads it."""
  found = run(module('faults.case'), folder)
  keys = ('step_reached', 'step_resumed')
  lines = [dict(zip(keys, incident, strict=True), seconds_lost=None) for incident in incidents]
  (found.workdir / 'incidents.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
  if fault:
    found._break(fault)
  return found


@pytest.mark.parametrize(
  ('incidents', 'said'),
  [
    (((2, 1), (None, None), (40, 20)), ''),
    (((2, 1), (40, 20)), '2 failures of 3 that were planned'),
    (((2, 1), (40, None), (None, 0)), '40 steps were computed again, saved every 10'),  # it started again from step 0
  ],
)
def test_a_fault_that_ended_nothing_and_a_start_from_0_are_not_survived(module, tmp_path, incidents, said):
  own, other = broken(module, tmp_path / 'a', *incidents), run(module('faults.case'), tmp_path / 'b')
  line = module('faults.case').verdict(own, other, 0, tried=3)
  assert line.worst == (said and f'{said}; see {own.workdir}.log')
  assert (line.tried, line.survived) == (3, 0 if said else 3)


def test_a_fault_that_fails_itself_is_reported(module, tmp_path):
  own, other = (
    broken(module, tmp_path / 'a', (2, 1), fault=lambda case: 1 // 0),
    run(module('faults.case'), tmp_path / 'b'),
  )
  line = module('faults.case').verdict(own, other, 0, tried=1)
  assert line.worst.startswith("the fault itself failed: ZeroDivisionError('")
  assert line.survived == 0


def with_this(word: str) -> list[str]:
  """The processes with this text in their command."""
  found = subprocess.run(['ps', '-ww', '-eo', 'pid=,args='], capture_output=True, text=True, check=True).stdout
  return [line for line in found.splitlines() if word in line]


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_series_leaves_no_process_and_no_snapshot(tmp_path, number):
  program = [sys.executable, str(SCRIPTS / 'faults.py'), 'F20', '--jobs=1', f'--workdir={tmp_path}']
  # A shell starts what runs behind it deaf to Ctrl-C, and so may be what runs this test.
  hearing = 'import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])'
  env = os.environ | {'PYTHONPATH': str(SCRIPTS.parent), 'XLA_FLAGS': ''}
  process = subprocess.Popen([sys.executable, '-c', hearing, *program], env=env)
  try:
    memory = interrupted(process, str(tmp_path), number)
  finally:
    process.kill()
  assert with_this(str(tmp_path)) == []
  assert not memory.exists()


def interrupted(process: subprocess.Popen, word: str, number: int) -> pathlib.Path:
  """Waits until a run has begun; returns the folder of its snapshots."""
  while not any('faults.child train' in line for line in with_this(word)):
    assert process.poll() is None
    time.sleep(0.05)
  words = ' '.join(with_this(word)).split()
  (memory,) = {pathlib.Path(word.removeprefix('--memory=')) for word in words if word.startswith('--memory=')}
  assert memory.is_dir()
  process.send_signal(number)
  assert process.wait(timeout=30) == 130
  return memory
