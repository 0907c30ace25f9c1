"""Nothing that is read may run, lead elsewhere, or show a secret; nothing listens that anybody could reach."""

import ast
import io
import re
import socket
import subprocess
import sys

import pytest

from data.errors import DataError
from data.stores.store import open_store
from pretrain.cli import main
from pretrain.config import bindings
from pretrain.errors import ConfigError, HostError
from pretrain.experiment.experiment import Experiment
from pretrain.fleet import launch
from pretrain.redact import redact
from tests.pretrain import tiny
from tests.test_house import PACKAGES, ROOT, SOURCES

PROGRAMS = sorted((ROOT / 'scripts').rglob('*.py'))
RUNS = ('pickle', 'cloudpickle', 'dill', 'joblib', 'shelve', 'marshal', 'jsonpickle', 'torch', 'code', 'runpy')
CALLS = ('eval', 'exec', 'compile', '__import__', 'os.system', 'os.popen', 'yaml.load', 'serialize_executable')
# What the product is shown to refuse; what scripts use that are run by hand, on models that they make themselves.
PLANTED = {
  'safety.py': {'pickle'}, 'check_export.py': {'torch'}, 'make_interchange_goldens.py': {'torch'},
  'make_generation_goldens.py': {'torch'}, 'check_lm_eval.py': {'torch'}, 'make_packed_goldens.py': {'torch'},
}  # fmt: skip


def dangers(text: str) -> list[str]:
  """What in a program would run what it reads, or open a server."""
  found = []
  for node in ast.walk(ast.parse(text)):
    match node:
      case ast.Import(names=names):
        found += [name.name for name in names if name.name.split('.')[0] in RUNS]
      case ast.ImportFrom(module=str(module)):
        found += [module] if module.split('.')[0] in RUNS else []
      case ast.Call(func=function, keywords=keywords):
        name = ast.unparse(function)
        found += [name] if name in CALLS or name.endswith(('profiler.start_server', 'start_http_server')) else []
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in keywords}
        if name.endswith('np.load') and given.get('allow_pickle') != 'False':
          found.append('np.load that may unpickle')
        if given.get('shell') == 'True' or given.get('trust_remote_code') == 'True':
          found.append(f'{name} of a shell, or of what others wrote')
      case ast.Constant(value=str(value)) if value == '0.0.0.0':
        found.append(f'an address that is every network: {value}')
  return found


def test_nothing_that_is_read_may_run():
  found = {path.name: set(dangers(path.read_text())) - PLANTED.get(path.name, set()) for path in [*SOURCES, *PROGRAMS]}
  assert found.pop('addresses.py') == {'an address that is every network: 0.0.0.0'}, 'to refuse it'
  assert {name: bad for name, bad in found.items() if bad} == {}


@pytest.mark.parametrize(
  'text',
  [
    'import pickle', 'from cloudpickle import loads', 'def f():\n  import joblib.numpy_pickle', 'x = eval("1")',
    'exec(compile("1", "", "eval"))', 'np.load("x")', 'np.load("x", allow_pickle=True)', 'yaml.load(x)',
    'subprocess.run("x", shell=True)', 'load(name, trust_remote_code=True)', 'os.system("x")',
    'jax.profiler.start_server(9999)', 'bind(("0.0.0.0", 1))', '__import__(name)',
  ],
)  # fmt: skip
def test_each_of_them_is_seen(text):
  assert dangers(text)


def test_the_packages_are_all_looked_at():
  assert {path.relative_to(ROOT).parts[0] for path in SOURCES} == set(PACKAGES)
  assert len(PROGRAMS) > 20


def test_configs_hold_values_and_run_nothing(tmp_path):
  canary = tmp_path / 'canary'
  touch = f"__import__('pathlib').Path('{canary}').touch()"
  for value in (
    touch,
    f'(lambda: {touch})()',
    "''.__class__",
    f"f'{{{touch}}}'",
    f'[{touch} for i in (1,)]',
    'open',
    '1 if 1 else 2',
  ):
    with pytest.raises(ConfigError, match=r'^CONFIG: --gin.seed: |^CONFIG: --gin.seed='):
      bindings.load(Experiment, [str(tiny.DECODER)], [f'seed={value}'])
  assert not canary.exists()


@pytest.mark.parametrize(
  ('text', 'shown'),
  [
    ('s3://KEY:SECRET@bucket/x', 's3://***@bucket/x'),
    ('read https://h/x?token=SECRET&page=2.', 'read https://h/x?token=***&page=2.'),
    ('AWS_SECRET_ACCESS_KEY=SECRET go', 'AWS_SECRET_ACCESS_KEY=*** go'),
    ("{'api_key': 'SECRET', 'n': 1}", "{'api_key': '***', 'n': 1}"),
    ('hf_token: SECRET', 'hf_token: ***'),
    *((text, text) for text in (
      'tokens=100, num_tokens: 5', 'tokenizer was beefbeef.., is absent', '--tokenizer=/a/b', 'loss 3.1  9k tokens/s',
      'user@host', 's3://bucket/a@b', 'key = 3', 'schedule.peak=1e-3', 'keyword=4', "data.sources=[{'path': 'a:b@c'}]",
    )),
  ],
)  # fmt: skip
def test_secrets_are_hidden_and_nothing_else(text, shown):
  assert redact(text) == shown
  assert redact(shown) == shown


SECRET = "data.sources=[{'path': 's3://me:SECRET@bucket/x'}]"


def test_a_config_with_a_secret_is_refused_and_does_not_show_it(tmp_path, capsys):
  flags = [f'--gin_file={tiny.DECODER}', f'--workdir={tmp_path}/run', "--gin.data.name='store'", f'--gin.{SECRET}']
  assert main.main(['train', *flags]) == 64
  said = capsys.readouterr().err
  assert "CONFIG: data.sources='s3://***@bucket/x' has a password or token in it, and a config is saved" in said
  assert said.strip().endswith('put it in the environment, e.g. AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.')
  assert 'SECRET@' not in said
  assert not (tmp_path / 'run').exists()
  late = ('phases=[{"start_step": 1, "set": {"data.sources": [{"path": "https://h/x?sig_token=SECRET"}]}}]',)
  with pytest.raises(ConfigError, match=r'phases=.*has a password'):
    tiny.decoder("data.name='store'", "data.sources=[{'path': 'x'}]", *late)


def test_what_is_printed_hides_secrets(capsys):
  assert main.main(['train', '--gin_file=s3://me:SECRET@b/x.gin', '--workdir=x']) == 64
  assert 'SECRET' not in capsys.readouterr().err
  stream = io.StringIO()
  command = [sys.executable, '-c', "raise RuntimeError('s3://me:SECRET@bucket')"]
  assert launch.run_program(1, command, stream) == 1
  assert 'RuntimeError: s3://***@bucket' in stream.getvalue()
  assert 'SECRET' not in re.sub(r'.*-c.*', '', stream.getvalue())


def test_a_column_that_leads_out_of_its_store_is_refused(text_store, tmp_path):
  store = tmp_path / 'store'
  store.mkdir()
  text = (text_store / 'manifest.json').read_text()
  (store / 'manifest.json').write_text('{"columns": {"scores/../../x": "float32"},' + text[1:])
  for name in ('tokens', 'document_offsets', 'tokenizer.model'):
    (store / name).symlink_to(text_store / name)
  with pytest.raises(DataError, match=r"DATA-CORRUPT: 'scores/../../x/' is not a valid name inside "):
    open_store(store)


@pytest.mark.parametrize(
  ('address', 'message'),
  [
    ('0.0.0.0:80', 'PRETRAIN_COORDINATOR=0.0.0.0:80 would open the coordinator, which has no password, to every'),
    ('[::]:80', 'to every network; name the address of one'),
    (':80', 'PRETRAIN_COORDINATOR=:80 is not an address; write HOST:PORT'),
    ('10.0.0.7', 'is not an address; write HOST:PORT'),
    ('10.0.0.7:99999', 'is not an address; write HOST:PORT'),
  ],
)
def test_the_coordinator_is_given_one_address(monkeypatch, address, message):
  meet(monkeypatch, 1, address)
  with pytest.raises(ConfigError, match=re.escape(message)):
    launch.initialize_from_env(0.1)


def meet(monkeypatch, host: int, address: str) -> None:
  for name, value in ((launch.COORDINATOR, address), (launch.NUM_HOSTS, '2'), (launch.HOST, str(host))):
    monkeypatch.setenv(name, value)


def test_a_coordinator_that_is_not_there_is_named_in_time(monkeypatch):
  address = f'127.0.0.1:{launch.free_port()}'
  meet(monkeypatch, 1, address)
  with pytest.raises(HostError, match=f'process 1 has not reached the coordinator at {address} within 0 s .*refused'):
    launch.initialize_from_env(0.2)


def test_a_port_that_is_taken_is_named(monkeypatch):
  with socket.socket() as taken:
    taken.bind(('127.0.0.1', 0))
    taken.listen()
    address = f'127.0.0.1:{taken.getsockname()[1]}'
    meet(monkeypatch, 0, address)
    with pytest.raises(ConfigError, match=rf'{address}: process 0 cannot listen there \(Address already in use'):
      launch.initialize_from_env(0.2)


def test_a_process_that_is_not_one_of_them_is_refused(monkeypatch):
  meet(monkeypatch, 2, '127.0.0.1:80')
  with pytest.raises(ConfigError, match='PRETRAIN_HOST=2 with PRETRAIN_NUM_HOSTS=2; processes are numbered from 0'):
    launch.initialize_from_env()


def test_who_waits_too_long_for_the_others_says_where():
  code = (
    "import time; from pretrain.fleet.launch import ending_after\nwith ending_after(0.2, 'at A.'):\n  time.sleep(60)"
  )
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=False)
  assert (done.returncode, done.stderr) == (70, 'HANG: at A.\n')


def test_random_numbers_are_the_runs_own():
  """Whatever the environment says; otherwise a run that is resumed elsewhere would draw others."""
  code = (
    'from pretrain.devices import mesh\nfrom pretrain.step import train_step as step\n'
    'import jax\nmesh.prepare_platform(mesh.MeshConfig())\n'
    'key = jax.random.key(3, impl=step.PRNG)\nprint(jax.random.uniform(key, (3,)), jax.random.split(key, 2)[1])'
  )
  env = {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
  runs = [
    subprocess.run(
      [sys.executable, '-c', code], cwd=ROOT, env=env | more, capture_output=True, text=True, check=True
    ).stdout
    for more in ({}, {'JAX_DEFAULT_PRNG_IMPL': 'rbg', 'JAX_THREEFRY_PARTITIONABLE': '0'})
  ]
  assert runs[0] == runs[1]
  text = (ROOT / 'pretrain/step/train_step.py').read_text()
  assert text.count('random.key(') == text.count('random.key(seed, impl=PRNG)') == 2
