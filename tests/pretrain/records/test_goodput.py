"""Every second of a run is counted once, over all its restarts."""

import json
import math
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from pretrain.records.goodput import KINDS, goodput, processes, write_goodput
from pretrain.records.timeline import FILE, Timeline, append, read_timeline
from tests.pretrain import tiny


def line(t, began, phase, step, resumed, /, **seconds):
  return {'t': t, 'began': began, 'phase': phase, 'step': step, 'resumed': resumed, 'seconds': seconds}


def exit_(t, started, failed, code):
  return {'t': t, 'started': started, 'event': 'exit', 'failed': failed, 'code': code, 'host': 0, 'hosts': 1}


KILLED = [
  line(5.0, 0.0, 'step', 0, 0, init=3.0, compile=2.0),
  line(6.0, 0.0, 'step', 1, 0, step=1.0),
  line(15.0, 0.0, 'save', 10, 0, step=8.0, data=1.0),
  line(16.0, 0.0, 'step', 10, 0, save=1.0),
  line(24.0, 0.0, 'step', 18, 0, step=8.0),
  exit_(25.0, -1.0, True, 137),
  line(30.0, 27.0, 'step', 10, 10, init=2.0, restore=1.0),
  line(31.0, 27.0, 'step', 11, 10, step=1.0),
  line(40.0, 27.0, 'close', 20, 10, step=9.0),
  line(42.0, 27.0, 'done', 20, 10, close=2.0),
  exit_(43.0, 26.0, False, 0),
]


def test_a_killed_run_is_counted_second_by_second():
  found = goodput(KILLED)
  expected = {
    'productive': 19.0, 'lost': 9.0, 'data': 1.0, 'save': 1.0, 'eval': 0.0, 'init': 5.0, 'compile': 2.0,
    'restore': 1.0, 'hang': 0.0, 'down': 2.0, 'close': 3.0,
  }  # fmt: skip
  assert found['seconds'] == expected, 'steps 11 to 18 of the first process, and its last second, were made again'
  assert found['wall_seconds'] == sum(expected.values()) == 43.0
  assert found['goodput'] == pytest.approx(19 / 43, abs=1e-4)
  assert (found['failures'], found['mttr_seconds'], found['mtbf_seconds']) == (1, 6.0, 41.0)


def test_steps_before_and_after_the_last_save_are_counted_apart():
  lines = [*KILLED[:2], line(16.0, 0.0, 'step', 11, 0, step=10.0), *KILLED[5:]]
  assert goodput(lines)['seconds']['lost'] == pytest.approx(1.0 + 9.0), (
    'the last of ten steps, and the time to the kill'
  )


def test_a_later_restart_that_goes_further_back_counts():
  again = [line(50.0, 47.0, 'step', 5, 5, init=3.0), line(51.0, 47.0, 'done', 6, 5, step=1.0)]
  assert processes([*KILLED, *again])[0].boundary == 5
  assert goodput([*KILLED, *again])['seconds']['lost'] > goodput(KILLED)['seconds']['lost'] + 10


def test_lines_written_after_another_process_failed_count_as_time_between_processes():
  late = [*KILLED[:6], line(26.0, 0.0, 'step', 18, 0, step=2.0), *KILLED[6:]]
  assert goodput(late)['wall_seconds'] == 43.0


def test_a_hang_is_subtracted_from_the_phase_it_happened_in():
  hang = line(85.0, 0.0, 'step', 18, 0, step=-60.0, hang=61.0)
  assert goodput([*KILLED[:5], hang, exit_(85.0, -1.0, True, 70)])['seconds']['hang'] == 61.0


def test_a_run_without_a_supervisor_counts_too():
  found = goodput([entry for entry in KILLED if 'event' not in entry])
  assert (found['failures'], found['seconds']['down']) == (1, 3.0)


def test_a_process_that_ended_without_a_state_is_time_between_processes():
  early = [*KILLED[:6], exit_(26.5, 25.5, True, 1), *KILLED[6:]]
  found = goodput(early)
  assert (found['seconds'], found['failures'], found['mttr_seconds']) == (goodput(KILLED)['seconds'], 2, 5.25)


def test_no_timeline_no_goodput(tmp_path):
  assert write_goodput(tmp_path) == {}
  assert list(tmp_path.iterdir()) == []


def test_lines_that_were_cut_off_are_left_out_and_the_next_one_is_whole(tmp_path):
  (tmp_path / FILE).write_bytes(b'{"t": 1.0, "event": "exit"}\n{"t": 2.0, "eve')
  Timeline().open(tmp_path, 0)
  assert [('event' in entry, 'began' in entry) for entry in read_timeline(tmp_path)] == [(True, False), (False, True)]


def test_lines_get_fewer_as_a_process_grows_old(tmp_path, monkeypatch):
  now = [0.0]
  monkeypatch.setattr('pretrain.records.timeline.time.monotonic', lambda: now[0])
  timeline = Timeline()
  timeline.began, timeline._mark, timeline._written = timeline._origin, 0.0, 0.0
  timeline.open(tmp_path, 0)
  timeline.completed(1)
  for now[0] in range(0, 86_400):
    timeline.completed(2)
  assert 5_000 < len(read_timeline(tmp_path)) < 6_000, '1000 (1 + ln(86.4)) in a day'


RUN = """
import os, pathlib, signal, sys, time, pretrain.run.train as t
from pretrain.run import step_numbers
from tests.pretrain import tiny
t.write_report, log = lambda _: None, step_numbers.log
def kill(run, step, *rest):
  log(run, step, *rest)
  while step == 15 and not (run.workdir / 'checkpoints/10/MANIFEST.json').exists(): time.sleep(0.01)
  if step == 15: os.kill(os.getpid(), signal.SIGKILL)
if not (pathlib.Path(sys.argv[1]) / 'timeline.jsonl').exists(): step_numbers.log = kill
t.train(tiny.decoder('train.steps=30', 'checkpoint.every=10', 'mesh.data=1'), sys.argv[1])
"""


@pytest.mark.slow
def test_the_seconds_of_a_real_run_that_was_killed_are_those_of_a_clock(tmp_path):
  """Within 2%, kill and all; the clock is this process's."""
  command = [sys.executable, '-c', RUN, tmp_path]
  start = time.time()
  assert subprocess.run(command, cwd=tiny.ROOT, check=False).returncode == -signal.SIGKILL
  killed = time.time()
  append(tmp_path / FILE, exit_(killed, start, True, 137))
  time.sleep(0.5)
  subprocess.run(command, cwd=tiny.ROOT, check=True)
  end = read_timeline(tmp_path)[-1]['t']
  found = write_goodput(tmp_path)
  assert found == json.loads(pathlib.Path(tmp_path / 'goodput.json').read_text())
  assert set(found['seconds']) == set(KINDS)
  assert math.isclose(sum(found['seconds'].values()), end - start, rel_tol=0.02), found
  for kind in ('productive', 'init', 'compile', 'restore', 'save'):
    assert found['seconds'][kind] > 0, kind
  assert found['seconds']['down'] == pytest.approx(0.5, abs=0.3)
