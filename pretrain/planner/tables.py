"""What `pretrain plan --search` and `--explain` print, and the file of the chosen layout."""

import collections
import pathlib
from collections.abc import Iterable, Sequence

from pretrain.devices.chips import Slice
from pretrain.errors import ConfigError
from pretrain.planner import compiled, layouts, memory, roofline
from pretrain.planner.compiled import Compiled
from pretrain.planner.layouts import LEFT_OUT, Layout
from pretrain.planner.search import Found
from pretrain.planner.workload import Workload

MIB = 2**20
SHOWN = 10
MARK = '# Written by pretrain plan --search'
TIMES = ('compute', 'HBM', 'ICI', 'DCN', 'step')


def _step(work: Workload, of: Slice, step: roofline.Step) -> list[str]:
  """Milliseconds, model FLOPs utilisation, tokens/s/chip and what binds."""
  parts = (step.products + step.kernels, step.hbm, step.ici, step.dcn, step.total)
  shown = [f'{1e3 * part:,.{0 if step.total > 0.1 else 2}f}' for part in parts]
  rate = roofline.tokens_per_chip(work, of, step.total)
  return [*shown, f'{roofline.mfu(work, of, step.total):.1%}', f'{rate:,.0f}', step.binds]


def _memory(found: memory.Memory) -> list[str]:
  parts = (found.arguments, found.kept, found.gradients, found.weights, found.layer, found.total)
  return [f'{part / MIB:,.0f}' for part in parts]


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
  """Lines of a table: the first column to the left, the others to the right."""
  widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
  line = lambda row: '  '.join(
    text.ljust(width) if i == 0 else text.rjust(width) for i, (text, width) in enumerate(zip(row, widths, strict=True))
  )
  return [line(row).rstrip() for row in rows]


def _name(layout: Layout, rows: int) -> list[str]:
  return [layout.mesh, layout.policy, f'{layout.rows(rows)}x{layout.accumulate}']


def table(found: Found) -> str:
  """The estimates of the fastest layouts, those that were compiled, the chosen one."""
  work, of, rows = found.work, found.of, found.work.rows
  head = ['mesh', 'remat', 'rows', 'state', 'kept', 'grads', 'weights', 'layer', 'MiB', *TIMES, 'MFU', 'tok/s/chip', '']
  lines = [
    f'{found.counted} layouts of {rows} rows on {of.slices} x {of.name} ({of.devices} devices, rings {_rings(of)}), '
    f'{len(found.estimates)} fit {of.chip.hbm / MIB:,.0f} MiB.',
    'rows: of a device x microbatches. MiB of a device. Times in ms; links are added to computation, none overlapped.',
    *(f'Not searched: {axis} ({why}).' for axis, why in LEFT_OUT.items()),
    '',
    f'Estimated ({found.seconds:.1f} s), the fastest {min(SHOWN, len(found.estimates))}:',
  ]
  estimated = [[*_name(e.layout, rows), *_memory(e.memory), *_step(work, of, e.step)] for e in found.estimates[:SHOWN]]
  lines += columns([head, *estimated])
  lines += [
    '',
    'Compiled: "compute" is the compiler\'s cycles, HBM included, and the kernels as estimated; * is chosen:',
  ]
  lines += columns([['mesh', 'remat', 'rows', 'estimated MiB', 'MiB', *TIMES, 'MFU', 'tok/s/chip', ''], *_tried(found)])
  return '\n'.join([*lines, *_failed(found)])


def _rings(of: Slice) -> str:
  return 'none' if not any(of.rings) else ' and '.join(str(n) for n, r in zip(of.sides, of.rings, strict=True) if r)


def _tried(found: Found) -> list[list[str]]:
  good = [(e, c) for e, c in found.tried if isinstance(c, Compiled)]
  rows = []
  for estimate, program in sorted(good, key=lambda pair: pair[1].step.total):
    mesh, *name = _name(estimate.layout, found.work.rows)
    sizes = [f'{estimate.memory.total / MIB:,.0f}', f'{program.memory.peak / MIB:,.0f}']
    star = '* ' if program is found.best else ''
    rows.append([star + mesh, *name, *sizes, *_step(found.work, found.of, program.step)])
  return rows


def _failed(found: Found) -> list[str]:
  return [f'refused: {e.layout.text}: {c[:200]}' for e, c in found.tried if not isinstance(c, Compiled)]


def explanation(work: Workload, of: Slice, program: Compiled, shown: int = 14) -> str:
  """Where the memory of a step is at its peak, and which collectives cost."""
  own, guess = program.memory, memory.estimate(work, program.layout).total
  lines = [
    f'{program.layout.text} on {of.slices} x {of.name}, MiB of a device: {own.peak / MIB:,.0f} in use at once '
    f'(estimated {guess / MIB:,.0f}), {own.arguments / MIB:,.0f} of them arguments, of {of.chip.hbm / MIB:,.0f}. '
    'Temporaries at the peak:',
    *columns([['what', 'arrays', 'MiB'], *_buffers(program, shown)]),
    '',
    'Collectives of a step:',
    *columns([['kind', 'of', 'times', 'GB', 'ms'], *_collectives(program, shown)]),
    '',
    *columns([[*TIMES, 'MFU', 'tok/s/chip', ''], _step(work, of, program.step)]),
    *_on_host(work, of, program),
  ]
  return '\n'.join(lines)


def _on_host(work: Workload, of: Slice, program: Compiled) -> list[str]:
  """What lies in the memory of the host, and what a step moves."""
  there, back = memory.moved(work, program.layout)
  if not program.memory.host:
    return []
  return [
    '',
    f'{program.memory.host / MIB:,.0f} MiB of a device in the memory of its host; a step moves {there / 1e9:,.2f} GB '
    f'to the device and {back / 1e9:,.2f} GB back: {1e3 * there / of.host_rate:,.0f} and '
    f'{1e3 * back / of.host_rate:,.0f} ms at {of.host_rate / 1e9:,.0f} GB/s each way, not in the times above.',
  ]


def _buffers(program: Compiled, shown: int) -> list[list[str]]:
  total: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
  for buffer in program.at_peak:
    row = total[f'{buffer.shape} {compiled.short(buffer.source)}']
    row[0] += 1
    row[1] += buffer.bytes
  rows = sorted(total.items(), key=lambda item: -item[1][1])
  return [[what, str(number), f'{size / MIB:,.1f}'] for what, (number, size) in rows[:shown]]


def _collectives(program: Compiled, shown: int) -> list[list[str]]:
  rows = compiled.by_source(program.collectives)[:shown]
  return [[kind, of, str(times), f'{size:,.2f}', f'{1e3 * spent:,.1f}'] for kind, of, times, size, spent in rows]


def default_path(of: Slice) -> pathlib.Path:
  return pathlib.Path(f'mesh_{of.name.replace(":", "_")}{f"_{of.slices}slices" if of.slices > 1 else ""}.gin')


def check_path(path: pathlib.Path) -> None:
  """Raises ConfigError for a file that this command has not written, and for a folder that is not there."""
  if not path.absolute().parent.is_dir():
    raise ConfigError(
      f'--output={path}: the folder {path.absolute().parent} does not exist; make it, or choose another.'
    )
  if path.exists() and not (path.is_file() and path.read_text(errors='replace').startswith(MARK)):
    raise ConfigError(
      f'--output={path} exists and was not written by pretrain plan; nothing was changed, name another.'
    )


def write(found: Found, path: pathlib.Path, files: Iterable[str]) -> str:
  """Writes the chosen layout to `path`; returns the line that says how to use it."""
  best = found.best
  mfu = roofline.mfu(found.work, found.of, best.step.total)
  headline = [
    f'{MARK[2:]}: the layout for {found.of.slices} x {found.of.name}, {found.work.rows} rows a step.',
    f'Compiled: {best.memory.peak / MIB:,.0f} MiB a device, {best.step.total:.3f} s a step, MFU {mfu:.1%}, no overlap.',
  ]
  text = layouts.gin(best.layout, headline) + f'data.batch_size = {found.work.rows}\n'
  path.write_text(text)
  return f'{path}: use it after the config, {" ".join(f"--gin_file={f}" for f in [*files, str(path)])}'
