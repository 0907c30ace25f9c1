"""Damages the files of a checkpoint in many ways and shows that no damaged file is ever loaded (fault F5).

python scripts/faults/files.py [--trials 40] [--seed 0] [--workdir DIR]

Each trial draws a file (in turn by its class and by its size) and a fault, checks which step a run would resume from,
and repairs the file. Orbax alone reads the same damage. Prints a line per kind of fault; exit code 1 if damage was not
noticed.
"""

import argparse
import collections
import contextlib
import dataclasses
import io
import logging
import os
import pathlib
import random
import shutil
import sys
import tempfile
from collections.abc import Callable

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from pretrain.checkpoints import manifest
from pretrain.checkpoints.checkpoints import Checkpoints
from pretrain.checkpoints.config import CheckpointConfig
from pretrain.step.train_step import TrainState

POSITION = {'loader': {'examples': 512}, 'data': {'stores': ['3fa1'], 'tokenizer': 'beef'}}
CLASSES = {
  'arrays': 'state/ocdbt.process_*/d/*', 'index': 'state/d/*', 'ocdbt': 'state/**/manifest.ocdbt',
  'tree': 'state/_METADATA', 'sharding': 'state/_sharding', 'array_metadatas': 'state/array_metadatas/*',
  'position': 'position/metadata', 'config': 'config/metadata', 'commit': '**/commit_success.txt',
  'step': '_CHECKPOINT_METADATA', 'manifest': manifest.FILE,
}  # fmt: skip


def flip(data: bytearray, draw: random.Random, other: bytes) -> None:
  data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def zero(data: bytearray, draw: random.Random, other: bytes) -> None:
  """Zeroes up to 4 KiB; at least one byte changes."""
  start = draw.choice([i for i, byte in enumerate(data) if byte] or [0])
  data[start : start + 4096] = bytes(len(data[start : start + 4096]))


def truncate(data: bytearray, draw: random.Random, other: bytes) -> None:
  del data[draw.randrange(len(data)) :]


def append(data: bytearray, draw: random.Random, other: bytes) -> None:
  data += b'\0' * draw.randrange(1, 100)


def swap(data: bytearray, draw: random.Random, other: bytes) -> None:
  """Takes the file of the other step; if it has the same bytes, flips a bit instead."""
  if other == bytes(data):
    return flip(data, draw, other)
  data[:] = other
  return None


FAULTS = {'flip': flip, 'zero': zero, 'truncate': truncate, 'append': append, 'swap': swap, 'delete': None}
WEIGHTS = (10, 2, 3, 1, 2, 3)


@dataclasses.dataclass
class Tally:
  """The number of trials, of trials that a run did not notice, and how Orbax alone reacted."""

  trials: int = 0
  missed: int = 0
  orbax: collections.Counter = dataclasses.field(default_factory=collections.Counter)


def state(seed: int) -> TrainState:
  draw = np.random.default_rng(seed)
  params = {f'layer_{i}': jnp.asarray(draw.standard_normal((64, 64 + i), dtype=np.float32)) for i in range(4)}
  moments = jax.tree.map(lambda x: (x * 0.1, x**2), params)
  return TrainState(jnp.int32(seed), params, moments, {})


def write_run(workdir: pathlib.Path) -> None:
  """A run with steps 1 and 2."""
  with contextlib.closing(Checkpoints(workdir, CheckpointConfig())) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, state(step), POSITION, 'train.steps = 2\n')


def damage(step: pathlib.Path, draw: random.Random, kind: str | None) -> tuple[str, Callable[[], None]]:
  """Changes or removes one file of `step`, of a class or drawn by size; returns (the fault, a function to undo it)."""
  pattern, by_size = CLASSES[kind] if kind else '**/*', kind is None
  paths = sorted(p for p in step.glob(pattern) if p.is_file() and p.stat().st_size)
  (path,) = draw.choices(paths, [p.stat().st_size if by_size else 1 for p in paths])
  (fault,) = draw.choices(list(FAULTS), WEIGHTS)
  before = path.read_bytes()
  if FAULTS[fault] is None:
    path.unlink()
  else:
    others = sorted(p for p in (step.parent / '1').glob(pattern) if p.is_file())
    FAULTS[fault](data := bytearray(before), draw, draw.choice(others).read_bytes())
    path.write_bytes(data)
  return fault, lambda: path.write_bytes(before)


def noticed(workdir: pathlib.Path) -> bool:
  """Whether a run resumes from step 1, bit for bit, and has set step 2 aside; step 2 is then restored."""
  checkpoints = Checkpoints(workdir, CheckpointConfig())
  if checkpoints.newest_whole() != 1:
    return False
  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state(1))
  with contextlib.redirect_stderr(io.StringIO()):
    restored = checkpoints.restore(abstract, 1)
  aside = workdir / 'checkpoints/2.corrupt'
  aside.rename(workdir / 'checkpoints/2')
  return same(restored.state, state(1)) and restored.position == POSITION


def orbax_alone(workdir: pathlib.Path, wanted: TrainState) -> str:
  """How Orbax's manager reads step 2; 'silent' means another value without an error."""
  mode = ocp.options.AtomicityOptions(mode=ocp.options.AtomicityMode.COMMIT_FILE)
  options = ocp.CheckpointManagerOptions(read_only=True, atomicity_options=mode)
  handlers = {'state': ocp.PyTreeCheckpointHandler(), 'position': ocp.JsonCheckpointHandler()}
  tree = {'params': wanted.params, 'opt_state': wanted.opt_state, 'step': wanted.step, 'extra': {}}
  placed = ocp.args.PyTreeRestore(tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree))
  restore = ocp.args.Composite(state=placed, position=ocp.args.JsonRestore())
  try:
    with ocp.CheckpointManager(workdir / 'checkpoints', options=options, item_handlers=handlers) as manager:
      if manager.latest_step() != 2:
        return 'not seen'
      found = manager.restore(2, args=restore)
  except Exception:
    return 'error'
  return 'same values' if same(found.state, tree) and found.position == POSITION else 'silent'


def same(found, wanted) -> bool:
  """Equal, bit for bit."""
  pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
  return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def run_trials(workdir: pathlib.Path, trials: int, seed: int) -> dict[str, Tally]:
  """A tally for each kind of fault, over `trials` draws."""
  for name in ('absl', 'asyncio'):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  write_run(workdir)
  draw, wanted, tallies = random.Random(seed), state(2), {fault: Tally() for fault in FAULTS}
  kinds = [kind for each in sorted(CLASSES) for kind in (each, None)]  # 22 trials cover every class
  for trial in range(trials):
    fault, repair = damage(workdir / 'checkpoints/2', draw, kinds[trial % len(kinds)])
    tally = tallies[fault]
    tally.trials += 1
    tally.orbax[orbax_alone(workdir, wanted)] += 1
    tally.missed += not noticed(workdir)
    repair()
  assert Checkpoints(workdir, CheckpointConfig()).newest_whole() == 2, 'repaired'
  return tallies


def main() -> int:
  flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  flags.add_argument('--trials', type=int, default=40)
  flags.add_argument('--seed', type=int, default=0)
  flags.add_argument('--workdir', type=pathlib.Path)
  options = flags.parse_args()
  sys.unraisablehook = lambda _: None  # for reads that Orbax left pending
  with tempfile.TemporaryDirectory() as folder:
    workdir = options.workdir or pathlib.Path(folder)
    shutil.rmtree(workdir, ignore_errors=True)
    tallies = run_trials(workdir, options.trials, options.seed)
  total = Tally()
  for fault, tally in tallies.items():
    print(line(fault, tally))
    total.trials, total.missed = total.trials + tally.trials, total.missed + tally.missed
    total.orbax += tally.orbax
  print(line('all', total))
  return 1 if total.missed else 0


def line(fault: str, tally: Tally) -> str:
  alone = ', '.join(f'{word} {tally.orbax[word]}' for word in ('silent', 'same values', 'error', 'not seen'))
  return f'F5 {fault:<9} {tally.trials:>4} tried, {tally.missed} loaded; Orbax alone: {alone}'


if __name__ == '__main__':
  sys.exit(main())
