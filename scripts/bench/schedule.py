"""The cycles of programs on TPUs that this machine does not have, counted in the schedules that the compiler writes.

A program's cycles are the sum over its Mosaic kernels (bundles of the final VLIW schedule, times the number of grid
steps that run them) and its XLA fusions (`estimated_cycles`). As an estimate of time it was calibrated only on splash's
forward kernels (within -5/+13% on v5p, v6e and v7x): compare backward passes only with each other.
"""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator

CHIPS = ('v5e:2x4', 'v5p:2x2x1', 'v6e:2x4', 'tpu7x:2x2x1')
CLOCK_GHZ = {'v5e': 1.5, 'v5p': 1.75, 'v6e': 1.75, 'tpu7x': 1.9}
CORES = {'v5e': 1, 'v5p': 2, 'v6e': 1, 'tpu7x': 1}  # cores that share a program; a device of tpu7x is one core
CYCLES = '"estimated_cycles"'
DELAY = 4  # bundles after a branch that run even if it is taken
LEAST = 16  # bundles of a body that is counted separately
FLAGS = '--xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles'


@dataclasses.dataclass(frozen=True)
class Listing:
  """A kernel's schedule. Spans are (first bundle, last bundle)."""

  products: list[bool]  # for each bundle: whether it multiplies matrices
  copies: list[bool]  # whether it starts a copy from HBM
  regions: list[tuple[int, int]]
  bodies: list[tuple[int, int]]  # the bundles that a forward branch skips
  loop: int  # bundles of the outermost loop, one step of the grid
  loops: list[tuple[int, int]]  # all of them

  def having(self, flags: list[bool], spans) -> list[tuple[int, int]]:
    return [span for span in spans if any(flags[span[0] : span[1] + 1])]


def read(path: pathlib.Path) -> Listing:
  products, copies, start, end, branches, target = [], [], {}, {}, {}, {}
  for line in path.read_text().splitlines():
    if re.match(r'\s*(0x[0-9a-f]+|0)\b[^:]*:', line):
      products.append('vmatmul' in line)
      copies.append('dma.hbm_to_vmem' in line)
    at = len(products) - 1
    for r in re.findall(r'Start region (\d+)', line):
      start.setdefault(r, max(at, 0))
    end |= dict.fromkeys(re.findall(r'End region (\d+)', line), at)
    target |= dict.fromkeys(re.findall(r'Start/End empty region (\d+)', line), at)
    branches |= dict.fromkeys(re.findall(r'sbr\.rel \([^)]*\) target = \$region(\d+)', line), at)
  to = {r: target.get(r, start.get(r, at)) for r, at in branches.items()}
  loops = sorted((to[r], at + DELAY) for r, at in branches.items() if to[r] <= at)
  return Listing(
    products, copies,
    sorted({(s, end.get(r, s)) for r, s in start.items()}),
    sorted((at + DELAY + 1, to[r] - 1) for r, at in branches.items() if to[r] > at),
    max(at + DELAY + 1 - to[r] for r, at in branches.items()), loops,
  )  # fmt: skip


def regions(path: pathlib.Path) -> tuple[list[int], list[int], int]:
  """(bundles of each innermost region with matrix products, of the other bodies of branches, of the rest of a step).

  Branches that start copies for the next step count as rest, and so do bodies of a few bundles. A body inside another
  is listed after it and not counted in it.
  """
  listing = read(path)
  size = lambda span: span[1] - span[0] + 1
  within = lambda a, b: a != b and b[0] <= a[0] and a[1] <= b[1]
  matrix = listing.having(listing.products, listing.regions)
  inner = [span for span in matrix if not any(within(other, span) for other in matrix)]
  other = {*listing.having(listing.products, listing.bodies), *listing.having(listing.copies, listing.bodies)}
  bodies = [body for body in listing.bodies if body not in other and size(body) >= LEAST]
  direct = lambda a, b: within(a, b) and not any(within(a, c) and within(c, b) for c in bodies)
  sides = [size(body) - sum(size(a) for a in bodies if direct(a, body)) for body in bodies]
  return [size(span) for span in inner], sides, listing.loop - sum(map(size, inner)) - sum(sides)


def loops(path: pathlib.Path, steps: int, number: int) -> tuple[int, list[int]]:
  """(bundles of one of the `steps` of the grid with one turn of each loop inside, of the `number` longest loops inside
  it in order, or of all if there are fewer). Short ones, some dozens of bundles, copy.
  """
  listing = read(path)
  size = lambda span: span[1] + 1 - span[0]
  step, found = len(listing.products), listing.loops
  if steps > 1:
    outer = max(found, key=size)
    step, found = listing.loop, [span for span in found if span != outer and span[0] > outer[0]]
  longest = sorted(found, key=size)[max(len(found) - number, 0) :]
  return step, [size(span) for span in found if span in longest]


def dumped(folder: pathlib.Path, name: str) -> pathlib.Path:
  """The newest schedule of the kernel of this name."""
  found = [p for p in folder.glob(f'*{name}*final_bundles*') if 'sched' not in p.name]
  return max(found, key=lambda p: p.stat().st_mtime)


def executed(text: str) -> Iterator[tuple[int, str]]:
  """(how often it runs, line) for each instruction of a compiled program's text; in a loop, once for each iteration.

  Raises ValueError for a loop without a known number of iterations.
  """
  blocks, entry = computations(text)
  pending = [(1, entry)]
  while pending:
    times, name = pending.pop()
    for line in blocks[name]:
      yield times, line
      if loop := re.search(r'condition=%([\w.\-]+), body=%([\w.\-]+)', line):
        pending.append((times * _turns(line, blocks[loop[1]]), loop[2]))
      elif re.search(r' (call|async-start|conditional)\(', line) or (' fusion(' in line and CYCLES not in line):
        called = re.findall(r'(?:to_apply|calls|branch_computations=\{|called_computations=\{)=?%([\w.\-]+)', line)
        pending += [(times, name) for name in called]


def computations(text: str) -> tuple[dict[str, list[str]], str]:
  """({name: lines}, name of the entry computation)."""
  blocks, entry, name = {}, '', ''
  for line in text.splitlines():
    if found := re.match(r'(ENTRY )?%([\w.\-]+) \(.*\{$', line):
      name = found[2]
      blocks[name], entry = [], name if found[1] else entry
    elif name and ' = ' in line:
      blocks[name].append(line)
  return blocks, entry


def _turns(line: str, condition: list[str]) -> int:
  if known := re.search(r'known_trip_count":\{"n":"(\d+)"', line):
    return int(known[1])
  constants = [n for each in condition for n in re.findall(r'[su]32\[\][^ ]* constant\((\d+)\)', each)]
  if len(constants) != 1 or 'direction=LT' not in condition[-1]:
    raise ValueError(f'a loop of the compiled program has no known number of iterations: {condition[-1].strip()[:200]}')
  return int(constants[0])


def fusion_cycles(text: str) -> int:
  """The cycles of the fusions in a compiled program's text."""
  return sum(times * int(n) for times, line in executed(text) for n in re.findall(rf'{CYCLES}:"(\d+)"', line))


def in_process(script: str, chip: str, arguments: list[str]) -> list[dict]:
  """The JSON lines of `script`, also printed as they come. It runs in its own process, because libtpu reads its options
  only once. The environment variable DUMP is the folder of its schedules.
  """
  with tempfile.TemporaryDirectory() as folder:
    own = {'LIBTPU_INIT_ARGS': f'--xla_jf_dump_to={folder} {FLAGS}', 'DUMP': folder, 'JAX_PLATFORMS': 'cpu'}
    command = [sys.executable, script, '--aot', f'--chips={chip}', *arguments]
    with subprocess.Popen(command, env=os.environ | own, stdout=subprocess.PIPE, text=True) as process:
      rows = []
      for line in process.stdout or ():
        if line.startswith('{'):
          print(line, end='', flush=True)
          rows.append(json.loads(line))
  if process.returncode:
    raise subprocess.CalledProcessError(process.returncode, command)
  return rows


def at_once(script: str, chips: str, arguments: list[str]) -> list[list[dict]]:
  """`in_process` for each chip of a comma-separated list, in parallel."""
  with concurrent.futures.ThreadPoolExecutor() as pool:
    return list(pool.map(lambda chip: in_process(script, chip, arguments), chips.split(',')))
