"""Files that start a run on a cluster: their exit codes are those of the program, and their syntax is right."""

import copy
import os
import pathlib
import re
import shlex
import subprocess

import pytest
import yaml

from pretrain.cli.shared import EXIT_CODES
from pretrain.fleet import cluster, launch
from tests.launch.jobset import mistakes
from tests.pretrain import tiny

LAUNCH = tiny.ROOT / 'launch'
JOBSETS = ('jobset_tpu.yaml', 'jobset_gpu.yaml')
RESUMES, ENDS = {70, 72, 74, 75}, {64, 65, 66, 71}


def test_the_codes_of_this_test_are_those_of_the_program():
  """As `pretrain --help` prints them, and as the supervisor of `pretrain run` and errors.py have them."""
  from pretrain import errors
  from pretrain.hosts import watchdog
  from pretrain.run import train

  assert set(launch.USER_CODES) == ENDS
  restarted = {launch.PREEMPTED, launch.HANG, launch.REWOUND, launch.CORRUPTED}
  assert (
    restarted
    == RESUMES
    == set(map(int, re.search(r'after (.*) the same command', EXIT_CODES)[1].replace(' and', ',').split(', ')))
  )
  assert set(map(int, re.findall(r'(\d+) [a-z]', EXIT_CODES))) - {0, 75} >= ENDS
  classes = [getattr(errors, name) for name in dir(errors)]
  codes = {c.exit_code for c in classes if isinstance(c, type) and issubclass(c, errors.UserError)}
  assert codes - {1} | {watchdog.EXIT_CODE, train.PREEMPTED} <= RESUMES | ENDS


def document(name: str) -> dict:
  return yaml.safe_load((LAUNCH / name).read_text())


def replicated(jobset: dict) -> tuple[dict, dict]:
  """(the Job, its pod) of a JobSet."""
  (job,) = jobset['spec']['replicatedJobs']
  return job, job['template']['spec']['template']['spec']


def shell_codes(text: str) -> tuple[set[int], set[int]]:
  """(codes that restart, codes that end) of the `case` over exit codes in a shell script."""
  lines = dict(re.findall(r'^ +([\d|]+)\) (.*)$', text, re.MULTILINE))
  codes = {tuple(map(int, numbers.split('|'))): action for numbers, action in lines.items() if numbers != '0'}
  ends = {code for numbers, action in codes.items() if re.match(r'return 1|exit', action) for code in numbers}
  return {code for numbers in codes for code in numbers} - ends, ends


@pytest.mark.parametrize('name', JOBSETS)
def test_a_jobset_fails_on_what_a_restart_would_find_again_and_restarts_on_the_rest(name):
  jobset = document(name)
  job, _ = replicated(jobset)
  (rule,) = job['template']['spec']['podFailurePolicy']['rules']
  assert (rule['action'], rule['onExitCodes']['operator']) == ('FailJob', 'In')
  assert set(rule['onExitCodes']['values']) == ENDS
  (policy,) = jobset['spec']['failurePolicy']['rules']
  assert (policy['action'], policy['onJobFailureReasons']) == ('FailJobSet', ['PodFailurePolicy'])
  assert job['template']['spec']['backoffLimit'] == 0
  comment = re.search(
    r'# codes ([\d, ]+), see podFailurePolicy; all others \(([\d, ]+), killed\)', (LAUNCH / name).read_text()
  )
  assert [set(map(int, listed.split(', '))) for listed in comment.groups()] == [ENDS, RESUMES]


@pytest.mark.parametrize('name', ['slurm.sbatch', 'restart.sh'])
def test_a_script_restarts_on_the_same_codes(name):
  assert shell_codes((LAUNCH / name).read_text()) == (RESUMES, ENDS)


def test_documents_have_the_same_codes():
  pages = (tiny.ROOT / 'docs/pods.md').read_text()
  table = dict(re.findall(r'^\| (\d+) \|.*\| (yes|no|) ?\|$', pages, re.MULTILINE))
  assert {int(code) for code, again in table.items() if again == 'yes'} == RESUMES
  assert {int(code) for code, again in table.items() if again == 'no'} == ENDS
  (xpk,) = re.findall(r'--restart-on-exit-codes=([\d,]+)', pages)
  assert set(map(int, xpk.split(','))) == RESUMES


@pytest.mark.parametrize('name', JOBSETS)
def test_a_jobset_file_is_valid(name):
  jobset = document(name)
  assert mistakes(jobset) == []
  _, pod = replicated(jobset)
  (container,) = pod['containers']
  assert container['ports'] == [{'containerPort': cluster.PORT}]
  assert container['command'] == ['pretrain', 'train'], 'no shell before it: SIGTERM reaches it'


def test_pods_with_gpus_know_how_many_they_are_and_where_the_first_is():
  jobset = document('jobset_gpu.yaml')
  job, pod = replicated(jobset)
  env = {item['name']: item.get('value', '1') for item in pod['containers'][0]['env']}
  name, parallelism = jobset['metadata']['name'], job['template']['spec']['parallelism']
  assert int(env['PRETRAIN_NUM_HOSTS']) == parallelism * job['replicas']
  assert env['PRETRAIN_COORDINATOR'] == f'{name}-{job["name"]}-0-0.{name}:{cluster.PORT}'
  found = cluster.find(env | {'JOBSET_JOB_INDEX': '0', 'JOB_COMPLETION_INDEX': '2'}, tpu=False, attribute={}.get)
  assert (found.processes, found.this) == (4, 2)


def test_the_tpu_file_has_a_pod_for_each_host_of_its_slice():
  """v5p: four chips a host. configs/ul2/20b.gin is for 4x4x8."""
  job, pod = replicated(document('jobset_tpu.yaml'))
  chips = int(pod['containers'][0]['resources']['limits']['google.com/tpu'])
  x, y, z = map(int, pod['nodeSelector']['cloud.google.com/gke-tpu-topology'].split('x'))
  assert job['template']['spec']['parallelism'] * chips == x * y * z
  assert 'v5p:4x4x8' in (tiny.ROOT / 'configs/ul2/20b.gin').read_text()
  assert '--gin_file=configs/ul2/20b.gin' in pod['containers'][0]['args']


def spec_of(jobset: dict) -> dict:
  return replicated(jobset)[0]['template']['spec']


@pytest.mark.parametrize(
  ('change', 'mistake'),
  [
    (lambda d: spec_of(d).update(podFailurePolicies={}), 'spec/podFailurePolicies is no field; the fields are'),
    (lambda d: d['spec']['failurePolicy'].update(maxRestarts='x'), "failurePolicy/maxRestarts is 'x', not a number"),
    (lambda d: d['spec']['failurePolicy']['rules'][0].update(action='Retry'), "action is 'Retry', not one of"),
    (lambda d: replicated(d)[1].update(restartPolicy='OnFailure'), 'podFailurePolicy needs restartPolicy: Never'),
    (lambda d: replicated(d)[1].pop('containers'), 'spec/containers is missing'),
    (lambda d: replicated(d)[1]['containers'][0].update(name='main'), 'onExitCodes names a container pretrain; there'),
    (lambda d: replicated(d)[1]['containers'][0]['env'][0].update(value=4), 'value is 4, not a str'),
    (lambda d: spec_of(d)['podFailurePolicy']['rules'][0]['onExitCodes'].update(values=['64']), "values/0 is '64'"),
    (lambda d: spec_of(d).update(completions=3), 'parallelism .* is not completions 3'),
    (lambda d: replicated(d)[1]['containers'][0]['resources']['limits'].clear(), 'has a request of . and a limit of'),
  ],
)  # fmt: skip
@pytest.mark.parametrize('name', JOBSETS)
def test_a_planted_mistake_is_found(name, change, mistake):
  jobset = copy.deepcopy(document(name))
  change(jobset)
  found = mistakes(jobset)
  assert [line for line in found if re.search(mistake, line)], found


@pytest.mark.parametrize('path', sorted(LAUNCH.glob('*.s*')), ids=lambda path: path.name)
def test_scripts_are_programs_without_mistakes_of_syntax(path):
  done = subprocess.run(['bash', '-n', path], capture_output=True, text=True, check=False)
  assert (done.returncode, done.stderr) == (0, '')
  assert os.access(path, os.X_OK)
  assert path.read_text().startswith('#!/usr/bin/env bash\n')


def tpu_vm(*words: str, **more: str) -> subprocess.CompletedProcess:
  env = {name: value for name, value in os.environ.items() if name not in ('WORKDIR', 'NAME', 'ZONE', 'TYPE')} | more
  return subprocess.run(
    ['bash', LAUNCH / 'tpu_vm.sh', *words], env=env, capture_output=True, text=True, check=False, cwd=LAUNCH
  )  # fmt: skip


def test_a_dry_run_prints_every_command_and_runs_none(tmp_path):
  """A program named gcloud would leave a file."""
  (tmp_path / 'gcloud').write_text(f'#!/bin/sh\ntouch {tmp_path}/ran\n')
  (tmp_path / 'gcloud').chmod(0o755)
  before = set(tiny.ROOT.iterdir())
  environ = {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'WORKDIR': 'gs://b/r'}
  done = tpu_vm('--dry_run', 'configs/ul2/20b.gin', "--gin.data.name='store'", **environ)
  assert (done.returncode, done.stderr) == (0, '')
  commands = [shlex.split(line, comments=True) for line in done.stdout.splitlines()]
  verbs = [
    words[4] if words[:4] == ['gcloud', 'compute', 'tpus', 'tpu-vm'] else words[0] for words in commands if words
  ]
  assert verbs == ['create', 'mkdir', 'git', 'scp', 'ssh', 'ssh', 'ssh', 'ssh', 'ssh', 'delete']
  trained = next(words[-1] for words in commands if 'pretrain train' in ' '.join(words))
  command = shlex.split(trained.removeprefix('--command=').split('>>')[0])
  assert command[5:] == [
    'launch/restart.sh', '.venv/bin/pretrain', 'train', '--gin_file=configs/ul2/20b.gin', '--workdir=gs://b/r',
    "--gin.data.name='store'",
  ]  # fmt: skip
  assert not (tmp_path / 'ran').exists()
  assert set(tiny.ROOT.iterdir()) == before
  queued = tpu_vm('--dry_run', 'create', 'configs/ul2/20b.gin', QUEUE='1', SPOT='1', **environ).stdout.splitlines()
  assert [line.split()[4] for line in queued] == ['create', 'describe']
  assert queued[0].endswith('--spot')


@pytest.mark.parametrize(
  ('words', 'message'),
  [
    (['up', 'configs/ul2/20b.gin'], 'WORKDIR is not set; all VMs write there: WORKDIR=gs://BUCKET/RUN.'),
    (['--dry_run', 'no.gin'], 'no.gin does not exist; name a .gin file, or an action: up create copy train tail'),
    (['--dry_run'], 'no config; write launch/tpu_vm.sh [--dry_run] [ACTION] CONFIG.gin.'),
  ],
)
def test_tpu_vm_refuses_what_it_cannot_start(words, message):
  done = tpu_vm(*words, PATH='/usr/bin:/bin')
  assert done.returncode == 64
  assert f'tpu_vm.sh: {message}' in done.stderr
  assert done.stdout == ''


def test_queued_vms_are_waited_for(tmp_path):
  """A gcloud that says WAITING, then ACTIVE; or FAILED."""
  (tmp_path / 'gcloud').write_text(
    f'#!/bin/bash\necho "$4" >>{tmp_path}/asked\n[[ $4 == describe ]] && {{ read -r state <{tmp_path}/states; '
    f'echo "$state"; sed -i 1d {tmp_path}/states; }}\nexit 0\n'
  )
  (tmp_path / 'sleep').write_text('#!/bin/sh\n')
  for name in ('gcloud', 'sleep'):
    (tmp_path / name).chmod(0o755)
  environ = {'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'WORKDIR': 'gs://b/r', 'QUEUE': '1'}
  (tmp_path / 'states').write_text('WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n')
  assert tpu_vm('create', 'configs/ul2/20b.gin', **environ).returncode == 0
  assert (tmp_path / 'asked').read_text().split() == ['create', *['describe'] * 3]
  (tmp_path / 'states').write_text('FAILED\n')
  done = tpu_vm('create', 'configs/ul2/20b.gin', **environ)
  assert 'tpu_vm.sh: the request for pretrain is FAILED; delete it, and create it again.' in done.stderr
  assert done.returncode == 64


@pytest.mark.parametrize('codes', [[75, 70, 72, 74, 137, 1, 0], [75, 64], [66]])
def test_a_command_is_started_again_while_its_code_resumes(tmp_path, codes):
  (tmp_path / 'codes').write_text(''.join(f'{code}\n' for code in codes))
  (tmp_path / 'program').write_text(
    f'#!/bin/bash\nread -r code <{tmp_path}/codes; sed -i 1d {tmp_path}/codes; exit "$code"\n'
  )
  (tmp_path / 'program').chmod(0o755)
  done = restart(tmp_path / 'program')
  assert done.returncode == codes[-1]
  assert (tmp_path / 'codes').read_text() == ''
  assert done.stderr.splitlines()[-1] == f'restart.sh: exit code {codes[-1]} after {len(codes) - 1} restarts'


def restart(program: pathlib.Path, **more: str) -> subprocess.CompletedProcess:
  env = os.environ | {'PAUSE_SECONDS': '0'} | more
  return subprocess.run([LAUNCH / 'restart.sh', program], env=env, capture_output=True, text=True, check=False)


def test_a_command_that_is_told_to_stop_is_not_started_again(tmp_path):
  (tmp_path / 'program').write_text(
    f'#!/bin/bash\ntrap "exit 75" TERM\necho x >>{tmp_path}/starts\nsleep 30 2>/dev/null & wait\n'
  )
  (tmp_path / 'program').chmod(0o755)
  process = subprocess.Popen([LAUNCH / 'restart.sh', tmp_path / 'program'], stderr=subprocess.PIPE, text=True)
  while not (tmp_path / 'starts').exists():
    pass
  process.terminate()
  _, said = process.communicate(timeout=20)
  assert process.returncode == 75
  assert said == 'restart.sh: exit code 75 after 0 restarts\n'
  assert (tmp_path / 'starts').read_text() == 'x\n'


def test_the_image_takes_a_tpu_or_cuda():
  text = (LAUNCH / 'Dockerfile').read_text()
  extras = re.search(r'\[options.extras_require\]\n(.*?)\n\n', (tiny.ROOT / 'setup.cfg').read_text(), re.DOTALL)[1]
  for accelerator in re.findall(r'"\$ACCELERATOR" = (\w+)', text):
    assert re.search(rf'^{accelerator} = jax', extras, re.MULTILINE), accelerator
  for copied in re.findall(r'^COPY (.*) \S+$', text, re.MULTILINE):
    for name in copied.split():
      assert (tiny.ROOT / name).exists(), name
  packages = re.findall(r'^  (\w+)\*|^    (\w+)\*', (tiny.ROOT / 'setup.cfg').read_text(), re.MULTILINE)
  assert {name for pair in packages for name in pair if name} <= set(re.findall(r'COPY (\w+) \1', text))
