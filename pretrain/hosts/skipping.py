"""Examples that a run leaves out, because every step with them fails or because they led to a spike of the loss:
RUN/skipped.json, [[first, end], …] in examples.

The supervisor writes it (`pretrain run --skip_poisoned`), or the run when it goes back (`rewinding.py`). A run reads it
when it starts, so that a resumed run makes the same steps. The position in each checkpoint contains the ranges.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from pretrain.errors import ConfigError
from pretrain.workdirs.folder import Folder

FILE, REWINDS = 'skipped.json', 'rewinds.jsonl'
Ranges = Sequence[tuple[int, int]]


def read_skips(workdir: Folder) -> list[tuple[int, int]]:
  """The ranges of a run, in order; empty without the file. Raises ConfigError if the file holds anything else."""
  path = workdir / FILE
  try:
    found = [(first, end) for first, end in json.loads(path.read_text())] if path.exists() else []
    if not all(isinstance(first, int) and isinstance(end, int) and 0 <= first < end for first, end in found):
      raise ValueError('a range is two integers, the first one smaller')
  except (ValueError, TypeError) as error:
    raise ConfigError(
      f'{path} is not a list of ranges of examples ({error}); write e.g. [[240, 420]], or remove it.'
    ) from error
  return sorted(found)


def check_skips(ranges: Ranges, examples: int, batch_size: int) -> None:
  """Raises ConfigError if no step of a run at `examples` would begin exactly where a later range begins."""
  while (left := steps_to_skip(ranges, examples, batch_size)) is not None:
    first = examples + left * batch_size
    if (examples := leave_out(ranges, {'examples': first})['examples']) == first:
      begin = next(begin for begin, _ in ranges if begin >= first)
      raise ConfigError(
        f'{FILE} leaves out examples from {begin} on, and with data.batch_size={batch_size} no step begins there: one '
        f'begins at {first}. Change or remove that range, or set data.batch_size back.'
      )


def add_skip(workdir: Folder, first: int, end: int) -> None:
  """Examples `first` to `end - 1` are left out from the next start on."""
  ranges = sorted({*read_skips(workdir), (first, end)})
  temporary = (workdir / FILE).with_suffix('.tmp')
  temporary.write_text(json.dumps(ranges) + '\n')
  temporary.replace(workdir / FILE)


def read_rewinds(workdir: Folder) -> list[dict[str, Any]]:
  """{'time', 'step' of the spike, 'to': the step it went back to, 'examples': [first, end] left out} of each rewind.

  A line that was cut off when the machine died is ignored.
  """
  path, found = workdir / REWINDS, []
  for line in path.read_text().splitlines() if path.exists() else ():
    with contextlib.suppress(ValueError):
      found.append(json.loads(line))
  return found


def steps_to_skip(ranges: Ranges, examples: int, batch_size: int) -> int | None:
  """Steps from `examples` to the next range; None if there is no range.

  >>> steps_to_skip([(24, 36)], 12, 12), steps_to_skip([(24, 36)], 36, 12)
  (1, None)
  """
  return next(((first - examples) // batch_size for first, _ in ranges if first >= examples), None)


def behind(ranges: Ranges, example: int) -> int:
  """The number of the example that would be number `example` if none were left out.

  >>> [behind([(24, 40)], example) for example in (16, 24, 32)]
  [16, 40, 48]
  """
  for first, end in ranges:
    example += (end - first) * (example >= first)
  return example


def leave_out(ranges: Ranges, position: Mapping[str, Any]) -> dict[str, Any]:
  """`position` after the ranges that begin at it, with a record of these ranges.

  >>> leave_out([(24, 36), (36, 48)], {'examples': 24})
  {'examples': 48, 'skipped': [[24, 36], [36, 48]]}
  """
  found = dict(position)
  for first, end in ranges:
    if first == found['examples']:
      found |= {'examples': end, 'skipped': [*found.get('skipped', []), [first, end]]}
  return found
