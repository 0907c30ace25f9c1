"""The kind of a file follows from its name, in any case, and its first bytes; if they disagree, it is refused."""

import bz2
import functools
import gzip
import io
import json
import lzma
import os
import pathlib
import shutil
import subprocess
import tarfile
import zipfile

import numpy as np
import pyarrow
import pyarrow.feather
import pyarrow.orc
import pyarrow.parquet
import pytest
import zstandard
from array_record.python import array_record_module

from data.errors import DataError
from data.prepare.inputs import Meter, open_bytes
from data.prepare.prepare import prepare
from data.prepare.text import Reading, read_segments

TEXTS = ['the work', 'of the license']
LINES = b''.join(json.dumps({'text': text}).encode() + b'\n' for text in TEXTS)
PLAIN = '\n\n'.join(TEXTS).encode()
packed = functools.partial(gzip.compress, mtime=0)  # so that test names do not change with the time


def parquet() -> bytes:
  out = io.BytesIO()
  pyarrow.parquet.write_table(pyarrow.table({'text': TEXTS}), out)
  return out.getvalue()


def arrayrecord(tmp_path: pathlib.Path) -> bytes:
  writer = array_record_module.ArrayRecordWriter(str(tmp_path / 'made'), 'group_size:64')
  for text in TEXTS:
    writer.write(text.encode())
  writer.close()
  return (tmp_path / 'made').read_bytes()


def tar() -> bytes:
  out = io.BytesIO()
  with tarfile.open(fileobj=out, mode='w') as archive:
    member = tarfile.TarInfo('a.txt')
    member.size = len(PLAIN)
    archive.addfile(member, io.BytesIO(PLAIN))
  return out.getvalue()


def zipped() -> bytes:
  out = io.BytesIO()
  with zipfile.ZipFile(out, 'w') as archive:
    archive.writestr('a.txt', PLAIN)
  return out.getvalue()


def feather() -> bytes:
  out = io.BytesIO()
  pyarrow.feather.write_feather(pyarrow.table({'text': TEXTS}), out)
  return out.getvalue()


def npy() -> bytes:
  out = io.BytesIO()
  np.save(out, np.arange(9))
  return out.getvalue()


def documents(path: pathlib.Path, **options) -> list[str]:
  return [segment.text.strip() for segment in read_segments(path, Reading(documents='paragraph', **options))]


@pytest.mark.parametrize(
  ('name', 'content'),
  [
    ('UP.JSONL', LINES), ('Up.Json', LINES), ('x.NDJSON', LINES), ('x.PARQUET', parquet()), ('x.Parquet', parquet()),
    ('x.txt.GZ', packed(PLAIN)), ('X.JSONL.GZ', packed(LINES)), ('x.jsonl.Gz', packed(LINES)),
    ('x.JSONL.Zst', zstandard.compress(LINES)), ('x.TXT.ZST', zstandard.compress(PLAIN)),
    ('x.ArrayRecord', None), ('x.ARRAY_RECORD', None),
    ('x.TXT', PLAIN), ('x.py', PLAIN), ('x.md', PLAIN), ('LICENSE', PLAIN), ('x.html', PLAIN), ('x.', PLAIN),
    ('x.v1.2', PLAIN), ('.hidden', PLAIN), ('x.txt.gz', packed(PLAIN)), ('jsonl', PLAIN), ('x.bin', PLAIN),
  ],
)  # fmt: skip
def test_names_are_read_in_any_case_and_text_may_have_any_other_suffix(tmp_path, name, content):
  (tmp_path / name).write_bytes(arrayrecord(tmp_path) if content is None else content)
  assert documents(tmp_path / name) == TEXTS


MISMATCHES = [
  ('t.txt', packed(PLAIN), 't.txt is gzip by its first bytes; rename it to t.txt.gz'),
  ('t.jsonl', packed(LINES), 't.jsonl is gzip by its first bytes; rename it to t.jsonl.gz'),
  ('t.jsonl.gzip', packed(LINES), 'rename it to t.jsonl.gz'),
  ('t.jsonl', zstandard.compress(LINES), 't.jsonl is zstd by its first bytes; rename it to t.jsonl.zst'),
  ('t.JSONL.gz', LINES, 't.JSONL.gz is not gzip: .* rename it to t.JSONL if'),
  ('t.txt.zst', PLAIN, 't.txt.zst is not zstd: .* rename it to t.txt if'),
  ('t.txt.gz', zstandard.compress(PLAIN), 't.txt.gz is not gzip: its first bytes are those of zstd'),
  ('t.txt.zst', packed(PLAIN), 't.txt.zst is not zstd: its first bytes are those of gzip'),
  ('t.parquet', PLAIN, r't.parquet is not Parquet: .* rename it to t.txt if'),
  ('t.parquet', packed(parquet()), 't.parquet is not Parquet: its first bytes are those of gzip'),
  ('t.txt', parquet(), 't.txt is Parquet by its first bytes; rename it to t.parquet'),
  ('t.pq', parquet(), 'rename it to t.parquet'),
  ('t.jsonl', parquet(), 'rename it to t.parquet'),
  ('t.arrayrecord', PLAIN, 't.arrayrecord is not ArrayRecord'),
  ('t.arrayrecord', parquet(), 't.arrayrecord is not ArrayRecord: its first bytes are those of Parquet'),
  ('t.parquet.gz', packed(parquet()), 'Parquet in gzip cannot be read .* unpack it first'),
  ('t.txt.gz', packed(parquet()), 't.txt.gz holds Parquet by its first bytes; unpack it, and rename'),
  ('t.txt.gz', packed(packed(PLAIN)), 't.txt.gz holds gzip by its first bytes; unpack it'),
  ('t.gz', packed(tar()), 't.gz holds a tar archive by its first bytes; unpack it first'),
  ('t.tar.gz', packed(tar()), r't.tar.gz has the name of an archive \(.tar\).* unpack it first'),
  ('t.tgz', packed(tar()), r'has the name of an archive \(.tgz\)'),
  ('t.txt.gz', packed(PLAIN.decode().encode('utf-16')), 't.txt.gz holds UTF-16 text.* iconv -f UTF-16 -t'),
  ('t.txt', bz2.compress(PLAIN), 't.txt is bzip2 by its first bytes; unpack it'),
  ('t.jsonl', lzma.compress(LINES), 't.jsonl is xz by its first bytes; unpack it'),
  ('t.jsonl.bz2', bz2.compress(LINES), r'compressed file \(.bz2\), which cannot be read; unpack it first'),
  ('t.XZ', lzma.compress(LINES), r'compressed file \(.xz\), which cannot be read; unpack it first'),
  ('t.txt', zipped(), 't.txt is a ZIP archive .*; unpack it first'),
  ('t.zip', zipped(), 'an archive .* unpack it first'),
  ('t.docx', zipped(), 'a formatted document .* convert it to text'),
  ('t', tar(), 't is a tar archive by its first bytes; unpack it first'),
  ('t.txt', b'%PDF-1.7\n%\xe2\xe3\n', 't.txt is a PDF by its first bytes; convert it to text'),
  ('t.PDF', b'%PDF-1.7\n', r'a formatted document \(.pdf\), .* convert it to text'),
  ('t.doc', b'\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1', 'convert it to text'),
  ('t.txt', rb'{\rtf1\ansi}', 'is RTF by its first bytes; convert it to text'),
  ('t.txt', feather(), 'is Arrow by its first bytes; convert it to .jsonl or .parquet'),
  ('t.txt', npy(), 'is a NumPy array by its first bytes'),
  ('t.txt', b'SQLite format 3\0', 'is an SQLite database'),
  ('t.csv', b'text,lang\na,en\n', r'a table \(.csv\).* convert it to .jsonl, or rename it to .txt .*--documents=line'),
  ('t.TSV', b'text\tlang\n', r'a table \(.tsv\)'),
  ('t.csv.gz', packed(b'text,lang\n'), r'a table \(.csv\)'),
  ('t.txt', PLAIN.decode().encode('utf-16'), 't.txt is UTF-16 text by its first bytes; convert it: iconv -f UTF-16 -t'),
  ('t.jsonl', LINES.decode().encode('utf-16-le'), 'is UTF-16LE text .* iconv -f UTF-16LE'),
  ('t.jsonl', LINES.decode().encode('utf-16-be'), 'is UTF-16BE text .* iconv -f UTF-16BE'),
  ('t.txt', PLAIN.decode().encode('utf-32'), 'is UTF-32 text'),
  ('t.txt', b'text \0 and more', r't.txt is binary \(a NUL at byte 5\)'),
  ('t', bytes(range(1, 256)), r't is not UTF-8 text \(byte 127\)'),
  ('t.txt', pathlib.Path('/bin/sh').read_bytes(), 'is a program by its first bytes; leave it out'),
  ('t.png', b'\x89PNG\r\n', 'a file without text .* leave it out'),
]


@pytest.mark.parametrize(
  ('name', 'content', 'message'), MISMATCHES, ids=[f'{i}-{m[0]}' for i, m in enumerate(MISMATCHES)]
)
def test_a_file_that_does_not_match_its_name_is_refused_with_the_fix(tmp_path, tokenizer_model, name, content, message):
  (tmp_path / 'm').write_bytes(tokenizer_model)
  (tmp_path / name).write_bytes(content)
  with pytest.raises(DataError, match=f'^DATA: .*{message}') as caught:
    prepare([tmp_path / name], tmp_path / 'out', tokenizer=tmp_path / 'm')
  assert len(str(caught.value).splitlines()) == 1
  assert sorted(path.name for path in tmp_path.iterdir()) == sorted(['m', name])


def test_every_file_is_checked_before_the_first_is_read(tmp_path, tokenizer_model, monkeypatch):
  (tmp_path / 'a.txt').write_bytes(PLAIN)
  (tmp_path / 'b.txt').write_bytes(packed(PLAIN))
  monkeypatch.setattr('data.prepare.prepare._train', lambda *args: pytest.fail('a tokenizer is trained first'))
  with pytest.raises(DataError, match=r'rename it to b\.txt\.gz'):
    prepare([tmp_path / 'a.txt', tmp_path / 'b.txt'], tmp_path / 'out')


@pytest.mark.parametrize(
  'text', ['PAR1 is a word', 'PK is one too', 'BZh', 'Rare', '{"a": 1}', '%PDF', '\x1fa', 'RIFF', 'ORC']
)
def test_text_that_resembles_another_kind_is_read_as_text(tmp_path, text):
  (tmp_path / 't.txt').write_text(text)
  assert documents(tmp_path / 't.txt') == [text.strip()]


# gzip


MEMBER = packed(LINES, mtime=0)
MEMBERS = {
  'one': MEMBER, 'two': MEMBER + MEMBER, 'an empty one': packed(b'') + MEMBER,
  'padded': MEMBER + bytes(1000), 'padded by one': MEMBER + b'\0', 'padded by much': MEMBER + bytes(2**18),
  'padded two': MEMBER + MEMBER + bytes(512),
  'garbage': MEMBER + b'garbage', 'two bytes': MEMBER + b'gg', 'garbage behind zeros': MEMBER + bytes(9) + b'x',
  'a member behind zeros': MEMBER + bytes(512) + MEMBER, 'much garbage': MEMBER + b'x' * 2**18,
  'no header': MEMBER + b'\x1fx\x8b' + bytes(30),
  'one byte': MEMBER + b'g', 'half a magic': MEMBER + b'\x1f', 'a magic': MEMBER + b'\x1f\x8b',
  'half a header': MEMBER + MEMBER[:9], 'half a member': MEMBER + MEMBER[:20], 'cut off': MEMBER[:-3],
  'cut off in its body': MEMBER[:20], 'wrong checksum': MEMBER[:-8] + b'abcd' + MEMBER[-4:],
  'wrong length': MEMBER[:-4] + b'abcd', 'unknown method': MEMBER + MEMBER[:2] + b'\7' + MEMBER[3:],
}  # fmt: skip


@pytest.mark.parametrize('case', MEMBERS)
def test_gzip_is_read_as_the_gzip_program_reads_it(tmp_path, capsys, case):
  path = tmp_path / 't.jsonl.gz'
  path.write_bytes(MEMBERS[case])
  oracle = subprocess.run(['gzip', '-dc', path], capture_output=True)
  if oracle.returncode == 1:  # 0: fine, 2: a warning
    with (
      pytest.raises(DataError, match=r'is cut off in the middle|cannot be unpacked'),
      open_bytes(path, Meter(0)) as file,
    ):
      file.read()
    return
  with open_bytes(path, Meter(0)) as file:
    assert file.read() == oracle.stdout
  warned = capsys.readouterr().err
  assert ('are ignored, as gzip -dc does' in warned) == (oracle.returncode == 2)
  assert documents(path) == [json.loads(line)['text'] for line in oracle.stdout.splitlines()]


def test_a_gzip_member_may_end_exactly_at_the_end_of_a_block(tmp_path, monkeypatch):
  (tmp_path / 't.gz').write_bytes(MEMBER + MEMBER + bytes(5))
  for size in range(1, 2 * len(MEMBER)):
    monkeypatch.setattr('data.prepare.inputs.BLOCK_BYTES', size)
    with open_bytes(tmp_path / 't.gz', Meter(0)) as file:
      assert file.read() == LINES + LINES


FRAME = zstandard.compress(LINES)
SKIPPED = b'\x50\x2a\x4d\x18' + (4).to_bytes(4, 'little') + b'abcd'


@pytest.mark.skipif(shutil.which('zstd') is None, reason='needs the zstd program')
@pytest.mark.parametrize('content', [FRAME, FRAME + FRAME, SKIPPED + FRAME, FRAME + SKIPPED + FRAME + SKIPPED])
def test_zstd_is_read_as_the_zstd_program_reads_it(tmp_path, content):
  path = tmp_path / 't.jsonl.zst'
  path.write_bytes(content)
  oracle = subprocess.run(['zstd', '-dcq', path], capture_output=True, check=True)
  with open_bytes(path, Meter(os.path.getsize(path))) as file:
    assert file.read() == oracle.stdout
