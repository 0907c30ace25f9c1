"""What a compiled step costs: the compiler's cycles, its collectives over the links of the slice, its memory."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pretrain.devices.chips import Slice
from pretrain.experiment.experiment import Experiment
from pretrain.experiment.program import build_program
from pretrain.planner import hlo, roofline, torus
from pretrain.planner.hlo import Buffer, Instruction, Program
from pretrain.planner.layouts import Layout
from pretrain.planner.torus import Time
from pretrain.planner.workload import Workload
from pretrain.tools import plan

KINDS = ('all-gather', 'all-reduce', 'reduce-scatter', 'collective-permute', 'all-to-all', 'ragged-all-to-all')
GROUPS = re.compile(r'replica_groups=(.*?), (?!device_ids=)[a-z_]+=')  # device_ids are a part of the groups
PAIRS = re.compile(r'source_target_pairs=\{([{}\d,]+)\}')  # of a collective-permute
# Sums over slices are left to the runtime: a device sends its part of its slice's sum to the host, and gets it back.
BETWEEN = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
TRANSFERS = {
  'ALL_REDUCE': 'all-reduce', 'ALL_GATHER': 'all-gather', 'REDUCE_SCATTER': 'reduce-scatter',
  'ALL_TO_ALL': 'all-to-all', 'ONE_TO_ONE': 'collective-permute',
}  # fmt: skip
ARRAYS = re.compile(r'(\w+)\[([\d,]*)\]')
OPERANDS = re.compile(r'operand_layout_constraints=\{(.*?)\}, [a-z_]+=')
RINGS = re.compile(r'"emitter":"(\d)D|StrategyND\{colors:(\d)')


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of the program. `bytes`: the whole array; `devices`: those of the first group.

  Between slices there are no `devices`: each has a partner in every other slice, and `bytes` are what it sends.
  """

  kind: str
  bytes: int
  times: int
  devices: tuple[int, ...]
  rings: int | None  # sides of the slice that it uses at once, where the compiler says
  source: str

  @property
  def crosses(self) -> bool:
    """Whether it is between slices."""
    return not self.devices


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A layout that was compiled: its step and its memory, in bytes of one device."""

  layout: Layout
  step: roofline.Step
  memory: plan.Memory
  collectives: tuple[tuple[Collective, Time], ...]
  at_peak: tuple[Buffer, ...]


def measure(work: Workload, layout: Layout, of: Slice) -> Compiled:
  """The cost of a layout's step, by its program. Raises ConfigError where it does not fit.

  Pallas kernels carry no estimate. Those of attention have the time that `roofline` gives them, those of rotary
  positions that of reading and writing their array once, those of quantized products that of `quantized_seconds`.
  """
  cfg = layout.of(work.cfg)
  memory, compiled, devices = compile_step(cfg, of)
  program = hlo.parse(compiled.as_text())
  timed = tuple(timed_collectives(program, devices, of))
  links = sum((time.times(one.times) for one, time in timed), Time())
  guess = roofline.estimate(work, layout, of, torus.groups(layout.sizes, of))
  cycles = sum(times * one.cycles for times, one in program.executed())
  kernels = guess.kernels + rotary_bytes(program) / of.hbm_rate + quantized_seconds(program, of)
  step = roofline.Step(cycles / of.chip.clock, kernels, 0.0, links.ici, links.dcn)
  return Compiled(layout, step, memory, timed, tuple(hlo.at_peak(program)))


def rotary_bytes(program: Program) -> int:
  """What the kernels for rotary positions read and write in a step."""
  rotary = lambda one: one.op == 'custom-call' and one.name.startswith('rotary')
  return sum(2 * times * sum(hlo.sizes(one.shape)) for times, one in program.executed() if rotary(one))


def quantized_seconds(program: Program, of: Slice) -> float:
  """The least time of the kernels of quantized products in a step: that of their multiplications at the peak of 8 bits,
  twice that of bf16, or of their arrays at the bandwidth of memory.
  """
  total, rate = 0.0, of.hbm_rate
  for times, one in program.executed():
    if one.op == 'custom-call' and one.name.startswith('quantized_matmul'):
      arrays = [_elements(found) for found in ARRAYS.findall(OPERANDS.search(one.rest)[1])]
      out = _elements(ARRAYS.search(one.shape).groups())
      # The two matrices, m x k and k x n, and the product, m x n.
      products = math.sqrt(math.prod(sorted(arrays)[-2:]) * out)
      moved = sum(hlo.sizes(one.shape)) + sum(hlo.sizes(OPERANDS.search(one.rest)[1]))
      total += times * max(products / of.flops, moved / rate)
  return total


def _elements(array: tuple[str, str]) -> int:
  """The number of elements of an array's (dtype, dims)."""
  return math.prod(int(n) for n in array[1].split(',') if n)


def compile_step(cfg: Experiment, of: Slice) -> tuple[plan.Memory, Any, Sequence[Any]]:
  """(memory, program, devices in the order in which its collectives number them) of a config's train step."""
  program = build_program(cfg, plan.tpu_devices(of.name, of.slices))
  memory, compiled = plan.compile_for(program.train_step, (program.abstract, plan.abstract_batch(cfg, program)))
  return memory, compiled, list(program.mesh.devices.flat)


def timed_collectives(program: Program, devices: Sequence[Any], of: Slice) -> Iterator[tuple[Collective, Time]]:
  """Each collective with the time of one run."""
  for one in collected(program, len(devices)):
    if one.crosses:
      yield one, torus.between(one.kind, one.bytes, of)
    else:
      over = torus.group([devices[i] for i in one.devices], of)
      yield one, torus.seconds(one.kind, one.bytes, of, over, one.rings)


def collected(program: Program, number: int) -> list[Collective]:
  """The collectives of a program over so many devices.

  One that is split over fusions, to overlap it with other work, stands in each of them: it counts once a channel.
  """
  found, seen = [], set()
  for times, one, inside in _visited(program, program.entry, 1, ''):
    if one.op == 'send' and (between := BETWEEN.search(one.rest)):
      found.append(_between(one, between[1], times))
    kind = next((kind for kind in KINDS if one.op in (kind, f'{kind}-start')), None)
    if kind is None:
      continue
    channel = re.search(r'channel_id=(\d+)', one.rest)
    key = kind, channel[1] if channel else one.name
    if inside and key in seen:
      continue
    seen.add(key)
    scatters = kind == 'all-reduce' and 'reduce-scatter' in inside
    groups, rings = GROUPS.search(one.rest), RINGS.search(one.rest)
    pairs = PAIRS.search(one.rest)
    members = torus.connected(pairs[1]) if pairs else tuple(torus.members(groups[1] if groups else '', number))
    size = _size(one, kind) * (len(members) if kind == 'reduce-scatter' else 1)
    sides = int(rings[1] or rings[2]) if rings else None
    found.append(Collective('reduce-scatter' if scatters else kind, size, times, members, sides, one.source))
  return found


def _between(one: Instruction, name: str, times: int) -> Collective:
  """The collective of a transfer that the runtime calls so. Raises ValueError for a name that is not known."""
  if (kind := TRANSFERS.get(name)) is None:
    raise ValueError(f'a transfer between slices of a kind that is not known: {name}')
  return Collective(kind, sum(hlo.sizes(hlo.elements(one.shape)[0])), times, (), None, one.source)


def _size(one: Instruction, kind: str) -> int:
  """Bytes of the result; that of a start is a tuple of operands and results."""
  parts = hlo.elements(one.shape) if one.shape.startswith('(') else [one.shape]
  if one.op.endswith('-start') and kind != 'all-reduce' and len(parts) > 1:
    parts = parts[1:2]
  return sum(sum(hlo.sizes(part)) for part in parts)


def _visited(program: Program, name: str, times: int, inside: str) -> Iterator[tuple[int, Instruction, str]]:
  """(how often it runs, instruction, name of the fusion around it), bodies and fusions included."""
  for one in program.computations.get(name, ()):
    yield times, one, inside
    if one.op == 'while':
      yield from _visited(program, one.of_loop('body'), times * program.turns(one), inside)
    elif one.op in ('call', 'async-start', 'conditional', 'fusion'):
      for other in one.called:
        yield from _visited(program, other, times, inside or (one.name if one.op == 'fusion' else ''))


def by_source(timed: Iterable[tuple[Collective, Time]]) -> list[tuple[str, str, int, float, float]]:
  """(kind, what it is for, times, GB, seconds), the most seconds first; equal ones together."""
  total: dict[tuple[str, str], list[float]] = collections.defaultdict(lambda: [0, 0.0, 0.0])
  for one, time in timed:
    row = total[one.kind, 'between slices' if one.crosses else short(one.source)]
    row[0] += one.times
    row[1] += one.times * one.bytes / 1e9
    row[2] += one.times * time.total
  rows = [(*key, int(times), size, spent) for key, (times, size, spent) in total.items()]
  return sorted(rows, key=lambda row: -row[4])


def short(source: str) -> str:
  """A JAX operation in few words: in which pass, and which product."""
  passes = 'backward' if 'transpose(jvp' in source else 'forward' if 'jvp' in source else 'update'
  again = ', made again' if 'rematted' in source else ''
  return f'{passes}{again}: {source.rsplit("/", 1)[-1] or "combined"}'
