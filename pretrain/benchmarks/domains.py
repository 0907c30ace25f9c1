"""Perplexity and bits per byte of texts, for each domain; long documents by windows that overlap."""

import dataclasses
import math
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from data.errors import DataError
from data.prepare.text import Reading, read_segments
from data.stores.store import open_store
from pretrain.benchmarks.scoring import Piece, Scorer
from pretrain.errors import ConfigError
from pretrain.evaluation.blanks import texts_of
from pretrain.evaluation.losses import bits_per_byte
from pretrain.evaluation.prompts import continues_text, framed, special_ids
from pretrain.evaluation.writer import Writer


@dataclasses.dataclass(frozen=True)
class Windows:
  """A document is scored in windows of at most `length` tokens; a window repeats all but the last `stride` of them.

  So each token is scored once, and sees all of the document before it, or at least `length - stride` tokens.
  """

  length: int
  stride: int


def documents(path: pathlib.Path) -> list[str]:
  """The texts of a token store, of the records of a JSONL or Parquet file (field `text`), or of a whole text file.

  Raises DataError for another kind of path, and for one without text.
  """
  if path.is_dir():
    return texts_of(open_store(path))
  texts, parts = [], []
  for segment in read_segments(path, Reading()):
    parts.append(segment.text)
    if segment.last:
      texts.append(''.join(parts))
      parts = []
  return [text for text in texts if text]


def first_bytes(texts: Sequence[str], most: int | None) -> list[str]:
  """The first texts, of `most` bytes in UTF-8 together: the last one ends between two words. None: all texts.

  >>> first_bytes(['one two', 'three four', 'five'], 16)
  ['one two', 'three']
  """
  kept, left = [], math.inf if most is None else most
  for text in texts:
    if (size := len(text.encode())) > left:
      cut = text.encode()[: int(left)].decode(errors='ignore').rsplit(maxsplit=1)
      return kept + cut[:1]
    kept.append(text)
    left -= size
  return kept


def windows_of(writer: Writer, length: int | None = None, stride: int | None = None) -> Windows:
  """The windows that a command asks for: by default rows of training, which overlap by half.

  Raises ConfigError for a run that does not continue text, and for numbers out of range.
  """
  cfg = writer.cfg
  if not continues_text(cfg):
    raise ConfigError(
      f"--text: a run with objective.name='{cfg.objective.name}' does not continue text, so a text has no perplexity; "
      'use --infill, --rank or --exact.'
    )
  length = cfg.data.targets_length if length is None else length
  stride = length - length // 2 if stride is None else stride
  if length < 2:
    raise ConfigError(f'--context={length}; it must be at least 2 tokens.')
  if not 1 <= stride <= length:
    raise ConfigError(f'--stride={stride}; it must be from 1 to --context={length}.')
  return Windows(length, stride)


def pieces_of(ids: Sequence[int], windows: Windows, writer: Writer) -> Iterator[tuple[Piece, int]]:
  """(piece, how many of its targets an earlier piece scored) for the ids of a document and its EOS.

  A decoder that reads from left to right has each window as a row. For others, the tokens of a window that are scored
  are targets, and those before them inputs, framed as training frames text to continue.
  """
  ids, causal = list(ids), not framed([], writer.cfg, writer.data)
  begin = scored = 0
  while scored < len(ids):
    end = min(begin + windows.length, len(ids))
    if causal:
      yield Piece([], ids[begin:end]), scored - begin
    else:
      end = min(scored + windows.stride, len(ids))
      begin = max(end - windows.length, 0)
      yield Piece(framed(ids[begin:scored], writer.cfg, writer.data), ids[scored:end]), 0
    scored, begin = end, begin + windows.stride


def score_domain(scorer: Scorer, texts: Iterable[str], windows: Windows, said=lambda done: None) -> dict[str, float]:
  """Results of a domain. A document's tokens are those of its text and EOS; its bytes are those of the text in UTF-8.

  perplexity = exp(nats / tokens). Raises DataError if the text is empty.
  """
  writer, pieces, skipped, count, size = scorer.writer, [], [], 0, 0
  end = special_ids(writer.data).eos[0]
  for text in texts:
    count, size = count + 1, size + len(text.encode())
    found = list(pieces_of([*writer.data.tokenizer.encode(text), end], windows, writer))
    pieces += [piece for piece, _ in found]
    skipped += [skip for _, skip in found]
  if not size:
    raise DataError('there is no text to score.')
  scores = [scored.nats[skip:] for scored, skip in zip(scorer(pieces, said), skipped, strict=True)]
  nats, tokens = float(sum(map(np.sum, scores))), sum(map(len, scores))
  return {
    'documents': count, 'tokens': tokens, 'bytes': size, 'nats': nats, 'nats_per_token': nats / tokens,
    'perplexity': math.exp(min(nats / tokens, 700.0)), 'bits_per_byte': bits_per_byte(nats, size),
    'context': windows.length, 'stride': windows.stride,
  }  # fmt: skip
