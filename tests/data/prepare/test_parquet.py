"""Columns of every Parquet type: text and numbers are read; others give a one-line error with file, row and column."""

import datetime
import decimal
import io
import pathlib

import pyarrow
import pyarrow.parquet
import pytest

from data.errors import DataError
from data.prepare.inputs import Meter
from data.prepare.parquet import parquet_rows
from data.prepare.prepare import prepare
from data.prepare.text import Reading, read_segments

TEXTS = ['the work', 'der Fuß ☃', '', 'of the license']
BYTES = [text.encode() for text in TEXTS]
TEXT_TYPES = {
  'string': pyarrow.array(TEXTS),
  'large_string': pyarrow.array(TEXTS, pyarrow.large_string()),
  'string_view': pyarrow.array(TEXTS, pyarrow.string_view()),
  'dictionary': pyarrow.array(TEXTS).dictionary_encode(),
  'binary': pyarrow.array(BYTES),
  'large_binary': pyarrow.array(BYTES, pyarrow.large_binary()),
  'binary_view': pyarrow.array(BYTES, pyarrow.binary_view()),
  'dictionary of binary': pyarrow.array(BYTES).dictionary_encode(),
  'json': pyarrow.array(TEXTS, pyarrow.string()).cast(pyarrow.json_()),
}
US, NS = pyarrow.timestamp('us'), pyarrow.timestamp('ns')
UNREAD = {
  'timestamp[ns]': pyarrow.array([1, 2**60 + 1], NS),
  'timestamp[us]': pyarrow.array([2**62, 1], US),  # beyond the year 9999
  'timestamp[us, tz=Nowhere/Zone]': pyarrow.array([1, 2], pyarrow.timestamp('us', tz='Nowhere/Zone')),
  'date32[day]': pyarrow.array([10**8, 1], pyarrow.date32()),
  'time64[ns]': pyarrow.array([1, 2], pyarrow.time64('ns')),
  'duration[ns]': pyarrow.array([1, 2], pyarrow.duration('ns')),
  'duration[us]': pyarrow.array([2**62, 2], pyarrow.duration('us')),
  'decimal128(10, 2)': pyarrow.array([decimal.Decimal('1.5'), decimal.Decimal('2')], pyarrow.decimal128(10, 2)),
  'decimal256(60, 2)': pyarrow.array([decimal.Decimal('1.5'), None], pyarrow.decimal256(60, 2)),
  'map<string, int64': pyarrow.array([[('a', 1)], []], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
  'list': pyarrow.array([['a'], []]),
  'dict': pyarrow.array([{'a': 1}, None]),
}


def write(path: pathlib.Path, **columns) -> pathlib.Path:
  pyarrow.parquet.write_table(pyarrow.table(columns), path)
  return path


def rows(path: pathlib.Path, *columns: str) -> list[dict]:
  return [row for _, row in parquet_rows(path, list(columns), Meter(0))]


@pytest.mark.parametrize('name', TEXT_TYPES)
def test_text_of_every_type_is_decoded(tmp_path, name):
  path = write(tmp_path / 't.parquet', text=TEXT_TYPES[name])
  assert [row['text'] for row in rows(path, 'text')] == TEXTS
  assert [segment.text for segment in read_segments(path, Reading())] == TEXTS


@pytest.mark.parametrize('kind', [pyarrow.binary(), pyarrow.large_binary(), pyarrow.binary_view(), pyarrow.binary(5)])
def test_bytes_that_are_not_utf8_give_one_line_with_row_column_and_byte(tmp_path, kind):
  path = write(tmp_path / 't.parquet', text=pyarrow.array([b'abcde', b'abc\xffd'], kind))
  with pytest.raises(DataError, match=r"t.parquet: row 1, column 'text' is not UTF-8 text \(byte 3\); convert it"):
    list(read_segments(path, Reading()))


def test_numbers_become_tags_and_nulls_are_left_out(tmp_path):
  path = write(
    tmp_path / 't.parquet', text=['a', 'b'], big=pyarrow.array([2**64 - 1, None], pyarrow.uint64()),
    half=pyarrow.array([1.5, None], pyarrow.float32()).cast(pyarrow.float16()), no=pyarrow.nulls(2),
    code=pyarrow.array([b'en', None]),
  )  # fmt: skip
  found = [segment.tags for segment in read_segments(path, Reading(tag_fields=('big', 'half', 'no', 'code')))]
  assert found == ['big: 18446744073709551615\nhalf: 1.5\ncode: en\n', '']


@pytest.mark.parametrize('name', UNREAD)
def test_a_tag_of_another_type_gives_one_line_with_file_row_and_field(tmp_path, tokenizer_model, name):
  """A row whose value is null is skipped, so the error names the second row, the first one with a value."""
  (tmp_path / 'm').write_bytes(tokenizer_model)
  values = pyarrow.concat_arrays([pyarrow.nulls(1, UNREAD[name].type), UNREAD[name]])
  path = write(tmp_path / 't.parquet', text=['a', 'b', 'c'], when=values)
  with pytest.raises(DataError) as caught:
    prepare([path], tmp_path / 'out', tokenizer=tmp_path / 'm', reading=Reading(tag_fields=('when',)))
  message = str(caught.value)
  assert message.startswith(f"DATA: {path}: row 1: field 'when' is not text ({name}"), message
  assert message.endswith('leave it out of --tag_fields.')
  assert len(message.splitlines()) == 1
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('name', UNREAD)
def test_text_and_scores_of_another_type_give_one_line_too(tmp_path, name):
  path = write(tmp_path / 't.parquet', text=['a', 'b'], other=UNREAD[name])
  with pytest.raises(DataError, match=r"row 0: no text in field 'other', which is "):
    list(read_segments(path, Reading(field='other')))
  with pytest.raises(DataError, match=r"row 0: field 'other' is .*, not a float32 number"):
    list(read_segments(path, Reading(score_field='other')))
  with pytest.raises(DataError, match=r"row 0: no text in field 'other'"):
    list(read_segments(path, Reading(pair=('text', 'other'))))


def test_columns_that_are_not_requested_are_not_decoded(tmp_path, monkeypatch):
  path = write(tmp_path / 't.parquet', text=['a', 'b'], **{f'c{i}': values for i, values in enumerate(UNREAD.values())})
  asked, original = [], pyarrow.parquet.ParquetFile.iter_batches
  monkeypatch.setattr(
    pyarrow.parquet.ParquetFile, 'iter_batches',
    lambda self, *args, columns, **kw: asked.append(columns) or original(self, *args, columns=columns, **kw),
  )  # fmt: skip
  assert [segment.text for segment in read_segments(path, Reading())] == ['a', 'b']
  assert asked == [['text']]


def test_conversations_with_times_beside_their_text_are_read(tmp_path):
  kind = pyarrow.list_(
    pyarrow.struct([('role', pyarrow.string()), ('content', pyarrow.binary()), ('at', NS), ('n', pyarrow.int8())])
  )
  messages = [{'role': 'user', 'content': b'hi', 'at': 1, 'n': 1}, {'role': 'assistant', 'content': b'yes', 'at': 2}]
  path = write(tmp_path / 't.parquet', messages=pyarrow.array([messages], kind))
  assert [s.text for s in read_segments(path, Reading(messages='messages'))] == ['hi', 'yes']
  wrong = pyarrow.list_(pyarrow.struct([('role', pyarrow.string()), ('content', NS)]))
  path = write(tmp_path / 'u.parquet', messages=pyarrow.array([[{'role': 'user', 'content': 1}]], wrong))
  with pytest.raises(DataError, match=r'row 0: messages\[0\].content is not text \(timestamp\[ns\]\)'):
    list(read_segments(path, Reading(messages='messages')))


def test_two_columns_with_the_same_name_are_refused(tmp_path):
  table = pyarrow.Table.from_arrays([pyarrow.array(['a']), pyarrow.array(['b'])], names=['text', 'text'])
  pyarrow.parquet.write_table(table, tmp_path / 't.parquet')
  with pytest.raises(DataError, match=r"t.parquet has 2 columns 'text'; rename all but one"):
    list(read_segments(tmp_path / 't.parquet', Reading()))


@pytest.mark.parametrize('name', ['a%20b', 's3:', 'file:x', 'a#b?c', 'a\\b', 'a\nb', '\udcff'])
def test_a_file_may_have_any_name(tmp_path, name):
  out = io.BytesIO()
  pyarrow.parquet.write_table(pyarrow.table({'text': TEXTS, 'day': [datetime.date(1, 1, 1)] * 4}), out)
  path = tmp_path / f'{name}.parquet'
  path.write_bytes(out.getvalue())
  assert [segment.text for segment in read_segments(path, Reading())] == TEXTS
