"""Faults that scripts/faults/child.py injects into the numbers of a run: another loss, a flipped bit on one device."""

import dataclasses
import pathlib


def inject_losses(spec: dict) -> None:
  """Changes losses, in every process: otherwise their programs would differ."""
  if spec.get('poison'):
    poison(spec['poison'], spec['batch_size'])


def inject_flips(spec: dict, notes: pathlib.Path) -> None:
  """Flips bits, in the process that has the device."""
  if spec.get('flips'):
    flip_bits(spec, notes)


def poison(factors: dict[str, float], batch_size: int) -> None:
  """Multiplies the loss of batch number k (counted from 0 by example number) by `factors[k]`, every time."""
  import jax.numpy as jnp

  from pretrain.experiment import program

  make_loss = program.make_loss

  def make(*args):
    loss = make_loss(*args)

    def poisoned(params, batch, *rest):
      number, factor = batch['example_index'][0] // batch_size, jnp.float32(1)
      for batch_number, times in factors.items():
        factor = jnp.where(number == int(batch_number), jnp.float32(times), factor)
      value, (metrics, seen) = loss(params, batch, *rest)
      return value * factor, (metrics | {'loss': metrics['loss'] * factor}, seen)

    return poisoned

  program.make_loss = make


def flip_bits(spec: dict, notes: pathlib.Path) -> None:
  """Applies each of `spec['flips']` = [step, leaf, local device, place, bit] once in the life of a run."""
  from pretrain.run import step_numbers

  after = step_numbers.numbers_of  # called after each step

  def flipping(run, *rest):
    for i, (at, *where) in enumerate(spec['flips']):
      done = notes / f'flipped{i}'
      if run.step == at and not done.exists():
        done.touch()
        run.state = flipped(run.state, *where)
    return after(run, *rest)

  step_numbers.numbers_of = flipping


def flipped(state, leaf: int, device: int, place: int, bit: int):
  """`state` with one bit of one array (modulo their number) changed in the copy of one local device."""
  import jax
  import numpy as np

  leaves, tree = jax.tree.flatten(state.params)
  x, shards = leaves[leaf % len(leaves)], []
  for number, shard in enumerate(x.addressable_shards):
    data = np.array(shard.data)
    if number == device:
      data.view(np.uint32).reshape(-1)[place % data.size] ^= np.uint32(1 << bit)
    shards.append(jax.device_put(data, shard.device))
  leaves[leaf % len(leaves)] = jax.make_array_from_single_device_arrays(x.shape, x.sharding, shards)
  return dataclasses.replace(state, params=jax.tree.unflatten(tree, leaves))
