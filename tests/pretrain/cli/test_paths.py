"""Paths with ~ are expanded wherever one is read; bytes that are not UTF-8 are legal in paths, an error in text."""

import os
import pathlib
import subprocess
import sys

import pytest

from data.arguments import expand_user
from pretrain.cli import main as command
from pretrain.cli import shared
from pretrain.config import bindings
from pretrain.devices.compilation_cache import cache_dir
from pretrain.experiment.experiment import Experiment
from tests.pretrain import tiny

BAD = os.fsdecode(b'caf\xe9')


@pytest.fixture
def home(tmp_path, monkeypatch):
  home = tmp_path / 'home'
  home.mkdir()
  monkeypatch.setenv('HOME', str(home))
  monkeypatch.chdir(tmp_path)
  return home


def parsed(*argv):
  return shared.parse(list(argv), command.COMMANDS)[0]


FILES = ['--gin_file=a.gin']
# (command, the flag that is a path, what it becomes)
FLAGS = [
  (['train', *FILES], '--workdir', 'workdir'),
  (['train', '--workdir=w'], '--gin_file', 'gin_file'),
  (['config', *FILES], '--plot', 'plot'),
  (['generate', '--text=a'], '--workdir', 'workdir'),
  (['generate', '--workdir=w'], '--prompts', 'prompts'),
  (['generate', '--workdir=w'], '--out', 'out'),
  (['eval'], '--workdir', 'workdir'),
  (['eval'], '--from', 'source'),
  (['eval'], '--out', 'out'),
  (['report'], '', 'workdir'),
  (['replay', '--step=1'], '--workdir', 'workdir'),
  (['plan', '--topology=v5e:2x2'], '--gin_file', 'gin_file'),
  (['data', 'prepare', '--out=o'], '', 'inputs'),
  (['data', 'prepare', 'in.txt'], '--out', 'out'),
  (['data', 'prepare', 'in.txt', '--out=o'], '--tokenizer', 'tokenizer'),
  (['data', 'verify'], '', 'path'),
  (['data', 'inspect'], '', 'path'),
  (['data', 'stats', '--out=o'], '', 'path'),
  (['data', 'stats', 'store'], '--out', 'out'),
  (['data', 'show'], '--workdir', 'workdir'),
  (['data', 'explain'], '--gin_file', 'gin_file'),
  (['data', 'plan'], '--gin_file', 'gin_file'),
  (['checkpoints', 'list'], '--workdir', 'workdir'),
  (['checkpoints', 'verify'], '--workdir', 'workdir'),
  (['checkpoints', 'average', '--steps=1', '--output=o'], '--workdir', 'workdir'),
  (['checkpoints', 'average', '--steps=1', '--workdir=w'], '--output', 'output'),
  (['checkpoints', 'diff'], '--inputs', 'inputs'),
  (['checkpoints', 'merge', '--inputs=a', '--output=o', '--coefficients=1'], '--base', 'base'),
  (['checkpoints', 'restore-as', '--output=o'], '--input', 'input'),
  (['checkpoints', 'grow', '--gin_file=f', '--method=stack', '--to=o'], '--input', 'input'),
]


@pytest.mark.parametrize(('argv', 'flag', 'name'), FLAGS, ids=lambda value: ' '.join(value) if value else '')
def test_every_flag_that_is_a_path_is_expanded_and_may_have_any_bytes(home, argv, flag, name):
  given = lambda path: getattr(parsed(*argv, f'{flag}={path}' if flag else path), name)
  found = lambda path: str(value[0] if isinstance(value := given(path), list) else value)
  assert found('~/runs/x') == f'{home}/runs/x'
  assert found('~') == str(home)
  assert found('~root/x') == f'{os.path.expanduser("~root")}/x'
  assert found('~nosuchuser/x') == '~nosuchuser/x'
  assert found('a~/~/b~') == 'a~/~/b~'
  assert found(BAD) == BAD


def flags_of(parser, words=()):
  """(words of a command, flag) of each flag and argument that takes a value."""
  for action in parser._actions:
    if isinstance(action.choices, dict):
      for name, child in action.choices.items():
        yield from flags_of(child, (*words, name))
    elif action.nargs != 0 and not (action.option_strings or [''])[0].startswith('--gin.'):
      yield words, (action.option_strings or [''])[0], action.type


def test_no_flag_takes_a_string_that_is_neither_path_nor_text():
  """A new flag has to say which: --topology, --special and the choices are compared with what there is."""
  plain = {(words, flag) for words, flag, kind in flags_of(shared.parser(command.COMMANDS)) if kind is None}
  assert plain == {
    (('plan',), '--topology'), (('data', 'prepare'), '--documents'), (('data', 'prepare'), '--records'),
    (('checkpoints', 'extend-vocabulary'), '--method'), (('checkpoints', 'warm-start'), '--cross'),
    (('checkpoints', 'grow'), '--method'),
    (('train',), '--cluster'), (('replay',), '--cluster'), (('generate',), '--special'),
    (('export',), '--dtype'), (('export',), '--quantize'),
  }  # fmt: skip


def test_every_path_of_a_config_is_expanded(home):
  flags = [
    "data.name='store'", "data.sources=[{'path': '~/a'}, {'path': 'b~/c'}, {'path': 's3://b/~x'}]",
    f"data.heldout=[{{'path': '~/h'}}, {{'path': '{BAD}'}}]", "checkpoint.initial='~/r/5'", "snapshot.folder='~/s'",
    "phases=[{'start_step': 2, 'set': {'data.sources': [{'path': '~/p'}]}}]",
  ]  # fmt: skip
  cfg = bindings.load(Experiment, [str(tiny.DECODER)], flags)
  assert [s.path for s in cfg.data.sources] == [f'{home}/a', 'b~/c', 's3://b/~x']
  assert [s.path for s in cfg.data.heldout] == [f'{home}/h', BAD]
  assert (cfg.checkpoint.initial, cfg.snapshot.folder) == (f'{home}/r/5', f'{home}/s')
  from pretrain.experiment.phases import phase_at

  assert [s.path for s in phase_at(cfg, 2).cfg.data.sources] == [f'{home}/p']


def test_included_files_and_the_cache_are_expanded(home, monkeypatch):
  (home / 'base.gin').write_text(f"include '{tiny.DECODER}'\nseed = 7\n")
  (home / 'x.gin').write_text("include '~/base.gin'\n")
  options = parsed('config', '--gin_file=~/x.gin')
  assert shared.load(options, []).seed == 7
  monkeypatch.setenv('PRETRAIN_CACHE', '~/cache')
  assert cache_dir() == home / 'cache'
  monkeypatch.delenv('PRETRAIN_CACHE')
  assert cache_dir() == home / '.cache' / 'pretrain'


def test_a_folder_whose_name_begins_with_a_tilde_can_be_named(home):
  assert parsed('report', './~x').workdir == pathlib.Path('~x')
  assert expand_user('./~x') == './~x'


TEXTS = [
  (['generate', '--workdir=w'], '--text'),
  (['checkpoints', 'soup', *FILES, '--inputs=a', '--output=o'], '--metric'),
  *((['data', 'prepare', 'in.txt', '--out=o'], f'--{name}') for name in (
    'field', 'inputs_field', 'targets_field', 'messages_field', 'score_field', 'tag_fields', 'scores',
  )),
]  # fmt: skip


def child(*argv):
  """The command in a process of its own, which gets the bytes as a shell passes them."""
  code = 'import sys; from pretrain.cli.main import main; sys.exit(main())'
  env = os.environ | {'PYTHONPATH': str(tiny.ROOT), 'JAX_PLATFORMS': 'cpu'}
  done = subprocess.run([sys.executable, '-c', code, *argv], capture_output=True, check=False, env=env)
  return done.returncode, done.stdout, done.stderr.decode()


@pytest.mark.parametrize(('argv', 'flag'), TEXTS, ids=lambda value: value if isinstance(value, str) else '')
def test_bytes_that_are_not_utf8_in_a_text_are_one_line(home, capsys, argv, flag):
  assert command.main([*argv, f'{flag}={BAD}']) == 64
  error = capsys.readouterr().err
  assert error.startswith(
    f"CONFIG: argument {flag}: 'caf\\udce9' has bytes that are not UTF-8; write the text in UTF-8"
  )
  assert error.count('\n') == 1


@pytest.mark.parametrize(
  ('override', 'sentence'),
  [
    (f"checkpoint.best_of='{BAD}'", "checkpoint.best_of='caf\\udce9' has bytes that are not UTF-8; write the text"),
    (f"model.name='{BAD}'", "model.name='caf\\udce9' is not one of"),
    (f'{BAD}=1', '--gin.caf\\udce9: syntax error'),
    (f'seed={BAD}', '--gin.seed: syntax error'),
  ],
)
def test_bytes_that_are_not_utf8_in_a_binding_are_one_line(capsys, override, sentence):
  assert command.main(['config', f'--gin_file={tiny.DECODER}', f'--gin.{override}']) == 64
  error = capsys.readouterr().err
  assert sentence in error
  assert error.count('\n') == 1


def test_a_run_in_such_a_folder_is_refused_before_anything_is_written(home, capsys):
  """TensorStore, which writes the checkpoints, takes only UTF-8."""
  train = ['train', f'--gin_file={tiny.DECODER}', f'--workdir={BAD}/run']
  for argv in (train, ['run', '--hosts=1', '--', *train]):
    assert command.main(argv) == 64
    error = capsys.readouterr().err
    assert error.startswith('CONFIG: --workdir=caf\\udce9/run is the folder ')
    assert error.count('\n') == 1
  pathlib.Path(BAD).mkdir()
  os.chdir(BAD)
  assert command.main([*train[:2], '--workdir=run']) == 64
  assert not os.listdir('.')


def test_checkpoints_of_such_a_folder_are_looked_for(home, capsys):
  assert command.main(['checkpoints', 'list', f'--workdir={BAD}']) == 66
  assert capsys.readouterr().err.count('\n') == 1


@pytest.mark.slow
def test_a_path_with_such_bytes_is_shown_and_never_crashes_the_message(home):
  code, out, error = child('config', f'--gin_file={BAD}.gin')
  where = f'caf\\udce9.gin (looked for in {os.getcwd()})'
  assert (code, error) == (
    64,
    f'CONFIG: --gin_file={where} cannot be read (No such file or directory); check the path.\n',
  )
  pathlib.Path(f'{BAD}.gin').write_text(f"include '{tiny.DECODER}'\n")
  code, out, error = child('config', f'--gin_file={BAD}.gin', f'--plot={BAD}.png')
  assert (code, out, error) == (0, b'caf\xe9.png\n', '')
  assert pathlib.Path(f'{BAD}.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize(
  'argv',
  [
    ('config', '--gin_file=no'),
    ('train', '--gin_file=no', '--workdir=run'),
    ('train', f'--gin_file={tiny.DECODER}', '--workdir=run', "--gin.checkpoint.initial='no/0'"),
    ('data', 'plan', '--gin_file=no'),
    ('data', 'prepare', '--out=store', '--tokenizer=no', str(tiny.ROOT / 'README.md')),
    ('data', 'prepare', '--out=store', 'no'),
    ('data', 'verify', 'no'),
    ('data', 'stats', 'no', '--out=stats'),
    ('generate', '--workdir=no', '--text=a'),
    ('report', 'no'),
    ('replay', '--workdir=no', '--step=1'),
    ('checkpoints', 'list', '--workdir=no'),
    ('import', '--from=no', '--workdir=run'),
    ('export', '--workdir=no', '--out=out'),
  ],
  ids=lambda argv: '-'.join(argv[:2]),
)
def test_a_missing_relative_path_is_reported_with_the_folder_it_was_looked_for_in(home, capsys, argv):
  before = set(os.listdir())
  assert command.main(list(argv)) in (64, 65, 66)
  error = capsys.readouterr().err
  assert f' (looked for in {os.getcwd()})' in error
  assert error.count('\n') == 1
  assert set(os.listdir()) == before
