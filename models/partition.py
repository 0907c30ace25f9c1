"""Logical axes -> mesh axes. Two total maps over the same words; an unknown word is an error."""

import contextlib
import math
from collections.abc import Mapping, Sequence

import jax
from jax import Array
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from models.specs import ParamSpec, Tree, is_spec

Rules = Mapping[str, str | tuple[str, ...] | None]

# A parameter's `embed` is sharded over fsdp; an activation's is not, because its `batch` is.
PARAMETER_RULES: Rules = {
  'embed': 'fsdp',
  'heads': 'tensor',
  'kv_heads': 'tensor',
  'one_head': None,
  'head_dim': None,
  'mlp': 'tensor',
  'vocab': 'tensor',
  'layers': 'stage',
  'experts': 'expert',
  'buckets': None,
  'length': None,
  'rank': None,
  'outputs': None,
}
ACTIVATION_RULES: Rules = {
  'batch': ('replica', 'data', 'fsdp', 'expert'),  # the work outside of experts is divided over `expert` too
  'rows': ('replica', 'data', 'fsdp', 'expert', 'stage'),  # the batch where no pipeline runs: `rows`
  'length': 'sequence',
  'embed': None,
  'heads': 'tensor',
  'kv_heads': 'tensor',
  'one_head': None,
  'head_dim': None,
  'mlp': 'tensor',
  'vocab': 'tensor',
  'experts': 'expert',
  'rank': None,
  'stages': 'stage',
}


def spec_for(axes: Sequence[str | None], rules: Rules) -> PartitionSpec:
  """The PartitionSpec of an array with these logical axes.

  Raises KeyError for an unknown axis, ValueError where two dims would share a mesh axis.
  """
  for axis in axes:
    if axis is not None and axis not in rules:
      raise KeyError(f'unknown logical axis {axis!r}; the axes are {", ".join(rules)}.')
  entries = [None if axis is None else rules[axis] for axis in axes]
  used = [m for entry in entries for m in _names(entry)]
  if len(used) != len(set(used)):
    raise ValueError(f'axes {tuple(axes)} put two dims on one mesh axis: {entries}.')
  return PartitionSpec(*entries)


def shardings(specs: Tree, mesh: Mesh) -> Tree:
  """The NamedSharding of each parameter."""
  place = lambda s: NamedSharding(mesh, spec_for(s.axes, PARAMETER_RULES))
  return jax.tree.map(place, specs, is_leaf=is_spec)


@contextlib.contextmanager
def on(mesh: Mesh | AbstractMesh | None):
  """Inside, `constrain` shards over this mesh; without a mesh it does nothing.

  In a `shard_map` over some of its axes, arrays are the parts that these give a device, and the other axes remain.
  """
  if mesh is None or jax.sharding.get_abstract_mesh().manual_axes:
    yield
    return
  with jax.sharding.use_abstract_mesh(getattr(mesh, 'abstract_mesh', mesh)):
    yield


def _rules(rules: Rules = ACTIVATION_RULES) -> Rules:
  """`rules` without the axes that a `shard_map` around has divided arrays over."""
  if not (done := jax.sharding.get_abstract_mesh().manual_axes):
    return rules
  left = {axis: tuple(n for n in _names(entry) if n not in done) for axis, entry in rules.items()}
  return {axis: names or None for axis, names in left.items()}


def _names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
  return (entry,) if isinstance(entry, str) else entry or ()


def entries_of(axes: Sequence[str | None], rules: Rules = ACTIVATION_RULES) -> tuple[tuple[str, ...], ...]:
  """For each dim the axes of the mesh in use that divide it, () where it is whole."""
  return tuple(_names(entry) for entry in spec_for(axes, _rules(rules)))


def constrain(x: Array, *axes: str | None) -> Array:
  """Shards an activation; without this the partitioner guesses, and replicates."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, spec_for(axes, _rules()))


def divides(axis: str) -> bool:
  """Whether the mesh in use divides activations along this logical axis."""
  return parts(axis) > 1


def parts(*axes: str) -> int:
  """Into how many parts the mesh in use divides an activation along these logical axes."""
  sizes, rules = jax.sharding.get_abstract_mesh().shape, _rules()
  return math.prod(sizes.get(n, 1) for axis in axes for n in _names(rules[axis]))


def rows(number: int) -> str:
  """The logical axis of a batch of so many rows where no pipeline runs: 'rows', so that stages have parts of it
  too, where they divide it, and 'batch' elsewhere."""
  return 'rows' if divides('stages') and number % parts('rows') == 0 else 'batch'


def per_shard(kernel, in_axes, out_axes):
  """`kernel` on each device's part of arrays with these logical axes; axes that are None are not divided.

  For what cannot be partitioned automatically (a Pallas call). Without a mesh it returns `kernel`. `in_axes` has a
  tuple of axes for each argument, or a dict of tuples; `out_axes` those of the result, or of each result.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return kernel
  rules = _rules()
  spec = lambda axes: spec_for(axes, rules)
  in_specs = jax.tree.map(spec, in_axes, is_leaf=lambda x: isinstance(x, tuple) and not any(map(_nested, x)))
  out_specs = jax.tree.map(spec, out_axes, is_leaf=lambda x: isinstance(x, tuple) and not any(map(_nested, x)))
  # A kernel does not declare along which axes its outputs vary, so that check is off.
  return jax.shard_map(kernel, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _nested(x) -> bool:
  return isinstance(x, tuple | dict)


def check_divisible(specs: Tree, mesh: Mesh | AbstractMesh) -> None:
  """Raises ValueError naming the first parameter dim that its mesh axes do not divide."""
  for path, spec in jax.tree_util.tree_flatten_with_path(specs, is_leaf=is_spec)[0]:
    _check_parameter('/'.join(str(p.key) for p in path), spec, mesh)


def _key(axis: str | None) -> str:
  return 'model.vocab_size' if axis == 'vocab' else f'the model key of {axis}'


def _check_parameter(path: str, spec: ParamSpec, mesh) -> None:
  for dim, axis, entry in zip(spec.shape, spec.axes, spec_for(spec.axes, PARAMETER_RULES), strict=True):
    names = _names(entry)
    size = math.prod(mesh.shape[name] for name in names)
    if dim % size:
      raise ValueError(
        f'{axis}={dim} of parameter {path} does not divide over mesh.{"*".join(names)}={size}; '
        f'make {_key(axis)} a multiple of {size}, or mesh.{names[0]} smaller.'
      )
