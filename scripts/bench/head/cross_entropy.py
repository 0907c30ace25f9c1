"""The loss of a linear head, value and gradients, compiled for TPUs that this machine does not have.

python scripts/bench/head/cross_entropy.py [--chips v5p:2x2x2] [--tensor 4] [--tokens 32768] [--vocab 262144]

`--tokens` belong to the devices that divide a vocabulary: 8,192 a device with `--tensor 4`. MiB are temporaries of a
device, cycles XLA's estimates of its fusions. Bars: at most 0.5 times the reference's MiB, and 1.02 times its cycles.
"""

import argparse
import pathlib
import sys

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parents[n]) for n in (3, 1)]


def step(name: str, number: tuple[int, int] | None):
  """The function that is compiled: the head's parameter is held in f32, divided over `fsdp` and `tensor`."""
  import jax
  import jax.numpy as jnp

  from models.partition import constrain
  from pallas_kernels.linear_cross_entropy import api
  from pretrain.step.loss import weighed

  def loss(x, w, labels, weights):
    w = constrain(w.astype(jnp.bfloat16), None, 'vocab')
    if name == 'reference':
      flat = x.reshape(-1, x.shape[-1])
      found = api.linear_cross_entropy(flat, w, labels.reshape(-1), z_loss=1e-4, implementation=name)
      return (found[0] * weights.reshape(-1)).sum(), found[1].sum()
    total, found = weighed(x, w, labels, weights, number=number, z_loss=1e-4, softcap=None, label_smoothing=0.0)
    return total, found[1].sum()

  return jax.value_and_grad(loss, (0, 1), has_aux=True)


def measure(flags, name: str) -> tuple[float, float]:
  """(MiB, millions of cycles)."""
  import jax
  import jax.numpy as jnp
  import schedule
  from jax.sharding import AxisType, NamedSharding, PartitionSpec

  from models import partition
  from pretrain.tools import plan

  devices = plan.tpu_devices(flags.chips)
  rows = len(devices) // flags.tensor
  axes = {'replica': 1, 'data': 1, 'fsdp': rows, 'sequence': 1, 'tensor': flags.tensor, 'expert': 1, 'stage': 1}
  mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes), devices=devices)
  shape = lambda dims, dtype, *own: jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, PartitionSpec(*own)))
  length = (rows * flags.tokens // 2048, 2048)
  arrays = (
    shape((*length, flags.embed), jnp.bfloat16, 'fsdp'),
    shape((flags.embed, flags.vocab), jnp.float32, 'fsdp', 'tensor'),
    shape(length, jnp.int32, 'fsdp'), shape(length, jnp.float32, 'fsdp'),
  )  # fmt: skip
  with partition.on(mesh):
    places = tuple(x.sharding for x in arrays[:2])
    run = jax.jit(step(name, flags.number), out_shardings=((None, None), places))
    compiled = plan.compile_for(run, arrays)[1]
  return compiled.memory_analysis().temp_size_in_bytes / 2**20, schedule.fusion_cycles(compiled.as_text()) / 1e6


def main(argv: list[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--chips', default='v5p:2x2x2')
  for name, default in (('tensor', 4), ('tokens', 32768), ('embed', 4096), ('vocab', 262144)):
    parser.add_argument(f'--{name}', type=int, default=default)
  parser.add_argument('--number', type=int, nargs=2, help='parts, and chunks of a part, in place of the default')
  parser.add_argument('--names', default='reference,chunked')
  flags = parser.parse_args(argv)
  found = []
  for name in flags.names.split(','):
    found.append(measure(flags, name))
    mib, cycles = found[-1]
    ratios = f'   ratios {mib / found[0][0]:.3f} {cycles / found[0][1]:.3f}'
    print(f'{name:<12}{mib:>10,.0f} MiB{cycles:>10,.1f} Mcycles{ratios}', flush=True)


if __name__ == '__main__':
  main()
