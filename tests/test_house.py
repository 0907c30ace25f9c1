"""The rules of the house that no linter has: sizes, one place for TPU topologies, no machine's paths."""

import ast
import configparser
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ('pretrain', 'models', 'data', 'pallas_kernels')
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob('*.py'))
LONGEST_FILE, LONGEST_FUNCTION, MEDIAN_FUNCTION, P90_FUNCTION = 400, 60, 8, 25
LARGEST_FOLDER = 12  # modules; __init__.py is not counted


def tracked() -> list[pathlib.Path]:
  names = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True, check=True).stdout
  return [ROOT / name for name in names.split('\0') if name and (ROOT / name).is_file()]


def functions(path: pathlib.Path, root: pathlib.Path = ROOT) -> dict[str, int]:
  """Lines of the body of each function, without its docstring; a function inside another counts with the outer one."""
  found = {}
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.FunctionDef):
      body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
      found[f'{path.relative_to(root)}:{node.lineno} {node.name}'] = node.body[-1].end_lineno - body[0].lineno + 1
  return found


@pytest.fixture(scope='module')
def lengths() -> dict[str, int]:
  return {name: length for path in SOURCES for name, length in functions(path).items()}


def test_files_are_short():
  assert {str(p): n for p in SOURCES if (n := len(p.read_text().splitlines())) > LONGEST_FILE} == {}


def test_functions_fit_a_screen(lengths):
  in_kernels = lambda name: name.startswith('pallas_kernels') and '/reference' not in name and '/api' not in name
  assert {name: n for name, n in lengths.items() if n > LONGEST_FUNCTION and not in_kernels(name)} == {}


def test_most_functions_are_a_thought(lengths):
  assert statistics.median(lengths.values()) <= MEDIAN_FUNCTION
  assert statistics.quantiles(lengths.values(), n=10)[-1] <= P90_FUNCTION


def test_a_function_is_measured_without_its_docstring(tmp_path):
  (tmp_path / 'x.py').write_text('def f():\n  """One\n\n  two."""\n  a = 1\n\n  return a\n')
  assert functions(tmp_path / 'x.py', tmp_path) == {'x.py:1 f': 3}


def test_tpu_topologies_are_asked_for_in_one_place():
  users = [str(p.relative_to(ROOT)) for p in SOURCES if re.search(r'\btopologies\b', p.read_text())]
  assert users == ['pretrain/tools/plan.py']


def test_there_is_no_drawer_for_everything():
  assert [p for p in SOURCES if p.stem in ('utils', 'util', 'helpers', 'common', 'misc')] == []


def test_no_machine_is_named():
  """Paths of somebody's machine mean nothing to anybody else."""
  home = re.compile(rb'/(?:home|Users|root|work|mnt)/\w|/tmp/\w')
  found = {}
  for path in tracked():
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
      if home.search(line) and path != pathlib.Path(__file__):
        found[f'{path.relative_to(ROOT)}:{number}'] = line[:200]
  assert found == {}


def test_every_shipped_config_begins_with_what_to_expect():
  """Purpose and size, hardware, the expected loss: so that a reader can tell a good run from a bad one."""
  for path in (ROOT / 'configs').rglob('*.gin'):
    header = re.match(r'(#.*\n)+', path.read_text())
    assert header, path
    for word in ('Hardware:', 'Expected:'):
      assert word in header[0], f'{path}: the header lacks {word}'


def folders(root: pathlib.Path, packages: tuple[str, ...]) -> dict[str, list[pathlib.Path]]:
  """The Python files of each folder that has any."""
  found = {}
  for path in sorted(path for package in packages for path in (root / package).rglob('*.py')):
    found.setdefault(str(path.parent.relative_to(root)), []).append(path)
  return found


def large_folders(root: pathlib.Path, packages: tuple[str, ...]) -> dict[str, int]:
  sizes = {name: sum(path.name != '__init__.py' for path in own) for name, own in folders(root, packages).items()}
  return {name: size for name, size in sizes.items() if size > LARGEST_FOLDER}


def test_no_folder_has_more_than_twelve_modules():
  assert large_folders(ROOT, (*PACKAGES, 'scripts')) == {}


def test_modules_of_a_folder_are_counted_without_its_init(tmp_path):
  for name in ('a/b/__init__', *(f'a/b/m{i}' for i in range(LARGEST_FOLDER)), 'a/x'):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / f'{name}.py').touch()
  assert large_folders(tmp_path, ('a',)) == {}
  (tmp_path / 'a/b/one_too_many.py').touch()
  assert large_folders(tmp_path, ('a',)) == {'a/b': LARGEST_FOLDER + 1}


def test_every_folder_of_a_package_states_its_job_and_its_limits():
  """The docstring of `__init__.py`: what the folder does, and what it must not know or import."""
  limits = re.compile(r'must not|imports? (nothing|only)|nothing\b.*\bimports', re.DOTALL | re.IGNORECASE)
  for name, files in folders(ROOT, (*PACKAGES, 'scripts/faults')).items():
    inits = [path for path in files if path.name == '__init__.py']
    assert inits, f'{name}: no __init__.py'
    words = ast.get_docstring(ast.parse(inits[0].read_text())) or ''
    assert limits.search(words), f'{inits[0].relative_to(ROOT)}: the docstring names no limit'


def lint_imports(root: pathlib.Path) -> subprocess.CompletedProcess:
  program = [pathlib.Path(sys.executable).parent / 'lint-imports', '--no-logo', '--no-cache']
  env = os.environ | {'COLUMNS': '200'}  # names of contracts stay on one line
  return subprocess.run(program, cwd=root, env=env, capture_output=True, text=True, check=False)


def test_an_import_against_the_layers_is_refused(tmp_path):
  """lint-imports reads the contracts of setup.cfg: records below run, data beside models."""
  for package in PACKAGES:
    shutil.copytree(ROOT / package, tmp_path / package, ignore=lambda _, names: {n for n in names if '__pyc' in n})
  shutil.copy(ROOT / 'setup.cfg', tmp_path)
  for importer, imported in (('pretrain/records/plots', 'pretrain.run.train'), ('data/errors', 'models.build')):
    with (tmp_path / f'{importer}.py').open('a') as file:
      file.write(f'\nimport {imported}\n')
  config = configparser.ConfigParser()
  config.read(ROOT / 'setup.cfg')
  done = lint_imports(tmp_path)
  assert done.returncode == 1, done.stdout + done.stderr
  broken = re.findall(r'^(.*) BROKEN', done.stdout, re.MULTILINE)
  assert broken == [config[f'importlinter:contract:{name}']['name'] for name in ('layers', 'pretrain')]
  assert 'pretrain.records.plots -> pretrain.run.train' in done.stdout
  assert 'data.errors -> models.build' in done.stdout
