"""The train step: a pure function of (state, batch), built from functions and never from a config."""

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array

Batch = Mapping[str, Array]
Metrics = dict[str, Array]
PRNG = 'threefry2x32'  # not JAX_DEFAULT_PRNG_IMPL: a resumed run must draw the numbers of the uninterrupted run
# loss(params, batch, key, weight) -> (scalar, metrics): both already divided by `weight`, the loss weight of the
# *global* batch, so that the sum over microbatches is the value of the whole batch.
LossFn = Callable[[Any, Batch, Array | None, Array], tuple[Array, Metrics]]


@struct.dataclass
class TrainState:
  """`step` counts attempted updates; `extra` is state that gradients do not change (scales, statistics, averages).

  `frozen` are parameters that no step changes and no checkpoint holds, by names that `params` does not have.
  """

  step: Array
  params: Any
  opt_state: optax.OptState
  extra: Any
  frozen: Any = struct.field(default_factory=dict)

  def whole(self, params: Any) -> Any:
    """Trained parameters with the frozen ones: what the model is applied with."""
    return {**self.frozen, **params} if self.frozen else params

  def saved(self) -> 'TrainState':
    """What checkpoints and snapshots hold."""
    return self.replace(frozen={})


class Track(NamedTuple):
  """State that a run keeps in `TrainState.extra`; `update` gets the parameters after update `step` (from 1)."""

  init: Callable[[Any], Any]  # params -> extra
  update: Callable[[Any, Any, Array], Any]  # (extra, params, step) -> extra


NOTHING = Track(lambda params: {}, lambda extra, params, step: extra)


def accumulate(loss: LossFn, num_microbatches: int) -> LossFn:
  """A value-and-grad of `loss` over the batch in `num_microbatches` parts, one at a time: ((value, metrics), grads)."""
  value_and_grad = jax.value_and_grad(loss, has_aux=True)
  if num_microbatches == 1:
    return value_and_grad

  def split(x):
    # Strided rows, so that every microbatch lies on every device: no data moves.
    return jnp.swapaxes(x.reshape(-1, num_microbatches, *x.shape[1:]), 0, 1)

  def accumulated(params, batch, key, weight):
    def body(total, part):
      return jax.tree.map(jnp.add, total, value_and_grad(params, part, key, weight)), None

    parts = jax.tree.map(split, dict(batch))
    shapes = jax.eval_shape(value_and_grad, params, jax.tree.map(lambda x: x[0], parts), key, weight)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(body, zeros, parts)[0]

  return accumulated


def checksum(batch: Batch) -> Array:
  """A uint32 sum over every value and its index in the global batch: equal for any mesh, hosts and microbatches."""
  total = jnp.zeros((), jnp.uint32)
  for name in sorted(batch):
    bits = jax.lax.bitcast_convert_type(batch[name], jnp.uint32)
    place = jnp.arange(bits.size, dtype=jnp.uint32).reshape(bits.shape) + jnp.uint32(zlib.crc32(name.encode()))
    mixed = (bits ^ (place * jnp.uint32(0x9E3779B1))) * jnp.uint32(0x85EBCA77)
    total += (mixed ^ (mixed >> 15)).sum(dtype=jnp.uint32)
  return total


def make_train_step(
  loss: LossFn, tx, schedule, skipped, seed: int, *, fill: Callable[[Batch], Metrics], track: Track = NOTHING,
  num_microbatches: int = 1, shardings=None,
):  # fmt: skip
  """`train_step(state, batch) -> (state, metrics)`; gradients have `shardings`, those of the parameters.

  The key of dropout follows from `seed` and the step. It is made inside the step: outside, it would need more programs.
  """
  tx = optax.with_extra_args_support(tx)

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    weight = jnp.maximum(batch['decoder_loss_weights'].sum(), 1.0)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed, impl=PRNG), 1), state.step)
    value_and_grad = accumulate(lambda params, *rest: loss(state.whole(params), *rest), num_microbatches)
    (_, metrics), grads = value_and_grad(state.params, batch, key, weight)
    if shardings is not None:  # otherwise fsdp all-reduces whole gradients instead of a reduce-scatter
      grads = jax.lax.with_sharding_constraint(grads, shardings)
    updates, opt_state = tx.update(grads, state.opt_state, state.params, value=metrics['loss'])
    metrics |= (
      {
        'grad_norm': optax.tree.norm(grads),
        'learning_rate': schedule(state.step),
        'loss_weight': weight,
        'batch_checksum': checksum(batch),
      }
      | fill(batch)
      | skipped(opt_state)
    )
    params = optax.apply_updates(state.params, updates)
    step = state.step + 1
    return TrainState(step, params, opt_state, track.update(state.extra, params, step), state.frozen), metrics

  return train_step


def init_state(initialize, tx, seed: int, track: Track = NOTHING, split=lambda params: (params, {})) -> TrainState:
  """Step 0 with parameters drawn by `initialize(key)`, which `split` divides into (trained, frozen).

  The optimizer's state is empty, and that of `track` its first.
  """
  params, frozen = split(initialize(jax.random.key(seed, impl=PRNG)))
  return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), track.init(params), frozen)
