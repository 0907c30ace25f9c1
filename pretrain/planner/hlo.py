"""The text of a compiled TPU program: its instructions, how often they run, and what memory is in use at the peak."""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

BITS = {'pred': 8, 's4': 4, 'u4': 4, 's8': 8, 'u8': 8, 's16': 16, 'u16': 16, 'bf16': 16, 'f16': 16, 's32': 32,
        'u32': 32, 'f32': 32, 's64': 64, 'u64': 64, 'f64': 64}  # fmt: skip
ARRAY = re.compile(r'\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^{}]*)\})?')
HEAD = re.compile(r'(ENTRY )?%?([\w.\-]+) \(.*\{\s*$')
LINE = re.compile(r'\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$')
NAMED = re.compile(r'%([\w.\-]+)')
CALLED = re.compile(r'(?:to_apply|calls|branch_computations=\{|called_computations=\{)=?%?([\w.\-]+)')
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
# Results that are (parts of) their operands' buffers.
VIEWS = ('bitcast', 'get-tuple-element', 'tuple', 'opt-barrier', 'add-dependency', 'domain')


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line. `shape` is its text; `operands` names, in order; `rest` the text behind the opening parenthesis."""

  name: str
  shape: str
  op: str
  rest: str
  root: bool

  @functools.cached_property
  def operands(self) -> tuple[str, ...]:
    depth, end = 1, len(self.rest)
    for place, letter in enumerate(self.rest):
      depth += (letter == '(') - (letter == ')')
      if not depth:
        end = place
        break
    return tuple(NAMED.findall(self.rest[:end]))

  @property
  def cycles(self) -> int:
    found = CYCLES.search(self.rest)
    return int(found[1]) if found else 0

  @property
  def source(self) -> str:
    """The JAX operation that it was made for."""
    found = re.search(r'op_name="([^"]*)"', self.rest)
    return found[1] if found else ''

  @property
  def called(self) -> list[str]:
    return CALLED.findall(self.rest)

  def of_loop(self, part: str) -> str:
    found = re.search(rf'{part}=%?([\w.\-]+)', self.rest)
    if found is None:
      raise ValueError(f'a loop without a {part}: {self.rest[:200]}')
    return found[1]


@dataclasses.dataclass(frozen=True)
class Program:
  """Computations by name; `entry` is the name of the first to run."""

  computations: Mapping[str, Sequence[Instruction]]
  entry: str

  def turns(self, loop: Instruction) -> int:
    """How often a loop runs. Raises ValueError where the text does not say."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest):
      return int(known[1])
    condition = self.computations[loop.of_loop('condition')]
    constants = [re.match(r'(\d+)\)', i.rest) for i in condition if i.op == 'constant']
    numbers = [int(found[1]) for found in constants if found]
    if len(numbers) != 1:
      raise ValueError(f'a loop of the compiled program has no known number of iterations: {loop.name}')
    return numbers[0]

  def executed(self) -> Iterator[tuple[int, Instruction]]:
    """(how often it runs, instruction), bodies of loops once for each iteration; inside fusions that have an estimate
    nothing is listed."""
    pending = [(1, self.entry)]
    while pending:
      times, name = pending.pop()
      for one in self.computations.get(name, ()):
        yield times, one
        if one.op == 'while':
          pending.append((times * self.turns(one), one.of_loop('body')))
        elif one.op in ('call', 'async-start', 'conditional') or (one.op == 'fusion' and not one.cycles):
          pending += [(times, other) for other in one.called]


def parse(text: str) -> Program:
  """The program of `compiled.as_text()`."""
  computations, entry, lines = {}, '', []
  for line in text.splitlines():
    if head := HEAD.match(line):
      lines = computations.setdefault(head[2], [])
      entry = head[2] if head[1] else entry
    elif found := LINE.match(line):
      lines.append(Instruction(found[2], found[3], found[4], found[5], bool(found[1])))
  return Program(computations, entry)


def sizes(shape: str, *, hbm_only: bool = False) -> list[int]:
  """Bytes of each array in the text of a shape, with the padding of its tiles; 0 outside HBM with `hbm_only`."""
  return [0 if hbm_only and 'S(' in (layout or '') else _bytes(kind, dims, layout or '')
          for kind, dims, layout in ARRAY.findall(shape) if kind in BITS]  # fmt: skip


def _bytes(kind: str, dims: str, layout: str) -> int:
  sides = [int(n) for n in dims.split(',') if n]
  order, _, rest = layout.partition(':')
  tile = re.match(r'T\(([\d,]+)\)', rest)
  if tile and sides:
    for dim, part in zip(order.split(','), reversed(tile[1].split(',')), strict=False):
      if dim:
        sides[int(dim)] = -(-sides[int(dim)] // int(part)) * int(part)
  return math.prod(sides) * BITS[kind] // 8


@dataclasses.dataclass(frozen=True)
class Buffer:
  """An allocation in HBM: bytes, the shape, the JAX operation that fills it."""

  bytes: int
  shape: str
  source: str


class _Frame:
  """The buffers of one computation while it runs: names -> the buffers of each array of the value."""

  def __init__(self, program: Program, name: str, outer: Sequence[int], buffers: list[Buffer]):
    self.program, self.lines, self.buffers = program, program.computations[name], buffers
    self.values: dict[str, list[int]] = {}
    self.parts: dict[str, list[int]] = {}  # how many arrays each element of a tuple has
    self.shapes = {one.name: one.shape for one in self.lines}
    self.outer = outer

  def value(self, one: Instruction) -> list[int]:
    """The buffers of the result of `one`, new ones where it writes to memory of its own."""
    given = [self.values.get(name, []) for name in one.operands]
    if one.op == 'parameter':
      return self._parameter(one)
    if one.op == 'get-tuple-element':
      return self._element(one, given[0])
    if one.op in VIEWS or one.op == 'while':
      return [b for part in given for b in part]
    if one.op.endswith(('-done', '-update')) and one.op != 'all-reduce-done':
      return self._done(one, given)
    if one.op == 'dynamic-update-slice' or self._in_place(one):
      return self._updated(one, given)
    if one.op.endswith('-start') and one.op != 'all-reduce-start' and one.shape.startswith('('):
      return self._started(one)
    return self._new(one)

  def _new(self, one: Instruction) -> list[int]:
    found = []
    arrays = [a for a in ARRAY.findall(one.shape) if a[0] in BITS]
    for (kind, dims, _), size in zip(arrays, sizes(one.shape, hbm_only=True), strict=True):
      found.append(len(self.buffers))
      self.buffers.append(Buffer(0 if one.op == 'constant' else size, f'{kind}[{dims}]', one.source or one.name))
    return found

  def _started(self, one: Instruction) -> list[int]:
    """The tuple of an asynchronous operation has its operands again, beside its results."""
    found = self._new(one)
    arrays = [a for a in ARRAY.findall(one.shape) if a[0] in BITS]
    for operand in one.operands:
      own = [a for a in ARRAY.findall(self.shapes.get(operand, '')) if a[0] in BITS]
      for array, b in zip(own, self.values.get(operand, []), strict=False):
        if array in arrays:
          place = arrays.index(array)
          self.buffers[found[place]] = dataclasses.replace(self.buffers[found[place]], bytes=0)
          found[place] = b
          arrays[place] = ('', '', '')
    return found

  def _parameter(self, one: Instruction) -> list[int]:
    if self.outer:
      return list(self.outer)
    return self._new(one)

  def _element(self, one: Instruction, whole: list[int]) -> list[int]:
    found = re.search(r'index=(\d+)', one.rest)
    index, counts = int(found[1]) if found else 0, self.parts.get(one.operands[0], [])
    start = sum(counts[:index])
    return whole[start : start + counts[index]] if index < len(counts) else []

  def _done(self, one: Instruction, given: list[list[int]]) -> list[int]:
    """The result of an asynchronous operation is in the buffers that its start made."""
    wanted = sizes(one.shape, hbm_only=True)
    pool = [b for part in given for b in part]
    found = []
    for size in wanted:
      same = [b for b in pool if self.buffers[b].bytes == size and b not in found]
      found.append(same[-1] if same else self._plain(size, one))
    return found

  def _plain(self, size: int, one: Instruction) -> int:
    self.buffers.append(Buffer(size, one.shape[:60], one.source or one.name))
    return len(self.buffers) - 1

  def _in_place(self, one: Instruction) -> bool:
    if one.op != 'fusion':
      return False
    body = self.program.computations.get(one.called[0] if one.called else '', ())
    return any(i.root and i.op in ('dynamic-update-slice', 'tuple', 'bitcast') for i in body) and any(
      i.op == 'dynamic-update-slice' for i in body
    )

  def _updated(self, one: Instruction, given: list[list[int]]) -> list[int]:
    """Arrays that an operand of the same bytes is updated to in place; others are new."""
    fresh, found, pool = self._new(one), [], [b for part in given for b in part]
    for b in fresh:
      own = self.buffers[b]
      same = [p for p in pool if self.buffers[p].shape == own.shape and p not in found]
      if own.bytes and same:
        self.buffers[b] = dataclasses.replace(own, bytes=0)
        found.append(same[0])
      else:
        found.append(b)
    return found

  def tuples(self, one: Instruction) -> None:
    """Remembers where the elements of a tuple begin."""
    if one.shape.startswith('('):
      self.parts[one.name] = [len([a for a in ARRAY.findall(e) if a[0] in BITS]) for e in elements(one.shape)]


def elements(shape: str) -> list[str]:
  """The texts of the elements of a tuple's shape."""
  found, depth, start = [], 0, 1
  for place, letter in enumerate(shape):
    depth += (letter in '([{') - (letter in ')]}')
    if (letter == ',' and depth == 1) or (letter == ')' and depth == 0):
      found.append(shape[start:place])
      start = place + 1
  return found


def peak(program: Program, name: str = '', outer: Sequence[int] = (), buffers: list[Buffer] | None = None) -> list[int]:
  """The buffers in use when the most bytes are; those of `outer` (a loop's state) are not counted.

  The order is the compiler's schedule. A computation that is called is counted at its own peak.
  """
  buffers = [] if buffers is None else buffers
  frame = _Frame(program, name or program.entry, outer, buffers)
  inner: dict[int, list[int]] = {}
  last: dict[int, int] = {}
  first: dict[int, int] = {}
  for place, one in enumerate(frame.lines):
    frame.tuples(one)
    frame.values[one.name] = own = frame.value(one)
    used = [b for n in one.operands for b in frame.values.get(n, [])]
    read = own if one.op == 'get-tuple-element' else used  # the other elements may be gone
    if one.op == 'while':
      inner[place] = peak(program, one.of_loop('body'), own, buffers)
    elif one.op in ('call', 'conditional') and one.called:
      inner[place] = max((peak(program, n, used, buffers) for n in one.called if n in program.computations),
                         key=lambda found: sum(buffers[b].bytes for b in found), default=[])  # fmt: skip
    for b in (*own, *read):
      first.setdefault(b, place)
      last[b] = place
  kept = set(outer)
  if not outer:  # arguments, and results that take their place
    ends = [i for i in frame.lines if i.root or i.op == 'parameter']
    kept |= {b for i in ends for b in frame.values[i.name]}
  return _most([b for b in last if b not in kept], first, last, inner, buffers)


def _most(
  own: list[int],
  first: Mapping[int, int],
  last: Mapping[int, int],
  inner: Mapping[int, list[int]],
  buffers: Sequence[Buffer],
) -> list[int]:
  """The largest set of buffers alive at one place of a schedule."""
  changes = collections.defaultdict(int)
  for b in own:
    changes[first[b]] += buffers[b].bytes
    changes[last[b] + 1] -= buffers[b].bytes
  for place, found in inner.items():
    size = sum(buffers[b].bytes for b in found)
    changes[place] += size
    changes[place + 1] -= size
  total, best, where = 0, -1, 0
  for place in sorted(changes):
    total += changes[place]
    if total > best:
      best, where = total, place
  return [*(b for b in own if first[b] <= where <= last[b]), *inner.get(where, [])]


def at_peak(program: Program) -> list[Buffer]:
  """The temporary buffers in use at the peak, the largest first."""
  buffers: list[Buffer] = []
  found = peak(program, buffers=buffers)
  return sorted((buffers[b] for b in found if buffers[b].bytes), key=lambda b: -b.bytes)
