"""Rows of Parquet files. Only the requested columns are read, and their values are converted to text or numbers.

pyarrow is imported only when needed, because it is not part of a plain installation.
"""

import collections
import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

from data.errors import DataError
from data.prepare.inputs import Meter, first_line, not_text, optional

_ROWS = 256


@dataclasses.dataclass(frozen=True)
class Unread:
  """Stands for a value whose type is neither text nor a number, such as timestamp[ns]. It is never decoded."""

  type: str

  def __repr__(self) -> str:
    return f'of type {self.type}'


def type_name(value: Any) -> str:
  """The name of the type of a field's value: Parquet's name for an unread value, otherwise Python's."""
  return value.type if isinstance(value, Unread) else type(value).__name__


def parquet_rows(path: pathlib.Path, columns: list[str], meter: Meter) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields (where, {column: value}) for each row; bytes are decoded as UTF-8. Raises DataError for a damaged file, a
  missing column, or text that is not UTF-8."""
  arrow, parquet = optional('pyarrow', path), optional('pyarrow.parquet', path)
  number, size = 0, path.stat().st_size
  try:
    with contextlib.ExitStack() as opened:
      raw = opened.enter_context(path.open('rb'))  # an open file, because pyarrow mistakes some paths for URLs
      # Pages are checked if the program that wrote the file added checksums.
      file = opened.enter_context(parquet.ParquetFile(raw, page_checksum_verification=True))
      _check_columns(path, columns, file.schema_arrow.names)
      for batch in file.iter_batches(_ROWS, columns=columns):
        meter.read += size * batch.num_rows // max(file.metadata.num_rows, 1)
        values = [_values(path, arrow, batch.column(name), name, number) for name in columns]
        for row in zip(*values, strict=True):
          yield f'{path}: row {number}', dict(zip(columns, row, strict=True))
          number += 1
  except (OSError, arrow.ArrowException) as error:
    raise DataError(
      f'{path} cannot be read as Parquet from row {number} on ({first_line(error)}); copy it again.'
    ) from error


def _check_columns(path: pathlib.Path, columns: list[str], names: list[str]) -> None:
  if missing := [column for column in columns if column not in names]:
    raise DataError(f'{path} has no column {missing[0]!r} (found: {", ".join(names)}); name another one.')
  counts = collections.Counter(names)
  if twice := [column for column in columns if counts[column] > 1]:
    raise DataError(f'{path} has {counts[twice[0]]} columns {twice[0]!r}; rename all but one.')


def _values(path: pathlib.Path, arrow, column, name: str, first: int) -> list[Any]:
  """The values of a column of a batch, whose first row is `first`."""
  if _is_plain(arrow.types, column.type):
    with contextlib.suppress(UnicodeDecodeError):  # the slow path below reports the row
      return column.to_pylist()
  return [_value(f'{path}: row {first + i}, column {name!r}', arrow, scalar) for i, scalar in enumerate(column)]


def _is_plain(types, kind) -> bool:
  """Whether to_pylist converts this type to text or numbers only."""
  if types.is_dictionary(kind):
    return _is_plain(types, kind.value_type)
  return (
    types.is_string(kind)
    or types.is_large_string(kind)
    or types.is_string_view(kind)
    or types.is_integer(kind)
    or types.is_float32(kind)
    or types.is_float64(kind)
    or types.is_boolean(kind)
    or types.is_null(kind)
  )


def _value(where: str, arrow, scalar) -> Any:
  """A value as a JSON type: text, a number, a list or a dictionary; `Unread` for any other type."""
  types, kind = arrow.types, scalar.type
  if not scalar.is_valid:
    return None
  if isinstance(kind, arrow.BaseExtensionType) or types.is_dictionary(kind):
    return _value(where, arrow, scalar.value)
  if types.is_struct(kind):
    return {field.name: _value(where, arrow, scalar[i]) for i, field in enumerate(kind)}
  if isinstance(scalar, arrow.ListScalar) and not types.is_map(kind):
    return [_value(where, arrow, item) for item in scalar.values]
  if isinstance(scalar, arrow.BinaryScalar) or types.is_string_view(kind):  # text scalars are BinaryScalar too
    return _decoded(where, scalar.as_buffer().to_pybytes())
  if types.is_float16(kind):
    return float(scalar.as_py())
  return scalar.as_py() if _is_plain(types, kind) else Unread(str(kind))


def _decoded(where: str, raw: bytes) -> str:
  try:
    return raw.decode()
  except UnicodeDecodeError as error:
    raise not_text(where, error.start) from error
