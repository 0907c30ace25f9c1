"""Every kind of input file gives the same documents; a damaged file is named in the error and leaves nothing behind."""

import functools
import gzip
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from array_record.python import array_record_module

from data.errors import DataError
from data.prepare import encode
from data.prepare.inputs import Meter
from data.prepare.prepare import prepare
from data.prepare.scores import SCORES, score
from data.prepare.text import Reading, read_segments
from data.stores import arrays
from data.stores.store import open_store

packed = functools.partial(gzip.compress, mtime=0)  # so that test names do not change with the time
TEXTS = [f'document {i} of the license\nand of any work {i % 7}' for i in range(700)]
ROWS = [{'text': text, 'lang': 'en', 'quality': i / 2} for i, text in enumerate(TEXTS)]
LINES = '\n'.join(map(json.dumps, ROWS)).encode()
PLAIN = '\n\n'.join(TEXTS).encode()


def arrayrecord(path: pathlib.Path, records: list[bytes]) -> None:
  writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:64')
  for record in records:
    writer.write(record)
  writer.close()


def parquet(path: pathlib.Path, rows: list[dict]) -> None:
  pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=100)


def zstd(content: bytes) -> bytes:
  return zstandard.compress(content[:999]) + zstandard.compress(content[999:])  # a file of two frames


WRITERS = {
  't.txt': lambda path: path.write_bytes(PLAIN),
  't.txt.gz': lambda path: path.write_bytes(packed(PLAIN[:999]) + packed(PLAIN[999:])),
  't.txt.zst': lambda path: path.write_bytes(zstd(PLAIN)),
  't.jsonl': lambda path: path.write_bytes(LINES),
  't.json.gz': lambda path: path.write_bytes(packed(LINES)),
  't.jsonl.zst': lambda path: path.write_bytes(zstd(LINES)),
  't.parquet': lambda path: parquet(path, ROWS),
  't.arrayrecord': lambda path: arrayrecord(path, [text.encode() for text in TEXTS]),
  'j.arrayrecord': lambda path: arrayrecord(path, [json.dumps(row).encode() for row in ROWS]),
}


@pytest.fixture
def model(tmp_path, tokenizer_model):
  (tmp_path / 'm').write_bytes(tokenizer_model)
  return tmp_path / 'm'


def reading_of(name: str, **options) -> Reading:
  return Reading(documents='paragraph', records='json' if name.startswith('j') else 'text', **options)


@pytest.mark.parametrize('name', WRITERS)
def test_documents_are_the_same_in_every_kind_of_file(tmp_path, name):
  WRITERS[name](tmp_path / name)
  meter = Meter((tmp_path / name).stat().st_size)
  segments = list(read_segments(tmp_path / name, reading_of(name), meter))
  assert [segment.text.split() for segment in segments] == [text.split() for text in TEXTS]
  assert 0.99 < meter.fraction <= 1.0, 'the progress bar gets to the end'


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('t.txt.gz', packed(PLAIN)[:-20], 't.txt.gz is cut off in the middle of its compressed data'),
    ('t.txt.zst', zstandard.compress(PLAIN)[:-20], 't.txt.zst is cut off in the middle of its compressed data'),
    ('t.txt.gz', packed(PLAIN)[:9] + PLAIN, r't.txt.gz cannot be unpacked \(.*\); copy it again'),
    ('t.txt.zst', zstandard.compress(PLAIN)[:9] + PLAIN, r't.txt.zst cannot be unpacked \(.*\); copy it again'),
    ('t.txt.gz', packed(PLAIN)[:400] + b'\xff' * 9 + packed(PLAIN)[409:], 't.txt.gz cannot be unpacked'),
    ('t.txt.gz', packed(b'a' * 90 + b'\xff'), r't.txt.gz is not UTF-8 text \(byte 90\)'),
    ('t.txt.zst', zstandard.compress(b'a' * 90 + b'\0'), r't.txt.zst is binary \(a NUL at byte 90\)'),
    ('t.jsonl.gz', packed(b'{"text": "a"}\n{'), r't.jsonl.gz:2: not JSON'),
    ('t.txt.gz', packed(b''), 't.txt.gz is empty; remove it'),
    ('t.parquet', b'PAR1\x15' + PLAIN, r't.parquet cannot be read as Parquet from row 0 on'),
    ('t.arrayrecord', bytes.fromhex('83af70d10d884a3f') + PLAIN, r't.arrayrecord cannot be read as ArrayRecord'),
    ('t.jsonl', b'[' * 10**5 + b']' * 10**5, r't.jsonl:1: not JSON \(maximum recursion depth'),
  ],
)  # fmt: skip
def test_the_error_names_a_damaged_file_and_nothing_is_left_behind(tmp_path, model, name, content, message):
  (tmp_path / name).write_bytes(content)
  with pytest.raises(DataError, match='^DATA: .*' + message):
    prepare([tmp_path / name], tmp_path / 'out', tokenizer=model)
  assert sorted(path.name for path in tmp_path.iterdir()) == sorted(['m', name])


@pytest.mark.parametrize(
  ('name', 'rows', 'options', 'message'),
  [
    ('t.parquet', [{'body': 'a'}], {}, r"t.parquet has no column 'text' \(found: body\)"),
    ('t.parquet', [{'text': 'a'}, {'text': None}], {}, r"t.parquet: row 1: no text in field 'text'"),
    ('t.parquet', [{'text': 'a'}], {'tag_fields': ('url',)}, r"t.parquet has no column 'url'"),
    ('j.arrayrecord', [{'text': 'a'}, {'x': 'a'}], {}, r"j.arrayrecord: record 1: no text in field 'text'"),
    ('t.jsonl', [{'text': 'a', 'q': 'high'}], {'score_field': 'q'}, r"t.jsonl:1: field 'q' is 'high', not a float32"),
    ('t.jsonl', [{'text': 'a'}], {'score_field': 'q'}, r"t.jsonl:1: field 'q' is None, not a float32"),
    ('t.jsonl', [{'text': 'a', 'q': 10**400}], {'score_field': 'q'}, r"t.jsonl:1: field 'q' is 10{39}, not a float32"),
    ('t.jsonl', [{'text': 'a', 'q': 1e39}], {'score_field': 'q'}, r"t.jsonl:1: field 'q' is 1e\+39, not a float32"),
    ('t.jsonl', [{'text': 'a', 'url': 'x\0'}], {'tag_fields': ('url',)}, r"field 'url' has a NUL \(character 1\)"),
    ('t.jsonl', [{'text': 'a', 'url': '\ud800'}], {'tag_fields': ('url',)}, r"field 'url' has half of a surrogate"),
    ('t.jsonl', [{'text': 5}], {}, r"t.jsonl:1: no text in field 'text', which is int \(found: text\)"),
    ('t.jsonl', [{'text': 'a', 'url': []}], {'tag_fields': ('url',)}, r"t.jsonl:1: field 'url' is not text \(list\)"),
  ],
)
def test_the_error_names_a_bad_record(tmp_path, model, name, rows, options, message):
  lines = [json.dumps(row).encode() for row in rows]
  if name == 't.parquet':
    parquet(tmp_path / name, rows)
  elif name == 't.jsonl':
    (tmp_path / name).write_bytes(b'\n'.join(lines))
  else:
    arrayrecord(tmp_path / name, lines)
  with pytest.raises(DataError, match='^DATA: .*' + message):
    prepare([tmp_path / name], tmp_path / 'out', tokenizer=model, reading=reading_of(name, **options))


def test_the_error_names_parquet_with_invalid_utf8_or_a_wrong_checksum(tmp_path, model):
  offsets = np.int32([0, 1, 4]).tobytes()
  text = pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, *map(pyarrow.py_buffer, (offsets, b'abc\xff'))])
  pyarrow.parquet.write_table(pyarrow.table({'text': text}), tmp_path / 'bad.parquet')
  with pytest.raises(DataError, match=r"bad.parquet: row 1, column 'text' is not UTF-8 text \(byte 2\); convert it"):
    prepare([tmp_path / 'bad.parquet'], tmp_path / 'out', tokenizer=model)
  table, path = pyarrow.table({'text': TEXTS}), tmp_path / 'flipped.parquet'
  pyarrow.parquet.write_table(table, path, write_page_checksum=True, compression='none', use_dictionary=False)
  path.write_bytes(path.read_bytes().replace(b'document 300', b'dokument 300'))
  with pytest.raises(DataError, match=r'flipped.parquet cannot be read as Parquet from row 0 on \(.*checksum'):
    prepare([path], tmp_path / 'out', tokenizer=model)


def test_the_error_for_a_missing_library_names_the_extra_to_install(tmp_path, model, monkeypatch):
  WRITERS['t.jsonl.zst'](tmp_path / 't.jsonl.zst')
  monkeypatch.setitem(sys.modules, 'zstandard', None)
  with pytest.raises(DataError, match=r"zst needs zstandard, which is not installed; pip install -e '\.\[data\]'"):
    prepare([tmp_path / 't.jsonl.zst'], tmp_path / 'out', tokenizer=model)


def test_the_store_is_the_same_for_any_number_of_workers(tmp_path, model, monkeypatch):
  monkeypatch.setattr(encode, 'BATCH_BYTES', 500)
  WRITERS['t.jsonl'](tmp_path / 't.jsonl')
  (tmp_path / 'long.jsonl').write_text(json.dumps({'text': ' '.join(TEXTS), 'lang': 'de', 'quality': 9}))
  reading = Reading(tag_fields=('lang',), score_field='quality')
  for workers in (1, 3):
    prepare(
      [tmp_path / 't.jsonl', tmp_path / 'long.jsonl'], tmp_path / str(workers), tokenizer=model, reading=reading,
      scores=SCORES, workers=workers,
    )  # fmt: skip
  files = [{p.relative_to(root): p.read_bytes() for p in root.rglob('*') if p.is_file()} for root in
           (tmp_path / '1', tmp_path / '3')]  # fmt: skip
  assert files[0] == files[1]
  assert any('scores' in path.parts for path in files[0])


def test_scores_do_not_depend_on_how_a_document_is_cut_into_segments(tmp_path, model, monkeypatch):
  (tmp_path / 't.txt').write_bytes(PLAIN)
  (tmp_path / 'u.txt').write_text(TEXTS[0])
  monkeypatch.setattr('data.prepare.text.SEGMENT_BYTES', 300)
  monkeypatch.setattr(encode, 'BATCH_BYTES', 700)
  prepare([tmp_path / 't.txt', tmp_path / 'u.txt'], tmp_path / 's', tokenizer=model, scores=SCORES)
  store = open_store(tmp_path / 's')
  assert store.score_names == SCORES
  for name in SCORES:
    wanted = [score(name, PLAIN.decode()), score(name, TEXTS[0])]
    assert store.scores(name, 0).tolist() == np.float32(wanted).tolist()


def test_scores_and_tags_from_fields_are_kept_for_each_document(tmp_path, model):
  WRITERS['t.parquet'](tmp_path / 't.parquet')
  rows = [*ROWS[:3], {'text': ' ', 'lang': 'de', 'quality': 7.0}, {'text': 'of', 'lang': None, 'quality': 8.0}]
  parquet(tmp_path / 't.parquet', rows)
  reading = Reading(tag_fields=('lang',), score_field='quality')
  prepare([tmp_path / 't.parquet'], tmp_path / 's', tokenizer=model, reading=reading)
  store = open_store(tmp_path / 's')
  assert store.scores('quality', 0).tolist() == [0.0, 0.5, 1.0, 8.0], 'a document without a token is left out'
  tokenizer, lengths = store.tokenizer(0), store.tag_lengths(0)
  assert lengths.dtype == np.int32
  begins = store.offsets[:-1].tolist()
  tags = [tokenizer.decode(ids) for ids in store.read(list(zip(begins, lengths.tolist(), strict=True)))]
  assert tags == ['lang: en'] * 3 + ['']
  whole = store.read(list(zip(begins, (np.diff(store.offsets) - 1).tolist(), strict=True)))
  texts = [tokenizer.decode(ids[n:]) for ids, n in zip(whole, lengths.tolist(), strict=True)]
  assert texts == [' '.join(text.split()) for text in [*TEXTS[:3], 'of']]
  with pytest.raises(
    DataError, match=r"has no score 'beauty' \(it has: quality\);.* data prepare --scores=beauty …, or"
  ):
    store.scores('beauty', 0)


def test_an_interrupt_waits_for_the_write_that_has_begun():
  """Else its thread would create the folder again that is removed meanwhile."""

  class Slow:
    asked = 0

    def result(self):
      raise KeyboardInterrupt

    def done(self):
      self.asked += 1
      return self.asked == 3

  with pytest.raises(KeyboardInterrupt):
    arrays._awaited(slow := Slow())
  assert slow.asked == 3


def test_ctrl_c_leaves_nothing_behind(tmp_path, model):
  """Runs in its own process group, as in a terminal; the workers receive the signal too."""
  (tmp_path / 't.txt').write_bytes(PLAIN * 1000)
  code = (
    'import signal, sys; from data.prepare.prepare import prepare\n'
    'signal.signal(signal.SIGINT, signal.default_int_handler)  # a background process ignores it by default\n'
    'prepare(sys.argv[1:2], sys.argv[2], tokenizer="m", workers=2)'
  )
  command = [sys.executable, '-c', code, str(tmp_path / 't.txt'), str(tmp_path / 'out')]
  process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, cwd=tmp_path)
  while not any((path / 'tokens').exists() for path in tmp_path.glob('out.partial*')):
    assert process.poll() is None, process.stderr.read()
    time.sleep(0.02)
  os.killpg(process.pid, signal.SIGINT)
  assert process.wait(120) != 0
  process.stderr.close()
  assert sorted(path.name for path in tmp_path.iterdir()) == ['m', 't.txt']
  wait_for_the_end_of(process.pid)


def wait_for_the_end_of(group: int) -> None:
  """Waits for the workers and their semaphore tracker, which end shortly after the process that started them."""
  for _ in range(500):
    try:
      os.killpg(group, 0)
    except ProcessLookupError:
      return
    time.sleep(0.02)
  pytest.fail(f'processes of group {group} live on')
