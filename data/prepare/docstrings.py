"""English text from Python files: the documentation strings of modules, classes and functions.

This is also a program, `python docstrings.py < paths`: for each input line, a path as a JSON string, it prints a JSON
list of strings. builtin.py runs several, because parsing is slow and such a process starts without the caller's
imports.
"""

import ast
import inspect
import json
import pathlib
import re
import sys
import warnings
from collections.abc import Iterator

MIN_CHARACTERS = 40
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def extract(source: str) -> list[str]:
  """The documentation strings of a Python source as prose, in source order, without those that are mostly not words.

  >>> extract('def f():\\n  "Returns the number of apples\\\\n  that fit into a basket."')
  ['Returns the number of apples that fit into a basket.']
  """
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # invalid escapes in other people's code
    tree = ast.parse(source)
  texts = (prose(ast.get_docstring(node, clean=False)) for node in _nodes(tree))
  return [text for text in texts if len(text) >= MIN_CHARACTERS and _letters(text) >= 0.6]


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
  """Everything that can have a documentation string, in source order."""
  if isinstance(tree, _DOCUMENTED) and ast.get_docstring(tree, clean=False):
    yield tree
  for child in ast.iter_child_nodes(tree):
    if isinstance(child, ast.stmt | ast.ExceptHandler):
      yield from _nodes(child)


def prose(docstring: str) -> str:
  """The docstring's paragraphs on one line, without examples (>>>), directives and rulers."""
  paragraphs = re.split(r'\n\s*\n', inspect.cleandoc(docstring))
  kept = [p for p in paragraphs if '>>>' not in p and not p.lstrip().startswith(('..', '::'))]
  text = re.sub(r'[-=~^*#]{3,}', ' ', '\n'.join(kept))
  return ' '.join(text.split())


def _letters(text: str) -> float:
  return sum(c.isalpha() for c in text) / max(len(text.replace(' ', '')), 1)


def extract_file(path: str) -> list[str]:
  """`extract` for a file; [] if this Python cannot parse it, e.g. a template or a test of another version."""
  try:
    return extract(pathlib.Path(path).read_text(encoding='utf-8'))
  except (SyntaxError, ValueError, RecursionError):
    return []


if __name__ == '__main__':
  for line in sys.stdin:
    print(json.dumps(extract_file(json.loads(line))), flush=True)
