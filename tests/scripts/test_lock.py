"""The locks: one version and hashes for every package, and everything that setup.cfg requires."""

import configparser
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
LOCKS = {'requirements.lock': (), 'requirements-dev.lock': ('dev', 'tpu', 'data')}


def entries(text: str) -> dict[str, tuple[list[str], int]]:
  """name -> (versions, number of hashes), of a file as pip reads it with --require-hashes."""
  found: dict[str, tuple[list[str], int]] = {}
  for block in re.findall(r'^\S(?:.*\\\n)*.*$', text, re.MULTILINE):
    if not block.startswith('#'):
      name, version = re.match(r'([\w.-]+)(?:\[[^\]]*\])?==([^\s;\\]+)', block).groups()
      versions, hashes = found.get(normal(name), ([], 10**6))
      found[normal(name)] = [*versions, version], min(hashes, len(re.findall(r'--hash=sha256:[0-9a-f]{64}\b', block)))
  return found


def normal(name: str) -> str:
  return re.sub(r'[-_.]+', '-', name).lower()


def asked(extras: tuple[str, ...]) -> dict[str, str]:
  """name -> smallest version, of setup.cfg."""
  found = configparser.ConfigParser()
  found.read(ROOT / 'setup.cfg')
  lists = [found['options']['install_requires'], *(found['options.extras_require'].get(extra, '') for extra in extras)]
  lines = [line.strip() for text in lists for line in text.splitlines()]
  pairs = [re.match(r'([\w.-]+)(?:\[[^\]]*\])?(?:>=([\d.]+))?', line) for line in lines if line and line[0] != '#']
  return {normal(pair[1]): pair[2] or '0' for pair in pairs}


def number(version: str) -> tuple[int, ...]:
  return tuple(int(part) for part in re.findall(r'\d+', version)[:3])


@pytest.mark.parametrize('name', LOCKS)
def test_each_package_has_a_version_and_hashes(name):
  found = entries((ROOT / name).read_text())
  assert len(found) > 40
  assert {package for package, (_, hashes) in found.items() if not hashes} == set()
  assert 'git+' not in (text := (ROOT / name).read_text())
  assert '://' not in re.sub(r'^\s*#.*$', '', text, flags=re.MULTILINE)


@pytest.mark.parametrize('name', LOCKS)
def test_the_lock_satisfies_setup_cfg(name):
  found = entries((ROOT / name).read_text())
  for package, least in asked(LOCKS[name]).items():
    assert package in found, f'{package} is not in {name}; run make lock'
    old = [version for version in found[package][0] if number(version) < number(least)]
    assert old == [], f'{package}>={least} in setup.cfg, {old} in {name}; run make lock'


def test_both_locks_have_the_same_versions():
  small, large = (entries((ROOT / name).read_text()) for name in LOCKS)
  assert {
    package: versions for package, (versions, _) in small.items() if large.get(package, ('', 0))[0] != versions
  } == {}


def test_a_package_without_a_hash_is_detected():
  text = f'a==1 \\\n    --hash=sha256:{"0" * 64}\n    # via b\nb[x]==2 ; python_version < "3.12"\n'
  assert entries(text) == {'a': (['1'], 1), 'b': (['2'], 0)}


def test_everything_is_installed_by_its_hashes():
  text = (ROOT / 'scripts/setup.sh').read_text()
  installs = re.findall(r'^.*(?:pip install|pip\[@\]).*$', text, re.MULTILINE)
  assert len(installs) == 4
  assert all('--require-hashes' in line or '--no-deps' in line for line in installs)
