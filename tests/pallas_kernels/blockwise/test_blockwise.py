"""'blockwise' against attention in float64, written down here from the formula: values, gradients, memory, choices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels.attention import reference
from pallas_kernels.attention.api import LONG, choose, flash_attention
from pallas_kernels.attention.blockwise import scan
from pallas_kernels.attention.blockwise.attention import attention
from pallas_kernels.attention.reference import RelativeBias, Visibility
from pallas_kernels.errors import KernelError
from tests.pallas_kernels.attention_cases import attend, draw, normal, packed, relative, row
from tests.pallas_kernels.test_flash import CASES, MORE, PREFIX, ROW, SINKS, SLOPES, bias, slow

ALL = {
  'causal': True, 'softcap': 1.5, 'sink_logits': SINKS, 'window': 90, 'num_sinks': 3, 'alibi': SLOPES,
  **PREFIX, **bias(False),
}  # fmt: skip
BACKWARDS = {'q_positions': jnp.arange(60, 100)[None], 'kv_positions': jnp.arange(99, -1, -1)[None]}
OWN = {
  'every feature': ((256,), {'batch': 2, 'kv_heads': 1}, ALL),
  'positions that are not indices': (
    (40, 100), {}, {'causal': True, **BACKWARDS, **bias(False)},
  ),
  'positions of keys alone': (
    (40, 100), {}, {'causal': False, 'window': 30, 'kv_positions': 2 * jnp.arange(100)[None], **bias(True)},
  ),
}  # fmt: skip
FAST = ('every feature', 'positions that are not indices')
NAMES = ('q', 'k', 'v', 'table', 'alibi', 'sink_logits')


def visible(see: Visibility, at, numbers) -> np.ndarray:
  """bool[batch, T, S] by the words of `Visibility`."""
  (q_at, k_at), (length, width) = at, numbers
  seen = np.ones((1, length, width), bool)
  if see.causal:
    before = k_at[:, None] <= q_at[:, :, None]
    seen = seen & (before | (False if see.prefix_end is None else (k_at < np.asarray(see.prefix_end))[:, None]))
  if see.window is not None:
    seen = seen & ((abs(q_at[:, :, None] - k_at[:, None]) < see.window) | (k_at < see.num_sinks)[:, None])
  if see.q_segment_ids is not None:
    ids = np.asarray(see.q_segment_ids)[:, :, None]
    seen = seen & (ids == np.asarray(see.kv_segment_ids)[:, None]) & (ids != 0)
  return seen


def exact(arrays: dict, see: Visibility, softcap, weights) -> dict[str, np.ndarray]:
  """(out, lse, seen) and gradients in float64 of sum(out * weights[0]) + sum(lse * weights[1] where it is finite)."""
  length, width = arrays['q'].shape[1], arrays['k'].shape[1]
  index = lambda given, n: np.arange(n)[None] if given is None else np.asarray(given)
  q_at, k_at = index(see.q_positions, length), index(see.kv_positions, width)
  seen = visible(see, (q_at, k_at), (length, width))[:, None]
  ahead = k_at[:, None] - q_at[:, :, None]

  def loss(own):
    heads = own['q'].shape[2]
    k, v = (jnp.repeat(own[name], heads // own[name].shape[2], 2) for name in ('k', 'v'))
    scores = jnp.einsum('bthd,bshd->bhts', own['q'], k) / np.sqrt(k.shape[-1])
    scores = scores if softcap is None else softcap * jnp.tanh(scores / softcap)
    if 'table' in own:
      options = {'bidirectional': see.relative_bias.bidirectional, 'max_distance': see.relative_bias.max_distance}
      bucket = reference.relative_position_bucket(ahead, buckets=len(own['table']), **options)
      scores = scores + jnp.moveaxis(own['table'][bucket], 3, 1)
    if 'alibi' in own:
      scores = scores - own['alibi'][:, None, None] * abs(ahead)[:, None]
    scores = jnp.where(seen, scores, -jnp.inf)
    if 'sink_logits' in own:
      one = jnp.broadcast_to(own['sink_logits'][:, None, None], (*scores.shape[:3], 1))
      scores, v = jnp.concatenate([scores, one], -1), jnp.pad(v, ((0, 0), (0, 1), (0, 0), (0, 0)))
    some = jnp.isfinite(scores).any(-1, keepdims=True)
    lse = jax.scipy.special.logsumexp(jnp.where(some, scores, 0.0), axis=-1)
    out = jnp.einsum('bhts,bshd->bthd', jnp.where(some, jnp.exp(scores - lse[..., None]), 0.0), v)
    lse, some = jnp.moveaxis(jnp.where(some[..., 0], lse, 0.0), 1, 2), jnp.moveaxis(some[..., 0], 1, 2)
    return (out * weights[0]).sum() + (lse * weights[1]).sum(), {'out': out, 'lse': lse, 'seen': some}

  with jax.enable_x64(True), jax.numpy_dtype_promotion('standard'):
    own = {name: jnp.asarray(np.asarray(x), jnp.float64) for name, x in arrays.items()}
    (_, values), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(own)
    return {n: np.asarray(x) for n, x in (values | {f'd{name}': x for name, x in gradients.items()}).items()}


def found(arrays: dict, see: Visibility, softcap, weights, run=attention, **options) -> dict[str, np.ndarray]:
  """What `exact` returns, from the implementation `run`."""

  def loss(own):
    given = see.relative_bias
    table = None if given is None else RelativeBias(own['table'], given.bidirectional, given.max_distance)
    ours = dataclasses.replace(see, relative_bias=table, alibi=own.get('alibi'))
    given = {'softcap': softcap, 'sink_logits': own.get('sink_logits')} | options
    out, lse = run(own['q'], own['k'], own['v'], ours, return_lse=True, **given)
    seen = jnp.isfinite(lse)
    lse = jnp.where(seen, lse, 0.0)
    return (out * weights[0]).sum() + (lse * weights[1]).sum(), {'out': out, 'lse': lse, 'seen': seen}

  (_, values), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
  return {n: np.asarray(x) for n, x in (values | {f'd{name}': x for name, x in gradients.items()}).items()}


def differences(case: str, **options) -> dict[str, float]:
  """Relative L2 differences from float64. Fails if other queries see no key."""
  lengths, sizes, given = (OWN | CASES | MORE)[case]
  q, k, v = draw(*lengths, **sizes)
  given = dict(given)
  softcap, sinks = given.pop('softcap', None), given.pop('sink_logits', None)
  see = Visibility(**given).count_sinks()
  arrays = {'q': q, 'k': k, 'v': v, 'alibi': see.alibi, 'sink_logits': sinks}
  arrays['table'] = None if see.relative_bias is None else see.relative_bias.table
  arrays = {name: x for name, x in arrays.items() if x is not None}
  weights = [np.asarray(normal(q.shape, 3)), np.asarray(normal(q.shape[:3], 4))]
  got, want = found(arrays, see, softcap, weights, **options), exact(arrays, see, softcap, weights)
  np.testing.assert_array_equal(got.pop('seen'), want.pop('seen'))
  return {name: relative(got[name].astype(np.float64), want[name]) for name in want}


@pytest.mark.parametrize('case', [*FAST, *(slow(case) for case in OWN | CASES | MORE if case not in FAST)])
def test_values_and_gradients_are_those_of_float64(case):
  wrong = differences(case, blocks=(128, 64))
  assert max(wrong.values()) < 2e-6, wrong


@pytest.mark.slow
@pytest.mark.parametrize('blocks', [None, (64, 128), (16, 16)])
@pytest.mark.parametrize('case', OWN | CASES | MORE)
def test_blocks_do_not_change_the_answer(case, blocks):
  wrong = differences(case, blocks=blocks)
  assert max(wrong.values()) < 2e-6, wrong


def test_values_in_padding_do_not_leak():
  q, k, v = draw(256, batch=2)
  hole, options = jnp.asarray(ROW == 0)[:, :, None, None], {'causal': False, 'blocks': (128, 128), **packed(ROW)}
  gradients = jax.jit(jax.grad(lambda *x: attend(attention, *x, **options).sum(), (0, 1, 2)))
  for a, b in zip(gradients(q, k, v), gradients(q, *(jnp.where(hole, jnp.nan, x) for x in (k, v))), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize('sharp', [4, 1])
def test_in_bfloat16_it_is_about_as_accurate_as_the_definition(sharp):
  q, *rest = draw(256, batch=2, dtype=jnp.bfloat16)
  arrays, weights = (q * jnp.bfloat16(sharp), *rest), normal(q.shape, 3)

  def everything(function, arrays, **options):
    run = jax.jit(lambda *x: attend(function, *x, causal=True, **packed(ROW), **options).astype(jnp.float32))
    out, back = jax.vjp(run, *arrays)
    return [np.asarray(x, np.float32) for x in (out, *back(weights))]

  truth = everything(reference.attention, tuple(x.astype(jnp.float32) for x in arrays))
  ours, definition = everything(attention, arrays, blocks=(64, 64)), everything(reference.attention, arrays)
  for limit, t, got, own in zip((2, 3, 3, 3), truth, ours, definition, strict=True):
    assert np.abs(got - t).max() <= limit * np.abs(own - t).max() + 1e-3


def specify(**options) -> scan.Spec:
  given = {'by_index': True, 'prefixed': False, 'softcap': None, 'bias': None} | options
  see = Visibility(causal=given.pop('causal'), window=given.pop('window', None), num_sinks=given.pop('num_sinks', 0))
  return scan.Spec(see=see, **({'q_length': 400, 'kv_length': 400, 'block_q': 96, 'block_kv': 64} | given))


@pytest.mark.parametrize(
  'options',
  [
    {'causal': True}, {'causal': False}, {'causal': True, 'window': 70}, {'causal': False, 'window': 70},
    {'causal': True, 'window': 40, 'num_sinks': 70}, {'causal': True, 'q_length': 90, 'window': 20},
  ],
)  # fmt: skip
def test_exactly_the_tiles_that_some_query_sees_are_visited(options):
  spec = specify(**options)
  at = np.arange(spec.q_length)[None], np.arange(spec.kv_length)[None]
  seen = visible(spec.see, at, (spec.q_length, spec.kv_length))[0]
  tiles = {(i // spec.block_q, j // spec.block_kv) for i, j in np.argwhere(seen).tolist()}
  assert sorted(map(tuple, spec.tiles().tolist())) == sorted(tiles)


@pytest.mark.parametrize('options', [{'prefixed': True}, {'by_index': False}])
def test_no_tile_is_left_out_where_indices_do_not_tell(options):
  assert len(specify(causal=True, **options).tiles()) == 5 * 7


def temporaries(length: int, heads: int = 2) -> float:
  """MiB of value and gradients of one causal packed row with T5's bias, compiled for this CPU."""
  shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)

  def loss(q, k, v, table, segments):
    options = {'q_segment_ids': segments, 'kv_segment_ids': segments, 'relative_bias': RelativeBias(table, False, 128)}
    return flash_attention(q, k, v, causal=True, implementation='blockwise', **options).sum()

  arrays, rows = (shape(1, length, heads, 64),) * 3, jax.ShapeDtypeStruct((1, length), jnp.int32)
  program = jax.jit(jax.grad(loss, (0, 1, 2, 3))).lower(*arrays, shape(32, heads), rows)
  return program.compile().memory_analysis().temp_size_in_bytes / 2**20


@pytest.mark.slow
def test_memory_is_linear_in_the_length():
  """q, k, v, the output and their gradients are 16 MiB each at 32k; one matrix of scores would be 8,192."""
  short, long = temporaries(8192), temporaries(32768)
  assert long < 250, long
  assert long < 4.2 * short, (short, long)


@pytest.mark.slow
def test_on_a_mesh_it_is_what_it_is_on_one_device():
  """Examples over `data`, heads over `tensor`, by the partitioner alone."""
  arrays, see = draw(64, batch=4, heads=4, kv_heads=2), Visibility(causal=True, **packed(np.stack([row(30, 34)] * 4)))
  see = dataclasses.replace(see, relative_bias=RelativeBias(normal((8, 4), 5), False, 32))
  loss = lambda q, k, v, see: jnp.square(attention(q, k, v, see, blocks=(32, 16))).sum()
  run = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), allow_int=True))
  mesh = jax.make_mesh((2, 2), ('data', 'tensor'), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
  place = NamedSharding(mesh, P('data', None, 'tensor'))
  spread = run(*(jax.device_put(x, place) for x in arrays), see)
  assert spread[1][0].sharding.is_equivalent_to(place, 4)
  of_numbers = lambda tree: [x for x in jax.tree.leaves(tree) if x.dtype == jnp.float32]
  for a, b in zip(*map(of_numbers, (spread, run(*arrays, see))), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


def test_auto_selects_it_on_a_cpu_for_long_rows_only():
  mesh = lambda kind: AbstractMesh(
    (1,), ('data',), abstract_device=AbstractDevice(device_kind=kind, num_cores=1, platform=kind)
  )
  with jax.sharding.use_abstract_mesh(mesh('cpu')):
    assert choose('auto', dropout=False, lengths=(LONG, LONG)) == 'reference'
    assert choose('auto', dropout=False, lengths=(LONG, LONG + 1)) == 'blockwise'
    for lacking in ('dropout', 'divided', 'position_scores'):
      options = {'dropout': False} | {lacking: True}
      instead = 'ring' if lacking == 'divided' else 'reference'
      assert choose('auto', **options, lengths=(2 * LONG, 2 * LONG)) == instead, lacking
      with pytest.raises(KernelError, match=r"^CONFIG: kernels.attention='blockwise' (has no|needs whole rows)"):
        choose('blockwise', **options)
  assert choose('auto', dropout=False, lengths=(2 * LONG, 2 * LONG)) == 'reference', 'no mesh'


def test_it_runs_on_any_platform():
  for kind in ('cpu', 'gpu', 'tpu'):
    device = AbstractDevice(device_kind=kind, num_cores=1, platform=kind)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ('data',), abstract_device=device)):
      assert choose('blockwise', dropout=False) == 'blockwise'
