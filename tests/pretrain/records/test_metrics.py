"""metrics.jsonl: each step once, every float exact, whatever killed the run; TensorBoard; the progress line."""

import io
import json
import math
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from pretrain.errors import ConfigError
from pretrain.records.metrics import FILE, JsonRows, Metrics, encode, read_metrics
from pretrain.records.progress import make_display


def open_metrics(workdir, resume_step=0):
  return Metrics(workdir, resume_step=resume_step, total_steps=10)


def steps(workdir):
  return [row['step'] for row in read_metrics(workdir)]


@pytest.fixture
def ten_steps(tmp_path):
  metrics = open_metrics(tmp_path)
  for step in range(1, 11):
    metrics.write(step, {'loss': 1 / step})
  metrics.close()
  return tmp_path


def test_floats_read_back_exactly(tmp_path):
  rng = np.random.default_rng(0)
  values = rng.standard_normal(1000).astype(np.float32).astype(float) * 10.0 ** rng.integers(-30, 30, 1000)
  metrics = open_metrics(tmp_path)
  for step, value in enumerate(values):
    metrics.write(step, {'loss': float(value)})
  metrics.close()
  assert [row['loss'] for row in read_metrics(tmp_path)] == values.tolist()


def test_nan_and_infinity_stay_valid_json_and_read_back(tmp_path):
  metrics = open_metrics(tmp_path)
  metrics.write(1, {'loss': math.nan, 'grad_norm': math.inf, 'z_loss': -math.inf})
  metrics.close()

  def refuse(constant):
    raise AssertionError(f'{constant} is not JSON')

  assert json.loads((tmp_path / FILE).read_text(), parse_constant=refuse)['grad_norm'] == 'Infinity'
  row = read_metrics(tmp_path)[0]
  assert math.isnan(row['loss'])
  assert (row['grad_norm'], row['z_loss']) == (math.inf, -math.inf)


def test_a_resume_removes_later_steps_and_writes_them_again_once(ten_steps):
  metrics = open_metrics(ten_steps, resume_step=6)
  assert steps(ten_steps) == list(range(1, 7))
  for step in range(7, 11):
    metrics.write(step, {'loss': 2.0})
  metrics.close()
  assert steps(ten_steps) == list(range(1, 11))
  assert [row['loss'] for row in read_metrics(ten_steps)][5:8] == [1 / 6, 2.0, 2.0]


def test_a_run_without_a_checkpoint_begins_again_at_the_first_row(ten_steps):
  open_metrics(ten_steps, resume_step=0).close()
  assert steps(ten_steps) == []


LAST_ROW = len(encode({'step': 10, 'loss': 0.1}))


@pytest.mark.parametrize('cut', range(1, LAST_ROW))  # among them `{"step": 1`, which looks like a whole value
def test_a_torn_last_line_is_dropped(ten_steps, cut):
  path = ten_steps / FILE
  path.write_bytes(path.read_bytes()[:-cut])
  assert steps(ten_steps) == list(range(1, 10)), 'a reader leaves it out'
  metrics = open_metrics(ten_steps, resume_step=9)
  metrics.write(10, {'loss': 0.1})
  metrics.close()
  assert steps(ten_steps) == list(range(1, 11))


def test_a_damaged_line_in_the_middle_is_refused_and_kept(ten_steps):
  path = ten_steps / FILE
  damaged = path.read_bytes().replace(b'"step": 4', b'"st\xffp": 4')
  path.write_bytes(damaged)
  with pytest.raises(
    ConfigError, match=r'metrics.jsonl:4: not a row of metrics; nothing was changed. Remove the line.'
  ):
    open_metrics(ten_steps, resume_step=10)
  assert path.read_bytes() == damaged


def test_steps_must_grow(ten_steps):
  metrics = open_metrics(ten_steps, resume_step=10)
  with pytest.raises(ValueError, match='step 3 after step 10'):
    metrics.write(3, {'loss': 1.0})
  metrics.close()


def test_an_evaluation_joins_the_row_of_its_step(tmp_path):
  metrics = open_metrics(tmp_path)
  metrics.write(1, {'loss': 3.0})
  metrics.eval(1, {'eval/a/loss': 2.0})
  metrics.eval(3, {'eval/a/loss': 1.0})
  metrics.write(4, {'loss': 0.5})
  metrics.close()
  assert read_metrics(tmp_path) == [
    {'step': 1, 'loss': 3.0, 'eval/a/loss': 2.0}, {'step': 3, 'eval/a/loss': 1.0}, {'step': 4, 'loss': 0.5},
  ]  # fmt: skip


def test_an_evaluation_of_the_resumed_step_joins_its_row(ten_steps):
  metrics = open_metrics(ten_steps, resume_step=5)
  metrics.eval(5, {'eval/a/loss': 2.0})
  metrics.close()
  assert read_metrics(ten_steps)[-1] == {'step': 5, 'loss': 0.2, 'eval/a/loss': 2.0}


def test_a_kill_while_an_evaluation_joins_loses_no_training_row(tmp_path):
  """The longer row overwrites the shorter one; a kill may fall behind any byte of it."""
  metrics = open_metrics(tmp_path)
  metrics.write(1, {'loss': 4.0})
  metrics.write(2, {'loss': 3.0})
  path = tmp_path / FILE
  before = path.read_bytes()
  metrics.eval(2, {'eval/a/loss': 2.0})
  metrics.close()
  after = path.read_bytes()
  for written in range(before.index(b'\n') + 1, len(after) + 1):
    path.write_bytes(after[:written] + before[written:])
    open_metrics(tmp_path, resume_step=2).close()
    assert [(row['step'], row['loss']) for row in read_metrics(tmp_path)] == [(1, 4.0), (2, 3.0)], written


def test_a_row_is_on_disk_when_write_returns(tmp_path):
  code = (
    'import sys, time; from pretrain.records.metrics import Metrics\n'
    f'm = Metrics({str(tmp_path)!r}, resume_step=0, total_steps=9)\n'
    'for step in range(1, 4): m.write(step, {"loss": 0.5})\n'
    'print("written", flush=True); time.sleep(60)'
  )
  process = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
  with process:
    process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
  assert steps(tmp_path) == [1, 2, 3]


def test_only_the_writing_process_touches_files(tmp_path, capsys):
  metrics = Metrics(tmp_path / 'none', resume_step=0, total_steps=3, write=False)
  metrics.write(1, {'loss': 1.0})
  metrics.eval(1, {'eval/a/loss': 1.0})
  metrics.warn('careful')
  metrics.close()
  assert not (tmp_path / 'none').exists()
  assert capsys.readouterr().err == ''


def test_tensorboard_gets_every_value_and_a_mark_where_a_resume_began(ten_steps):
  from tensorboardX.event_file_writer import EventsWriter  # noqa: F401 - the format below is its own
  from tensorboardX.proto.event_pb2 import Event, SessionLog

  metrics = open_metrics(ten_steps, resume_step=6)
  metrics.write(7, {'loss': 2.0, 'eval/a/loss': 3.0})
  metrics.close()
  files = sorted((ten_steps / 'tensorboard').iterdir(), key=lambda p: p.stat().st_mtime)
  events = [Event.FromString(record) for record in records(files[-1].read_bytes())]
  values = {(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value}
  assert values == {(7, 'loss', 2.0), (7, 'eval/a/loss', 3.0)}
  assert [e.step for e in events if e.session_log.status == SessionLog.START] == [7]


def test_every_start_has_its_own_file_of_events_even_within_a_second(tmp_path, monkeypatch):
  from tensorboardX import event_file_writer

  monkeypatch.setattr(event_file_writer.time, 'time', lambda: 1_796_059_864.0)
  for resumed in range(3):
    metrics = open_metrics(tmp_path, resume_step=resumed)
    metrics.write(resumed + 1, {'loss': 2.0})
    metrics.close()
  assert len(list((tmp_path / 'tensorboard').iterdir())) == 3


def records(data):
  """The payloads of a TFRecord file: length (8 bytes), its checksum (4), payload, its checksum (4)."""
  while data:
    size = int.from_bytes(data[:8], 'little')
    yield data[12 : 12 + size]
    data = data[16 + size :]


def test_without_a_terminal_there_are_few_plain_lines():
  stream = io.StringIO()
  display = make_display(1000, stream)
  for step in range(1, 1001):
    display.show(step, {'loss': 2.5, 'tokens_per_second': 12_345.0})
  display.warn('NONFINITE: careful')
  display.close()
  first, last, warning = stream.getvalue().splitlines()
  assert first == 'step 1/1000  loss 2.5000  12.3k tokens/s', 'a rate needs two steps'
  assert last.startswith('step 1000/1000  loss 2.5000')
  assert last.endswith('ETA 0:00:00')
  assert warning == 'NONFINITE: careful'


def test_in_a_terminal_there_is_one_live_line():
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  stream = Terminal()
  display = make_display(10, stream)
  display.show(3, {'loss': 2.5})
  display.print('step 3  eval/a 1.0')
  display.show(4, {'loss': 1.5})
  display.close()
  text = stream.getvalue()
  assert 'eval/a 1.0' in text
  assert 'step 4/10' in text
  assert 'loss 1.5000' in text


def test_a_shorter_value_replaces_a_longer_one_completely(tmp_path):
  """Two saves end at one row; and a kill between the write and the cut costs nothing."""
  path = tmp_path / FILE
  rows = JsonRows(path, 0)
  rows.write(1, {'loss': 2.0, 'save_stall': 0.123456789})
  rows.write(1, {'save_stall': 0.5})
  rows.close()
  assert path.read_bytes() == encode({'step': 1, 'loss': 2.0, 'save_stall': 0.5})
  path.write_bytes(path.read_bytes() + b'789}\n')
  JsonRows(path, 1).close()
  assert read_metrics(tmp_path) == [{'step': 1, 'loss': 2.0, 'save_stall': 0.5}]
