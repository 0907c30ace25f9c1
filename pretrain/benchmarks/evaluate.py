"""`pretrain eval`: all measurements that a command asks for, and their file."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

from data.errors import DataError
from data.stores.paths import looked_in
from pretrain.benchmarks.domains import documents, first_bytes, score_domain, windows_of
from pretrain.benchmarks.infilling import infill
from pretrain.benchmarks.masked import MaskedScorer
from pretrain.benchmarks.needles import Haystacks, check_haystacks, probe
from pretrain.benchmarks.pseudo import MOST_BYTES, fill_masked, rank_pseudo, score_pseudo
from pretrain.benchmarks.scoring import Scorer
from pretrain.benchmarks.tasks import exact, rank
from pretrain.errors import ConfigError
from pretrain.evaluation.writer import Writer
from pretrain.records.progress import Counter
from pretrain.workdirs.folder import Folder, write_whole

Named = tuple[tuple[str, pathlib.Path], ...]
FILE = 'eval.json'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measurements:
  """Files by the names of their results, and what else is measured."""

  text: Named = ()
  rank: Named = ()
  exact: Named = ()
  infill: Named = ()
  needles: Haystacks | None = None
  context: int | None = None
  stride: int | None = None
  text_bytes: int | None = None
  pathways: tuple[int, ...] = ()
  sentences: int = 200
  batch: int = 8


def check_measurements(wanted: Measurements) -> None:
  """Raises ConfigError where nothing is measured, for a name given twice and for numbers out of range; DataError for
  a path that does not exist."""
  kinds = {kind: getattr(wanted, kind) for kind in ('text', 'rank', 'exact', 'infill')}
  if not any(kinds.values()) and wanted.needles is None and not wanted.pathways:
    raise ConfigError(
      'pretrain eval measures nothing: give --text, --rank, --exact, --infill, --needle_lengths or --pathways.'
    )
  for kind, files in kinds.items():
    names = [name for name, _ in files]
    if twice := [name for name in names if names.count(name) > 1]:
      raise ConfigError(f'--{kind}: {twice[0]} names two files; give each its own name, --{kind}=NAME=FILE.')
    if absent := [path for _, path in files if not path.exists()]:
      raise DataError(f'--{kind}: {absent[0]} does not exist{looked_in(absent[0])}; check the path.')
  for flag, value in (('batch', wanted.batch), ('sentences', wanted.sentences), ('text_bytes', wanted.text_bytes)):
    if value is not None and value < 1:
      raise ConfigError(f'--{flag}={value}; it must be at least 1.')
  if wanted.needles is not None:
    check_haystacks(wanted.needles)


def evaluate(writer: Writer, wanted: Measurements) -> dict[str, Any]:
  """{'text': {name: results}, 'rank': …, 'exact': …, 'infill': …, 'needle': results}; a kind that is not asked for is
  absent. Progress is a line on stderr."""
  encoder = writer.cfg.model.name == 'encoder'
  measure = _of_encoder(writer, wanted) if encoder else _of_writer(writer, wanted)
  found: dict[str, Any] = {}
  for kind in ('text', 'rank', 'exact', 'infill'):
    for name, path in getattr(wanted, kind):
      found.setdefault(kind, {})[name] = _counted(functools.partial(measure[kind], path), f'{kind}/{name}')
  if wanted.needles is not None:
    found['needle'] = _counted(functools.partial(measure['needle'], wanted.needles), 'needle')
  return found


def _of_writer(writer: Writer, wanted: Measurements) -> dict[str, Callable]:
  """How each kind is measured: functions of (a file, what hears how much is done)."""
  scorer = Scorer(writer, wanted.batch)
  measure: dict[str, Callable] = {
    'rank': lambda path, said: rank(scorer, path, said),
    'exact': lambda path, said: exact(writer, path, wanted.batch, said),
    'infill': lambda path, said: infill(writer, documents(path), wanted.sentences, wanted.batch, said),
    'needle': lambda needles, said: probe(scorer, needles, said),
  }
  if wanted.text:
    windows = windows_of(writer, wanted.context, wanted.stride)
    texts = lambda path: first_bytes(documents(path), wanted.text_bytes)
    measure['text'] = lambda path, said: score_domain(scorer, texts(path), windows, said)
  return measure


def _of_encoder(writer: Writer, wanted: Measurements) -> dict[str, Callable]:
  """As `_of_writer`. Raises ConfigError, naming the flag, for what has no meaning for an encoder."""
  writes = {'exact': wanted.exact, 'needle_lengths': wanted.needles}
  if flags := [flag for flag, given in writes.items() if given]:
    raise ConfigError(
      f'--{flags[0]}: an encoder writes no text; leave it out, and use --rank for choices or --infill for hidden words.'
    )
  if wanted.stride is not None:
    raise ConfigError(
      f'--stride={wanted.stride}: an encoder sees both sides of a token, so each has a window of its own, of --context '
      'tokens; leave --stride out.'
    )
  scorer, most = MaskedScorer(writer, wanted.batch, wanted.context), wanted.text_bytes or MOST_BYTES
  return {
    'text': lambda path, said: score_pseudo(scorer, first_bytes(documents(path), most), said),
    'rank': lambda path, said: rank_pseudo(scorer, path, said),
    'infill': lambda path, said: fill_masked(scorer, documents(path), wanted.sentences, said),
  }


def _counted(measure: Callable, what: str) -> Any:
  counter = Counter(0, what)
  try:
    return measure(counter.show)
  finally:
    counter.close()


def write_results(path: Folder, results: dict[str, Any]) -> None:
  """Writes the whole file, or leaves it as it was."""
  write_whole(path, json.dumps(results, indent=1, ensure_ascii=False) + '\n')


def lines_of(results: dict[str, Any]) -> list[str]:
  """The results for a person: one line each."""
  lines = []
  for kind in ('text', 'rank', 'exact', 'infill', 'pathways'):
    for name, values in results.get(kind, {}).items():
      lines.append(f'{kind}/{name}  ' + '  '.join(f'{key}={value:.6g}' for key, value in values.items()))
  if needle := results.get('needle'):
    head = '  '.join(f'{depth:6.0%}' for depth in needle['depths'])
    lines.append(f'needle: share of right answers ({needle["trials"]} each)\n  tokens \\ depth  {head}')
    for length, row in zip(needle['lengths'], needle['accuracy'], strict=True):
      lines.append(f'  {length:14,}  ' + '  '.join(f'{value:6.0%}' for value in row))
  return lines
