"""The kind of an input file: its name decides, in upper or lower case, and its first bytes must agree."""

import dataclasses
import pathlib
import re
from collections.abc import Callable
from typing import Literal, NoReturn

from data.errors import DataError

Packing = Literal['gzip', 'zstd']
Holds = Literal['text', 'json', 'parquet', 'arrayrecord']

PACKED: dict[str, Packing] = {'.gz': 'gzip', '.zst': 'zstd'}
HOLDS: dict[str, Holds] = {
  '.jsonl': 'json', '.ndjson': 'json', '.json': 'json',  # C4's files are named .json
  '.parquet': 'parquet', '.arrayrecord': 'arrayrecord', '.array_record': 'arrayrecord',
}  # fmt: skip
LABELS = {'gzip': 'gzip', 'zstd': 'zstd', 'parquet': 'Parquet', 'arrayrecord': 'ArrayRecord', 'text': 'plain text'}
SUFFIXES = {'gzip': '.gz', 'zstd': '.zst', 'parquet': '.parquet', 'arrayrecord': '.arrayrecord'}
HEAD_BYTES = 512  # tar has its signature at byte 257

_UNPACK, _LEAVE = 'unpack it first', 'leave it out'
_TO_TEXT, _TO_RECORDS = 'convert it to text', 'convert it to .jsonl or .parquet'
_TABLE = 'convert it to .jsonl, or rename it to .txt to read it as text (--documents=line: each line is a document)'
# Suffixes of unsupported files, which are not text or not meant as text: (what they are, how to fix it).
_REFUSED: dict[str, tuple[str, str]] = {
  suffix: (what, cure)
  for suffixes, what, cure in (
    ('.csv .tsv', 'a table', _TABLE),
    ('.xls .xlsx .ods', 'a spreadsheet', _TO_RECORDS),
    ('.bz2 .xz .lzma .lz .lz4 .br .z .sz', 'a compressed file', _UNPACK),
    ('.zip .tar .tgz .tbz .tbz2 .txz .tzst .7z .rar .jar .whl .cpio', 'an archive', _UNPACK),
    ('.pdf .doc .docx .odt .rtf .epub .mobi .ppt .pptx .odp', 'a formatted document', _TO_TEXT),
    ('.arrow .feather .avro .orc .tfrecord .tfrecords .npy .npz .pkl .pickle .h5 .hdf5 .sqlite .sqlite3 .msgpack '
     '.safetensors', 'a data file of an unsupported kind', _TO_RECORDS),
    ('.png .jpg .jpeg .gif .webp .bmp .tif .tiff .ico .mp3 .mp4 .wav .flac .ogg .avi .mov .mkv .exe .dll .so .o .pyc '
     '.class .wasm', 'a file without text', _LEAVE),
  )
  for suffix in suffixes.split()
}  # fmt: skip
_SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
  (rb'BZh[1-9](1AY&SY|\x17\x72\x45\x38)', 'bzip2', _UNPACK),
  (rb'\xfd7zXZ\0', 'xz', _UNPACK),
  (rb'\x04\x22\x4d\x18', 'lz4', _UNPACK),
  (rb'\x1f[\x9d\xa0]', 'compress (.Z)', _UNPACK),
  (rb'PK(\x03\x04|\x05\x06|\x07\x08)', 'a ZIP archive (.zip, .docx, .xlsx, .epub)', 'unpack it first, or ' + _TO_TEXT),
  (rb'7z\xbc\xaf\x27\x1c', 'a 7z archive', _UNPACK),
  (rb'Rar!\x1a\x07', 'a RAR archive', _UNPACK),
  (rb'(?s).{257}ustar', 'a tar archive', _UNPACK),
  (rb'%PDF-\d', 'a PDF', _TO_TEXT),
  (rb'\{\\rtf\d', 'RTF', _TO_TEXT),
  (rb'\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1', 'an old Office document', _TO_TEXT),
  (rb'PARE', 'encrypted Parquet', _TO_RECORDS),
  (rb'ARROW1\0|FEA1', 'Arrow', _TO_RECORDS),
  (rb'Obj\x01', 'Avro', _TO_RECORDS),
  (rb'\x93NUMPY', 'a NumPy array', _TO_RECORDS),
  (rb'SQLite format 3\0', 'an SQLite database', _TO_RECORDS),
  (rb'\x89HDF', 'HDF5', _TO_RECORDS),
  (rb'\x7fELF|MZ.\0|\xca\xfe\xba\xbe', 'a program', _LEAVE),
  (rb'\x89PNG|\xff\xd8\xff|GIF8[79]a|RIFF....(WEBP|WAVE|AVI )', 'a picture, sound or video', _LEAVE),
)
_READ: dict[str, bytes] = {
  'gzip': rb'\x1f\x8b',
  'zstd': rb'\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18',  # RFC 8878: a frame, or a skippable frame
  'parquet': rb'PAR1\x15',  # 0x15: both a page header and a footer begin with an i32 field
  'arrayrecord': rb'\x83\xaf\x70\xd1\x0d\x88\x4a\x3f',  # the signature of Riegeli
}


@dataclasses.dataclass(frozen=True)
class Kind:
  """How a file is compressed (None: not compressed), and what it contains after unpacking."""

  packing: Packing | None
  holds: Holds


def kind_of(path: pathlib.Path) -> Kind:
  """The kind that the file's name indicates.

  >>> kind_of(pathlib.Path('c4/train.00001.JSON.gz')), kind_of(pathlib.Path('LICENSE'))
  (Kind(packing='gzip', holds='json'), Kind(packing=None, holds='text'))
  """
  packing = PACKED.get(path.suffix.lower())
  return Kind(packing, HOLDS.get(_inner(path).suffix.lower(), 'text'))


def _inner(path: pathlib.Path) -> pathlib.Path:
  return path.with_suffix('') if path.suffix.lower() in PACKED else path


def check_kind(path: pathlib.Path, head: bytes, unpacked_head: Callable[[], bytes]) -> None:
  """Raises DataError, with the fix, if the name indicates an unsupported kind or does not match the contents.

  `head` is the first HEAD_BYTES of the file; `unpacked_head()` gives the first HEAD_BYTES of a compressed file's
  unpacked contents.
  """
  kind, suffix = kind_of(path), _inner(path).suffix.lower()
  if not head:  # that a file is empty is reported when it is read
    return
  if suffix in _REFUSED:
    what, cure = _REFUSED[suffix]
    raise DataError(f'{path} has the name of {what} ({suffix}), which cannot be read; {cure}.')
  if kind.packing and kind.holds in ('parquet', 'arrayrecord'):
    label = LABELS[kind.holds]
    raise DataError(f'{path}: {label} in {kind.packing} cannot be read ({label} compresses its own data); {_UNPACK}.')
  wanted = kind.packing or (kind.holds if kind.holds in _READ else 'text')
  _check_content(path, head, wanted)
  if kind.packing:
    _check_content(path, unpacked_head(), 'text', f'{path} holds')


def _found(head: bytes) -> str:
  """The supported kind whose signature `head` begins with; 'text' if there is none."""
  return next((kind for kind, signature in _READ.items() if re.match(signature, head)), 'text')


def _check_content(path: pathlib.Path, head: bytes, wanted: str, subject: str = '') -> None:
  """Raises DataError if the first bytes do not match the kind `wanted`."""
  found, subject = _found(head), subject or f'{path} is'
  if found == wanted != 'text':
    return
  for signature, what, cure in _SIGNATURES:
    if re.match(signature, head):
      raise DataError(f'{subject} {what} by its first bytes; {cure}.')
  if utf := _wide(head):
    raise DataError(f'{subject} {utf} text by its first bytes; convert it: iconv -f {utf} -t UTF-8.')
  if found != wanted:
    _refuse_other(path, subject, found, wanted)


def _refuse_other(path: pathlib.Path, subject: str, found: str, wanted: str) -> NoReturn:
  if ' holds' in subject[len(str(path)) :]:
    raise DataError(f'{subject} {LABELS[found]} by its first bytes; unpack it, and rename the result.')
  if wanted == 'text':
    replaced = found not in PACKED.values() or path.suffix.lower() in ('.gzip', '.zstd')
    better = f'{path.stem if replaced else path.name}{SUFFIXES[found]}'
    raise DataError(f'{subject} {LABELS[found]} by its first bytes; rename it to {better}.')
  better = path.with_suffix('').name if wanted in PACKED.values() else f'{path.stem}{SUFFIXES.get(found, ".txt")}'
  what = 'something else' if found == 'text' else LABELS[found]
  raise DataError(
    f'{path} is not {LABELS[wanted]}: its first bytes are those of {what}; rename it to {better} if that is correct, '
    'otherwise copy it again.'
  )


def _wide(head: bytes) -> str | None:
  """UTF-16 or UTF-32, recognised by a byte order mark or by the zero bytes of ASCII characters; None otherwise."""
  for name, *marks in (('UTF-32', b'\xff\xfe\0\0', b'\0\0\xfe\xff'), ('UTF-16', b'\xff\xfe', b'\xfe\xff')):
    if head.startswith(tuple(marks)):
      return name
  zeros = [head[side::2].count(0) / max(len(head[side::2]), 1) for side in (0, 1)]
  for side, name in ((0, 'UTF-16BE'), (1, 'UTF-16LE')):
    if zeros[side] > 0.9 and zeros[1 - side] < 0.1:
      return name
  return None
