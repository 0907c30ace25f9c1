"""Host memory of `pretrain export`: a step 0 of 3 GB becomes three shards of 1 GB.

python scripts/bench/memory/exporting.py [--layers 6] [--width 3072] [--dtype bfloat16] [--trained]

With --trained, a step 1 with the same parameters is exported, which is saved as training saves its steps. Measured is
the peak of the process's resident memory from the start of `export` to its end, less what it was before.
Bar: at most 1.3 times the largest tensor in the files + 200 MB; exit code 1 above it, and for other bytes than those of
the imported files.
"""

import argparse
import filecmp
import os
import pathlib
import sys
import tempfile

from importing import MB, reset_peak, resident, write_model  # beside this file; it finds the packages


def bench(options: argparse.Namespace, folder: pathlib.Path) -> bool:
  from pretrain.interchange.exporting import export
  from pretrain.interchange.safetensors import open_folder
  from pretrain.tools.weights import find

  step = find(str(folder / 'run'))
  before = resident('VmRSS')
  reset_peak()
  export(step, folder / 'out', dtype=options.dtype, shard_bytes=10**9)
  more = resident('VmHWM') - before
  files = sorted(path.name for path in folder.glob('*.safetensors'))
  same = [filecmp.cmp(folder / name, folder / 'out' / name, shallow=False) for name in files if not options.dtype]
  largest = max(tensor.size for tensor in open_folder(folder).values())
  print(f'largest tensor {largest / MB:.0f} MB; bar {(1.3 * largest + 200 * MB) / MB:.0f} MB')
  print(f'export: at most {more / MB:.0f} MB more; {sum(same)} of {len(same)} files are equal')
  return more <= 1.3 * largest + 200 * MB and all(same)


def save_as_trained(workdir: pathlib.Path) -> None:
  """Step 1 is saved as in training, with the parameters of step 0."""
  import jax.numpy as jnp

  from pretrain.checkpoints.checkpoints import Checkpoints
  from pretrain.checkpoints.config import CheckpointConfig
  from pretrain.step.train_step import TrainState
  from pretrain.tools.weights import config_of, find, program_on_one_device

  program = program_on_one_device(config_of(workdir))
  params = find(f'{workdir}/0').read(program.abstract.params)
  checkpoints = Checkpoints(workdir, CheckpointConfig())
  checkpoints.save(1, TrainState(jnp.int32(1), params, {}, {}), {'data': {}}, (workdir / 'config.gin').read_text())
  checkpoints.close()


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--layers', type=int, default=6)
  parser.add_argument('--width', type=int, default=3072)
  parser.add_argument('--dtype')
  parser.add_argument('--trained', action='store_true')
  options = parser.parse_args()
  os.environ['JAX_PLATFORMS'] = 'cpu'
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder)
    if not os.fork():  # another process imports, so that its memory is not in the measurement
      from pretrain.cli.main import main as pretrain

      write_model(path, options.layers, options.width)
      code = pretrain(['import', f'--from={path}', f'--workdir={path}/run'])
      if options.trained:
        save_as_trained(path / 'run')
      os._exit(code)
    os.wait()
    sys.exit(not bench(options, path))


if __name__ == '__main__':
  main()
