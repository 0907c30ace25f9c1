"""The train step and the start-up against bare JAX: ratios in one run, in CPU seconds and wall seconds.

python scripts/bench/step.py [--rounds 5] [--starts 3]

- step: `pretrain`'s whole train step (loss, gradients, clipping, AdamW, skipped non-finite updates, metrics) against
  that of scripts/bench/bare.py, same decoder and shapes, interleaved. Bar: <= 1.05x CPU seconds per step.
- start: process start to the end of step 5, cold and with the persistent compilation cache. Bars: bare + 2 s; a second
  start at least 2x faster than the first, printed beside the speed-up of bare JAX. With all 8 rows, and with 1, for
  which five steps take less than half of the time.
"""

import argparse
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = ROOT / 'configs/decoder/bench.gin'
sys.path.insert(0, str(ROOT))  # before this folder, whose data.py would be `data`


def spread(values: list[float]) -> str:
  return f'{statistics.median(values):.3f} [{min(values):.3f} .. {max(values):.3f}]'


def time_steps(step, state, batches) -> tuple[float, object]:
  """(CPU seconds per step, state after the steps); waits for the last result."""
  import jax

  start = time.process_time()
  for batch in batches:
    state, value = step(state, batch)
  jax.block_until_ready((state, value))
  return (time.process_time() - start) / len(batches), state


def bench_step(rounds: int, steps: int) -> None:
  import bare

  from data.batches.loader import loader
  from data.batches.source import open_data
  from pretrain.config import bindings
  from pretrain.devices.compilation_cache import cache_dir
  from pretrain.devices.mesh import host_rows, to_global
  from pretrain.experiment.experiment import Experiment
  from pretrain.experiment.program import build_program

  cfg = bindings.load(Experiment, [str(CONFIG)], [])
  program = build_program(cfg)
  source = open_data(cfg.data, cfg.objective, seed=0, vocab_size=cfg.model.vocab_size, cache_dir=cache_dir())
  batches = loader(source, {'examples': 0}, host_rows(program.mesh, cfg.data.batch_size))
  ours = [next(batches)[1] for _ in range(steps)]
  theirs = [bare.make_batch(i) for i in range(steps)]
  our_state = program.init()
  their_state, their_step = bare.make_step()
  our_step = lambda state, batch: program.train_step(state, to_global(batch, program.mesh))
  _, our_state = time_steps(our_step, our_state, ours[:2])
  _, their_state = time_steps(their_step, their_state, theirs[:2])
  a, b = [], []
  for _ in range(rounds):
    seconds, our_state = time_steps(our_step, our_state, ours)
    a.append(seconds)
    seconds, their_state = time_steps(their_step, their_state, theirs)
    b.append(seconds)
  ratios = [x / y for x, y in zip(a, b, strict=True)]
  print(f'step, CPU seconds: pretrain {spread(a)}  bare {spread(b)}  ratio {spread(ratios)}  (bar 1.05)', flush=True)


def start(command: list[str], cache: str, finished) -> float:
  """Wall seconds from the start of `command` until `finished()`, when step 5 has ended."""
  env = os.environ | {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT), 'PRETRAIN_CACHE': cache}
  env |= {'JAX_COMPILATION_CACHE_DIR': f'{cache}/bare', 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}
  begin = time.perf_counter()
  with tempfile.TemporaryFile() as output, subprocess.Popen(command, env=env, stdout=output, stderr=output) as process:
    while not finished(output):
      if process.poll():
        output.seek(0)
        raise SystemExit(f'{command} failed:\n{output.read().decode()[-2000:]}')
      time.sleep(0.005)
    seconds = time.perf_counter() - begin
    process.wait()
  return seconds


def five_lines(path: pathlib.Path):
  return lambda _: path.exists() and path.read_bytes().count(b'\n') >= 5


def five_printed(output) -> bool:
  return os.pread(output.fileno(), 1 << 16, 0).count(b'\n') >= 5


def bench_start(starts: int, rows: int) -> None:
  """Wall seconds to the end of step 5: with an empty compilation cache (first) and with that of the first (second)."""
  times = {name: [] for name in ('pretrain first', 'pretrain second', 'bare first', 'bare second')}
  for _ in range(starts):
    with tempfile.TemporaryDirectory() as scratch:
      for name in times:
        workdir = pathlib.Path(scratch) / name
        command = [sys.executable, '-m', 'pretrain', 'train', f'--gin_file={CONFIG}', '--gin.train.steps=5']
        command += [f'--gin.data.batch_size={rows}', f'--workdir={workdir}']
        finished = five_lines(workdir / 'metrics.jsonl')
        if name.startswith('bare'):
          command, finished = [sys.executable, str(ROOT / 'scripts/bench/bare.py'), '5', str(rows)], five_printed
        times[name].append(start(command, scratch, finished))
  print(f'start to end of step 5, {rows} rows, wall s: ' + ', '.join(f'{k} {spread(v)}' for k, v in times.items()))
  extra = [a - b for a, b in zip(times['pretrain first'], times['bare first'], strict=True)]
  ours, theirs = (
    [a / b for a, b in zip(times[f'{name} first'], times[f'{name} second'], strict=True)]
    for name in ('pretrain', 'bare')
  )
  print(
    f'  pretrain - bare {spread(extra)} (bar 2)  second start faster by {spread(ours)} (bar 2), bare {spread(theirs)}'
  )


def main() -> None:
  flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  flags.add_argument('--rounds', type=int, default=5)
  flags.add_argument('--steps', type=int, default=4, help='steps in a round')
  flags.add_argument('--starts', type=int, default=5)
  options = flags.parse_args()
  os.environ.setdefault('JAX_PLATFORMS', 'cpu')
  import jax

  cores = len(os.sched_getaffinity(0))
  print(f'cores {cores}, Python {platform.python_version()}, jax {jax.__version__}', flush=True)
  if options.rounds:
    bench_step(options.rounds, options.steps)
  if options.starts:
    for rows in (8, 1):
      bench_start(options.starts, rows)


if __name__ == '__main__':
  main()
