"""A train step compiled for TPUs that this machine does not have: memory and cycles per device, for each attention.

  python scripts/bench/end_to_end.py --aot --chips=v5e:4x4 --gin_file=configs/t5/base.gin [--gin.KEY=VALUE …]
    [--attention=auto,reference]

`schedule.py` defines the cycles: those of kernels and fusions, in loops once for each iteration. A kernel of quantized
products takes no less than what the bytes that it moves need at the chip's bandwidth (`matmul.py`). Each row is counted
as one document that fills it, so that only causality leaves tiles out. Collectives are counted but have no cycles,
because XLA gives no estimate for them; nor for rotary kernels, each of which reads and writes queries or keys once.
"""

import argparse
import collections
import concurrent.futures
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
from unittest import mock

sys.path.insert(
  0, str(pathlib.Path(__file__).resolve().parents[2])
)  # before this folder, whose data.py would be `data`

import attention
import matmul
import schedule

NAMES = ('auto', 'reference')
KERNEL = re.compile(r'%((attention_\w+?_[0-9a-f]{16})[\w.\-]*) = .* custom-call\(')
PRODUCT = re.compile(rf'%(({matmul.KERNEL}_[0-9a-f]+)[\w.\-]*) = .* custom-call\(')
COLLECTIVE = re.compile(
  r'%([\w.\-]+) = .*? (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\('
)
ROTARY = re.compile(r'%\w*rotary[\w.]* = .* custom-call\(')
CALLS = re.compile(r'calls=%([\w.\-]+)')
CHANNEL = re.compile(r'channel_id=(\d+)')


def recorded() -> dict:
  """{name: (kernel, its Spec, heads of all rows)}, filled while the step is traced. As in `matmul.recorded`, kernels
  that differ in anything have different names: encoder and decoder may have operands of equal shapes, and other masks.
  """
  from jax.experimental import pallas as pl

  from pallas_kernels.attention import tpu

  found, own, plain = {}, tpu.Call.run, pl.pallas_call

  def run(self, kernel, ins, outs, scratch):
    arrays = [self.words, *self.numbers.values(), *(x for x, _ in {**self._row_vectors(), **ins, **outs}.values())]
    program = self.spec, [(x.shape, str(x.dtype)) for x in arrays]
    name = f'attention_{kernel.__name__}_{hashlib.sha256(repr(program).encode()).hexdigest()[:16]}'
    found[name] = kernel.__name__, self.spec, ins['q'][0].shape[0]
    with mock.patch.object(pl, 'pallas_call', lambda *args, **options: plain(*args, **options | {'name': name})):
      return own(self, kernel, ins, outs, scratch)

  tpu.Call.run = run
  return found


def whole(spec):
  """Vectors of a row that is one document, and no prefix."""
  import jax.numpy as jnp

  from pallas_kernels.attention.tiles import Vectors

  ones = {'q_segments': spec.q_length, 'kv_segments': spec.kv_length} if spec.segmented else {}
  at = {'q_positions': spec.q_length, 'kv_positions': spec.kv_length, 'kv_reach': spec.kv_length}
  found = {name: jnp.ones((1, n), jnp.int32) for name, n in ones.items()}
  return Vectors(**found, **{name: jnp.arange(n)[None] for name, n in at.items() if spec.positioned})


def kernels(text: str, specs: dict, folder: pathlib.Path) -> dict[str, int]:
  """{kernel: cycles} of the compiled step; `specs` as of `recorded`."""
  cycles = collections.Counter()
  for name, (times, path) in scheduled(KERNEL, text, folder).items():
    kernel, spec, rows = specs[name]
    counted = attention.count(spec, whole(spec), by_keys=kernel == attention.KEYS)
    cycles[kernel] += times * attention.kernel_cycles(spec, kernel, schedule.regions(path), counted, rows)
  return dict(cycles)


def scheduled(pattern: re.Pattern, text: str, folder: pathlib.Path) -> dict[str, tuple[int, pathlib.Path]]:
  """{name of a kernel: (how often a step runs it, its schedule)}. Calls of one program share a schedule, under the name
  of one of them.
  """
  times, paths = collections.Counter(), {}
  for count, line in schedule.executed(text):
    if one := pattern.search(line):
      times[one[2]] += count
      dumps = [p for p in folder.glob(f'*-{one[1]}-*final_bundles*') if 'sched' not in p.name]
      paths |= {one[2]: dumps[0]} if dumps else {}
  return {name: (count, paths[name]) for name, count in times.items()}


def products(text: str, calls: dict, folder: pathlib.Path, chip: str) -> dict[str, int]:
  """{'quantized_matmul': cycles} of the compiled step; empty where it has none. `calls` by the names of their programs
  (`matmul.recorded`): calls of one program share a schedule; programs with equal shapes have one each.
  """
  found = scheduled(PRODUCT, text, folder)
  own = [times * matmul.kernel_cycles(calls[name], path, chip) for name, (times, path) in found.items()]
  return {matmul.KERNEL: sum(own)} if own else {}


def collectives(text: str) -> dict[str, int]:
  """{kind: how often a step runs it}.

  The compiler may split a collective over fusions, to overlap it with other work: then a copy of it, on the same
  channel, stands in the fusion that starts it, in each that overlaps it and in the one that waits for it. Of the copies
  in fusions only the first counts.
  """
  found, first, fused = collections.Counter(), {}, _in_fusions(text)
  for times, line in schedule.executed(text):
    if one := COLLECTIVE.search(line):
      channel = CHANNEL.search(line)
      is_copy = line in fused and channel is not None and first.setdefault(channel[1], one[1]) != one[1]
      found[one[2]] += 0 if is_copy else times
  return dict(found)


def rotary(text: str) -> dict[str, int]:
  """How often a step runs the kernel for rotary positions; empty where it does not."""
  found = sum(times for times, line in schedule.executed(text) if ROTARY.search(line))
  return {'rotary kernel': found} if found else {}


def _in_fusions(text: str) -> set[str]:
  """The instructions inside fusions."""
  blocks, _ = schedule.computations(text)
  names = [name for lines in blocks.values() for line in lines if ' fusion(' in line for name in CALLS.findall(line)]
  return {line for name in names for line in blocks[name]}


def config(flags, name: str):
  """The checked experiment with this attention. Raises ConfigError."""
  from pretrain.config import bindings
  from pretrain.experiment import checks, experiment

  cfg = bindings.load(experiment.Experiment, flags.gin_file, [*flags.overrides, f"kernels.attention='{name}'"])
  checks.check(cfg)
  return cfg


def check(flags, names: list[str]) -> None:
  """Raises ConfigError or KernelError for arguments with which a step could not be compiled; compiles nothing."""
  from pallas_kernels.attention.api import IMPLEMENTATIONS
  from pretrain.errors import ConfigError
  from pretrain.experiment.program import build_program
  from pretrain.tools import plan

  known = ('auto', *IMPLEMENTATIONS)
  if wrong := [name for name in names if name not in known or names.count(name) > 1]:
    raise ConfigError(f"--attention names '{wrong[0]}'; give different names of {', '.join(known)}, with commas.")
  configs = [config(flags, name) for name in names]
  devices = plan.tpu_devices(flags.chips)
  for cfg in configs:
    program = build_program(cfg, devices)
    program.train_step.trace(program.abstract, plan.abstract_batch(cfg, program))


def measure(flags, name: str) -> dict:
  from pretrain.tools import plan

  specs, calls = recorded(), matmul.recorded()
  memory, compiled = plan.compile_train_step(config(flags, name), flags.chips)
  text, folder = compiled.as_text(), pathlib.Path(os.environ['DUMP'])
  own = {f'attention_{name}': cycles for name, cycles in kernels(text, specs, folder).items()}
  own |= products(text, calls, folder, flags.chips.split(':')[0])
  return {
    'attention': name, 'MiB': round(memory.total / plan.MIB), 'fusions': schedule.fusion_cycles(text),
    'kernels': own, 'not timed': collectives(text) | rotary(text),
  }  # fmt: skip


def table(rows: list[dict]) -> str:
  """One column for each row; of two, their ratio too."""
  names = sorted({name for row in rows for name in row['kernels']})
  lines = {'MiB per device': [row['MiB'] for row in rows]}
  lines |= {f'cycles of {name}': [row['kernels'].get(name, 0) for row in rows] for name in names}
  lines |= {'cycles of fusions': [row['fusions'] for row in rows]}
  lines |= {'cycles': [row['fusions'] + sum(row['kernels'].values()) for row in rows]}
  for name in sorted({name for row in rows for name in row['not timed']}):
    lines[f'{name}, not timed'] = [row['not timed'].get(name, 0) for row in rows]
  text = [f'{"":<40}' + ''.join(f'{row["attention"]:>18}' for row in rows) + ('   ratio' if len(rows) == 2 else '')]
  for name, values in lines.items():
    ratio = f'{values[0] / values[1]:>8.3f}' if len(values) == 2 and values[1] else ''
    text.append(f'{name:<40}' + ''.join(f'{value:>18,}' for value in values) + ratio)
  return '\n'.join(text)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
  """The flags; `overrides` are the bindings of --gin.KEY=VALUE. Anything else ends the process with code 2."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    '--aot', action='store_true', required=True, help='compile for TPUs that this machine does not have'
  )
  parser.add_argument('--chips', required=True, help='one slice, e.g. v5e:4x4')
  parser.add_argument('--gin_file', action='append', required=True)
  parser.add_argument('--attention', default=','.join(NAMES), help='implementations, with commas')
  flags, rest = parser.parse_known_args(argv)
  if wrong := [x for x in rest if not re.match(r'--gin\.[^=]+=', x)]:
    parser.error(f'{wrong[0]} is no argument; bindings are --gin.KEY=VALUE.')
  flags.overrides = [x.removeprefix('--gin.') for x in rest]
  return flags


def compare(flags, names: list[str]) -> str:
  """The table of all names, each compiled in a process of its own."""
  own = [*(f'--gin_file={path}' for path in flags.gin_file), *(f'--gin.{x}' for x in flags.overrides)]
  run = lambda name: schedule.in_process(__file__, flags.chips, [*own, f'--attention={name}'])
  with concurrent.futures.ThreadPoolExecutor() as pool:
    return table([row for rows in pool.map(run, names) for row in rows])


def main(argv: list[str] | None = None) -> int:
  """Prints the table. A user's mistake is one line on stderr and its exit code, before anything is compiled."""
  from pretrain.errors import USER_ERRORS

  flags = parse(argv)
  names = flags.attention.split(',')
  try:
    if 'DUMP' in os.environ:
      print(json.dumps(measure(flags, names[0])), flush=True)
    else:
      check(flags, names)
      print(compare(flags, names))
  except USER_ERRORS as error:
    print(error, file=sys.stderr)
    return error.exit_code
  except subprocess.CalledProcessError as error:  # the process has printed why
    return error.returncode
  return 0


if __name__ == '__main__':
  sys.exit(main())
