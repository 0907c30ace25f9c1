"""The part of a report with the results of `pretrain eval`."""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pretrain.errors import CheckpointError
from pretrain.records.heat_map import draw_needles
from pretrain.workdirs.folder import Folder

FILE = 'eval.json'
# Kind of result -> heading, and (key, name, unit) of its rows; results have some of the keys.
TABLES = {
  'text': (
    'Text',
    (
      ('bits_per_byte', 'bits per byte', 'bits/byte'),
      ('perplexity', 'perplexity', 'per token'),
      ('pseudo_bits_per_byte', 'pseudo bits per byte', 'bits/byte'),
      ('pseudo_perplexity', 'pseudo-perplexity', 'per token'),
      ('masked_accuracy', 'tokens right, hidden alone', 'share of tokens'),
      ('bytes', 'bytes', ''),
    ),
  ),
  'rank': (
    'Choices',
    (
      ('accuracy', 'accuracy', 'share of answers'),
      ('accuracy_per_byte', 'accuracy, per byte', 'share of answers'),
      ('pseudo_accuracy', 'accuracy by pseudo-likelihood', 'share of answers'),
      ('pseudo_accuracy_per_byte', 'accuracy by pseudo-likelihood, per byte', 'share of answers'),
    ),
  ),
  'exact': ('Exact match', (('exact_match', 'exact match', 'share of outputs'),)),
  'infill': (
    'Hidden words',
    (
      ('exact_match', 'exact match', 'share of sentences'),
      ('masked_accuracy', 'masked tokens right', 'share of tokens'),
      ('masked_exact_match', 'all masked tokens right', 'share of sentences'),
    ),
  ),
  'pathways': (
    'Experts chosen as at another step',
    (
      ('agreement', 'choices that are the same', 'share of choices'),
      ('same', 'tokens whose choices all are', 'share of tokens'),
    ),
  ),
}


def read_results(workdir: Folder) -> dict[str, Any]:
  """The results of the last `pretrain eval` of a run; empty without any. Raises CheckpointError for a damaged file."""
  path = workdir / FILE
  if not path.exists():
    return {}
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise CheckpointError('EVAL', f'{path} is damaged ({error}); remove it, and run pretrain eval again.') from error


def eval_section(
  found: Mapping[str, Any],
  folder: pathlib.Path,
  show: Callable[[float], str],
  table: Callable[[Sequence[str], Sequence[tuple[str, str, str]]], str],
  embedded: Callable[[pathlib.Path, str], str],
) -> str:
  """The results as HTML, with the map of needles, which is also drawn into `folder`; empty without results."""
  if not found:
    return ''
  step = f', step {found["step"]:,}' if 'step' in found else ''
  parts = [f'<h2>Evaluation{step}</h2>']
  for kind, (heading, keys) in TABLES.items():
    rows = [
      (f'{name}: {label}', show(values[key]), unit)
      for name, values in found.get(kind, {}).items()
      for key, label, unit in keys
      if key in values
    ]
    parts += [table((heading, 'value', 'unit'), rows)] if rows else []
  if 'needle' in found:
    draw_needles(found['needle'], folder / 'needles.png')
    parts.append(f'<p>{embedded(folder / "needles.png", "Needles found")}</p>')
  return ''.join(parts)
