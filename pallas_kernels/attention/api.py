"""`flash_attention`: one signature, one dict of implementations."""

import functools
import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels import tuned
from pallas_kernels.attention import cudnn, gpu, reference, tpu
from pallas_kernels.attention.blockwise import attention as blockwise
from pallas_kernels.attention.reference import Dropout, PositionScores, RelativeBias, Visibility, drop_values
from pallas_kernels.attention.ring import attention as ring
from pallas_kernels.errors import KernelError

__all__ = [
  'IMPLEMENTATIONS',
  'Dropout',
  'PositionScores',
  'RelativeBias',
  'Visibility',
  'attention',
  'choose',
  'drop_values',
  'flash_attention',
  'mesh_platform',
]


def _mosaic_gpu(q: Array, k: Array, v: Array, see: Visibility, **options):
  # Imported only when it is used: the import takes a third of a second.
  from pallas_kernels.attention import gpu_mosaic

  return gpu_mosaic.attention(q, k, v, see, **options)


def _ring(q: Array, k: Array, v: Array, see: Visibility, **options):
  # The kernels read a relative bias by indices, which the tokens of a device do not have.
  kernel = mesh_platform() == 'tpu' and see.relative_bias is None
  return ring.attention(q, k, v, see, kernel=kernel, **options)


# `interpret` runs `tpu` on any platform, slowly: for tests, and to compute on a CPU what a TPU would compute.
IMPLEMENTATIONS = {
  'reference': reference.attention,
  'tpu': tpu.attention,
  'interpret': functools.partial(tpu.attention, interpret=True),
  'triton': gpu.attention,
  'mosaic_gpu': _mosaic_gpu,
  'cudnn': cudnn.attention,
  'blockwise': blockwise.attention,
  'ring': _ring,
}
HOPPER = ('h100', 'h200')
# These read and write [batch, heads, length, head_dim]; the others transpose.
HEADS_FIRST = {
  'tpu': functools.partial(tpu.attention, heads_first=True),
  'interpret': functools.partial(tpu.attention, heads_first=True, interpret=True),
  'ring': functools.partial(_ring, heads_first=True),
}
PLATFORMS = {'tpu': 'tpu', 'triton': 'gpu', 'mosaic_gpu': 'gpu', 'cudnn': 'gpu'}  # the others run anywhere
WHOLE_ROWS = ('mosaic_gpu', 'cudnn')  # these have no segments, so no packed rows
LONG = 2048  # on a CPU 'auto' keeps the reference up to LONG x LONG scores: losses of such runs keep their bits
_reported: set[str] = set()


def choose(
  implementation: str,
  *,
  dropout: bool,
  shared: bool = False,
  divided: bool = False,
  position_scores: bool = False,
  relative_bias: bool = False,
  packed: bool = False,
  lengths: tuple[int, int] = (0, 0),
) -> str:
  """The implementation to run: `implementation` itself, or the one that 'auto' selects, logged once for each reason.

  The platform is that of the mesh in use: a program may be compiled for devices that this process does not have. On
  Hopper GPUs 'auto' selects 'triton' for all that has run there, which a relative bias has not. 'mosaic_gpu' and
  'cudnn', which have no packed rows, must be named. On other GPUs and on CPUs it selects 'blockwise' for long rows.
  `divided`: each device holds parts of rows, which 'ring' sends around and the partitioner gathers for the reference.
  `shared`: the dropout has one mask for all queries of a head, which the caller of 'ring' puts on the values.
  `position_scores`: disentangled attention, whose scores depend on content and position together; no kernel has it.
  `packed`: rows have segments. `lengths` of queries and keys.

  Raises KernelError.
  """
  unlike = dropout and not shared
  if implementation == 'auto':
    chosen, reason = _automatic(unlike or (dropout and not divided), divided, position_scores, relative_bias, lengths)
    if reason not in _reported:
      _reported.add(reason)
      logging.getLogger(__name__).info('attention: %s (%s)', chosen, reason)
    return chosen
  if implementation not in IMPLEMENTATIONS:
    known = ', '.join(repr(name) for name in IMPLEMENTATIONS)
    raise KernelError(f"kernels.attention='{implementation}' is not one of 'auto', {known}.")
  platform = mesh_platform()
  if platform is not None and PLATFORMS.get(implementation, platform) != platform:
    raise KernelError(
      f"kernels.attention='{implementation}' runs on {PLATFORMS[implementation]}, this mesh has {platform} devices; "
      "use 'auto' or 'reference'."
    )
  if implementation == 'ring' and unlike:
    raise KernelError(
      "kernels.attention='ring' has no attention dropout with a mask for each query, which model.dropout > 0 needs "
      "with model.dropout_sites='bert'; use 'auto' or 'reference', or model.dropout=0, or model.dropout_sites='t5'."
    )
  if dropout and implementation not in ('reference', 'ring'):
    raise KernelError(
      f"kernels.attention='{implementation}' has no attention dropout, which model.dropout > 0 needs; "
      "use 'auto' or 'reference', or model.dropout=0."
    )
  if divided and implementation not in ('reference', 'ring'):
    raise KernelError(
      f"kernels.attention='{implementation}' needs whole rows, which mesh.sequence > 1 divides: each device would do "
      "all of the work; use kernels.attention='ring', or mesh.sequence=1 with mesh.fsdp or mesh.tensor."
    )
  if position_scores and implementation != 'reference':
    raise KernelError(
      f"kernels.attention='{implementation}' has no disentangled attention, which model.positions='disentangled' "
      "needs; use 'auto' or 'reference'."
    )
  if packed and implementation in WHOLE_ROWS:
    raise KernelError(
      f"kernels.attention='{implementation}' has no packed rows, which all models train on; use 'auto', 'triton' or "
      "'blockwise'."
    )
  return implementation


def mesh_platform() -> str | None:
  """The platform of the mesh in use, or None without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty or mesh.abstract_device is None else mesh.abstract_device.platform


def _automatic(
  dropout: bool, divided: bool, position_scores: bool, relative_bias: bool, lengths: tuple[int, int]
) -> tuple[str, str]:
  """(implementation, reason)."""
  platform = mesh_platform()
  if divided and not (dropout or position_scores):
    return 'ring', 'mesh.sequence > 1 divides rows'
  if platform is None:
    return 'reference', 'no mesh gives the platform'
  whole = not (dropout or divided or position_scores)
  # What has been compared with the definition on a GPU: docs/LOG.md.
  if platform == 'gpu' and whole and not relative_bias and tuned.chip_of(tuned.device_kind()) in HOPPER:
    return 'triton', 'the kernel for Hopper GPUs'
  if platform in ('cpu', 'gpu') and whole and lengths[0] * lengths[1] > LONG**2:
    return 'blockwise', f'more than {LONG} x {LONG} scores on {platform}'
  if platform == 'gpu' and whole:
    return (
      'reference',
      "kernels.attention='triton' has not run on this GPU with all that the model has; name it to use it",
    )
  if platform not in ('tpu', 'gpu'):
    return 'reference', f'no kernel for {platform}'
  if position_scores:
    return 'reference', 'disentangled attention'
  return ('reference', 'attention dropout') if dropout else ('tpu', 'the kernel for TPU')


def _check_shapes(q: Any, k: Any, v: Any, bias: RelativeBias | None, of_heads: dict[str, Array | None]) -> None:
  """Raises KernelError for arrays that do not fit each other: a kernel would read past their ends without an error."""
  heads, per_head = q.shape[2], {name: x.shape for name, x in of_heads.items() if x is not None}
  if k.shape != v.shape or (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]) or heads % k.shape[2]:
    raise KernelError(
      f'flash_attention got q{q.shape}, k{k.shape}, v{v.shape}; pass q[batch, T, heads, head_dim] and k and v of one '
      'shape [batch, S, kv_heads, head_dim], where kv_heads divides heads.'
    )
  if bias is not None:
    per_head['relative_bias.table'] = bias.table.shape[1:]
    exact = bias.table.shape[0] // (4 if bias.bidirectional else 2)
    if bias.max_distance <= exact:
      raise KernelError(
        f'flash_attention got relative_bias.max_distance={bias.max_distance} with a table of {bias.table.shape[0]} '
        f'buckets, which have {exact} single distances on each side; pass a max_distance above {exact}.'
      )
  if wrong := [f'{name} with heads {shape}' for name, shape in per_head.items() if shape != (heads,)]:
    raise KernelError(f'flash_attention got {", ".join(wrong)}; pass one number for each of the {heads} heads of q.')


def _check_positions(chosen: str, q: Any, k: Any, see: Visibility) -> None:
  """Raises KernelError where the shapes show that positions are not indices: slots of a cache, parts of rows."""
  sides = [name for name, x in (('q_positions', see.q_positions), ('kv_positions', see.kv_positions)) if x is not None]
  if len(sides) == 1 or (sides and q.shape[1] != k.shape[1]):
    raise KernelError(
      f"kernels.attention='{chosen}' reads a relative bias by the difference of indices, and got {' and '.join(sides)} "
      f"for {q.shape[1]} queries and {k.shape[1]} keys; pass both, of rows of one length, or use 'reference'."
    )


def _check_position_scores(q: Any, k: Any, see: Visibility) -> None:
  """Raises KernelError for shapes that do not fit, and for positions that are given: distances are those of indices."""
  heads, own = q.shape[2:], see.position_scores.given
  if wrong := [f'position_scores.{name}{x.shape}' for name, x in own.items() if x.shape[1:] != heads]:
    raise KernelError(f'attention got {", ".join(wrong)}; pass [buckets, heads={heads[0]}, head_dim={heads[1]}].')
  if k.shape[2] != heads[0] or see.q_positions is not None or see.kv_positions is not None:
    given = 'positions' if k.shape[2] == heads[0] else f'{k.shape[2]} key heads for {heads[0]} query heads'
    raise KernelError(f'attention got position_scores and {given}; pass rows without positions, and as many key heads.')


def attention(
  q: Array,
  k: Array,
  v: Array,
  see: Visibility,
  *,
  softcap: float | None = None,
  scale: float | None = None,
  sink_logits: Array | None = None,
  dropout: Dropout | tuple[float, Array] | None = None,
  implementation: str = 'auto',
  return_lse: bool = False,
  heads_first: bool = False,
  axis: str | None = None,
):
  """`flash_attention`, for a caller that has a `Visibility`. Raises KernelError as that does.

  'ring' is called on each device with its part of the rows, which `axis` of the mesh divides.

  With `heads_first` arrays are [batch, heads, length, head_dim], and lse [batch, heads, length]: the order in which the
  kernels for TPU read and write them.
  """
  shapes = [_turned(x) if heads_first else x for x in (q, k, v)]
  chosen = _checked(shapes, see, implementation, dropout is not None, {'alibi': see.alibi, 'sink_logits': sink_logits})
  see = see.count_sinks()
  options = {'dropout': dropout} if chosen == 'reference' else {'axis': axis} if chosen == 'ring' else {}
  options |= {'softcap': softcap, 'scale': scale, 'sink_logits': sink_logits, 'return_lse': return_lse}
  if not heads_first:
    return IMPLEMENTATIONS[chosen](q, k, v, see, **options)
  if chosen in HEADS_FIRST:
    return HEADS_FIRST[chosen](q, k, v, see, **options)
  turn = lambda x: jnp.swapaxes(x, 1, 2)
  return jax.tree.map(turn, IMPLEMENTATIONS[chosen](turn(q), turn(k), turn(v), see, **options))


def _turned(x: Array) -> jax.ShapeDtypeStruct:
  batch, heads, length, head_dim = x.shape
  return jax.ShapeDtypeStruct((batch, length, heads, head_dim), x.dtype)


def _checked(
  shapes: Sequence[Any], see: Visibility, implementation: str, dropout: bool, of_heads: dict[str, Array | None]
) -> str:
  """The implementation to run, for arrays with these shapes [batch, length, heads, head_dim]. Raises KernelError."""
  q, k, v = shapes
  if (see.q_segment_ids is None) != (see.kv_segment_ids is None):
    raise KernelError('flash_attention got segment ids of one side only; pass q_segment_ids and kv_segment_ids.')
  _check_shapes(q, k, v, see.relative_bias, of_heads)
  if see.position_scores is not None:
    _check_position_scores(q, k, see)
  chosen = choose(
    implementation, dropout=dropout, position_scores=see.position_scores is not None,
    relative_bias=see.relative_bias is not None, lengths=(q.shape[1], k.shape[1]),
  )  # fmt: skip
  if see.relative_bias is not None and chosen not in ('reference', 'blockwise', 'ring'):
    _check_positions(chosen, q, k, see.count_sinks())
  return chosen


def flash_attention(
  q: Array,
  k: Array,
  v: Array,
  *,
  causal: bool,
  window: int | None = None,
  num_sinks: int = 0,
  q_segment_ids: Array | None = None,
  kv_segment_ids: Array | None = None,
  q_positions: Array | None = None,
  kv_positions: Array | None = None,
  prefix_end: Array | None = None,
  relative_bias: RelativeBias | None = None,
  position_scores: PositionScores | None = None,
  alibi: Array | None = None,
  softcap: float | None = None,
  scale: float | None = None,
  sink_logits: Array | None = None,
  dropout: Dropout | tuple[float, Array] | None = None,
  implementation: str = 'auto',
  return_lse: bool = False,
):
  """Attention of q[batch, T, heads, head_dim] over k, v[batch, S, kv_heads, head_dim]; heads = kv_heads * group.

  `Visibility` defines which keys a query sees, from `causal` to `alibi` (slopes[heads]). `softcap`,
  `sink_logits[heads]` and `dropout` (rate, keys[batch], shared) act as `reference.attention` defines. Returns q's
  shape and dtype, and lse f32[batch, T, heads] if `return_lse`.

  Kernels read a relative bias by the difference of indices: with one, position j - position i must be j - i inside a
  segment, as in packed rows. They have no gradient of `alibi`, and no dropout. 'blockwise' lacks only dropout and
  `position_scores`.

  Raises KernelError for an implementation that does not exist or lacks a feature, for shapes that do not fit each
  other, and for segment ids of only one side.
  """
  see = Visibility(
    causal=causal, window=window, num_sinks=num_sinks, q_segment_ids=q_segment_ids, kv_segment_ids=kv_segment_ids,
    q_positions=q_positions, kv_positions=kv_positions, prefix_end=prefix_end, relative_bias=relative_bias,
    position_scores=position_scores, alibi=alibi,
  )  # fmt: skip
  return attention(
    q, k, v, see, softcap=softcap, scale=scale, sink_logits=sink_logits, dropout=dropout,
    implementation=implementation, return_lse=return_lse,
  )  # fmt: skip
