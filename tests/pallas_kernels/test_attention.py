"""The definition of attention: its mask against a plain loop, its limits, its buckets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention.api import RelativeBias, flash_attention
from pallas_kernels.attention.reference import relative_position_bucket
from pallas_kernels.errors import KernelError

B, T, H, D = 2, 9, 4, 8
RNG = np.random.default_rng(0)
SEGMENTS = np.array([[1] * 4 + [2] * 5, [1] * 6 + [2] * 2 + [0]], np.int32)
POSITIONS = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 0, 1, 0]], np.int32)
PREFIX = np.where(SEGMENTS == 1, 3, 0).astype(np.int32)


def draw(kv_heads=H, dtype=np.float32):
  return (jnp.asarray(RNG.normal(size=(B, T, n, D)), dtype) for n in (H, kv_heads, kv_heads))


def by_loop(q, k, v, visible):
  """Softmax attention, query by query, in float64; 0 for a query without a visible key."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.zeros_like(q)
  for b, i, h in np.ndindex(B, T, H):
    seen = [j for j in range(T) if visible(b, i, j)]
    if seen:
      weights = np.exp(k[b, seen, h] @ q[b, i, h] / np.sqrt(D))
      out[b, i, h] = weights @ v[b, seen, h] / weights.sum()
  return out


def same_segment(b, i, j):
  return SEGMENTS[b, i] == SEGMENTS[b, j] != 0


CASES = {
  'full': ({'causal': False}, lambda b, i, j: True),
  'causal': ({'causal': True}, lambda b, i, j: j <= i),
  'packed': (
    {'causal': True, 'q_segment_ids': SEGMENTS, 'kv_segment_ids': SEGMENTS},
    lambda b, i, j: same_segment(b, i, j) and j <= i,
  ),
  'prefix': (
    {'causal': True, 'q_segment_ids': SEGMENTS, 'kv_segment_ids': SEGMENTS, 'q_positions': POSITIONS,
     'kv_positions': POSITIONS, 'prefix_end': PREFIX},
    lambda b, i, j: same_segment(b, i, j) and (POSITIONS[b, j] <= POSITIONS[b, i] or POSITIONS[b, j] < PREFIX[b, j]),
  ),
  'window': ({'causal': True, 'window': 3}, lambda b, i, j: i - 3 < j <= i),
  'window of everything': ({'causal': False, 'window': T}, lambda b, i, j: True),
  'window and sinks': ({'causal': True, 'window': 2, 'num_sinks': 1}, lambda b, i, j: j <= i and (j > i - 2 or j < 1)),
  'sinks of packed documents': (
    {'causal': True, 'window': 2, 'num_sinks': 1, 'q_segment_ids': SEGMENTS, 'kv_segment_ids': SEGMENTS},
    lambda b, i, j: same_segment(b, i, j) and j <= i and (j > i - 2 or j == list(SEGMENTS[b]).index(SEGMENTS[b, i])),
  ),
}  # fmt: skip


@pytest.mark.parametrize('case', CASES)
def test_it_is_softmax_over_the_visible_keys(case):
  options, visible = CASES[case]
  q, k, v = draw()
  np.testing.assert_allclose(flash_attention(q, k, v, **options), by_loop(q, k, v, visible), atol=2e-6)


def test_a_query_without_a_visible_key_gives_zero_and_finite_gradients():
  q, k, v = draw()
  options = {'causal': True, 'q_segment_ids': SEGMENTS, 'kv_segment_ids': SEGMENTS, 'return_lse': True}
  out, lse = flash_attention(q, k, v, **options)
  assert (np.asarray(out)[1, 8] == 0).all()
  assert (np.asarray(lse)[1, 8] == -np.inf).all()
  grads = jax.grad(lambda *x: flash_attention(*x, **options)[0].sum(), (0, 1, 2))(q, k, v)
  assert all(np.isfinite(g).all() for g in grads)


def test_shared_keys_equal_repeated_keys():
  q, k, v = draw(kv_heads=2)
  wide = flash_attention(q, jnp.repeat(k, 2, 2), jnp.repeat(v, 2, 2), causal=True)
  np.testing.assert_allclose(flash_attention(q, k, v, causal=True), wide, atol=2e-6)


def test_a_constant_bias_table_changes_nothing_and_its_gradient_sums_to_zero():
  q, k, v = draw()
  plain = flash_attention(q, k, v, causal=True)

  def biased(table):
    return flash_attention(q, k, v, causal=True, relative_bias=RelativeBias(table, bidirectional=False, max_distance=8))

  np.testing.assert_allclose(biased(jnp.full((8, H), 0.7)), plain, atol=2e-6)
  table = jnp.asarray(RNG.normal(size=(8, H)), jnp.float32)
  assert np.abs(biased(table) - plain).max() > 1e-2
  gradient = jax.grad(lambda t: jnp.square(biased(t)).sum())(table)
  np.testing.assert_allclose(gradient.sum(0), 0, atol=1e-5)


def test_a_sink_logit_takes_part_in_the_softmax_and_a_softcap_changes_scores():
  q, k, v = draw()
  plain, lse = flash_attention(q, k, v, causal=True, return_lse=True)
  sunk = flash_attention(q, k, v, causal=True, sink_logits=jnp.zeros(H))
  np.testing.assert_allclose(sunk, plain * jax.nn.sigmoid(lse)[..., None], atol=2e-6)
  np.testing.assert_allclose(flash_attention(q, k, v, causal=True, softcap=1e4), plain, atol=1e-4)
  assert np.abs(flash_attention(q, k, v, causal=True, softcap=0.1) - plain).max() > 1e-2


def test_alibi_is_a_bias_by_distance():
  q, k, v = draw()
  slopes = jnp.asarray([0.0, 50.0, 0.0, 50.0], jnp.float32)
  out = flash_attention(q, k, v, causal=True, alibi=slopes)
  np.testing.assert_allclose(out[:, :, 0], flash_attention(q, k, v, causal=True)[:, :, 0], atol=2e-6)
  np.testing.assert_allclose(out[:, :, 1], v[:, :, 1], atol=1e-3, err_msg='a steep slope leaves the token itself')


def test_dropout_keeps_the_mean():
  q, k, v = draw()
  keys = jax.vmap(lambda i: jax.vmap(lambda b: jax.random.fold_in(jax.random.key(i), b))(jnp.arange(B)))(
    jnp.arange(400)
  )
  many = jax.vmap(lambda key: flash_attention(q, k, v, causal=False, dropout=(0.3, key)))(keys)
  np.testing.assert_allclose(many.mean(0), flash_attention(q, k, v, causal=False), atol=0.15)
  assert many.std(0).max() > 0.05


def bucket_by_formula(distance, buckets, bidirectional, max_distance):
  """Raffel et al.'s buckets, one number at a time."""
  base = 0
  if bidirectional:
    buckets //= 2
    base, distance = (buckets, distance) if distance > 0 else (0, -distance)
  else:
    distance = max(-distance, 0)
  exact = buckets // 2
  if distance < exact:
    return base + distance
  far = exact + int(np.log(distance / exact) / np.log(max_distance / exact) * (buckets - exact))
  return base + min(far, buckets - 1)


@pytest.mark.parametrize('bidirectional', [True, False])
def test_buckets_are_t5s(bidirectional):
  distance = np.arange(-300, 301)
  got = relative_position_bucket(jnp.asarray(distance), buckets=32, bidirectional=bidirectional, max_distance=128)
  expected = [bucket_by_formula(int(d), 32, bidirectional, 128) for d in distance]
  np.testing.assert_array_equal(got, expected)
  own = relative_position_bucket(distance, buckets=32, bidirectional=bidirectional, max_distance=128)
  assert type(own) is np.ndarray
  np.testing.assert_array_equal(own, expected)


@pytest.mark.parametrize(('buckets', 'max_distance'), [(8, 200), (16, 800), (32, 800), (32, 128)])
def test_numpy_and_jax_compute_the_same_buckets(buckets, max_distance):
  """Where bucket borders are whole numbers, a different logarithm would move them."""
  distance = np.arange(-2 * max_distance, 2 * max_distance)
  for bidirectional in (True, False):
    options = {'buckets': buckets, 'bidirectional': bidirectional, 'max_distance': max_distance}
    count = jax.jit(lambda x, options=options: relative_position_bucket(x, **options))
    np.testing.assert_array_equal(count(jnp.asarray(distance)), relative_position_bucket(distance, **options))


MISFITS = {
  'heads not a multiple of kv_heads': (((B, T, 3, D), (B, T, 2, D), (B, T, 2, D)), {}, r'q\(2, 9, 3, 8\), k\(2, 9, 2'),
  'keys without values': (((B, T, 2, D), (B, T, 2, D), (B, 7, 2, D)), {}, r'v\(2, 7, 2, 8\); pass q\[batch, T, heads'),
  'slopes for other heads': (((B, T, 4, D),) * 3, {'alibi': jnp.ones(2)}, r'alibi with heads \(2,\); pass one number'),
  'a sink and a table for other heads': (
    ((B, T, 4, D),) * 3,
    {'sink_logits': jnp.ones(1), 'relative_bias': RelativeBias(jnp.ones((8, 2)), False, 64)},
    r'sink_logits with heads \(1,\), relative_bias.table with heads \(2,\)',
  ),
  'a max_distance inside the exact buckets': (
    ((B, T, 4, D),) * 3, {'relative_bias': RelativeBias(jnp.ones((32, 4)), False, 16)},
    'max_distance=16 with a table of 32 buckets, which have 16 single distances .* pass a max_distance above 16',
  ),
}  # fmt: skip


@pytest.mark.parametrize('implementation', ['reference', 'interpret', 'triton'])
@pytest.mark.parametrize('case', MISFITS)
def test_arrays_that_do_not_fit_each_other_are_refused(case, implementation):
  """A kernel would read past the end of an array and return wrong values without an error."""
  shapes, options, message = MISFITS[case]
  arrays = [jnp.ones(shape) for shape in shapes]
  with pytest.raises(KernelError, match=message):
    flash_attention(*arrays, causal=True, **options, implementation=implementation)


@pytest.mark.parametrize('given', [('q',), ('kv',), ('q', 'kv')])
def test_a_kernel_with_a_relative_bias_refuses_positions_that_are_not_indices(given):
  """In a decoding step, a kernel would use the distance between neighbours for that to key 0."""
  q, k, v = draw()
  at = {'q': jnp.full((B, 1), T - 1), 'kv': jnp.arange(T)[None]}
  options = {f'{side}_positions': at[side] for side in given}
  options |= {'relative_bias': RelativeBias(jnp.ones((8, H)), False, 64), 'causal': True}
  message = f"'interpret' reads a relative bias.*{given[-1]}_positions for 1 queries and 9"
  with pytest.raises(KernelError, match=message):
    flash_attention(q[:, :1], k, v, **options, implementation='interpret')
  flash_attention(q[:, :1], k, v, **options, implementation='reference')


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ({'implementation': 'fast'}, "kernels.attention='fast' is not one of 'auto', 'reference', 'tpu', 'interpret'"),
    ({'q_segment_ids': SEGMENTS}, 'segment ids of one side only'),
  ],
)
def test_an_unknown_implementation_and_one_sided_segments_are_refused(options, message):
  q, k, v = draw()
  with pytest.raises(ValueError, match=message):
    flash_attention(q, k, v, causal=True, **options)
