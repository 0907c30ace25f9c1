"""Places in a buffer that a loop reads and writes by index, whose gradients touch one place at a time too.

JAX's own gradient of a read adds an array of zeros as large as the buffer, in each step of a loop.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

DIM = 1  # of the slots; dim 0 is that of stages, each of which has its own


def _at(store: Array, slot: Array) -> Array:
  return jax.lax.dynamic_index_in_dim(store, slot, DIM, keepdims=False)


def _set(store: Array, slot: Array, value: Array) -> Array:
  return jax.lax.dynamic_update_index_in_dim(store, value, slot, DIM)


@jax.custom_vjp
def take(store: Array, slot: Array, active: Array) -> tuple[Array, Array]:
  """(the store, `store[:, slot]`, or zeros where not `active`). The slot counts as empty until the next `put` there."""
  return store, jnp.where(active, _at(store, slot), 0)


def _take_fwd(store: Array, slot: Array, active: Array):
  return take(store, slot, active), (slot, active)


def _take_bwd(saved, gradients):
  (slot, active), (store, value) = saved, gradients
  return _set(store, slot, jnp.where(active, value, _at(store, slot))), None, None


take.defvjp(_take_fwd, _take_bwd)


@jax.custom_vjp
def put(store: Array, slot: Array, active: Array, value: Array) -> Array:
  """The store with `value` in an empty slot; as it was where not `active`."""
  return _set(store, slot, jnp.where(active, value, _at(store, slot)))


def _put_fwd(store: Array, slot: Array, active: Array, value: Array):
  return put(store, slot, active, value), (slot, active)


def _put_bwd(saved, store: Array):
  slot, active = saved
  return store, None, None, jnp.where(active, _at(store, slot), 0)  # `take` replaces the gradient of the slot


put.defvjp(_put_fwd, _put_bwd)


@jax.custom_vjp
def either(which: Array, a: Array, b: Array) -> Array:
  """Of each stage a where `which`[stages], else b. For the gradient `which` is kept, and no mask of the size of a."""
  return jnp.where(like(which, a), a, b)


def _either_bwd(which: Array, gradient: Array):
  mask = like(which, gradient)
  return None, jnp.where(mask, gradient, 0), jnp.where(mask, 0, gradient)


either.defvjp(lambda which, a, b: (either(which, a, b), which), _either_bwd)


def like(of_stages: Array, x: Array) -> Array:
  """`of_stages`[stages] with as many dims as x, to broadcast over the others."""
  return of_stages.reshape(-1, *(1 for _ in x.shape[1:]))


@jax.custom_vjp
def lend(account: Array, store: Array, slot: Array) -> tuple[Array, Array]:
  """(the account, `store[slot]`) of one stage, as often as wanted. `account` has the shape of `store`; gradients go to
  it, and none to `store`.

  A loop carries the account: its values are never read, and its gradient grows in place, one slot at a time.
  """
  return account, jax.lax.dynamic_index_in_dim(store, slot, 0, keepdims=False)


def _lend_fwd(account: Array, store: Array, slot: Array):
  return lend(account, store, slot), slot


def _lend_bwd(slot: Array, gradients):
  account, value = gradients
  so_far = jax.lax.dynamic_index_in_dim(account, slot, 0, keepdims=False)
  return jax.lax.dynamic_update_index_in_dim(account, so_far + value, slot, 0), None, None


lend.defvjp(_lend_fwd, _lend_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def for_each(x: Array, number: int) -> Array:
  """`number` copies of x, [number, …]; their gradients, which are largest sizes, are joined by their maximum."""
  return jnp.broadcast_to(x, (number, *x.shape))


for_each.defvjp(lambda x, number: (for_each(x, number), None), lambda number, _, g: (g.max(0),))
