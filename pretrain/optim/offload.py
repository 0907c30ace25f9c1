"""State in the memory of the host: it comes to the device a parameter at a time, and goes back while others come.

Source: Ren et al. 2021, arXiv:2101.06840 (ZeRO-Offload), §4, has the state on the host; Yang et al. 2024,
arXiv:2406.08334 (ProTrain), §3, moves it in chunks. Here a chunk is what belongs to one parameter; in the loss, one
layer of it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import optax
from jax import Array
from jax.extend.core import ClosedJaxpr, Literal, Var, jaxpr_as_fun
from jax.sharding import NamedSharding

from models.host_memory import DEVICE, HOST, on_device
from models.specs import ParamSpec, is_matrix
from pretrain.optim.shared import Offloaded
from pretrain.optim.state import own_path

# How many chunks may be on their way. With one, libtpu 0.0.42 lets the next come while one goes back. With two, twice
# the memory is in use, and the update itself, a hundredth of the time of the transfers, overlaps with them too.
IN_FLIGHT = 1


def on_host(names: Sequence[Offloaded], specs: Mapping[str, Any], shapes: Any, places: Any) -> Any:
  """`places`, shardings of an optimizer's state of these `shapes`, with what `names` says in the host's memory.

  'moments' are the arrays of a matrix's own shape. Vectors, factored means and scales are small, and stay.
  """
  own = {own_path(path): spec for path, spec in jax.tree_util.tree_flatten_with_path(specs)[0]}

  def place(path, leaf, sharding: NamedSharding) -> NamedSharding:
    spec = own.get(own_path(path))
    return sharding.with_memory_kind(HOST) if spec is not None and moves(names, spec, leaf.shape) else sharding

  return jax.tree_util.tree_map_with_path(place, shapes, places)


def params_on_host(names: Sequence[Offloaded], specs: Mapping[str, Any], places: Any) -> Any:
  """The shardings `places` of the parameters, with host memory for the ones that `names` selects."""
  place = lambda spec, sharding: sharding.with_memory_kind(HOST) if moves_parameter(names, spec) else sharding
  return jax.tree.map(place, specs, places)


def moves_parameter(names: Sequence[Offloaded], spec: ParamSpec) -> bool:
  """Whether a parameter is one of `names`: 'parameters' are the matrices of stacks, of which one layer is used at a
  time. XLA makes no loop of a stack of one layer, so that stays on the device.
  """
  return 'parameters' in names and spec.axes[0] == 'layers' and spec.shape[0] > 1 and is_matrix(spec)


def moves(names: Sequence[Offloaded], spec: ParamSpec, shape: Sequence[int]) -> bool:
  """Whether a statistic of this shape of the parameter `spec` is one of `names`."""
  return 'moments' in names and is_matrix(spec) and tuple(shape) == tuple(spec.shape)


def streamed(tx: optax.GradientTransformation, places: Any, of_params: Any = ()) -> optax.GradientTransformation:
  """`tx` with its state at `places`, of which the arrays in the host's memory come and go in chunks. Parameters whose
  shardings in `of_params` are in the host's memory come in the same way; their updates stay on the device.

  Values are those of `tx`. Without the order that this one gives to the chunks, XLA has all arrays on the device at
  once (libtpu 0.0.42), which saves nothing.
  """
  both = jax.tree_util.tree_flatten_with_path((places, of_params))[0]
  homes, of_state = [home for _, home in both], len(jax.tree.leaves(places))
  chunks = _chunks([own_path(path) for path, _ in both], homes)
  state_of = lambda numbers: [i for i in numbers if i < of_state]
  if not chunks:
    return tx
  tx = optax.with_extra_args_support(tx)

  def init(params):
    leaves, tree = jax.tree.flatten(tx.init(params))
    before: Any = ()
    for numbers in filter(None, map(state_of, chunks.values())):
      chunk, _ = jax.lax.optimization_barrier(([leaves[i] for i in numbers], before))
      before = jax.device_put(chunk, [homes[i] for i in numbers])
      leaves = _replaced(leaves, numbers, before)
    return jax.tree.unflatten(tree, leaves)

  def update(grads, state, params=None, **extra):
    values = _Values(tx.update, (grads, state, params), extra)
    owned = _numbers([own_path(path) for path, _ in jax.tree_util.tree_flatten_with_path(grads)[0]])
    first, leaves = len(jax.tree.leaves(grads)), jax.tree.leaves((state, params))
    ready, moved = [optax.tree.norm(grads)] * IN_FLIGHT, {}
    for path, numbers in chunks.items():
      chunk, _ = jax.lax.optimization_barrier(([leaves[i] for i in numbers], ready[-IN_FLIGHT]))
      fetched = [_fetched(x, homes[i], by_layer=i >= of_state) for i, x in zip(numbers, chunk, strict=True)]
      values.give({first + i: x for i, x in zip(numbers, fetched, strict=True)})
      values.outputs(owned[path])  # in the order of the program, beside what they are computed with
      own = state_of(numbers)
      back = jax.device_put(values.outputs(first + i for i in own), [homes[i] for i in own])
      moved |= {first + i: x for i, x in zip(own, back, strict=True)}
      ready.append(back or values.outputs(owned[path]))
    return values.result(moved)

  return optax.GradientTransformationExtraArgs(init, update)


def _fetched(x: Array, home: NamedSharding, *, by_layer: bool) -> Array:
  """`x` on the device. Parameters come by layers: where one operation reads a whole array of which another one reads
  layers, libtpu 0.0.42 has the whole array on the device for both.
  """
  return jax.lax.map(on_device, x) if by_layer else jax.device_put(x, home.with_memory_kind(DEVICE))


def _chunks(paths: Sequence[tuple[str, ...]], homes: Sequence[NamedSharding]) -> dict[tuple[str, ...], list[int]]:
  """The numbers of the arrays in the host's memory, by the path of their parameter."""
  away = [path if home.memory_kind == HOST else None for path, home in zip(paths, homes, strict=True)]
  return {path: numbers for path, numbers in _numbers(away).items() if path is not None}


def _numbers(keys: Iterable[Any]) -> dict[Any, list[int]]:
  found: dict[Any, list[int]] = {}
  for i, key in enumerate(keys):
    found.setdefault(key, []).append(i)
  return found


def _replaced(leaves: Sequence[Array], numbers: Sequence[int], new: Sequence[Array]) -> list[Array]:
  given = dict(zip(numbers, new, strict=True))
  return [given.get(i, leaf) for i, leaf in enumerate(leaves)]


class _Values:
  """The outputs of a function, computed when they are asked for: each operation once, and after what it reads.

  An array of the host's memory is no argument until its copy on the device is given.
  """

  def __init__(self, function: Callable, args: tuple, extra: Mapping[str, Any]):
    leaves, tree = jax.tree.flatten((args, dict(extra)))
    shapes = jax.tree.unflatten(tree, [_shape(x) for x in leaves])
    flat = lambda given, more: function(*given, **more)
    calls, self._result = jax.make_jaxpr(flat, return_shape=True)(*shapes)
    traced = jax.make_jaxpr(lambda *values: _without_calls(calls, values))(*jax.tree.leaves(shapes))
    self._jaxpr = traced.jaxpr
    self._read = {x for eqn in self._jaxpr.eqns for x in eqn.invars if not isinstance(x, Literal)}
    self._read |= {x for x in self._jaxpr.outvars if not isinstance(x, Literal)}
    variables = (*self._jaxpr.constvars, *self._jaxpr.invars)
    self._known = dict(zip(variables, (*traced.consts, *leaves), strict=True))

  def give(self, arguments: Mapping[int, Array]) -> None:
    """Arguments by their number, in place of those of the call."""
    self._known |= {self._jaxpr.invars[i]: x for i, x in arguments.items()}

  def outputs(self, numbers: Iterable[int]) -> list[Array]:
    wanted = [self._jaxpr.outvars[i] for i in numbers]
    self._compute([x for x in wanted if not isinstance(x, Literal)])
    return [x.val if isinstance(x, Literal) else self._known[x] for x in wanted]

  def result(self, given: Mapping[int, Array]) -> Any:
    """What the function returns, with the outputs that are given."""
    others = [i for i in range(len(self._jaxpr.outvars)) if i not in given]
    leaves = dict(zip(others, self.outputs(others), strict=True)) | given
    return jax.tree.unflatten(jax.tree.structure(self._result), [leaves[i] for i in range(len(leaves))])

  def _compute(self, wanted: Iterable[Var]) -> None:
    """Runs what `wanted` needs of the operations that have not run."""
    needed, eqns = set(wanted) - self._known.keys(), []
    for eqn in reversed(self._jaxpr.eqns):
      if needed.intersection(eqn.outvars):
        eqns.insert(0, eqn)
        needed |= {x for x in eqn.invars if not isinstance(x, Literal)} - self._known.keys()
    made = [x for eqn in eqns for x in eqn.outvars if x in self._read]
    reads = [*dict.fromkeys(x for eqn in eqns for x in eqn.invars if not isinstance(x, Literal) and x in self._known)]
    part = self._jaxpr.replace(constvars=[], invars=reads, outvars=made, eqns=eqns)
    values = jaxpr_as_fun(ClosedJaxpr(part, ()))(*(self._known[x] for x in reads))
    self._known |= zip(made, values, strict=True)


def _without_calls(closed: ClosedJaxpr, values: Iterable[Any]) -> list[Any]:
  """The outputs of `closed`. What functions under `jit` do is done in their place: a call of one with all moments, as
  optax has, would need all of them at once."""
  jaxpr = closed.jaxpr
  known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *values), strict=True))
  value = lambda x: x.val if isinstance(x, Literal) else known[x]
  for eqn in jaxpr.eqns:
    if eqn.primitive.name in ('jit', 'pjit'):
      outputs = _without_calls(eqn.params['jaxpr'], map(value, eqn.invars))
    else:
      reads = [*dict.fromkeys(x for x in eqn.invars if not isinstance(x, Literal))]
      part = jaxpr.replace(constvars=[], invars=reads, outvars=eqn.outvars, eqns=[eqn])
      outputs = jaxpr_as_fun(ClosedJaxpr(part, ()))(*map(value, reads))
    known |= zip(eqn.outvars, outputs, strict=True)
  return [value(x) for x in jaxpr.outvars]


def _shape(x: Array) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, weak_type=getattr(x, 'weak_type', False))
