"""The rules of the house that no linter has: sizes, one place for TPU topologies, no machine's paths."""

import ast
import pathlib
import re
import statistics
import subprocess

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ('pretrain', 'models', 'data', 'pallas_kernels')
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob('*.py'))
LONGEST_FILE, LONGEST_FUNCTION, MEDIAN_FUNCTION, P90_FUNCTION = 400, 60, 8, 25


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
