"""`pretrain run -- train`: restarts processes that fail, and stops with the reason if a restart cannot help.

Here the processes are scripts that tell what they have done as a run does; test_faults.py has real ones.
"""

import io
import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from pretrain.cli.main import main
from pretrain.fleet import supervise
from pretrain.fleet.supervise import Policy, Supervisor
from pretrain.hosts.skipping import add_skip, read_skips
from pretrain.records.goodput import goodput
from pretrain.records.timeline import read_timeline
from tests.pretrain import tiny

# A process that resumes at the last multiple of five steps, and makes ten; `plan` says how each start ends.
CHILD = """
import json, os, pathlib, sys, time
from pretrain.records.timeline import Timeline, read_timeline
workdir, plan, host = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]), int(os.environ['PRETRAIN_HOST'])
number = len(list(workdir.glob(f'start_{host}_*')))
(workdir / f'start_{host}_{number}').touch()
end = plan.get(str(host), plan.get('all', []))
at, code = end[number] if number < len(end) else (None, 0)
if at is None and code: os._exit(code)
up = 'up_' + os.environ['PRETRAIN_COORDINATOR']
(workdir / f'{up}_{host}').touch()
while host == 0 and len(list(workdir.glob(f'{up}_*'))) < int(os.environ['PRETRAIN_NUM_HOSTS']): time.sleep(0.01)
done = max([line['step'] for line in read_timeline(workdir) if 'began' in line], default=0) // 5 * 5
timeline = Timeline()
if host == 0: timeline.open(workdir, done)
for step in range(done + 1, 11):
  timeline.enter('step')
  if step - 1 == at:
    timeline.flush()
    if code < 0: os.kill(os.getpid(), -code); time.sleep(9)
    print('these are last words', flush=True)
    os._exit(code)
  time.sleep(0.01)
  timeline.completed(step, 8 * step)
timeline.enter('done')
timeline.flush()
"""


def run(workdir, plan, *, hosts=1, fits=lambda n: True, **policy) -> int:
  """The code of a supervised run; `plan`: host -> [(last step of a start or None, its exit code or -signal), …]."""
  command = [sys.executable, '-c', CHILD, str(workdir), json.dumps(plan)]
  return Supervisor(hosts, command, workdir, Policy(**policy), fits, io.StringIO(), batch_size=8).run()


def incidents(workdir) -> list[dict]:
  path = workdir / supervise.INCIDENTS
  return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def starts(workdir, host=0) -> int:
  return len(list(workdir.glob(f'start_{host}_*')))


@pytest.fixture(autouse=True)
def no_delay(monkeypatch):
  monkeypatch.setattr(supervise, 'FIRST_DELAY', 0.01)
  monkeypatch.setenv('PYTHONPATH', str(tiny.ROOT))


def test_a_killed_process_is_restarted_and_the_incident_is_written(tmp_path, capsys):
  assert run(tmp_path, {'0': [(7, -9)]}) == 0
  assert starts(tmp_path) == 2
  (incident,) = incidents(tmp_path)
  assert incident['seconds_lost'] > incident['seconds_down'] > 0
  wanted = {
    'host': 0, 'hosts': 1, 'cause': 'killed', 'exit_code': 137, 'signal': 'SIGKILL', 'step_reached': 7,
    'step_resumed': 5, 'action': 'restart',
  }  # fmt: skip
  assert {key: incident[key] for key in wanted} == wanted
  assert 'RUN: process 0 ended (killed, code 137) at step 7; restart 1 of 100.' in capsys.readouterr().err
  found = json.loads((tmp_path / 'goodput.json').read_text())
  assert found == goodput(read_timeline(tmp_path))
  assert (found['failures'], found['processes']) == (1, 2)
  assert found['mttr_seconds'] == pytest.approx(incident['seconds_down'], abs=2e-3)


@pytest.mark.parametrize('code', [75, 64])
def test_an_incident_without_a_later_step_is_written_too(tmp_path, code):
  assert run(tmp_path, {'0': [(7, -9), (None, code)]}) == code
  incident = incidents(tmp_path)[0]
  assert (incident['cause'], incident['step_resumed'], incident['seconds_down']) == ('killed', None, None)


def test_a_rewind_does_not_count_as_a_failure_of_a_step(tmp_path):
  """For any number of rewinds: the run itself limits them. The next failure is not the fourth at one step."""
  assert run(tmp_path, {'0': [(7, 72)] * 4 + [(6, 1), (6, 1)]}) == 0
  found = [(i['cause'], i['action']) for i in incidents(tmp_path)]
  assert found == [('spike', 'rewind')] * 4 + [('crash', 'restart')] * 2


def test_an_incident_has_the_message_of_the_process(tmp_path):
  script = "import sys; print('REPLICAS: at step 7\\nCKPT-X no code\\nother'); sys.exit(74)"
  command = [sys.executable, '-c', f'import pathlib\n{script}']
  assert Supervisor(1, command, tmp_path, Policy(max_restarts=1), stream=io.StringIO()).run() == 74
  assert {(i['cause'], i['exit_code'], i['reason']) for i in incidents(tmp_path)} == {
    ('corruption', 74, 'REPLICAS: at step 7')
  }


@pytest.mark.parametrize(
  ('code', 'cause'), [(70, 'hang'), (1, 'crash'), pytest.param(-11, 'SIGSEGV', marks=pytest.mark.slow), (-6, 'SIGABRT')]
)
def test_hangs_and_crashes_are_restarted(tmp_path, code, cause):
  assert run(tmp_path, {'0': [(7, code)]}) == 0
  assert [(i['cause'], i['action']) for i in incidents(tmp_path)] == [(cause, 'restart')]


@pytest.mark.parametrize(('code', 'cause'), [(64, 'config'), (65, 'data'), (66, 'checkpoint'), (71, 'non-finite')])
def test_an_error_that_a_restart_would_repeat_is_not_retried(tmp_path, capsys, code, cause):
  assert run(tmp_path, {'0': [(7, code)]}) == code
  assert starts(tmp_path) == 1
  assert [(i['cause'], i['action'], i['step_resumed']) for i in incidents(tmp_path)] == [(cause, 'stop', None)]
  assert 'not restarted: it would fail the same way' in capsys.readouterr().err


def test_a_refused_workdir_is_not_touched(tmp_path):
  assert run(tmp_path, {'0': [(None, 64)]}) == 64
  assert [p.name for p in tmp_path.iterdir()] == ['start_0_0']


def test_an_interrupted_run_has_not_failed(tmp_path):
  assert run(tmp_path, {'0': [(7, 75)]}) == 75
  assert starts(tmp_path) == 1
  assert incidents(tmp_path) == []


def test_failures_at_one_step_end_the_run_and_name_step_and_log(tmp_path, capsys):
  assert run(tmp_path, {'0': [(7, 1)] * 9}) == 1
  assert starts(tmp_path) == supervise.SAME_STEP == 3
  last = incidents(tmp_path)[-1]
  assert (last['action'], last['step_reached']) == ('give up', 7)
  assert 'these are last words' in pathlib.Path(last['log']).read_text()
  said = f'at step 7; gave up after 3 failures without a new step. Saved steps are intact; see {last["log"]}.'
  assert said in capsys.readouterr().err


def test_a_run_that_makes_progress_is_always_restarted(tmp_path):
  assert run(tmp_path, {'0': [(2, 1), (2, 1), (3, 1), (3, 1), (6, -9), (7, -9), (8, 1)]}) == 0
  assert starts(tmp_path) == 8
  assert [i['step_resumed'] for i in incidents(tmp_path)] == [0, 0, 0, 0, 5, 5, 5]


def test_examples_of_a_step_that_fails_repeatedly_are_left_out(tmp_path):
  assert run(tmp_path, {'0': [(7, 1)] * 3}, skip_poisoned=True) == 0
  assert incidents(tmp_path)[-1]['action'] == 'restart without examples 56..71'
  assert read_skips(tmp_path) == [(56, 72)]


def test_a_step_that_fails_after_skipped_examples_is_skipped_too(tmp_path):
  """The run stays at the start of the range until a step after it is done: the same range again would not help."""
  assert run(tmp_path, {'0': [(7, 1)] * 6}, skip_poisoned=True) == 0
  assert read_skips(tmp_path) == [(56, 72), (72, 88)]


def test_steps_that_are_only_in_the_metrics_are_not_left_out(tmp_path):
  """A timeline has a line per second; a process killed in its hundredth step of a second has written 100 rows."""
  (tmp_path / 'metrics.jsonl').write_text('{"step": 9, "loss": 2.0}\n{"step": 10, "loss": 2.0}\n')
  add_skip(tmp_path, 64, 80)  # 7 steps are 56 examples, 8 are 64, 9 are 88
  assert run(tmp_path, {'0': [(7, 1)] * 3}, skip_poisoned=True) == 0
  assert read_skips(tmp_path) == [(64, 80), (96, 112)]


def test_a_signal_during_the_start_reaches_the_processes(tmp_path, monkeypatch):
  """Otherwise they would continue to train and would not save."""
  script = 'import signal, time; signal.signal(signal.SIGTERM, lambda *_: exit(75)); time.sleep(60)'
  supervisor = Supervisor(1, [sys.executable, '-c', script], tmp_path, Policy(), stream=io.StringIO())

  class Slow(supervise.Group):
    def __init__(self, *args, **options):
      super().__init__(*args, **options)
      supervisor._stop(signal.SIGTERM)  # the group is not known to it yet

  monkeypatch.setattr(supervise, 'Group', Slow)
  start = time.monotonic()
  assert supervisor.run() == 75
  assert time.monotonic() - start < 30


def test_without_restarts_the_first_failure_is_the_last(tmp_path):
  assert run(tmp_path, {'0': [(7, -9)]}, max_restarts=0) == 137
  assert starts(tmp_path) == 1


@pytest.mark.slow
def test_a_run_continues_without_a_host_that_does_not_come_back(tmp_path):
  """Not after one death, and not below --min_hosts; the new count is the next one that divides the batch."""
  plan = {'3': [(None, 1)] * 9}
  for name in ('all', 'fewer', 'once'):
    (tmp_path / name).mkdir()
  assert run(tmp_path / 'all', plan, hosts=4) == 1
  assert run(tmp_path / 'fewer', plan, hosts=4, min_hosts=1, fits=lambda n: n != 3) == 0
  assert starts(tmp_path / 'fewer', host=3) == supervise.AWAY == 2
  assert [i['action'] for i in incidents(tmp_path / 'fewer')] == ['restart', 'restart with 2 hosts']
  assert run(tmp_path / 'once', {'3': [(None, 1)]}, hosts=4, min_hosts=1) == 0
  assert starts(tmp_path / 'once', host=3) == 2


STUBBORN = """
import pathlib, sys
from pretrain.fleet.supervise import *
child = '''
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN if %d else (lambda *_: exit(75)))
print('up', flush=True)
time.sleep(60)
'''
sys.exit(Supervisor(2, [sys.executable, '-c', child], pathlib.Path(sys.argv[1]), Policy(), stream=sys.stdout).run())
"""


@pytest.mark.parametrize(
  ('number', 'deaf', 'code'),
  [pytest.param(signal.SIGTERM, 0, 75, marks=pytest.mark.slow), (signal.SIGINT, 0, 75), (signal.SIGTERM, 1, 137)],
)
def test_a_signal_makes_all_save_and_a_second_one_ends_them(tmp_path, number, deaf, code):
  command = [sys.executable, '-c', STUBBORN % deaf, tmp_path]
  with subprocess.Popen(command, cwd=tiny.ROOT, stdout=subprocess.PIPE, text=True) as process:
    assert {process.stdout.readline(), process.stdout.readline()} == {'[0] up\n', '[1] up\n'}
    process.send_signal(number)
    if deaf:
      with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
      process.send_signal(number)
    assert process.wait(20) == code


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--hosts=0'], '--hosts=0; it must be at least 1.'),
    (['--hosts=2', '--max_restarts=-1'], '--max_restarts=-1; it must be at least 0 (0 = never).'),
    (['--hosts=2', '--min_hosts=3'], '--min_hosts=3 with --hosts=2; it must be 1 to --hosts.'),
  ],
)
def test_impossible_numbers_are_refused(capsys, flags, message):
  assert main(['run', *flags, '--', 'train', '--gin_file=x', '--workdir=y']) == 64
  assert capsys.readouterr().err == f'CONFIG: {message}\n'


@pytest.mark.parametrize(
  ('file', 'key', 'message'),
  [
    ('ul2/tiny_odm.gin', 'seed=0', '--skip_poisoned with data.online, whose weights come from the losses of all'),
    (
      'ul2/tiny.gin', "phases=[{'start_step': 9, 'set': {'data.batch_size': 64}}]",
      '--skip_poisoned with data.batch_size=[32, 64] in phases; give all one size, or remove it.',
    ),
  ],
)  # fmt: skip
def test_skipping_is_refused_if_examples_cannot_be_left_out(capsys, tmp_path, file, key, message):
  flags = [f'--gin_file={tiny.ROOT / "configs" / file}', f'--workdir={tmp_path}', f'--gin.{key}']
  assert main(['run', '--hosts=1', '--skip_poisoned', '--', 'train', *flags]) == 64
  assert message in capsys.readouterr().err


def test_a_mistake_shows_before_a_process_is_started(capsys, tmp_path):
  assert main(['run', '--hosts=2', '--', 'train', '--gin_file=no.gin', f'--workdir={tmp_path}']) == 64
  assert capsys.readouterr().err.startswith('CONFIG: --gin_file=no.gin (looked for in ')
