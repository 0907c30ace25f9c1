"""`pretrain plan --search`: every layout estimated in seconds, the best few compiled, one chosen."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence

from models.build import build
from pallas_kernels.errors import KernelError
from pretrain.devices.chips import Slice
from pretrain.devices.compiler import CompilerConfig, options_for, quick
from pretrain.errors import ConfigError
from pretrain.experiment.experiment import Experiment
from pretrain.planner import compiled, layouts, memory, roofline, torus, workload
from pretrain.planner.compiled import Compiled
from pretrain.planner.layouts import Layout
from pretrain.planner.workload import Workload

MIB = 2**20
CLOSEST = 3
# Of the memory: an estimate may be a tenth too low, and near the limit the compiler makes activations again.
ROOM = 0.9
LESS = 0.75  # of the estimated memory of a layout that did not fit: another on its mesh is tried with at most this


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A layout with its estimated memory and step."""

  layout: Layout
  memory: memory.Memory
  step: roofline.Step


@dataclasses.dataclass(frozen=True)
class Found:
  """`estimates`: layouts that fit, the fastest first, but layouts that leave little memory free last; `tried`: layouts
  that were compiled, each with its program or the compiler's error.
  """

  work: Workload
  of: Slice
  estimates: Sequence[Estimate]
  counted: int  # how many layouts there are
  seconds: float  # of the estimates
  tried: Sequence[tuple[Estimate, Compiled | str]]

  @property
  def best(self) -> Compiled:
    """The fastest of the compiled ones; links are added to the cycles, none overlapped."""
    return min((c for _, c in self.tried if isinstance(c, Compiled)), key=lambda c: c.step.total)


def estimates(work: Workload, of: Slice, options: Iterable[Layout]) -> list[Estimate]:
  """All layouts, the fastest first; of equally fast ones, the smallest."""
  groups: dict[tuple[int, ...], dict] = {}
  found = []
  for layout in options:
    key = tuple(layout.sizes.values())
    if key not in groups:
      groups[key] = torus.groups(layout.sizes, of)
    step = roofline.estimate(work, layout, of, groups[key])
    found.append(Estimate(layout, memory.estimate(work, layout), step))
  return sorted(found, key=lambda e: (e.step.total, e.memory.total))


def search(
  cfg: Experiment,
  of: Slice,
  number: int,
  report: Callable[[str], None] = lambda line: None,
  own: Layout | None = None,
) -> Found:
  """The layouts of `cfg` on `of`, the best `number` of them compiled. The second is `own`, so that the choice is never
  slower than the layout that a config has; where `own` has an axis that is not searched, a line of `report` says so.

  Raises ConfigError where no layout divides the rows and the parameters, or none fits the memory.
  """
  began = time.monotonic()
  work = workload.describe(cfg)
  every = estimates(work, of, layouts.candidates(cfg, build(cfg.model, lora=cfg.lora).specs, of))
  if not every:
    raise ConfigError(_indivisible(cfg, of))
  fits = [e for e in every if e.memory.total <= of.chip.hbm]
  fits.sort(key=lambda e: e.memory.total > ROOM * of.chip.hbm)  # stable: the fastest first of either kind
  seconds = time.monotonic() - began
  if not fits:
    raise ConfigError(_too_large(work, of, every))
  quickly = quick(cfg.compiler, of.chip.name)
  to_compile = dataclasses.replace(work, cfg=dataclasses.replace(cfg, compiler=quickly))
  report(
    f'{len(every)} layouts estimated in {seconds:.1f} s, {len(fits)} fit; compiling {min(number, len(fits))}'
    f'{_without(cfg.compiler, quickly, of)}.'
  )
  if own is not None and (left_out := [axis for axis in layouts.LEFT_OUT if own.sizes[axis] > 1]):
    report(
      f"the config's own layout, {own.mesh}, is not among them: mesh.{left_out[0]} is not searched, "
      f'{layouts.LEFT_OUT[left_out[0]]}.'
    )
  tried = _compiled(to_compile, of, fits, number, report, own)
  if not any(isinstance(program, Compiled) for _, program in tried):
    raise ConfigError(
      f'none of the {len(tried)} best layouts fits {of.name} when compiled; the last: {tried[-1][1]} Use more chips, '
      'or a smaller data.batch_size.'
    )
  return Found(work, of, fits, len(every), seconds, tried)


def _compiled(
  work: Workload,
  of: Slice,
  fits: Sequence[Estimate],
  number: int,
  report: Callable[[str], None],
  own: Layout | None,
):
  """[(estimate, program or error)]: the best layout of each mesh, then others on the best of these meshes.

  Where the estimate errs it errs for a mesh (how products and gathers are split), so meshes come first. At most twice
  `number` are tried.
  """
  tried: list[tuple[Estimate, Compiled | str]] = []
  while len(tried) < 2 * number and len(good := [c for _, c in tried if isinstance(c, Compiled)]) < number:
    if (one := _own(fits, tried, own) or _next(fits, tried, number, good)) is None:
      break
    began = time.monotonic()
    try:
      program = compiled.measure(work, one.layout, of)
    except (ConfigError, KernelError) as error:
      program = str(error).removeprefix('CONFIG: ')
    tried.append((one, program))
    did = 'compiled' if isinstance(program, Compiled) else 'refused:'
    report(f'{did} {one.layout.text} ({time.monotonic() - began:.0f} s)')
  return tried


def _own(
  fits: Sequence[Estimate], tried: Sequence[tuple[Estimate, Compiled | str]], own: Layout | None
) -> Estimate | None:
  """The config's own layout, once another is tried."""
  if not tried or own is None or any(e.layout == own for e, _ in tried):
    return None
  return next((e for e in fits if e.layout == own), None)


def _next(
  fits: Sequence[Estimate], tried: Sequence[tuple[Estimate, Compiled | str]], number: int, good: Sequence[Compiled]
) -> Estimate | None:
  """The layout to compile next, if any is left."""
  done, meshes = {e.layout.text for e, _ in tried}, {e.layout.mesh for e, c in tried if isinstance(c, Compiled)}
  limits = {e.layout.mesh: LESS * e.memory.total for e, c in tried if not isinstance(c, Compiled)}
  small = lambda e: e.memory.total <= limits.get(e.layout.mesh, e.memory.total)
  left = [e for e in fits if e.layout.text not in done and small(e)]
  anew = [e for e in left if e.layout.mesh not in meshes]
  if len(good) < max(number - 1, 1) and anew:
    return anew[0]
  best = min(good, key=lambda c: c.step.total).layout if good else None
  same = [e for e in left if best is not None and e.layout.mesh == best.mesh]
  other = [e for e in same if e.layout.policy != best.policy] if best is not None else []
  return next(iter((*other, *same, *left)), None)


def _without(cfg: CompilerConfig, quickly: CompilerConfig, of: Slice) -> str:
  """Which options the run will have that the search has not."""
  kind = of.chip.kinds[0]
  left_out = ', '.join(sorted(options_for(cfg, kind).keys() - options_for(quickly, kind).keys()))
  return f' without {left_out}, a default of {of.chip.name} that makes compiling slow' if left_out else ''


def _indivisible(cfg: Experiment, of: Slice) -> str:
  rows, devices = cfg.data.batch_size, of.devices
  return (
    f'data.batch_size={rows} with {devices} devices of {of.slices} x {of.name}: no mesh divides both the rows and the '
    f'parameters; take a multiple of {devices} rows, e.g. --global_batch={-(-rows // devices) * devices}.'
  )


def _too_large(work: Workload, of: Slice, every: Sequence[Estimate]) -> str:
  """What is missing, of the layouts that need least, and what would help."""
  smallest = sorted(every, key=lambda e: e.memory.total)[:CLOSEST]
  over = lambda e: f'{e.memory.total / MIB:,.0f} MiB, {(e.memory.total - of.chip.hbm) / MIB:,.0f} too many'
  near = '; '.join(
    f'{e.layout.mesh} remat={e.layout.policy} train.accumulate={e.layout.accumulate} needs {over(e)}' for e in smallest
  )
  return (
    f'no layout fits {of.slices} x {of.name}, which has {of.chip.hbm / MIB:,.0f} MiB a device. Closest: {near}. '
    f'{_help(work, smallest[0])}.'
  )


def _help(work: Workload, least: Estimate) -> str:
  """What would shrink the largest part."""
  parts = {f.name: getattr(least.memory, f.name) for f in dataclasses.fields(least.memory)}
  largest = max(parts, key=lambda name: parts[name])
  share = f'{largest} take {parts[largest] / least.memory.total:.0%}'
  if largest == 'kept':
    return f'Most is kept activations ({share}): a smaller data.batch_size, shorter rows, or more chips'
  if largest == 'layer':
    return f'Most is the layer in work ({share}): more chips along tensor, shorter rows, or a smaller data.batch_size'
  smaller = '' if work.cfg.optimizer.name == 'adafactor' else ", optimizer.name='adafactor', optimizer.state_dtype"
  return f'Most is the state ({share}): more chips{smaller}'
