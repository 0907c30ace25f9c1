"""The train step: a pure function of (state, batch), built from functions and never from a config."""

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import Array

from pretrain.step import from_host

Batch = Mapping[str, Array]
Metrics = dict[str, Array]
PRNG = 'threefry2x32'  # not JAX_DEFAULT_PRNG_IMPL: a resumed run must draw the numbers of the uninterrupted run
Seen = Mapping[str, Any]  # what a step has observed, for `TrainState.extra`
# loss(params, batch, key, weight, read) -> (scalar, (metrics, seen)): all already divided by `weight`, the loss weight
# of the *global* batch, so that the sum over microbatches is the value of the whole batch. `read`: see `Track`.
LossFn = Callable[[Any, Batch, Array | None, Array, Mapping[str, Any]], tuple[Array, tuple[Metrics, Seen]]]


@struct.dataclass
class TrainState:
  """`step` counts attempted updates; `extra` is state that gradients do not change (scales, statistics, averages), an
  entry for each method that keeps some (`Track`).

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
  """One entry of `TrainState.extra`. The train step knows of these functions, not of the method that they belong to.

  The loss gets `read(entry)` under the entry's name, if there is a `read`. What the step observes is in `seen`: all
  that the loss returns as such, and under the name of an entry the gradient of what was read of it. A custom VJP may
  return any number of the backward pass as this gradient (Flax: linen/fp8_ops.py, "overwrite with gradient").
  Observations of microbatches are added, gradients are combined by `join`, for which 0 must be neutral. `shown` makes
  metrics of the entry after the step.
  """

  init: Callable[[Any], Any]  # params -> entry
  update: Callable[[Any, Seen, Any, Array], Any]  # (entry, seen, params after update `step`, step from 1) -> entry
  place: Callable[[Any, Any], Any]  # (shardings of params, the sharding of what all devices hold) -> shardings of entry
  read: Callable[[Any], Any] | None = None
  join: Callable[[Array, Array], Array] = jnp.add
  shown: Callable[[Any], Metrics] = lambda entry: {}


Tracks = Mapping[str, Track]
NOTHING: Tracks = {}


def read_of(tracks: Tracks, extra: Mapping[str, Any]) -> dict[str, Any]:
  """What the loss reads of `extra`."""
  return {name: track.read(extra[name]) for name, track in tracks.items() if track.read is not None}


def accumulate(loss: LossFn, num_microbatches: int, tracks: Tracks = NOTHING):
  """((value, (metrics, seen)), (gradients of params, of `read`)) of `loss`, as a function of its arguments: over the
  batch in `num_microbatches` parts, one at a time.
  """
  value_and_grad = from_host.value_and_grad(loss)
  if num_microbatches == 1:
    return value_and_grad

  def split(x):
    # Strided rows, so that every microbatch lies on every device: no data moves.
    return jnp.swapaxes(x.reshape(-1, num_microbatches, *x.shape[1:]), 0, 1)

  def added(total, own):
    ((value, (grads, felt)), (more, (more_grads, more_felt))) = total, own
    sums = jax.tree.map(jnp.add, (value, grads), (more, more_grads))
    joined = {name: jax.tree.map(tracks[name].join, felt[name], more_felt[name]) for name in felt}
    return sums[0], (sums[1], joined)

  def accumulated(params, batch, key, weight, read):
    def body(total, part):
      return added(total, value_and_grad(params, part, key, weight, read)), None

    parts = jax.tree.map(split, dict(batch))
    shapes = jax.eval_shape(value_and_grad, params, jax.tree.map(lambda x: x[0], parts), key, weight, read)
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
  loss: LossFn, tx, schedule, skipped, seed: int, *, fill: Callable[[Batch], Metrics],
  tracks: Tracks = NOTHING, num_microbatches: int = 1, shardings=None, whole=lambda value_and_grad: value_and_grad,
):  # fmt: skip
  """`train_step(state, batch) -> (state, metrics)`; gradients have `shardings`, those of the parameters. Each of
  `tracks` has an entry of `state.extra`. `whole` wraps the gradient function (`across_replicas`).

  The key of dropout follows from `seed` and the step. It is made inside the step: outside, it would need more programs.
  """
  tx = optax.with_extra_args_support(tx)

  def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    weight = jnp.maximum(batch['decoder_loss_weights'].sum(), 1.0)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed, impl=PRNG), 1), state.step)
    own = accumulate(lambda params, *rest: loss(state.whole(params), *rest), num_microbatches, tracks)
    read = read_of(tracks, state.extra)
    (_, (metrics, seen)), (grads, felt) = whole(own)(state.params, batch, key, weight, read)
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
    params = from_host.apply_updates(state.params, updates)
    step = state.step + 1
    seen = {**seen, **felt}
    extra = {name: track.update(state.extra[name], seen, params, step) for name, track in tracks.items()}
    for name, track in tracks.items():
      metrics |= track.shown(extra[name])
    return TrainState(step, params, opt_state, extra, state.frozen), metrics

  return train_step


def init_state(initialize, tx, seed: int, tracks: Tracks = NOTHING, split=lambda params: (params, {})) -> TrainState:
  """Step 0 with parameters drawn by `initialize(key)`, which `split` divides into (trained, frozen).

  The optimizer's state is empty, and the entries of `tracks` have their first values.
  """
  params, frozen = split(initialize(jax.random.key(seed, impl=PRNG)))
  extra = {name: track.init(params) for name, track in tracks.items()}
  return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), extra, frozen)
