"""What a TPU that is not there would do: the schedules that its compiler writes, counted.

A program's cycles are those of its Mosaic kernels (bundles of the final VLIW schedule times how often the grid runs
them) and of its XLA fusions (`estimated_cycles`). As a model of time it was calibrated on splash's forward kernels only
(within -5/+13% on v5p, v6e and v7x): backward passes can be compared with each other, no more.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

CHIPS = ('v5e:2x4', 'v5p:2x2x1', 'v6e:2x4', 'tpu7x:2x2x1')
CLOCK_GHZ = {'v5e': 1.5, 'v5p': 1.75, 'v6e': 1.75, 'tpu7x': 1.9}
CORES = {'v5e': 1, 'v5p': 2, 'v6e': 1, 'tpu7x': 1}  # that share a program; a device of tpu7x is one core
FLAGS = '--xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles'


def regions(path: pathlib.Path) -> tuple[list[int], list[int], int]:
  """(bundles of each innermost region with matrix products, of regions before and after those, of the rest).

  The rest runs at every step; so do regions that start copies for the next one, which are part of it.
  """
  bundles, products, copies, start, end = 0, [], [], {}, {}
  for line in path.read_text().splitlines():
    if re.match(r'\s*(0x[0-9a-f]+|0)\b[^:]*:', line):
      bundles += 1
      products.append('vmatmul' in line)
      copies.append('dma.hbm_to_vmem' in line)
    for r in re.findall(r'Start region (\d+)', line):
      start.setdefault(int(r), bundles - 1)
    for r in re.findall(r'End region (\d+)', line):
      end[int(r)] = bundles - 1
  spans = sorted({(max(s, 0), end.get(r, s)) for r, s in start.items()})
  within = lambda a, b: a != b and b[0] <= a[0] and a[1] <= b[1]
  matrix = [span for span in spans if any(products[span[0] : span[1] + 1])]
  inner = [span for span in matrix if not any(within(other, span) for other in matrix)]
  plain = [s for s in spans if s not in matrix and s[1] - s[0] >= 60 and not any(within(s, m) for m in inner)]
  plain = [s for s in plain if not any(copies[s[0] : s[1] + 1])]
  outer = [s for s in plain if not any(within(s, other) for other in plain)]
  sizes = lambda found: [e - s + 1 for s, e in found]
  return sizes(inner), sizes(outer), max(0, max(sizes(spans)) - sum(sizes(inner)) - sum(sizes(outer)))


def dumped(folder: pathlib.Path, name: str) -> pathlib.Path:
  """The newest schedule of the kernel of this name."""
  found = [p for p in folder.glob(f'*{name}*final_bundles*') if 'sched' not in p.name]
  return max(found, key=lambda p: p.stat().st_mtime)


def fusion_cycles(text: str) -> int:
  """Of a compiled program's text. Raises ValueError for loops, whose bodies run more than once."""
  if ' while(' in text:
    raise ValueError('the compiled program has a loop in XLA; its cycles are not counted.')
  return sum(int(n) for n in re.findall(r'"estimated_cycles":"(\d+)"', text))


def in_process(script: str, chip: str, arguments: list[str]) -> list[dict]:
  """The JSON lines of `script`, shown as they come, in a process: libtpu reads its options once. DUMP is its folder."""
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
