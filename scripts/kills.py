"""Kills a run five times with SIGKILL and shows that its losses are those of a run left alone, bit for bit.

python scripts/kills.py --gin_file=configs/ul2/tiny.gin [--steps 40] [--every 10] [--workdir DIR]

One kill falls during compilation, one inside a save, three at random moments after the first commit; each resume may
use another number of data workers. Prints where each fell; exit code 1 where a loss differs, is missing or comes twice,
or a kill missed what it was meant for. Restarts by the supervisor, and more of them: scripts/faults.py.
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

COMMIT = 'MANIFEST.json'  # written last


class Training:
  """One process of `pretrain train`; its stderr is watched for what it is doing."""

  def __init__(self, options, workdir: pathlib.Path, workers: int = 0, fresh_compile: bool = False):
    command = [sys.executable, '-m', 'pretrain', 'train', f'--gin_file={options.gin_file}', f'--workdir={workdir}']
    overrides = {
      'train.steps': options.steps, 'train.log_every': 1, 'checkpoint.every': options.every, 'evaluation.every': 0,
      'data.workers': workers,
    }  # fmt: skip
    command += [f'--gin.{k}={v}' for k, v in overrides.items()]
    env = os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_LOG_COMPILES': '1'}
    env |= {'JAX_ENABLE_COMPILATION_CACHE': 'false'} if fresh_compile else {}
    self.workdir, self.lines = workdir, []
    self.process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    threading.Thread(target=lambda: self.lines.extend(self.process.stderr), daemon=True).start()

  def logged(self, *words: str) -> bool:
    return any(all(word in line for word in words) for line in list(self.lines))

  def saving(self) -> bool:
    """A step's folder is there and its manifest is not."""
    return any(not (p / COMMIT).exists() for p in steps_of(self.workdir))

  def last_step(self) -> int:
    path = self.workdir / 'metrics.jsonl'
    lines = path.read_text().splitlines() if path.exists() else []
    return json.loads(lines[-2])['step'] if len(lines) > 1 else 0

  def wait_for(self, condition, what: str) -> None:
    while not condition():
      if self.process.poll() is not None:
        raise SystemExit(f'the run ended (code {self.process.returncode}) before {what}:\n' + ''.join(self.lines[-20:]))
      time.sleep(0.001)

  def kill(self) -> None:
    self.process.send_signal(signal.SIGKILL)
    if (code := self.process.wait()) != -signal.SIGKILL:
      raise SystemExit(f'the run ended (code {code}) before it was killed')

  def finish(self) -> None:
    if self.process.wait():
      raise SystemExit(f'the run failed (code {self.process.returncode}):\n' + ''.join(self.lines[-20:]))


def steps_of(workdir: pathlib.Path) -> list[pathlib.Path]:
  return [p for p in (workdir / 'checkpoints').glob('[0-9]*') if p.name.isdecimal()]


def commits(workdir: pathlib.Path) -> list[int]:
  return sorted(int(p.name) for p in steps_of(workdir) if (p / COMMIT).exists())


def kill_in_compilation(options, workdir) -> str:
  run = Training(options, workdir, fresh_compile=True)
  run.wait_for(lambda: run.logged('Compiling', 'train_step'), 'compilation')
  time.sleep(0.2)
  run.kill()
  inside = not run.logged('Finished XLA compilation', 'train_step')
  return f'during compilation of the train step ({"inside" if inside else "MISSED"}); commits: {commits(workdir)}'


def kill_in_save(options, workdir, workers: int) -> str:
  run = Training(options, workdir, workers)
  run.wait_for(run.saving, 'a save')
  run.kill()
  return f'inside a save ({"inside" if run.saving() else "MISSED"}), workers={workers}; commits: {commits(workdir)}'


def kill_after_commit(options, workdir, workers: int, draw: random.Random) -> str:
  run = Training(options, workdir, workers)
  start = max(commits(workdir), default=0)
  target = min(max(start, options.every) + draw.randrange(1, options.every), options.steps - 2)
  run.wait_for(lambda: run.last_step() >= target and commits(workdir), f'step {target}')
  time.sleep(draw.random() * 0.2)
  run.kill()
  return f'after step {run.last_step()}, workers={workers}; commits: {commits(workdir)}'


def losses(workdir: pathlib.Path) -> list[tuple[int, float]]:
  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  return [(row['step'], row['loss']) for row in rows if 'loss' in row]


def main() -> int:
  flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  flags.add_argument('--gin_file', required=True)
  flags.add_argument('--steps', type=int, default=60)
  flags.add_argument('--every', type=int, default=10)
  flags.add_argument('--seed', type=int, default=0)
  flags.add_argument('--workdir', type=pathlib.Path, default=pathlib.Path('runs/kills'))
  options = flags.parse_args()
  shutil.rmtree(options.workdir, ignore_errors=True)
  whole, killed, draw = options.workdir / 'whole', options.workdir / 'killed', random.Random(options.seed)
  Training(options, whole).finish()
  missed = False
  for i, kill in enumerate((
    lambda: kill_in_compilation(options, killed), lambda: kill_after_commit(options, killed, 1, draw),
    lambda: kill_in_save(options, killed, 0), lambda: kill_after_commit(options, killed, 2, draw),
    lambda: kill_after_commit(options, killed, 0, draw),
  )):  # fmt: skip
    print(i + 1, where := kill(), flush=True)
    missed |= 'MISSED' in where
  Training(options, killed, workers=1).finish()
  a, b = losses(whole), losses(killed)
  once = [step for step, _ in b] == list(range(1, options.steps + 1))
  differ = [(x, y) for x, y in zip(a, b, strict=False) if x != y]
  print(
    f'{len(b)} steps logged, each once: {once}; losses that differ from the run left alone: {len(differ)} of {len(a)}'
  )
  return 0 if once and a == b and not missed else 1


if __name__ == '__main__':
  sys.exit(main())
