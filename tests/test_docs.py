"""What documents name exists: files, links, commands, flags, config keys, and the values that pick a part.

Text in backticks and code blocks is checked. Not checked: blocks marked `t5x`, `other` (other programs) or `wrong`, the
first column of tables in docs/from_*.md (names of other programs), and docs/LOG.md, which records the past.
"""

import argparse
import ast
import configparser
import dataclasses
import pathlib
import re
import typing
from collections.abc import Iterator, Mapping

import pytest

from pretrain.cli import main, shared
from pretrain.config import bindings
from pretrain.config.schema import is_section, name_of, sections, without_none
from pretrain.experiment.checks import check
from pretrain.experiment.experiment import Experiment

ROOT = pathlib.Path(__file__).parents[1]
ARCHITECTURE = ROOT / 'docs/design/ARCHITECTURE.md'
DOCUMENTS = [
  ROOT / 'README.md',
  ROOT / 'CONTRIBUTING.md',
  *sorted((ROOT / 'docs/design').glob('*.md')),
  *(path for path in sorted((ROOT / 'docs').glob('*.md')) if path.name != 'LOG.md'),
]
PACKAGES = ('pretrain', 'models', 'data', 'pallas_kernels')
SECTIONS = '|'.join(field.name for field in dataclasses.fields(Experiment))
FOLDERS = 'configs|data|docs|launch|models|pallas_kernels|pretrain|scripts|tests'
START = r'(?:(?<=--gin\.)|(?<![\w./-]))'
KEY = re.compile(rf'{START}((?:{SECTIONS})(?:\.[a-z]\w*)+)(?!\w|/|\.[a-z])')
ASSIGNED = re.compile(r"""(?:^|--gin\.|['"])([a-z]\w*(?:\.[a-z]\w*)+)['"]?\s*[=:]""", re.MULTILINE)
PICK = re.compile(rf'{START}((?:{SECTIONS})(?:\.\w+)*\.name)[\'"]?\s*[=:]\s*[\'"]*(\w+)')
FILE = re.compile(rf'(?<![\w./-])(?:\./)?((?:{FOLDERS})/[\w./-]*\w)(?![\w.-]*[*{{…])')
FLAG = re.compile(r'(?<![\w-])--[a-z]\w*')
LINK = re.compile(r'\]\(([^)#:]+)(?:#[^)]+)?\)')
ANCHOR = re.compile(r'\]\(([^)#:]*)#([^)]+)\)')
BLOCK = re.compile(r'^```(\w*)\n(.*?)^```$', re.MULTILINE | re.DOTALL)


def members(hint) -> tuple:
  """The dataclasses that a section, an optional one, or a list of them is made of."""
  args = typing.get_args(hint)
  if typing.get_origin(hint) is tuple:
    return members(args[0])
  if type(None) in args:
    hint = without_none(args)
  return sections(hint) if is_section(hint) else ()


def keys_of(schema, prefix: str = '') -> Iterator[tuple[str, set[str]]]:
  """Every dotted key of every choice, and the values that pick one of them."""
  for name, hint in typing.get_type_hints(schema).items():
    parts, key = members(hint), prefix + name
    yield key, {name_of(schema)} if name == 'name' and prefix else set()
    for part in parts:
      yield from keys_of(part, key + '.')


KEYS: dict[str, set[str]] = {}
for key, values in keys_of(Experiment):
  KEYS[key] = KEYS.get(key, set()) | values


def code_of(text: str, foreign_column: bool) -> list[str]:
  """Code blocks (but of other programs, and mistakes) and inline code of a document."""
  blocks = [body for language, body in BLOCK.findall(text) if language not in ('t5x', 'other', 'wrong')]
  prose = BLOCK.sub('', text)
  if foreign_column:
    prose = re.sub(r'^\|(?:[^|`]|`[^`]*`)*\|', '|', prose, flags=re.MULTILINE)
  return blocks + [code.replace('\n', ' ') for code in re.findall(r'`([^`]+)`', prose)]


def commands_in(code: str) -> Iterator[list[str]]:
  """The words of each `pretrain …`, one command on a (continued) line; what `--` hands on is a command of its own."""
  for line in code.replace('\\\n', ' ').splitlines():
    line = re.split(r'\s[|#>&]|\s-- ', line.strip().removeprefix('$ '))
    for i, part in enumerate(line):
      words = part.split()
      if words and words[0] == 'pretrain':
        yield words[1:]
      elif i and words and words[0] == 'train':
        yield words


def wrong_words(words: list[str]) -> Iterator[str]:
  """Sub-commands and flags that the parser does not have; `--gin.KEY=` is a key's matter."""
  parser = shared.parser(main.COMMANDS)
  for word in words:
    actions = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not word.startswith('-'):
      if actions:
        if word not in actions[0].choices:
          yield f'sub-command {word}'
          return
        parser = actions[0].choices[word]
      continue
    flag = word.split('=')[0]
    if not flag.startswith('--gin.') and flag not in parser._option_string_actions:
      yield f'flag {flag} of {parser.prog}'


def all_flags(parser: argparse.ArgumentParser) -> set[str]:
  found = set(parser._option_string_actions)
  for action in parser._actions:
    for child in (action.choices or {}).values() if isinstance(action.choices, Mapping) else ():
      found |= all_flags(child)
  return found


def anchors_of(text: str) -> set[str]:
  """The anchors of a document's headings, as GitHub makes them."""
  headings = re.findall(r'^#+ (.+)$', BLOCK.sub('', text), re.MULTILINE)
  return {re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-') for heading in headings}


def wrong_anchors(path: pathlib.Path, text: str) -> Iterator[str]:
  for page, anchor in ANCHOR.findall(text):
    target = path.parent / page
    if page and not target.exists():
      continue  # a wrong link, reported as such
    if anchor not in anchors_of(target.read_text() if page else text):
      yield f'anchor {page}#{anchor}'


def mistakes(path: pathlib.Path, text: str) -> list[str]:
  """What a document names and the program does not have."""
  found = [f'link {link}' for link in LINK.findall(text) if not (path.parent / link).exists()]
  found += wrong_anchors(path, text)
  # Flags of setup.sh, faults.py, launch/, pytest (--import-mode) and pip (--no-deps).
  of_scripts = {'--dev', '--full', '--times', '--jobs', '--go_on', '--import', '--no', '--dry_run', '--signal'}
  known = all_flags(shared.parser(main.COMMANDS)) | of_scripts | {'--gin'}
  for code in code_of(text, path.name.startswith('from_')):
    found += [f'file {name}' for name in FILE.findall(code) if not (ROOT / name).exists()]
    keys = dict.fromkeys(KEY.findall(code) + ASSIGNED.findall(code))
    found += [f'key {key}' for key in keys if key not in KEYS and not key.endswith(('.py', '.safetensors'))]
    found += [f'{key}={value}' for key, value in PICK.findall(code) if key in KEYS and value not in KEYS[key]]
    found += [f'flag {flag}' for flag in FLAG.findall(code) if flag not in known]
    found += [wrong for words in commands_in(code) for wrong in wrong_words(words)]
  return found


@pytest.mark.parametrize('path', DOCUMENTS, ids=lambda path: path.name)
def test_everything_that_a_document_names_exists(path):
  assert mistakes(path, path.read_text()) == []


@pytest.mark.parametrize('path', DOCUMENTS, ids=lambda path: path.name)
def test_configs_in_documents_load(path, tmp_path):
  """Blocks that include a shipped config, as files of a folder beside configs/."""
  (tmp_path / 'configs').symlink_to(ROOT / 'configs')
  (tmp_path / 'my').mkdir()
  blocks = [body for language, body in BLOCK.findall(path.read_text()) if language == 'gin']
  for i, body in enumerate(body for body in blocks if body.startswith("include '../configs/")):
    (file := tmp_path / 'my' / f'{i}.gin').write_text(body)
    check(bindings.load(Experiment, [str(file)]))


@pytest.mark.parametrize(
  ('text', 'mistake'),
  [
    ('`model.num_heads`', 'key model.num_heads'),
    ('set `--gin.train.step=3`', 'key train.step'),
    ('```\nmodell.embed = 64\n```', 'key modell.embed'),
    ("```\noptimizer.name = 'adamv'\n```", 'optimizer.name=adamv'),
    ("```gin\nphases = [{'set': {'objective.name': 'ul3'}}]\n```", 'objective.name=ul3'),
    ('`configs/t5/smal.gin`', 'file configs/t5/smal.gin'),
    ('```\npretrain tran --workdir=RUN\n```', 'sub-command tran'),
    ('`pretrain data shaw`', 'sub-command shaw'),
    ('`pretrain train --workdri=RUN`', 'flag --workdri of pretrain train'),
    ('```\npretrain run --hosts=2 -- train --workdri=RUN\n```', 'flag --workdri of pretrain train'),
    ('`--workdri`', 'flag --workdri'),
    ('[page](nowhere.md)', 'link nowhere.md'),
    ('[page](nowhere.md#part)', 'link nowhere.md'),
    ('[page](concepts.md#nothing-here)', 'anchor concepts.md#nothing-here'),
    ('| `model.num_heads` | ours `model.num_layers` |', 'key model.num_layers'),
  ],
)
def test_a_misspelt_word_is_found(text, mistake):
  assert mistake in mistakes(ROOT / 'docs' / 'from_x.md', text)


def test_names_of_other_programs_are_not_checked():
  text = (
    '| `model.num_heads`, `--gin_search_paths` | no |\n```t5x\nmodel.num_heads = 3\n```\n`t5.data.mixtures` `train/x.y`'
  )
  assert mistakes(ROOT / 'docs' / 'from_x.md', text) == []


def layers_of(package: str) -> list[set[str]]:
  """The layers of a package in setup.cfg, highest first: sets of folders and modules that may not import each other."""
  parser = configparser.ConfigParser()
  parser.read(ROOT / 'setup.cfg')
  contracts = [parser[name] for name in parser.sections() if name.startswith('importlinter:contract:')]
  layers = next(c['layers'] for c in contracts if c.get('containers', '').split() == [package])
  return [set(line.split(' | ')) for line in layers.split('\n') if line]


def drawn_layers(text: str) -> dict[str, list[set[str]]]:
  """The layers of each package in the picture of ARCHITECTURE.md."""
  found: dict[str, list[set[str]]] = {}
  package = ''
  for line in BLOCK.search(text)[2].splitlines():
    if match := re.fullmatch(r'(?:(\w+)/)? +([a-z_]+(?: \| [a-z_]+)*)(?:  .*)?', line):
      package = match[1] or package
      found.setdefault(package, []).append(set(match[2].split(' | ')))
  return found


def folder_table(text: str) -> dict[str, list[str]]:
  """Folder -> its cells (knows, must not know, may import, start reading at) in the table of ARCHITECTURE.md."""
  rows = [[cell.strip() for cell in line[1:-1].split('|')] for line in text.splitlines() if line.startswith('| `')]
  return {row[0].strip('`/'): row[1:] for row in rows if row[0].endswith('/`')}


def folders() -> set[str]:
  """The folders inside the packages and scripts/."""
  found = {path.parent for top in (*PACKAGES, 'scripts') for path in (ROOT / top).glob('*/*') if path.is_file()}
  return {str(path.relative_to(ROOT)) for path in found if path.name != '__pycache__'}


def may_import(folder: str) -> str:
  """What the table must say, by the contract of the package."""
  package, name = folder.split('/')
  layers = layers_of(package)
  below = layers[next(i for i, layer in enumerate(layers) if name in layer) + 1]
  return ', '.join(f'`{part}`' for part in below) + ' and below'


TABLE = folder_table(ARCHITECTURE.read_text())


def test_the_architecture_table_lists_exactly_the_folders_that_exist():
  assert set(TABLE) == folders()


def test_the_picture_has_the_layers_of_import_linter():
  drawn = drawn_layers(ARCHITECTURE.read_text())
  assert drawn == {package: layers_of(package) for package in PACKAGES}


@pytest.mark.parametrize('folder', TABLE)
def test_a_row_of_the_architecture_table_agrees_with_setup_cfg_and_the_folder(folder):
  knows, must_not_know, imports, start = TABLE[folder]
  assert (ROOT / start.strip('`')).is_file()
  assert start.strip('`').startswith(folder + '/')
  package, name = folder.split('/')
  if package in PACKAGES and any(name in layer for layer in layers_of(package)):
    assert sorted(re.findall(r'`\w+`', imports)) == sorted(re.findall(r'`\w+`', may_import(folder)))
    assert imports.endswith(' and below')
    words = ' '.join(ast.get_docstring(ast.parse((ROOT / folder / '__init__.py').read_text())).split())
    assert knows in words
    assert must_not_know in words
  else:
    assert imports == ('all packages' if package == 'scripts' else 'nothing')


def test_recipes_name_two_to_five_files_and_a_test():
  """A recipe is a section of CONTRIBUTING.md that begins with a table of files; one of them is a test."""
  sections = re.split(r'^### ', (ROOT / 'CONTRIBUTING.md').read_text(), flags=re.MULTILINE)[1:]
  assert len(sections) >= 8
  for section in sections:
    files = re.findall(r'^\| `([^`]+)` \|', section, re.MULTILINE)
    title = section.splitlines()[0]
    assert 2 <= len(set(files)) <= 5, title
    assert any(name.startswith('tests/') for name in files), title
    assert [name for name in files if not (ROOT / name).is_file()] == [], title
