"""A train step on TPUs that are not there, with the attention kernel and the reference: memory and cycles a device.

  python scripts/bench/end_to_end.py --aot --chips=v5e:4x4 --gin_file=configs/t5/base.gin [--gin.KEY=VALUE …]

`schedule.py` says what is counted: kernels and fusions, loops as often as they turn. A row is taken for one document
that fills it, so that no tile is left out but for causality. Collectives are named, not timed: XLA gives no estimate.
"""

import argparse
import collections
import concurrent.futures
import json
import os
import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # in front of this folder, where `data` is data.py

import attention
import schedule

NAMES = ('auto', 'reference')
KERNEL = re.compile(r'%attention_(\w+?)\.(\d+) = .*operand_layout_constraints=\{(.*?)\}, [a-z_]+=')
COLLECTIVE = re.compile(r' (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(')


def recorded() -> dict:
  """{(kernel, shapes of its operands): (its Spec, heads of all rows)}, filled while the step is traced."""
  from pallas_kernels.attention import tpu

  found, own = {}, tpu.Call.run

  def run(self, kernel, ins, outs, scratch):
    arrays = [self.words, *self.numbers.values(), *(x for x, _ in {**self._row_vectors(), **ins}.values())]
    shapes = tuple(','.join(map(str, x.shape)) for x in arrays)
    found[kernel.__name__, shapes] = self.spec, ins['q'][0].shape[0]
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
  """{kernel: cycles} of the compiled step. Calls that are alike share one schedule, under the name of one of them."""
  calls, paths = [], {}
  for times, line in schedule.executed(text):
    if found := KERNEL.search(line):
      # A list whose length is counted at run time comes with that length, a scalar.
      call = found[1], tuple(dims for dims in re.findall(r'\w+\[([\d,]*)\]', found[3]) if dims)
      calls.append((times, call))
      dumps = [p for p in folder.glob(f'*-attention_{found[1]}.{found[2]}-*final_bundles*') if 'sched' not in p.name]
      paths |= {call: dumps[0]} if dumps else {}
  cycles = collections.Counter()
  for times, call in calls:
    kernel, (spec, rows) = call[0], specs[call]
    counted = attention.count(spec, whole(spec), by_keys=kernel == attention.KEYS)
    sizes = schedule.regions(paths[call])
    cycles[kernel] += times * attention.kernel_cycles(spec, kernel, sizes, counted, rows)
  return dict(cycles)


def collectives(text: str) -> dict[str, int]:
  found = collections.Counter()
  for times, line in schedule.executed(text):
    if kind := COLLECTIVE.search(line):
      found[kind[1]] += times
  return dict(found)


def measure(flags, name: str) -> dict:
  from pretrain.config import bindings
  from pretrain.experiment import checks, experiment
  from pretrain.tools import plan

  overrides = [x.removeprefix('--gin.') for x in flags.overrides] + [f"kernels.attention='{name}'"]
  cfg = bindings.load(experiment.Experiment, flags.gin_file, overrides)
  checks.check(cfg)
  specs = recorded()
  memory, compiled = plan.compile_train_step(cfg, flags.chips)
  text = compiled.as_text()
  return {
    'attention': name, 'MiB': round(memory.total / plan.MIB), 'fusions': schedule.fusion_cycles(text),
    'kernels': kernels(text, specs, pathlib.Path(os.environ['DUMP'])), 'collectives': collectives(text),
  }  # fmt: skip


def table(rows: list[dict]) -> str:
  kernel, reference = rows
  names = sorted({name for row in rows for name in row['kernels']})
  lines = {'MiB per device': [row['MiB'] for row in rows]}
  lines |= {f'cycles of attention_{name}': [row['kernels'].get(name, 0) for row in rows] for name in names}
  lines |= {'cycles of fusions': [row['fusions'] for row in rows]}
  lines |= {'cycles': [row['fusions'] + sum(row['kernels'].values()) for row in rows]}
  for name in sorted(kernel['collectives'] | reference['collectives']):
    lines[f'{name}, not timed'] = [row['collectives'].get(name, 0) for row in rows]
  text = [f'{"":<40}{kernel["attention"]:>18}{reference["attention"]:>18}{"ratio":>8}']
  for name, (own, other) in lines.items():
    text.append(f'{name:<40}{own:>18,}{other:>18,}' + (f'{own / other:>8.3f}' if other else ''))
  return '\n'.join(text)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--aot', action='store_true', required=True, help='compile for TPUs that are not there')
  parser.add_argument('--chips', required=True, help='one slice, e.g. v5e:4x4')
  parser.add_argument('--gin_file', action='append', required=True)
  parser.add_argument('--attention', default=','.join(NAMES))
  flags, flags.overrides = parser.parse_known_args()
  names = flags.attention.split(',')
  if 'DUMP' in os.environ:
    print(json.dumps(measure(flags, names[0])), flush=True)
    return
  files = [f'--gin_file={path}' for path in flags.gin_file]
  arguments = [[*files, *flags.overrides, f'--attention={name}'] for name in names]
  with concurrent.futures.ThreadPoolExecutor() as pool:
    found = pool.map(lambda own: schedule.in_process(__file__, flags.chips, own), arguments)
  print(table([row for rows in found for row in rows]))


if __name__ == '__main__':
  main()
