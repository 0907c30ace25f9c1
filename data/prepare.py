"""`pretrain data prepare`: text or JSONL -> a token store, with a SentencePiece model of its own when none is given."""

import argparse
import hashlib
import io
import itertools
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import sentencepiece
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from data.errors import DataError
from data.store import Store, StoreWriter, open_store
from data.text import Documents, Segment, read_pairs, read_segments, sample
from data.vocabulary import EOS, MODES, PAD, UNKNOWN, Tokenizer

SAMPLE_BYTES = 20_000_000
BATCH_BYTES = 2**22
FEWEST_PIECES = 3 + 256 + 100  # special pieces, bytes, and something to say with them
MAX_SENTENCE = 4096  # characters; SentencePiece passes over longer ones
TRAINING_THREADS = 4  # sums of floats depend on it, and with them the model


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The flags of `pretrain data prepare`."""
  parser.add_argument('inputs', nargs='+', type=pathlib.Path, help='text files, or .jsonl')
  parser.add_argument('--out', required=True, help='the store: a path or a URL (gs://, s3://)')
  parser.add_argument('--vocab_size', type=int, default=32_768, help='ids in all: pieces, sentinels and modes')
  parser.add_argument('--sentinels', type=int, default=100, help='ids kept for sentinels (data.sentinels)')
  parser.add_argument('--tokenizer', type=pathlib.Path, help='a SentencePiece model to use; otherwise one is trained')
  parser.add_argument('--documents', choices=('file', 'paragraph', 'line'), default='file', help='what a document is')
  parser.add_argument('--field', default='text', help='the field of a JSONL line that holds the text')
  parser.add_argument('--inputs_field', help='with --targets_field: make pairs, of these two fields of a JSONL line')
  parser.add_argument('--targets_field', help='the field of what is to be written for the inputs')
  parser.add_argument('--no_eos', action='store_true', help='do not end documents with EOS (T5 did not)')


def run(options: argparse.Namespace) -> None:
  """Prepares a store as the flags say and prints what it holds."""
  prepare(
    options.inputs, options.out, vocab_size=options.vocab_size, sentinels=options.sentinels,
    tokenizer=options.tokenizer, documents=options.documents, field=options.field, append_eos=not options.no_eos,
    inputs_field=options.inputs_field, targets_field=options.targets_field,
  )  # fmt: skip
  store = open_store(options.out)
  print(f'{options.out}: {store.num_tokens:,} tokens in ' + (_pairs_of(store) if store.pairs else _documents_of(store)))


def _documents_of(store: Store) -> str:
  return f'{store.num_documents:,} documents'


def _pairs_of(store: Store) -> str:
  """How many pairs, and how long they are: what is longer than a row of training has room for is cut there."""
  lines = [f'{store.num_documents // 2:,} pairs']
  for side, lengths in zip(('inputs', 'targets'), np.diff(store.offsets).reshape(-1, 2).T, strict=True):
    half, most = np.percentile(lengths, [50, 99], method='inverted_cdf')
    lines.append(f'{side}: half have up to {half} tokens, 99% up to {most}, the longest {lengths.max()} (with EOS)')
  return '\n  '.join(lines)


def prepare(
  inputs: Sequence[str | os.PathLike[str]],
  out: str | os.PathLike[str],
  *,
  vocab_size: int = 32_768,
  sentinels: int = 100,
  tokenizer: str | os.PathLike[str] | None = None,
  documents: Documents = 'file',
  field: str = 'text',
  append_eos: bool = True,
  inputs_field: str | None = None,
  targets_field: str | None = None,
) -> None:
  """Makes the store `out` from files, streaming: memory does not grow with them.

  With `inputs_field` and `targets_field` it is a store of pairs, made of JSONL.
  With `tokenizer` (a SentencePiece model file) `vocab_size` is not used. Raises DataError for bad input, for an `out`
  that exists, and for a vocabulary that the text cannot fill; then nothing is left behind.
  """
  paths = [pathlib.Path(path) for path in inputs]
  missing = [str(path) for path in paths if not path.is_file()]
  if missing:
    raise DataError(f'{missing[0]} is no file; check the path.')
  _check_fields(inputs_field, targets_field, field, append_eos)
  if sentinels < 0:
    raise DataError(f'--sentinels={sentinels}; it must be >= 0.')
  total = sum(path.stat().st_size for path in paths)
  pairs = inputs_field is not None and targets_field is not None
  one = lambda path: read_pairs(path, inputs_field, targets_field) if pairs else read_segments(path, documents, field)
  read = lambda: itertools.chain.from_iterable(map(one, paths))
  if tokenizer is None:
    texts = (segment.text for segment in _with_progress(read(), total, 'reading a sample'))
    model = train_sentencepiece(sample(texts, total, SAMPLE_BYTES), vocab_size, sentinels + len(MODES))
  else:
    model = load_model(pathlib.Path(tokenizer))
  with StoreWriter(out, Tokenizer(model, sentinels), append_eos=append_eos, pairs=pairs) as writer:
    digest = _tokenize(_with_progress(read(), total, 'tokenising'), writer, Tokenizer(model, sentinels))
    what = {'fields': [inputs_field, targets_field]} if pairs else {'documents': documents}
    writer.finish(text_sha256=digest, inputs=[path.name for path in paths], **what)


def _check_fields(inputs_field: str | None, targets_field: str | None, field: str, append_eos: bool) -> None:
  """Raises DataError for flags of pairs that do not go together."""
  if inputs_field is None and targets_field is None:
    return
  if inputs_field is None or targets_field is None:
    given, missing = ('targets', 'inputs') if inputs_field is None else ('inputs', 'targets')
    raise DataError(f'--{given}_field is given without --{missing}_field; a pair has both.')
  if field != 'text':
    raise DataError(f'--field={field} is for text, --inputs_field and --targets_field are for pairs; give one kind.')
  if not append_eos:
    raise DataError('--no_eos cannot go with pairs, in which EOS says where an output ends; leave it out.')


def _with_progress(segments: Iterable[Segment], total: int, label: str) -> Iterator[Segment]:
  columns = (
    TextColumn('{task.description}'), BarColumn(), TaskProgressColumn(), TransferSpeedColumn(), TimeRemainingColumn()
  )  # fmt: skip
  console = Console(stderr=True)
  with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
    task = progress.add_task(label, total=total)
    for segment in segments:
      yield segment
      progress.advance(task, segment.num_bytes)


def _tokenize(segments: Iterable[Segment], writer: StoreWriter, tokenizer: Tokenizer) -> str:
  """Fills `writer`; returns the sha256 of the text."""
  digest, threads = hashlib.sha256(), len(os.sched_getaffinity(0))
  for batch in _batches(segments):
    for segment in batch:
      digest.update(segment.text.encode() + b'\0' * segment.last)
    ids = tokenizer.encode_batch([segment.text for segment in batch], threads)
    writer.add(ids, [segment.last for segment in batch])
  return digest.hexdigest()


def _batches(segments: Iterable[Segment]) -> Iterator[list[Segment]]:
  batch, size = [], 0
  for segment in segments:
    batch.append(segment)
    size += segment.num_bytes
    if size >= BATCH_BYTES:
      yield batch
      batch, size = [], 0
  if batch:
    yield batch


def load_model(path: pathlib.Path) -> bytes:
  """A SentencePiece model file with T5's special ids. Raises DataError otherwise."""
  try:
    model = path.read_bytes()
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
  except (OSError, RuntimeError) as error:
    raise DataError(f'{path} is no SentencePiece model ({str(error).splitlines()[0]}); check --tokenizer.') from error
  found = (processor.pad_id(), processor.eos_id(), processor.unk_id())
  if found != (PAD, EOS, UNKNOWN):
    raise DataError(f'{path} has pad, EOS, unknown = {found}, not {(PAD, EOS, UNKNOWN)}; train it with these ids.')
  return model


def tokenizer_from_documents(texts: Sequence[str], vocab_size: int, sentinels: int, *, sample_bytes: int) -> Tokenizer:
  """A tokenizer trained on a sample of documents; `vocab_size` counts pieces, sentinels and modes."""
  chosen = sample(texts, sum(map(len, texts)), sample_bytes)
  return Tokenizer(train_sentencepiece(chosen, vocab_size, sentinels + len(MODES)), sentinels)


def train_sentencepiece(texts: Iterable[str], vocab_size: int, other_ids: int = 0) -> bytes:
  """A unigram model with byte fallback whose pieces and `other_ids` are `vocab_size`; the same for the same text.

  Pad 0, EOS 1, unknown 2, no BOS; NFKC normalisation and collapsed white space, as T5's. Raises DataError, with a size
  that will do, where the text does not allow this one. Source: Kudo 2018, arXiv:1804.10959.
  """
  pieces = vocab_size - other_ids
  if pieces < FEWEST_PIECES:
    raise DataError(
      f'{pieces} pieces are left for text, at least {FEWEST_PIECES} are needed; '
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
  """`parts`; an error among them is kept, because SentencePiece makes another one of it."""
  try:
    yield from parts
  except DataError as error:
    failures.append(error)
    raise


def _advice(error: str, pieces: int, other_ids: int) -> str:
  """SentencePiece's error as a sentence that speaks of the vocabulary size, of which pieces are a part."""
  if most := re.search(r'too high .*value <= (\d+)', error):
    found = f'{pieces} pieces are left for text, this text has no more than {most[1]}'
    if int(most[1]) < FEWEST_PIECES:
      return f'{found}, at least {FEWEST_PIECES} are needed; give more text, or --tokenizer of another store.'
    return f'{found}; set the vocabulary size <= {int(most[1]) + other_ids}, or give more text.'
  if fewest := re.search(r'smaller than required_chars. \d+ vs (\d+)', error):
    needed = f'the characters of this text need {fewest[1]}'
    return f'{pieces} pieces are left for text, {needed}; set the vocabulary size >= {int(fewest[1]) + other_ids}.'
  reason = re.sub(r'^.*\]\s*', '', error.splitlines()[-1]).strip() or 'too little text. Give more, or fewer pieces.'
  return f'SentencePiece cannot make {pieces} pieces of this text: {reason}'


def sentences(text: str) -> Iterator[str]:
  """Lines of at most MAX_SENTENCE characters, long ones cut between words where there are any."""
  for line in text.splitlines():
    line = line.replace('\0', ' ').strip()
    while len(line) > MAX_SENTENCE:
      cut = line.rfind(' ', 1, MAX_SENTENCE)
      cut = cut if cut > 0 else MAX_SENTENCE
      yield line[:cut]
      line = line[cut:].lstrip()
    if line:
      yield line
