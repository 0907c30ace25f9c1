"""A phase that takes too long ends the process with its stacks; one that is only long, or stopped, does not."""

import pathlib
import subprocess
import sys

import pytest

from pretrain.hosts import coordination, watchdog
from pretrain.hosts.watchdog import Watchdog, WatchdogConfig, limit_of
from pretrain.records.timeline import Timeline, read_timeline
from tests.pretrain import tiny


class Expired(Exception):
  pass


@pytest.fixture
def dog(tmp_path, monkeypatch):
  """(timeline, watchdog) that raises instead of ending the process; time passes only by `tick`."""

  def leave(code):
    raise Expired(code)

  monkeypatch.setattr(watchdog.os, '_exit', leave)
  timeline = Timeline()
  timeline.open(tmp_path, 7)
  dog = Watchdog(timeline, WatchdogConfig(data=10.0, save=0.0), tmp_path)
  timeline.enter('data')
  dog.tick(0.0)
  return timeline, dog


def test_a_phase_longer_than_its_limit_ends_the_process_with_all_stacks(dog, tmp_path, capsys):
  _, watch = dog
  watch.tick(10.0)
  with pytest.raises(Expired, match='70'):
    watch.tick(0.5)
  stacks = (tmp_path / 'hang_7_p0.txt').read_text()
  assert 'test_watchdog.py' in stacks
  assert 'Current thread' in stacks
  said = capsys.readouterr().err
  assert said.startswith('HANG: process 0 in phase data for 10 s since step 7, watchdog.data allows 10 s; stacks in ')
  assert read_timeline(tmp_path)[-1]['seconds']['hang'] == pytest.approx(10.5)


def test_a_process_that_makes_progress_is_not_ended(dog, tmp_path):
  timeline, watch = dog
  for _ in range(5):
    watch.tick(9.0)
    timeline.enter('data')
    watch.tick(0.1)
  assert not list(tmp_path.glob('hang_*'))
  watch.tick(10.0)
  with pytest.raises(Expired):  # 45 s in five phases were not held against it, these in one are
    watch.tick(0.5)


def test_stacks_are_brought_to_where_the_run_is_kept_before_the_process_ends(dog, tmp_path, capsys):
  timeline, _ = dog
  brought = []
  upload = lambda path: brought.append(path.read_text()) or f'gs://bucket/run/{path.name}'
  watch = Watchdog(timeline, WatchdogConfig(data=1.0), tmp_path, upload)
  watch.tick(0.0)
  with pytest.raises(Expired):
    watch.tick(1.5)
  assert ['Current thread' in text for text in brought] == [True]
  assert 'stacks in gs://bucket/run/hang_7_p0.txt.' in capsys.readouterr().err


def test_a_record_that_is_complete_is_not_written_again(dog, tmp_path, monkeypatch):
  """It may be uploaded already; on a slow machine the copy would lack a line."""
  timeline, watch = dog
  monkeypatch.setattr(timeline, 'due', lambda: True)
  timeline.enter('close')
  watch.tick(0.0)
  timeline.enter('done')
  timeline.flush()
  before = read_timeline(tmp_path)
  watch.tick(0.5)
  assert read_timeline(tmp_path) == before


def test_a_limit_of_zero_means_no_limit(dog, tmp_path):
  timeline, watch = dog
  timeline.enter('save')
  watch.tick(0.0)
  watch.tick(1e9)
  assert not list(tmp_path.glob('hang_*'))


def test_a_process_that_waits_in_a_step_ends_after_the_one_it_waits_for(dog, monkeypatch):
  timeline, watch = dog
  monkeypatch.setattr(coordination, 'doing', lambda: {1: ('data', 7)})
  monkeypatch.setattr(watchdog, 'limit_of', lambda cfg, phase, median: {'step': 3.0, 'data': 10.0}[phase])
  timeline.enter('step')
  watch.tick(0.0)
  watch.tick(10.0 + watchdog.GRACE_SECONDS)
  with pytest.raises(Expired):
    watch.tick(1.0)


def test_time_in_which_the_machine_stood_still_does_not_count(dog, monkeypatch):
  """The watchdog's thread stands still too: time that it did not measure does not count."""
  _, watch = dog
  seen = []
  monkeypatch.setattr(watch, 'tick', seen.append)
  clock = iter([0.0, 0.25, 3600.0, 3600.25])
  monkeypatch.setattr(watchdog.time, 'monotonic', lambda: next(clock))
  monkeypatch.setattr(watch._stop, 'wait', lambda _: len(seen) == 3)
  watch._watch()
  assert seen == [0.25, 1.0, 0.25]


def test_the_limit_of_a_step_follows_its_median():
  cfg = WatchdogConfig(compile=900.0)
  assert limit_of(cfg, 'step', None) == 900.0, 'no step is known yet: it may still be compiling'
  assert limit_of(cfg, 'step', 0.1) == 60.0
  assert limit_of(cfg, 'step', 20.0) == 200.0
  assert limit_of(WatchdogConfig(step=5.0), 'step', 20.0) == 5.0


def test_the_median_is_over_whole_steps_for_any_number_of_timeline_lines(tmp_path, monkeypatch):
  now = [0.0]
  monkeypatch.setattr('pretrain.records.timeline.time.monotonic', lambda: now[0])
  timeline = Timeline()
  timeline.open(tmp_path, 0)
  for _ in range(5):
    timeline.enter('step')
    for _ in range(4):
      now[0] += 2.0
      timeline.flush()
    timeline.enter('data')
  assert timeline.median_step() == 8.0


HANGS = """
import sys, time, pretrain.run.train as t
from pretrain.run import loop
from tests.pretrain import tiny
def a_loader_that_never_answers(*args):
  time.sleep(600)
  yield
loop.loader = a_loader_that_never_answers
t.train(tiny.decoder('train.steps=3', 'watchdog.data=1.0'), sys.argv[1])
"""


def test_a_run_that_hangs_ends_with_70_and_names_the_place(tmp_path):
  done = subprocess.run(
    [sys.executable, '-c', HANGS, tmp_path], cwd=tiny.ROOT, capture_output=True, text=True, check=False, timeout=120
  )
  assert done.returncode == 70, done.stderr[-2000:]
  assert f'watchdog.data allows 1 s; stacks in {tmp_path}/hang_0_p0.txt.' in done.stderr
  for stacks in (done.stderr, pathlib.Path(tmp_path / 'hang_0_p0.txt').read_text()):
    assert 'a_loader_that_never_answers' in stacks
