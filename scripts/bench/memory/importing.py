"""Host memory while weights are read: three shards of 1 GB, on one device or divided over eight simulated ones.

python scripts/bench/memory/importing.py [--devices 8] [--layers 6] [--width 3072] [--save]

Arrays on simulated devices are memory of the host too, so what is measured is the rest: while each parameter is placed,
the peak of the process's resident memory, less what it was before, less the parameter's own arrays. Files are read
with `read`, so their pages are not counted. With --save also the step-0 checkpoint: the peak while Orbax writes it,
less the resident memory before. Bar for both: at most 1.3 times the largest tensor in the files + 200 MB; exit code 1
above it.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))
MB = 1e6


def resident(field: str) -> int:
  """Bytes: VmRSS, or its peak VmHWM."""
  text = pathlib.Path('/proc/self/status').read_text()
  return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(field))


def reset_peak() -> None:
  pathlib.Path('/proc/self/clear_refs').write_text('5')


def write_model(folder: pathlib.Path, layers: int, width: int) -> None:
  """A Llama of random bits in shards of at most 1 GB."""
  import numpy as np

  from pretrain.interchange.config_json import ConfigJson
  from pretrain.interchange.importing import needed
  from pretrain.interchange.published.llama import LLAMA
  from pretrain.interchange.safetensors import create

  values = {
    'model_type': 'llama', 'vocab_size': 8 * width, 'hidden_size': width, 'intermediate_size': 2 * width,
    'num_hidden_layers': layers, 'num_attention_heads': 16, 'num_key_value_heads': 16, 'head_dim': width // 16,
  }  # fmt: skip
  (folder / 'config.json').write_text(json.dumps(values))
  cfg = LLAMA.read(ConfigJson(values, folder), {'lm_head.weight': None})
  shapes = {name: ('F32', shape) for name, shape in needed(LLAMA, cfg, values).items()}
  rng = np.random.default_rng(0)
  for array in create(folder, shapes, limit=10**9).values():
    rows = array.reshape(-1, array.shape[-1])
    for at in range(0, len(rows), 1024):
      rows[at : at + 1024] = rng.random(rows[at : at + 1024].shape, dtype='float32')


def bench(options: argparse.Namespace, folder: pathlib.Path) -> None:
  import jax

  from models import partition
  from models.build import build
  from pretrain.devices.mesh import MeshConfig, make_mesh
  from pretrain.interchange.importing import flat, open_source, parameter, placed

  source = open_source(folder)
  mesh = make_mesh(MeshConfig(fsdp=options.devices // 2, tensor=2) if options.devices > 1 else MeshConfig())
  shardings = flat(partition.shardings(build(source.model).specs, mesh))
  largest, worst, tree = max(t.size for t in source.tensors.values()), (0, ''), {}
  for entry, spec in placed(source.family, source.model, source.values):
    before = resident('VmRSS')
    reset_peak()
    array = tree[entry.ours] = parameter(source, entry, spec, shardings[entry.ours]).block_until_ready()
    own = sum(shard.data.nbytes for shard in array.addressable_shards)
    worst = max(worst, (resident('VmHWM') - before - own, entry.ours))
  files = [path.stat().st_size for path in sorted(folder.glob('*.safetensors'))]
  sizes = {
    device.id: sum(shard.data.nbytes for x in tree.values() for shard in x.addressable_shards if shard.device == device)
    for device in jax.local_devices()
  }  # fmt: skip
  print(f'{len(files)} files of {", ".join(f"{size / MB:.0f}" for size in files)} MB; {len(source.tensors)} tensors')
  print(f'largest tensor {largest / MB:.0f} MB; bar {(1.3 * largest + 200 * MB) / MB:.0f} MB')
  print(f'host memory beside the arrays: at most {worst[0] / MB:.0f} MB, at {worst[1]}')
  print(f'bytes of each device: {min(sizes.values()) / MB:.0f} to {max(sizes.values()) / MB:.0f} MB')
  saved = save(tree, folder / 'run') if options.save else 0
  sys.exit(max(worst[0], saved) > 1.3 * largest + 200 * MB)


def save(tree, workdir: pathlib.Path) -> int:
  from pretrain.checkpoints.checkpoints import Checkpoints
  from pretrain.checkpoints.config import CheckpointConfig

  workdir.mkdir()
  before = resident('VmRSS')
  reset_peak()
  checkpoints = Checkpoints(workdir, CheckpointConfig())
  checkpoints.save_params(0, tree, {'source': 'bench', 'data': {}}, '')
  checkpoints.close()
  more = resident('VmHWM') - before
  print(f'saving step 0: at most {more / MB:.0f} MB more')
  return more


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--devices', type=int, default=8)
  parser.add_argument('--layers', type=int, default=6)
  parser.add_argument('--width', type=int, default=3072)
  parser.add_argument('--save', action='store_true')
  options = parser.parse_args()
  os.environ['JAX_PLATFORMS'] = 'cpu'
  os.environ['NPROC'] = str(2 * options.devices)  # threads, see pretrain/devices/platform.py
  os.environ['XLA_FLAGS'] = f'--xla_force_host_platform_device_count={options.devices}'
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder)
    if not os.fork():  # another process writes, so that its memory is not in the measurement
      write_model(path, options.layers, options.width)
      os._exit(0)
    os.wait()
    bench(options, path)


if __name__ == '__main__':
  main()
