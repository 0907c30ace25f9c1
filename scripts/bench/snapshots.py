"""The cost of snapshots: steps with a snapshot every few steps and without, alternating in one process.

python scripts/bench/snapshots.py [--rounds 5] [--steps 10] [--every 5] [--tokens 2048] [--hosts 1] [--group 3]

A decoder of 4 layers x 768 and AdamW, 2,048 tokens a step. Each round has `steps` steps without and `steps` with
snapshots, in alternating order. Prints median and spread of both in wall and CPU seconds and, for one snapshot, its
MiB, the seconds that the step waits and the seconds until it can be used. --hosts=3 does the same in one run of three
processes on this machine, with parity; they share its cores and memory, unlike separate hosts.
"""

import argparse
import pathlib
import resource
import statistics
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # before this folder, whose data.py would be `data`
KEYS = (
  'model.embed=768', 'model.heads=12', 'model.head_dim=64', 'model.mlp.hidden=2048', 'model.vocab_size=4096',
  'data.targets_length=512', 'checkpoint.every=100000', 'train.steps=1000',
)  # fmt: skip


class Bench:
  """The state and step of a run; snapshots can be switched on and off."""

  def __init__(self, options, memory: str):
    from data.batches.loader import loader
    from data.batches.source import open_data
    from pretrain.config import bindings
    from pretrain.devices.compilation_cache import cache_dir, use_compilation_cache
    from pretrain.devices.mesh import host_rows, prepare_platform
    from pretrain.experiment.checks import check
    from pretrain.experiment.experiment import Experiment
    from pretrain.experiment.program import build_program
    from pretrain.experiment.resume import identity
    from pretrain.snapshots.slots import SnapshotConfig
    from pretrain.snapshots.snapshots import Snapshots

    rows = max(options.tokens // 512 // options.hosts, 1) * options.hosts
    keys = [*KEYS, f'data.batch_size={rows}', f'mesh.{options.mesh}={options.hosts}']
    cfg = bindings.load(Experiment, [str(ROOT / 'configs/decoder/bench.gin')], keys)
    check(cfg)
    prepare_platform(cfg.mesh, options.hosts)
    use_compilation_cache()
    self.program = build_program(cfg)
    data = open_data(cfg.data, cfg.objective, seed=0, vocab_size=cfg.model.vocab_size, cache_dir=cache_dir())
    self.batches = loader(data, {'examples': 0}, host_rows(self.program.mesh, cfg.data.batch_size))
    own = SnapshotConfig(every=options.every, group=options.group if options.hosts > 1 else 0, folder=memory)
    self.snapshots = Snapshots(own, pathlib.Path(memory), identity(cfg, ()))
    self.snapshots.newest()
    if error := self.snapshots.start(self.program.abstract):
      raise SystemExit(error)
    self.state, self.step, self.every, self.taken = self.program.init(), 0, options.every, []
    self._compile_together()

  def _compile_together(self) -> None:
    """Compiles as a run does: a process that compiles later would miss the first connection of gloo."""
    from pretrain.devices.mesh import to_global
    from pretrain.hosts import coordination

    self.program.train_step.lower(self.state, to_global(next(self.batches)[1], self.program.mesh)).compile()
    coordination.barrier('compiled', 1800.0)

  def run(self, steps: int, on: bool) -> tuple[float, float]:
    """(wall, CPU) seconds per step. Like a run, it reads the numbers of a step while the next one runs."""
    import jax

    from pretrain.devices.mesh import to_global

    jax.block_until_ready(self.state)
    start, cpu, before = time.perf_counter(), cpu_seconds(), None
    for i in range(steps):
      self.state, metrics = self.program.train_step(self.state, to_global(next(self.batches)[1], self.program.mesh))
      self.step += 1
      if on and i % self.every == self.every // 2:  # so that its background work ends inside the block
        self.snapshots.begin(self.step, self.state, {'loader': {}})
      if before is not None:
        jax.device_get(before)
        self.snapshots.recorded(self.step - 1, {})
      before = metrics
    jax.device_get(before)
    self.snapshots.recorded(self.step, {})
    wall = time.perf_counter() - start
    if on:
      self.finish()
    return wall / steps, (cpu_seconds() - cpu) / steps

  def finish(self) -> None:
    """Waits for the last snapshot of a block, so that it does not slow the next; its CPU seconds count in its block."""
    while not self.snapshots._settle():
      time.sleep(0.02)
    self.taken += self.snapshots.poll()


def cpu_seconds() -> float:
  used = resource.getrusage(resource.RUSAGE_SELF)
  return used.ru_utime + used.ru_stime


def spread(values) -> str:
  return f'{statistics.median(values):.3f} ({min(values):.3f} - {max(values):.3f})'


def measure(options, memory: str) -> None:
  import jax

  bench = Bench(options, memory)
  bench.run(2, on=False)  # compiles
  bench.run(options.every, on=True)
  bench.taken.clear()
  found = {True: [], False: []}
  for i in range(options.rounds):
    for on in (i % 2 == 0, i % 2 != 0):
      found[on].append(bench.run(options.steps, on))
  bench.snapshots.close()
  if jax.process_index() == 0:
    show(options, found, bench.taken)


def show(options, found, taken) -> None:
  for on, name in ((False, 'without'), (True, 'with')):
    walls, cpus = zip(*found[on], strict=True)
    print(f'{name:<8} {spread(walls)} s a step, {spread(cpus)} CPU s, {options.rounds} rounds of {options.steps} steps')
  for i, name in enumerate(('wall', 'CPU')):
    ratios = [100 * (with_[i] / without[i] - 1) for with_, without in zip(found[True], found[False], strict=True)]
    print(f'overhead {spread(ratios)} % {name}, of the rounds')
  good = [each for each in taken if not each.error]
  stalls, seconds = [1000 * each.stall for each in good], [each.seconds for each in good]
  print(
    f'{len(good)} of {len(taken)} snapshots, every {options.every} steps: {good[0].size / 2**20:.0f} MiB a host; '
    f'the step waits {spread(stalls)} ms, ready after {spread(seconds)} s'
  )


def main() -> None:
  flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  for name, default in (('rounds', 5), ('steps', 10), ('every', 5), ('tokens', 2048), ('hosts', 1), ('group', 3)):
    flags.add_argument(f'--{name}', type=int, default=default)
  flags.add_argument('--mesh', choices=['data', 'fsdp'], default='data')
  flags.add_argument('--memory', help=argparse.SUPPRESS)
  options = flags.parse_args()
  from pretrain.fleet import launch

  if options.hosts > 1 and options.memory is None:
    with tempfile.TemporaryDirectory(dir='/dev/shm') as memory:
      sys.exit(
        launch.run_program(options.hosts, [sys.executable, __file__, *sys.argv[1:], f'--memory={memory}'], sys.stdout)
      )
  launch.initialize_from_env()
  if options.memory is not None:
    measure(options, options.memory)
  else:
    with tempfile.TemporaryDirectory(dir='/dev/shm') as memory:
      measure(options, memory)


if __name__ == '__main__':
  main()
