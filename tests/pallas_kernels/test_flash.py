"""The kernels for TPU, in an interpreter, against the definition: values and gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels.attention import api, reference, tiles, toeplitz, tpu, tpu_kernels
from pallas_kernels.attention.api import choose, flash_attention
from pallas_kernels.attention.reference import RelativeBias
from pallas_kernels.errors import KernelError
from tests.pallas_kernels.attention_cases import SMALL, attend, compare, draw, normal, packed, prefixed, relative, row

ROW = np.stack([row(100, 30, 100, padding=26), row(156, 100)])
OTHER = np.stack([row(20, 60, 40, padding=8), row(100, 28)])
SHORT = np.stack([row(40, 30, padding=29), row(99)])  # end inside the only block
PREFIX = prefixed(ROW, (0, 20, 0, 70))
SLOPES = jnp.asarray([0.1, 0.01], jnp.float32)
SINKS = jnp.asarray([0.3, -1.0], jnp.float32)
V5E = AbstractDevice(device_kind='TPU v5 lite', num_cores=1, platform='tpu')
slow = lambda *values: pytest.param(*values, marks=pytest.mark.slow)


def bias(bidirectional: bool, max_distance: int = 64) -> dict:
  return {'relative_bias': RelativeBias(normal((16, 2), 5), bidirectional, max_distance)}


CASES = {
  'causal, lengths that no block divides': ((200,), {}, {'causal': True}),
  'full, keys shared': ((200, 140), {'heads': 4, 'kv_heads': 2}, {'causal': False}),
  'across packed rows': (
    (256, 128), {'batch': 2},
    {'causal': False, 'q_segment_ids': jnp.asarray(ROW), 'kv_segment_ids': jnp.asarray(OTHER)},
  ),
  'prefixes, a cap, sinks': (
    (256,), {'batch': 2, 'kv_heads': 1}, {'causal': True, 'softcap': 1.5, 'sink_logits': SINKS, **PREFIX}
  ),
  'window, first tokens, slopes': (
    (256,), {'batch': 2}, {'causal': True, 'window': 40, 'num_sinks': 3, 'alibi': SLOPES, **PREFIX}
  ),
  'bias, packed': ((256,), {'batch': 2}, {'causal': True, **packed(ROW), **bias(False)}),
  'bias of both sides': ((384, 384), {}, {'causal': False, **bias(True)}),
}  # fmt: skip
MORE = {
  'window of both sides': ((300,), {}, {'causal': False, 'window': 70}),
  'window, first tokens, by index': ((300,), {}, {'causal': True, 'window': 70, 'num_sinks': 5}),
  'slopes': ((256,), {}, {'causal': True, 'alibi': SLOPES}),
  'more queries than keys': ((256, 140), {}, {'causal': True}),
  'bias, prefixes, keys shared': ((256,), {'batch': 2, 'kv_heads': 1}, {'causal': True, **PREFIX, **bias(False)}),
  'all': (
    (256,), {'batch': 2},
    {'causal': True, 'softcap': 1.5, 'sink_logits': SINKS, 'window': 90, 'num_sinks': 3, **PREFIX, **bias(False)},
  ),
}  # fmt: skip
# Arrays that end inside the only block; a ring could not divide them.
ENDING = {
  'short rows, a bias, a cap': ((99,), {'batch': 2}, {'causal': True, 'softcap': 1.5, **packed(SHORT), **bias(False)}),
  'short queries, keys of two blocks': ((114, 200), {}, {'causal': False, **bias(True)}),
  'queries of two blocks, short keys': ((200, 60), {'heads': 4}, {'causal': False, 'sink_logits': jnp.ones(4)}),
  'short rows by index': ((50,), {}, {'causal': True, 'window': 30}),
}  # fmt: skip
SQUARE = tpu.Blocks(q=256, kv=256, compute=128)  # its diagonal tiles are cut into pieces of keys
STRIPS = tpu.Blocks(q=256, kv=256, compute=256)  # these are cut into strips of queries
LARGE = {'bias, packed': STRIPS, 'causal, lengths that no block divides': SQUARE}
MANY = [SMALL, tpu.Blocks(q=128, kv=256, compute=128), tpu.Blocks(q=256, kv=128, compute=128), SQUARE, STRIPS]


@pytest.mark.parametrize('case', [*CASES, *ENDING, *(slow(case) for case in MORE)])
def test_it_is_the_definition_in_values_and_gradients(case):
  lengths, sizes, options = (CASES | MORE | ENDING)[case]
  differences = compare(draw(*lengths, **sizes), options, LARGE.get(case, SMALL))
  assert max(differences.values()) < 3e-6, differences


@pytest.mark.slow
def test_sinks_of_packed_documents_are_those_of_the_definition():
  """Through the op, which gives kernels the positions inside segments."""
  q, k, v = draw(256, batch=2)
  options = {'causal': True, 'window': 20, 'num_sinks': 3, **packed(ROW)}
  found, expected = (flash_attention(q, k, v, implementation=name, **options) for name in ('interpret', 'reference'))
  np.testing.assert_allclose(found, expected, atol=3e-6)
  without = flash_attention(q, k, v, implementation='reference', **options | {'num_sinks': 0})
  assert np.abs(without - expected).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize('blocks', MANY, ids=['small', 'wide', 'tall', 'square', 'strips'])
@pytest.mark.parametrize('case', CASES | MORE | ENDING)
def test_blocks_do_not_change_the_answer(case, blocks):
  lengths, sizes, options = (CASES | MORE | ENDING)[case]
  differences = compare(draw(*lengths, **sizes), options, blocks)
  assert max(differences.values()) < 3e-6, differences


@pytest.mark.slow
def test_rows_whose_lists_of_tiles_do_not_fit_together_run_one_after_another(monkeypatch):
  monkeypatch.setattr(tpu, 'WORDS_AT_ONCE', 4)
  lengths, sizes, options = CASES['bias, packed']
  differences = compare(draw(*lengths, **sizes), options)
  assert max(differences.values()) < 3e-6, differences


def simulated(length: int = 256, **options) -> dict[str, float]:
  """`compare` of a row with a bias, in the interpreter that simulates memories and two cores that share the heads."""
  params = pltpu.InterpretParams(detect_races=True, uninitialized_memory='nan', num_cores_or_threads=2)
  return compare(draw(length), {'causal': True, **bias(False), **options}, interpret=params)


def raced(capfd, caplog) -> bool:
  """The interpreter only reports a race as a line of output or of the log."""
  return 'RACE DETECTED' in ''.join(capfd.readouterr()) + caplog.text


@pytest.mark.slow
@pytest.mark.parametrize('segments', [ROW, SHORT], ids=['two blocks', 'ends inside the only block'])
def test_no_memory_is_read_before_it_is_written_and_there_are_no_races(segments, capfd, caplog):
  """Memory that was not written is NaN, and so is what lies behind the end of an array."""
  differences = simulated(segments.shape[1], **packed(segments[:1]))
  assert max(differences.values()) < 3e-6, differences
  assert not raced(capfd, caplog)


@pytest.mark.slow
def test_the_interpreter_reports_two_cores_on_one_block(monkeypatch):
  """A kernel whose tiles may run in parallel is wrong, and the interpreter must report it."""
  own = pltpu.CompilerParams
  wrong = lambda dimension_semantics, **options: own(('parallel',) * len(dimension_semantics), **options)
  monkeypatch.setattr(pltpu, 'CompilerParams', wrong)
  jax.clear_caches()
  with pytest.raises(jax.errors.JaxRuntimeError, match='Revisited block'):
    simulated()


def define(q, k, v, **options):
  return attend(reference.attention, q, k, v, **options)


def run(q, k, v, **options):
  return attend(tpu.attention, q, k, v, **options, blocks=SMALL, interpret=True)


def test_values_in_padding_do_not_leak():
  q, k, v = draw(256, batch=2)
  options = {'causal': False, **packed(ROW)}
  hole = jnp.asarray(ROW == 0)[:, :, None, None]
  for function in (run, define):
    gradients = jax.jit(jax.grad(lambda *x, f=function: f(*x, **options).sum(), (0, 1, 2)))
    clean, dirty = gradients(q, k, v), gradients(q, *(jnp.where(hole, jnp.nan, x) for x in (k, v)))
    for a, b in zip(clean, dirty, strict=True):
      np.testing.assert_array_equal(a, b)


def test_a_packed_document_has_the_result_of_the_document_alone_in_any_order():
  lengths, options = (100, 28, 128), {'causal': True, **bias(False)}
  q, k, v = draw(sum(lengths))
  packed_run = jax.jit(lambda q, k, v, ids: run(q, k, v, **options, q_segment_ids=ids, kv_segment_ids=ids))
  out = packed_run(q, k, v, jnp.asarray(row(*lengths))[None])
  starts = np.cumsum([0, *lengths])
  places = [np.arange(a, b) for a, b in itertools.pairwise(starts)]
  for own in places:
    alone = jax.jit(lambda *x: define(*x, **options))(*(x[:, own] for x in (q, k, v)))
    np.testing.assert_allclose(out[:, own], alone, atol=3e-6)
  order = np.concatenate([places[n] for n in (2, 0, 1)])
  moved = packed_run(*(x[:, order] for x in (q, k, v)), jnp.asarray(row(128, 100, 28))[None])
  np.testing.assert_allclose(moved, out[:, order], atol=3e-6)


def test_an_empty_prefix_is_causal_and_a_full_one_bidirectional():
  q, k, v = draw(256)
  at = jnp.arange(256, dtype=jnp.int32)[None]
  prefixed_run = jax.jit(lambda end: run(q, k, v, causal=True, q_positions=at, kv_positions=at, prefix_end=end))
  for end, causal in ((0, True), (256, False)):
    want = define(q, k, v, causal=causal)
    np.testing.assert_allclose(prefixed_run(jnp.full((1, 256), end, jnp.int32)), want, atol=3e-6)


def test_the_running_kernel_computes_exactly_the_live_tiles(monkeypatch):
  """Counted in the running kernel, not in its list of tiles."""
  seen, own = [], tpu_kernels._forward_piece

  def counted(tile, piece):
    jax.debug.callback(lambda word: seen.append(int(word)), tile.word)
    own(tile, piece)

  monkeypatch.setattr(tpu_kernels, '_forward_piece', counted)
  q, k, v = draw(512, batch=1)
  ids = row(200, 56, 200, padding=56)[None]
  jax.block_until_ready(run(q, k, v, causal=True, **packed(ids)))
  jax.effects_barrier()
  live = {(0, 0), (1, 0), (1, 1), (2, 2), (3, 2), (3, 3)}  # of ten causal ones
  assert sorted(map(tiles.unpack, seen)) == sorted([*live, *live]), 'two heads'


@pytest.mark.parametrize('sharp', [4, slow(1)])
def test_in_bfloat16_it_is_about_as_accurate_as_the_definition(sharp):
  """Also with sharp scores, where rounding before the product shows."""
  q, *rest = draw(256, batch=2, dtype=jnp.bfloat16)
  arrays = (q * jnp.bfloat16(sharp), *rest)
  options = {'causal': True, **packed(ROW)}
  weights = normal(arrays[0].shape, 3)

  def everything(function, arrays):
    out, back = jax.vjp(jax.jit(lambda *x: function(*x, **options).astype(jnp.float32)), *arrays)
    return [np.asarray(x, np.float32) for x in (out, *back(weights))]

  truth = everything(define, tuple(x.astype(jnp.float32) for x in arrays))
  kernel, definition = everything(run, arrays), everything(define, arrays)
  for limit, t, got, own in zip((2, 3, 3, 3), truth, kernel, definition, strict=True):
    assert np.abs(got - t).max() <= limit * np.abs(own - t).max() + 1e-3


def exact_table_gradient(q, k, v, weights, bias: RelativeBias, causal: bool) -> np.ndarray:
  """In float64, because the gradient of the definition, in f32, differs from it by up to 9e-6."""
  q, k, v, weights, table = (np.asarray(x, np.float64) for x in (q, k, v, weights, bias.table))
  ahead = np.arange(k.shape[1])[None] - np.arange(q.shape[1])[:, None]
  bucket = np.asarray(
    reference.relative_position_bucket(
      jnp.asarray(ahead), buckets=len(table), bidirectional=bias.bidirectional, max_distance=bias.max_distance
    )
  )
  found = np.zeros_like(table)
  for b, h in np.ndindex(q.shape[0], q.shape[2]):
    scores = q[b, :, h] @ k[b, :, h].T / np.sqrt(q.shape[-1]) + table[bucket, h]
    p = np.exp(np.where(ahead <= 0, scores, -np.inf) if causal else scores)
    p /= p.sum(-1, keepdims=True)
    dp = weights[b, :, h] @ v[b, :, h].T
    ds = p * (dp - (p * dp).sum(-1, keepdims=True))
    found[:, h] += np.bincount(bucket.ravel(), ds.ravel(), minlength=len(table))
  return found


@pytest.mark.parametrize(
  ('causal', 'dtype', 'limit'),
  [slow(True, jnp.float32, 5e-6), slow(False, jnp.float32, 5e-6), slow(True, 'bfloat16', 1e-2)],
)
def test_the_gradient_of_the_bias_table_is_exact_and_includes_the_saturated_tiles(causal, dtype, limit, monkeypatch):
  arrays, options = draw(512, dtype=dtype), bias(not causal)['relative_bias']
  weights = normal(arrays[0].shape, 3)

  def loss(table):
    own = RelativeBias(table, options.bidirectional, options.max_distance)
    return (run(*arrays, causal=causal, relative_bias=own).astype(jnp.float32) * weights).sum()

  want = exact_table_gradient(*arrays, weights, options, causal)
  assert relative(np.asarray(jax.jit(jax.grad(loss))(options.table), np.float64), want) < limit
  if dtype == jnp.float32 and causal:
    monkeypatch.setattr(toeplitz, 'partial_sum', lambda x: jnp.zeros((8, 128), jnp.float32))
    jax.clear_caches()
    assert relative(np.asarray(jax.jit(jax.grad(loss))(options.table), np.float64), want) > 1e-2


def test_dropout_uses_the_reference_and_a_named_kernel_refuses_it():
  q, k, v = draw(8)
  keys = jax.random.split(jax.random.key(0), 1)
  with pytest.raises(ValueError, match=r"kernels.attention='interpret' has no attention dropout.*use 'auto'"):
    flash_attention(q, k, v, causal=True, dropout=(0.1, keys), implementation='interpret')
  flash_attention(q, k, v, causal=True, dropout=(0.1, keys), implementation='auto')


def test_rows_divided_over_the_mesh_use_the_ring():
  with pytest.raises(KernelError) as caught:
    choose('interpret', dropout=False, divided=True)
  assert str(caught.value) == (
    "CONFIG: kernels.attention='interpret' needs whole rows, which mesh.sequence > 1 divides: each device would do all "
    "of the work; use kernels.attention='ring', or mesh.sequence=1 with mesh.fsdp or mesh.tensor."
  )
  assert choose('reference', dropout=False, divided=True) == 'reference'
  assert choose('ring', dropout=True, shared=True, divided=True) == 'ring'
  for platform in ('tpu', 'cpu', 'gpu'):
    device = AbstractDevice(device_kind='one', num_cores=1, platform=platform)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ('data',), abstract_device=device)):
      assert choose('auto', dropout=True, shared=True, divided=True, relative_bias=True) == 'ring'
      assert choose('auto', dropout=True, divided=True) == 'reference'
      assert choose('auto', dropout=False, divided=True, position_scores=True) == 'reference'


def test_what_a_ring_lacks_is_named():
  with pytest.raises(KernelError) as caught:
    choose('ring', dropout=True, divided=True)
  assert str(caught.value) == (
    "CONFIG: kernels.attention='ring' has no attention dropout with a mask for each query, which model.dropout > 0 "
    "needs with model.dropout_sites='bert'; use 'auto' or 'reference', or model.dropout=0, or model.dropout_sites='t5'."
  )
  with pytest.raises(KernelError, match=r"^CONFIG: kernels.attention='ring' has no disentangled attention, which"):
    choose('ring', dropout=False, divided=True, position_scores=True)


def test_auto_selects_by_the_platform_of_the_mesh_and_logs_why_once(caplog, monkeypatch):
  caplog.set_level('INFO')
  monkeypatch.setattr(api, '_reported', set())
  mesh = jax.make_mesh((8,), ('data',))
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    assert [choose('auto', dropout=False) for _ in range(3)] == ['reference'] * 3
  assert [r.getMessage() for r in caplog.records].count('attention: reference (no kernel for cpu)') == 1
