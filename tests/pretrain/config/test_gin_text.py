"""What a gin file may hold: encodings, literals, and the line that each mistake is reported at."""

import ast
import pathlib

import pytest

from pretrain.cli.main import main
from pretrain.config import gin_text
from pretrain.errors import ConfigError
from tests.pretrain import tiny

SYNTAX = 'syntax error'


def read(tmp_path, raw: bytes):
  file = tmp_path / 'x.gin'
  file.write_bytes(raw)
  return {b.key: (b.value, b.place) for b in gin_text.read_file(file, '--gin_file=', ())}


def refusal(tmp_path, raw: bytes) -> str:
  with pytest.raises(ConfigError) as caught:
    read(tmp_path, raw)
  text = str(caught.value)
  assert '\n' not in text
  return text.replace(str(tmp_path), 'DIR')


TEXT = "seed = 1\nname = 'é \ufeff'\n"


@pytest.mark.parametrize('mark', ['', '\ufeff'])
@pytest.mark.parametrize('end', ['\n', '\r\n', '\r'])
def test_a_file_is_read_with_any_line_ends_and_with_a_byte_order_mark(tmp_path, mark, end):
  found = read(tmp_path, (mark + TEXT.replace('\n', end)).encode())
  assert found == {'seed': (1, f'{tmp_path}/x.gin:1'), 'name': ('é \ufeff', f'{tmp_path}/x.gin:2')}


def test_an_included_file_may_have_a_byte_order_mark(tmp_path):
  (tmp_path / 'base.gin').write_bytes('\ufeffseed = 1\r\n'.encode())
  assert read(tmp_path, "\ufeffinclude 'base.gin'\r\nb.c = 2".encode())['seed'] == (1, f'{tmp_path}/base.gin:1')


@pytest.mark.parametrize(
  ('raw', 'encoding'),
  [
    ('\ufeffseed = 1\n'.encode('utf-16-le'), 'UTF-16'),
    ('\ufeffseed = 1\n'.encode('utf-16-be'), 'UTF-16'),
    ('seed = 1\n'.encode('utf-16-le'), 'UTF-16LE'),
    ('seed = 1\n'.encode('utf-16-be'), 'UTF-16BE'),
    ('\ufeffseed = 1\n'.encode('utf-32-le'), 'UTF-32'),
    ('\ufeffseed = 1\n'.encode('utf-32-be'), 'UTF-32'),
  ],
)
def test_other_encodings_are_named_with_the_command_that_converts(tmp_path, raw, encoding):
  sentence = f'is {encoding} text; save it as UTF-8, e.g. iconv -f {encoding} -t UTF-8 FILE.'
  assert refusal(tmp_path, raw) == f'CONFIG: --gin_file=DIR/x.gin {sentence}'
  (tmp_path / 'base.gin').write_bytes(raw)
  assert refusal(tmp_path, b"\n\ninclude 'base.gin'\n") == f'CONFIG: DIR/x.gin:3: DIR/base.gin {sentence}'


@pytest.mark.parametrize(
  ('raw', 'sentence'),
  [
    (b'seed = 1\nb.c = \xff', 'is not UTF-8 text (byte 15); is it a gin file?'),
    (b'\xef\xbb\xbfseed = 1\nb.c = \xff', 'is not UTF-8 text (byte 18); is it a gin file?'),
    (b'seed = 1\nb.c = \x00', 'has a NUL byte in line 2 (byte 15); is it a gin file, and undamaged?'),
    (b'seed = 1\n' + bytes(100), 'has a NUL byte in line 2 (byte 9); is it a gin file, and undamaged?'),
  ],
)
def test_bytes_that_are_no_text_are_one_line(tmp_path, raw, sentence):
  assert refusal(tmp_path, raw) == f'CONFIG: --gin_file=DIR/x.gin {sentence}'


def test_a_path_that_cannot_be_resolved_is_one_line(tmp_path):
  (tmp_path / 'loop.gin').symlink_to('loop.gin')
  assert 'DIR/x.gin:2: DIR/loop.gin cannot be read' in refusal(tmp_path, b"\ninclude 'loop.gin'")
  assert 'DIR/x.gin:2: DIR cannot be read (Is a directory)' in refusal(tmp_path, b"\ninclude '.'")


DEEP = '[' * 3000 + ']' * 3000
HUGE = '9' * 400


@pytest.mark.parametrize(
  ('value', 'line', 'sentence'),
  [
    ("{'path': 'a', 'path': 'b'}", 1, "the key 'path' is in one dict twice; remove one of them."),
    ("[{'path': 'a'},\n{'path': 'b',\n'path': 'c'}]", 3, "the key 'path' is in one dict twice; remove one of them."),
    ("{'a': {'b': 1, 'b': 1}}", 1, "the key 'b' is in one dict twice; remove one of them."),
    ("[{'start_step': 1, 'set': {'x': 1, 'x': 2}}]", 1, "the key 'x' is in one dict twice; remove one of them."),
    ("{'a': {'b': 1}, 'a': 2}", 1, "the key 'a' is in one dict twice; remove one of them."),
    ("{'a' 'b': 1, 'ab': 2}", 1, "the key 'ab' is in one dict twice; remove one of them."),
    ('{1: 1, True: 2}', 1, 'the key True is in one dict twice; remove one of them.'),
    ("[{['a']: 1}]", 1, "['a'] is the key of a dict; write a string, e.g. {'path': …}."),
    ("{('a', ['b']): 1}", 1, "('a', ['b']) is the key of a dict; write a string, e.g. {'path': …}."),
    ("{{'a': 1}: 1}", 1, "{'a': 1} is the key of a dict; write a string, e.g. {'path': …}."),
    ('{%A: 1}', 1, "%A is the key of a dict; write a string, e.g. {'path': …}."),
    ('{@f: 1}', 1, "@f is the key of a dict; write a string, e.g. {'path': …}."),
    (
      "[1,\nb'x']",
      2,
      "b'x' is bytes; values are numbers, strings, True, False, None, lists and dicts.",
    ),
    ('3j', 1, '3j is complex; values are numbers, strings, True, False, None, lists and dicts.'),
    (HUGE, 1, 'a whole number of 400 digits; write one of at most 30.'),
    (f'-{10**30}', 1, 'a whole number of 31 digits; write one of at most 30.'),
    ("'a\\0b'", 1, "'a\\x00b' has a NUL character (\\0); remove it."),
  ],
)
def test_a_literal_that_is_no_value_is_a_syntax_error_with_its_line(tmp_path, value, line, sentence):
  assert refusal(tmp_path, f'\nb.c = {value}\n'.encode()) == f'CONFIG: DIR/x.gin:{line + 1}: {SYNTAX}: {sentence}'
  with pytest.raises(ConfigError) as caught:
    list(gin_text.read_text(f'b.c={value}', pathlib.Path(), '--gin.b.c', ()))
  assert str(caught.value) == f'CONFIG: --gin.b.c: {SYNTAX}: {sentence}'


@pytest.mark.parametrize('value', ['{1, 2}', '...', "f'{1}'", "{'a'}", '1 + 2', '9' * 5000, '{**{}}', '[*[1]]', 'x'])
def test_what_the_parser_refuses_is_a_syntax_error_with_its_line(tmp_path, value):
  assert refusal(tmp_path, f'\nb.c = {value}\n'.encode()).startswith(f'CONFIG: DIR/x.gin:2: {SYNTAX}')


def test_lists_nested_without_end_are_one_line(tmp_path):
  assert SYNTAX in refusal(tmp_path, f'b.c = {DEEP}'.encode())


@pytest.mark.parametrize('value', [10**30 - 1, 1 - 10**30, "{'a': {'a': 1}, 'b': {'a': 1}}", "[{'a': 1}, {'a': 1}]"])
def test_what_only_resembles_them_is_read(tmp_path, value):
  assert read(tmp_path, f'b.c = {value}'.encode())['b.c'][0] == ast.literal_eval(str(value))


def test_the_command_line_refuses_a_key_that_is_repeated(capsys):
  flag = "--gin.data.sources=[{'path':'a','path':'b'}]"
  assert main(['config', f'--gin_file={tiny.DECODER}', flag]) == 64
  assert capsys.readouterr().err.startswith("CONFIG: --gin.data.sources: syntax error: the key 'path' is in one dict")
