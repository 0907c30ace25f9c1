"""Whether `pretrain plan --search` finds the best layout: every layout compiled, and the choice beside the best.

  python scripts/bench/planner/sweep.py --gin_file=configs/decoder/tiny.gin --topology=v5e:2x2 --global_batch=4
    [--compile=4] [--gin.KEY=VALUE …]

Judged by the compiler's cycles and the bytes of collectives over the bandwidth of their links (`planner/compiled.py`).
Prints a line for each layout as it is compiled; the last line has the choice, the best, and their ratio.
"""

import argparse
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3]))


def main(argv: list[str] | None = None) -> int:
  from models.build import build
  from pretrain.cli.config import NO_LAYOUT
  from pretrain.config import bindings
  from pretrain.devices.chips import parse
  from pretrain.errors import ConfigError
  from pretrain.experiment.experiment import Experiment
  from pretrain.planner import compiled, layouts, search, workload

  flags = _flags(argv)
  rows = f'data.batch_size={flags.global_batch}'
  cfg = bindings.load(Experiment, [flags.gin_file], [*flags.overrides, rows, *NO_LAYOUT])
  of, known, own = parse(flags.topology), {}, compiled.measure

  def measure(work, layout, of):
    if layout.text not in known:
      began = time.monotonic()
      try:
        known[layout.text] = own(work, layout, of)
        shown = f'{1e3 * known[layout.text].step.total:.4f} ms'
      except ConfigError as error:
        known[layout.text], shown = error, str(error)[:80]
      print(f'{layout.text}: {shown} ({time.monotonic() - began:.0f} s)', flush=True)
    if isinstance(known[layout.text], ConfigError):
      raise known[layout.text]
    return known[layout.text]

  compiled.measure = measure
  chosen = search.search(cfg, of, flags.compile).best
  for layout in layouts.candidates(cfg, build(cfg.model).specs, of):
    try:
      measure(workload.describe(cfg), layout, of)
    except ConfigError:
      continue
  best = min((c for c in known.values() if isinstance(c, compiled.Compiled)), key=lambda c: c.step.total)
  ratio = chosen.step.total / best.step.total
  print(f'{len(known)} layouts; chosen {chosen.layout.text}, best {best.layout.text}: ratio {ratio:.3f}')
  return 0


def _flags(argv: list[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--gin_file', required=True)
  parser.add_argument('--topology', required=True)
  parser.add_argument('--global_batch', type=int, required=True)
  parser.add_argument('--compile', type=int, default=4)
  flags, rest = parser.parse_known_args(argv)
  flags.overrides = [x.removeprefix('--gin.') for x in rest]
  return flags


if __name__ == '__main__':
  sys.exit(main())
