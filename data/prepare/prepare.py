"""`pretrain data prepare`: files of text -> a token store. A SentencePiece model is trained unless one is given."""

import argparse
import contextlib
import hashlib
import io
import itertools
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, assert_never, get_args

import numpy as np
import sentencepiece
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from data import arguments
from data.errors import DataError
from data.prepare.encode import Encoder, Recipe, batches, encode_all
from data.prepare.inputs import Meter, Records, check_file
from data.prepare.published import published
from data.prepare.scores import SCORES, Score
from data.prepare.text import Documents, Reading, Segment, is_blank, read_segments, sample
from data.stores.arrays import is_inside
from data.stores.paths import looked_in
from data.stores.staging import refuse_existing
from data.stores.store import TURNS_LEFT, Store, StoreWriter, open_store
from data.stores.vocabulary import EOS, MODES, PAD, UNKNOWN, Tokenizer

FORMATS = 'text, .jsonl (either may be .gz or .zst), .parquet, .arrayrecord'
SAMPLE_BYTES = 20_000_000
WORKER_BYTES = 16_000_000  # input bytes per process; smaller inputs are done before another process has started
FEWEST_PIECES = 3 + 256 + 100  # special pieces, bytes, and at least 100 pieces of text
MAX_SENTENCE = 4096  # characters; SentencePiece skips longer sentences
TRAINING_THREADS = 4  # fixed: the order of float sums, and so the model, depends on the number of threads


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The flags of `pretrain data prepare`."""
  parser.add_argument('inputs', nargs='+', type=arguments.path, help=FORMATS)
  parser.add_argument(
    '--out', required=True, type=arguments.expand_user, help='the store: a path or a URL (gs://, s3://)'
  )
  parser.add_argument('--vocab_size', type=int, default=32_768, help='total ids: pieces, sentinels and mode tokens')
  parser.add_argument('--sentinels', type=int, default=100, help='ids behind the pieces for sentinels (data.sentinels)')
  parser.add_argument(
    '--tokenizer', type=arguments.path, help='a SentencePiece model, a tokenizer.json, or the folder of one; otherwise '
    'one is trained',
  )  # fmt: skip
  parser.add_argument(
    '--documents', choices=get_args(Documents), default='file', help='the part of a text file that becomes one document'
  )
  parser.add_argument(
    '--records', choices=get_args(Records), default='text', help='the type of the records of .arrayrecord files'
  )
  parser.add_argument(
    '--field', type=arguments.text, default='text', help='the JSONL field or the column that contains the text'
  )
  parser.add_argument(
    '--inputs_field', type=arguments.text, help='with --targets_field: make pairs from these two fields'
  )
  parser.add_argument('--targets_field', type=arguments.text, help='the field of the text to write for the inputs')
  parser.add_argument(
    '--messages_field', type=arguments.text, help='make conversations from the lists of messages in this field'
  )
  parser.add_argument('--tag_fields', type=_names, default=(), help='fields put in front of each text, e.g. url,lang')
  parser.add_argument('--scores', type=_names, default=(), help=f'computed for each document: {",".join(SCORES)}')
  parser.add_argument(
    '--score_field', type=arguments.text, help='a field that contains a number, kept as a score of each document'
  )
  parser.add_argument('--no_eos', action='store_true', help='do not end documents with EOS (as T5)')
  parser.add_argument('--workers', type=int, help='processes (default: one per core for large inputs)')


def _names(value: str) -> tuple[str, ...]:
  return tuple(filter(None, arguments.text(value).split(',')))


def run(options: argparse.Namespace) -> None:
  """Prepares a store as set by the flags and prints its size."""
  reading = Reading(
    documents=options.documents, field=options.field, pair=_pair(options.inputs_field, options.targets_field),
    messages=options.messages_field, tag_fields=options.tag_fields, score_field=options.score_field,
    records=options.records,
  )  # fmt: skip
  prepare(
    options.inputs, options.out, vocab_size=options.vocab_size, sentinels=options.sentinels,
    tokenizer=options.tokenizer, append_eos=not options.no_eos, reading=reading, scores=options.scores,
    workers=options.workers,
  )  # fmt: skip
  store = open_store(options.out)
  print(f'{options.out}: {store.num_tokens:,} tokens in {_units_of(store)}')


def _pair(inputs_field: str | None, targets_field: str | None) -> tuple[str, str] | None:
  """The fields of pairs; None if neither is given. Raises DataError for one without the other."""
  if inputs_field is None or targets_field is None:
    if inputs_field is None and targets_field is None:
      return None
    given, missing = ('targets', 'inputs') if inputs_field is None else ('inputs', 'targets')
    raise DataError(f'--{given}_field is given without --{missing}_field; give both.')
  return inputs_field, targets_field


def _units_of(store: Store) -> str:
  """The number of units and their lengths, which matter for pairs and conversations: training cuts those that do not
  fit in a row."""
  sizes = np.diff(store.offsets)
  match store.kind:
    case 'text':
      return f'{store.num_documents:,} documents'
    case 'pairs':
      sides = zip(('inputs', 'targets'), sizes.reshape(-1, 2).T, strict=True)
      return '\n  '.join([f'{store.num_documents // 2:,} pairs', *(_lengths(*side) for side in sides)])
    case 'conversations':
      left = np.concatenate([store.column(TURNS_LEFT, shard) for shard in range(len(store.shards))])
      first = np.flatnonzero(np.concatenate([[True], left[:-1] == 0]))
      whole = _lengths('conversations', np.add.reduceat(sizes, first))
      return f'{len(first):,} conversations of {len(left):,} turns\n  {whole}'
    case _:
      assert_never(store.kind)


def _lengths(what: str, lengths: np.ndarray) -> str:
  half, most = np.percentile(lengths, [50, 99], method='inverted_cdf')
  return f'{what}: half have up to {half} tokens, 99% up to {most}, the longest {lengths.max()} (with EOS)'


def prepare(
  inputs: Sequence[str | os.PathLike[str]],
  out: str | os.PathLike[str],
  *,
  vocab_size: int = 32_768,
  sentinels: int = 100,
  tokenizer: str | os.PathLike[str] | None = None,
  append_eos: bool = True,
  reading: Reading | None = None,
  scores: tuple[str, ...] = (),
  workers: int | None = None,
) -> None:
  """Makes the store `out` from files as a stream: memory does not grow with their size.

  `reading` selects what is read from the files, `scores` what is computed for each document. With `tokenizer` (see
  published.py) `vocab_size` is ignored. The store is the same for any number of `workers` (processes); the
  default is one per WORKER_BYTES of input, at most one per core. Raises DataError for bad input, an `out` that exists,
  and a vocabulary that the text cannot fill; then nothing is left behind.
  """
  paths, reading = [pathlib.Path(path) for path in inputs], reading or Reading()
  missing = [str(path) for path in paths if not path.is_file()]
  if missing:
    raise DataError(f'{missing[0]}{looked_in(missing[0])} is not a file; check the path.')
  _check(reading, scores, append_eos, sentinels, workers)
  for path in paths:  # check all of them before reading the first
    check_file(path)
  refuse_existing(out)
  total = sum(path.stat().st_size for path in paths)
  workers = workers or min(-(-total // WORKER_BYTES) or 1, len(os.sched_getaffinity(0)))
  if tokenizer:
    own = published(tokenizer).open(sentinels)
  else:
    own = Tokenizer(_train(paths, reading, total, vocab_size, sentinels), sentinels)
  recipe = Recipe(scores, reading.score_field, bool(reading.tag_fields), turns=reading.messages is not None)
  options = {'append_eos': append_eos, 'pairs': reading.pair is not None, 'columns': recipe.columns}
  with StoreWriter(out, own, **options) as writer:
    digest = hashlib.sha256()
    segments = _hashed(_read(paths, reading, total, own), digest)
    with contextlib.closing(encode_all(batches(segments), Encoder(own, recipe), workers)) as encoded:
      for batch in encoded:
        writer.add_joined(batch.tokens, batch.last, batch.columns)
    writer.finish(text_sha256=digest.hexdigest(), inputs=[path.name for path in paths], **_provenance(reading))


def _provenance(reading: Reading) -> dict[str, Any]:
  taken = {'fields': list(reading.units)} if reading.units else {'documents': reading.documents}
  return taken | ({'tag_fields': list(reading.tag_fields)} if reading.tag_fields else {})


def _check(reading: Reading, scores: tuple[str, ...], append_eos: bool, sentinels: int, workers: int | None) -> None:
  """Raises DataError for flags that are invalid or cannot be combined."""
  if sentinels < 0:
    raise DataError(f'--sentinels={sentinels}; it must be >= 0.')
  if workers is not None and workers < 1:
    raise DataError(f'--workers={workers}; it must be >= 1.')
  if unknown := [name for name in scores if name not in SCORES]:
    raise DataError(f'--scores={unknown[0]} is not a score; choose from {", ".join(SCORES)}.')
  if reading.score_field and not is_inside(reading.score_field):
    raise DataError(f'--score_field={reading.score_field} cannot be used as a folder name; rename the field.')
  if reading.score_field in scores:
    raise DataError(f'--score_field={reading.score_field} is also given in --scores; remove one of them.')
  if reading.units:
    _check_units(reading, scores, append_eos)


def _check_units(reading: Reading, scores: tuple[Score, ...], append_eos: bool) -> None:
  """`_check` for pairs and conversations."""
  kind = 'pairs' if reading.pair else 'conversations'
  if reading.pair and reading.messages:
    raise DataError('--inputs_field and --targets_field make pairs, --messages_field makes conversations; give one.')
  if reading.field != 'text':
    flags = '--inputs_field and --targets_field are' if reading.pair else '--messages_field is'
    raise DataError(f'--field={reading.field} is for text, {flags} for {kind}; give one kind.')
  if not append_eos:
    raise DataError(f'--no_eos cannot be used with {kind}, in which EOS marks the end of an output; leave it out.')
  if reading.tag_fields or reading.score_field or scores:
    raise DataError(f'--tag_fields, --scores and --score_field are for text, not for {kind}; leave them out.')


def _read(paths: list[pathlib.Path], reading: Reading, total: int, tokenizer: Tokenizer) -> Iterator[Segment]:
  """The segments of all files, with a progress bar in a terminal. A text without tokens counts as empty."""
  is_empty = lambda text: is_blank(text) or not tokenizer.encode(text)
  return (segment for segment, _ in _metered(paths, reading, total, 'tokenising', is_empty))


def _metered(
  paths: list[pathlib.Path], reading: Reading, total: int, label: str, is_empty: Callable[[str], bool] = is_blank
) -> Iterator[tuple[Segment, float]]:
  """Yields each segment with the fraction of all files read so far."""
  columns = (
    TextColumn('{task.description}'), BarColumn(), TaskProgressColumn(), TransferSpeedColumn(), TimeRemainingColumn()
  )  # fmt: skip
  console, meter = Console(stderr=True), Meter(total)
  shown = console.is_terminal
  with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
    task = progress.add_task(label, total=total)
    for path in paths:
      for segment in read_segments(path, reading, meter, is_empty):
        yield segment, meter.fraction
        if shown:
          progress.update(task, completed=meter.read)


def _hashed(segments: Iterable[Segment], digest: 'hashlib._Hash') -> Iterator[Segment]:
  for segment in segments:
    digest.update(segment.text.encode() + b'\0' * segment.last)
    yield segment


def _train(paths: list[pathlib.Path], reading: Reading, total: int, vocab_size: int, sentinels: int) -> bytes:
  head = lambda found: f'{found.tags} ' if reading.messages else ''  # every turn has a marker, so it should be short
  texts = ((head(found) + found.text, part) for found, part in _metered(paths, reading, total, 'reading a sample'))
  return train_sentencepiece(sample(texts, SAMPLE_BYTES), vocab_size, sentinels + len(MODES))


def tokenizer_from_documents(texts: Sequence[str], vocab_size: int, sentinels: int, *, sample_bytes: int) -> Tokenizer:
  """A tokenizer trained on a sample of documents; `vocab_size` counts pieces, sentinels and modes."""
  ends = list(itertools.accumulate(map(len, texts)))
  chosen = sample(((text, end / max(ends[-1], 1)) for text, end in zip(texts, ends, strict=True)), sample_bytes)
  return Tokenizer(train_sentencepiece(chosen, vocab_size, sentinels + len(MODES)), sentinels)


def train_sentencepiece(texts: Iterable[str], vocab_size: int, other_ids: int = 0) -> bytes:
  """A unigram model with byte fallback that has `vocab_size - other_ids` pieces; the same text gives the same model.

  Pad 0, EOS 1, unknown 2, no BOS; NFKC normalisation and collapsed white space, as in T5. If the text does not allow
  this size, raises DataError with a size that works. Source: Kudo 2018, arXiv:1804.10959.
  """
  pieces = vocab_size - other_ids
  if pieces < FEWEST_PIECES:
    raise DataError(
      f'{pieces} pieces are left for text, but at least {FEWEST_PIECES} are needed; '
      f'set the vocabulary size >= {FEWEST_PIECES + other_ids}.'
    )
  model, failures = io.BytesIO(), []
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=_remember(failures, (part for text in texts for part in sentences(text))),
      model_writer=model, vocab_size=pieces,
      model_type='unigram', byte_fallback=True, pad_id=PAD, eos_id=EOS, unk_id=UNKNOWN, bos_id=-1,
      normalization_rule_name='nmt_nfkc', character_coverage=0.9995, max_sentence_length=8 * MAX_SENTENCE,
      num_threads=TRAINING_THREADS, minloglevel=2,
    )  # fmt: skip
  except RuntimeError as error:
    raise failures[0] if failures else DataError(_advice(str(error), pieces, other_ids)) from error
  return model.getvalue()


def _remember(failures: list[DataError], parts: Iterator[str]) -> Iterator[str]:
  """Yields `parts`. A DataError is also kept in `failures`, because SentencePiece replaces it with its own error."""
  try:
    yield from parts
  except DataError as error:
    failures.append(error)
    raise


def _advice(error: str, pieces: int, other_ids: int) -> str:
  """SentencePiece's error in terms of the vocabulary size, which includes the pieces."""
  if most := re.search(r'too high .*value <= (\d+)', error):
    found = f'{pieces} pieces are left for text, but this text has no more than {most[1]}'
    if int(most[1]) < FEWEST_PIECES:
      return f'{found}, and at least {FEWEST_PIECES} are needed; give more text, or the --tokenizer of another store.'
    return f'{found}; set the vocabulary size <= {int(most[1]) + other_ids}, or give more text.'
  if fewest := re.search(r'smaller than required_chars. \d+ vs (\d+)', error):
    needed = f'the characters of this text need {fewest[1]}'
    return f'{pieces} pieces are left for text, but {needed}; set the vocabulary size >= {int(fewest[1]) + other_ids}.'
  reason = re.sub(r'^.*\]\s*', '', error.splitlines()[-1]).strip() or 'too little text. Give more, or fewer pieces.'
  return f'SentencePiece cannot make {pieces} pieces of this text: {reason}'


def sentences(text: str) -> Iterator[str]:
  """Yields lines of at most MAX_SENTENCE characters; longer lines are cut between words if possible."""
  for line in text.splitlines():
    line = line.replace('\0', ' ').strip()
    while len(line) > MAX_SENTENCE:
      cut = line.rfind(' ', 1, MAX_SENTENCE)
      cut = cut if cut > 0 else MAX_SENTENCE
      yield line[:cut]
      line = line[cut:].lstrip()
    if line:
      yield line
