"""Shows that the losses of a run do not depend on its layout: meshes, microbatches, hosts, in f32 and bf16.

python scripts/layouts.py --gin_file=configs/ul2/tiny.gin [--steps 20] [--only expert stage] [--workdir DIR]

Each line: a layout, its largest relative loss difference to one device, whether its batches equal those of one device
(by checksum), and the number of "Involuntary full rematerialization" lines of the compiler. Exit code 1 above a bar.
"""

import argparse
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys

AXES = ('replica', 'data', 'fsdp', 'sequence', 'tensor', 'expert', 'stage')
# A config's own microbatches and repeats need not divide the rows and layers of each layout.
ONE = {f'mesh.{axis}': 1 for axis in AXES} | {'model.pipeline_microbatches': None, 'model.pipeline_repeats': 1}
REFERENCE = 'one device'
LAYOUTS = {
  REFERENCE: (ONE, 1),
  'data=8': (ONE | {'mesh.data': 8}, 1),
  'fsdp=8': (ONE | {'mesh.fsdp': 8}, 1),
  'fsdp=4 x tensor=2': (ONE | {'mesh.fsdp': 4, 'mesh.tensor': 2}, 1),
  'data=2 x fsdp=2 x tensor=2': (ONE | {'mesh.data': 2, 'mesh.fsdp': 2, 'mesh.tensor': 2}, 1),
  'sequence=4': (ONE | {'mesh.sequence': 4}, 1),
  'fsdp=2 x sequence=2 x tensor=2': (ONE | {'mesh.fsdp': 2, 'mesh.sequence': 2, 'mesh.tensor': 2}, 1),
  # Experts on several devices; a model without any has its rows divided alone.
  'expert=4': (ONE | {'mesh.expert': 4}, 1),
  'expert=2 x fsdp=2 x tensor=2': (ONE | {'mesh.expert': 2, 'mesh.fsdp': 2, 'mesh.tensor': 2}, 1),
  'accumulate 2, expert=4': (ONE | {'mesh.expert': 4, 'train.accumulate': 2}, 1),
  # Pipelines, where there are enough layers.
  'stage=2': (ONE | {'mesh.stage': 2}, 1),
  'stage=4 x fsdp=2': (ONE | {'mesh.stage': 4, 'mesh.fsdp': 2}, 1),
  'stage=2 x 2 repeats x tensor=2': (
    ONE | {'mesh.stage': 2, 'mesh.tensor': 2, 'model.pipeline_repeats': 2, 'model.remat': "'full'"},
    1,
  ),
  'accumulate 2, stage=4 x data=2': (ONE | {'mesh.stage': 4, 'mesh.data': 2, 'train.accumulate': 2}, 1),
  'accumulate 2, fsdp=4': (ONE | {'mesh.fsdp': 4, 'train.accumulate': 2}, 1),
  'accumulate 4, fsdp=4': (ONE | {'mesh.fsdp': 4, 'train.accumulate': 4}, 1),
  'replica=2 x fsdp=2 x tensor=2': (ONE | {'mesh.replica': 2, 'mesh.fsdp': 2, 'mesh.tensor': 2}, 1),
  'replica=2 x stage=2 x fsdp=2': (ONE | {'mesh.replica': 2, 'mesh.stage': 2, 'mesh.fsdp': 2}, 1),
  'accumulate 2, replica=2 x fsdp=4': (ONE | {'mesh.replica': 2, 'mesh.fsdp': 4, 'train.accumulate': 2}, 1),
  '2 hosts, fsdp=4': (ONE | {'mesh.fsdp': 4}, 2),
  '3 hosts, data=3': (ONE | {'mesh.data': 3}, 3),
  '3 hosts, rows that lie apart': (ONE | {'mesh.tensor': 2, 'mesh.expert': 3}, 3),
  '4 hosts, fsdp=4': (ONE | {'mesh.fsdp': 4}, 4),
}
# Layouts that divide what the model has not so many of.
UNDIVIDED = 'does not divide into mesh.stage', 'does not divide over mesh.expert'
BARS = {'float32': 1e-5, 'bfloat16': 1e-3}


def train(options, dtype: str, name: str, overrides: dict, hosts: int) -> tuple[list[dict], int] | None:
  """Trains one layout in separate processes; returns (metrics rows, number of rematerialization lines), None where it
  does not divide the layers or experts. The losses that balance experts are left out: they are means over the tokens of
  a microbatch and replica.
  """
  workdir = options.workdir / dtype / name.replace(' ', '_').replace('=', '')
  launch = ['run', f'--hosts={hosts}', '--'] if hosts > 1 else []
  values = {
    'train.steps': options.steps, 'train.log_every': 1, 'evaluation.every': 0, 'checkpoint.every': 10_000,
    'data.batch_size': options.batch_size, 'model.dropout': 0.1, 'model.dtype': f"'{dtype}'",
    'loss.load_balance': 0.0, 'loss.router_z': 0.0,
  } | overrides  # fmt: skip
  command = [
    sys.executable,
    '-m',
    'pretrain',
    *launch,
    'train',
    f'--gin_file={options.gin_file}',
    f'--workdir={workdir}',
  ]
  command += [f'--gin.{k}={v}' for k, v in values.items()]
  # A program that is read from the user's cache is not compiled, and its compiler says nothing.
  own = {'JAX_PLATFORMS': 'cpu', 'PRETRAIN_CACHE': str(options.workdir.absolute() / 'cache')}
  done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, check=False)
  if any(message in done.stderr for message in UNDIVIDED):
    return None
  if done.returncode:
    raise SystemExit(f'{name} failed ({done.returncode}):\n{done.stdout[-1000:]}{done.stderr[-3000:]}')
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  remat = (done.stdout + done.stderr).count('Involuntary full rematerialization')
  return [row for row in rows if 'loss' in row], remat


def difference(row: dict, reference: dict) -> float:
  """The relative difference of two losses, infinite where one of them is NaN."""
  found = abs(float(row['loss']) / float(reference['loss']) - 1)
  return math.inf if math.isnan(found) else found


def compare(options, dtype: str) -> bool:
  good, reference, skipped = True, None, []
  for name in [REFERENCE, *(name for name in options.layouts if name != REFERENCE)]:
    if (found := train(options, dtype, name, *LAYOUTS[name])) is None:
      skipped.append(name)
      continue
    rows, remat = found
    reference = reference or rows
    worst = max(difference(a, b) for a, b in zip(rows, reference, strict=True))
    same = [r['batch_checksum'] for r in rows] == [r['batch_checksum'] for r in reference]
    good &= worst <= BARS[dtype] and same and not remat
    print(
      f'{dtype:9} {name:30} loss {worst:.1e} (bar {BARS[dtype]:.0e})  batches equal {same}  remat {remat}', flush=True
    )
  if skipped:
    print(f'{dtype:9} not compared, for the mesh does not divide layers or experts: {", ".join(skipped)}', flush=True)
  return good


def main() -> int:
  flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  flags.add_argument('--gin_file', required=True)
  flags.add_argument('--steps', type=int, default=20)
  flags.add_argument('--batch_size', type=int, default=48, help='a multiple of 3 and of 16, for three hosts and 4 x 4')
  flags.add_argument('--only', nargs='+', metavar='TEXT', help='layouts whose name has one of these (default: all)')
  flags.add_argument('--dtypes', nargs='+', default=list(BARS))
  flags.add_argument('--workdir', type=pathlib.Path, default=pathlib.Path('runs/layouts'))
  options = flags.parse_args()
  options.layouts = [name for name in LAYOUTS if not options.only or any(part in name for part in options.only)]
  if not options.layouts:
    flags.error(f'--only: no layout has {" or ".join(options.only)} in its name; they are {", ".join(LAYOUTS)}.')
  shutil.rmtree(options.workdir, ignore_errors=True)
  return 0 if all([compare(options, dtype) for dtype in options.dtypes]) else 1


if __name__ == '__main__':
  sys.exit(main())
