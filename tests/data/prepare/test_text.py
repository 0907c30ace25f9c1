"""Documents as a stream: equal to a naive splitter's, in segments of bounded size, however long a line is."""

import pathlib
import tempfile
import tracemalloc

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.prepare import text
from data.stores.vocabulary import Tokenizer

MIXED = st.text('ab \t\r\n\u00e9\u3000\U0001f642', max_size=80)
KINDS = st.sampled_from(['file', 'paragraph', 'line'])
FEW = settings(derandomize=True, deadline=None, max_examples=300)


def naive(whole: str, documents: str) -> list[str]:
  """The documents of a text in memory: the oracle."""
  if documents == 'file':
    return [whole]
  lines = whole.split('\n')
  lines = [line + '\n' for line in lines[:-1]] + lines[-1:]
  if documents == 'line':
    return [line for line in lines if line.strip()]
  paragraphs = ['']
  for line in lines:
    paragraphs = [*paragraphs[:-1], paragraphs[-1] + line] if line.strip() else [*paragraphs, '']
  return [paragraph for paragraph in paragraphs if paragraph]


def read(content: bytes, documents: str, longest: int) -> list[text.Segment]:
  with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
    patch.setattr(text, 'SEGMENT_BYTES', longest)
    path = pathlib.Path(folder) / 't.txt'
    path.write_bytes(content)
    return list(text.read_segments(path, text.Reading(documents=documents)))


def joined(segments: list[text.Segment]) -> list[str]:
  """Segments -> documents."""
  documents = ['']
  for segment in segments:
    documents[-1] += segment.text
    documents += [''] * segment.last
  assert documents.pop() == '', 'the last document is ended'
  return documents


@FEW
@given(whole=MIXED.filter(str.strip), documents=KINDS)
def test_documents_equal_a_naive_splitters(whole, documents):
  segments = read(whole.encode(), documents, 1000)
  assert joined(segments) == naive(whole, documents)
  assert all(segment.last for segment in segments)


@FEW
@given(whole=MIXED.filter(str.strip), documents=KINDS, longest=st.integers(5, 30))
@example(whole='a' * 30 + '\n\n' + 'b' * 30, documents='paragraph', longest=10)
@example(whole=' ' * 30 + 'a\n' + ' ' * 30 + '\nb', documents='paragraph', longest=10)
def test_a_long_document_is_one_document_in_small_segments(whole, documents, longest):
  segments = read(whole.encode(), documents, longest)
  assert [d.split() for d in joined(segments)] == [d.split() for d in naive(whole, documents)]
  # Before a piece is added a segment is shorter than `longest`, and so is the piece.
  assert max(len(segment.text.encode()) for segment in segments) < 2 * longest
  if documents == 'file':
    assert joined(segments) == [whole]
    assert sum(segment.num_bytes for segment in segments) == len(whole.encode())


@pytest.mark.parametrize('documents', ['file', 'paragraph', 'line'])
def test_cutting_a_long_line_does_not_change_its_tokens(tokenizer_model, documents):
  words = ('the Licensor shall grant \u00e9t\u00e9 ' * 400).encode()
  tokenizer = Tokenizer(tokenizer_model, 8)
  cut = read(words, documents, 1000)
  assert len(cut) > 4
  assert [i for segment in cut for i in tokenizer.encode(segment.text)] == tokenizer.encode(words.decode())


@pytest.mark.parametrize('documents', ['file', 'paragraph', 'line'])
@pytest.mark.parametrize('unit', [b'some words ', b'x', b'words of a paragraph ' * 12 + b'\n'])
def test_memory_does_not_grow_with_the_size_of_a_file(tmp_path, documents, unit):
  """16 MB in one line, in one word and in one paragraph: only a few segments of 256 KiB are held."""
  path = tmp_path / 'long.txt'
  path.write_bytes(unit * (16_000_000 // len(unit)))
  tracemalloc.start()
  try:
    longest = max(len(segment.text) for segment in text.read_segments(path, text.Reading(documents=documents)))
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert longest < 2 * text.SEGMENT_BYTES
  assert peak < 12 * text.SEGMENT_BYTES


@pytest.mark.parametrize(('content', 'byte'), [(b'a' * 95 + b'\xff', 95), (b'\x80' * 99, 0), (b'a' * 20 + b'\xc3', 20)])
def test_the_position_of_an_invalid_byte_is_counted_across_pieces(content, byte):
  with pytest.raises(DataError, match=rf'is not UTF-8 text \(byte {byte}\)'):
    read(content, 'file', 10)
