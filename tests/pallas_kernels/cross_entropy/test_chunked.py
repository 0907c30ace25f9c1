"""The loss in chunks against float64 and on meshes: values, gradients, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from models import partition
from pallas_kernels import tuned
from pallas_kernels.linear_cross_entropy import chunked, reference
from pallas_kernels.linear_cross_entropy.api import choose, linear_cross_entropy
from pretrain.step.loss import weighed

RNG = np.random.default_rng(0)
ROWS, LENGTH, EMBED, VOCAB = 4, 10, 8, 64
X, W, BIAS = (RNG.normal(size=shape).astype(np.float32) for shape in ((ROWS, LENGTH, EMBED), (EMBED, VOCAB), (VOCAB,)))
LABELS = RNG.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
WEIGHTS = (RNG.uniform(size=(ROWS, LENGTH)) * (RNG.uniform(size=(ROWS, LENGTH)) > 0.2)).astype(np.float32)
PLAIN = {'z_loss': 0.0, 'softcap': None, 'label_smoothing': 0.0}
EVERYTHING = {'z_loss': 0.1, 'softcap': 2.0, 'label_smoothing': 0.1}
AXES = ('replica', 'data', 'fsdp', 'sequence', 'tensor', 'expert', 'stage')
ROOM = {'float32': 5e-7, 'bfloat16': 2**-7}
DEFINITION = functools.partial(linear_cross_entropy, implementation='reference')


@functools.cache
def exact(everything: bool, dtype: str = 'float32') -> dict[str, np.ndarray]:
  """In float64 and numpy: total, loss, lse, and the gradients of the total to x, w and bias, of x and w in `dtype`."""
  x, w = (np.asarray(jnp.asarray(own, dtype), np.float64) for own in (X.reshape(-1, EMBED), W))
  o = EVERYTHING if everything else PLAIN
  weights, hot = WEIGHTS.reshape(-1, 1).astype(np.float64), np.eye(VOCAB)[LABELS.reshape(-1)]
  raw = x @ w + BIAS
  logits, slope = raw, 1.0
  if o['softcap'] is not None:
    logits = o['softcap'] * np.tanh(raw / o['softcap'])
    slope = 1 / np.cosh(raw / o['softcap']) ** 2
  lse = np.log(np.exp(logits).sum(-1, keepdims=True))
  target = (1 - o['label_smoothing']) * hot + o['label_smoothing'] / VOCAB
  loss = -(target * (logits - lse)).sum(-1, keepdims=True) + o['z_loss'] * lse**2
  softmax = np.exp(logits - lse)
  by_raw = weights * (softmax - target + 2 * o['z_loss'] * lse * softmax) * slope
  return {
    'total': (weights * loss).sum(), 'loss': loss[:, 0], 'lse': lse[:, 0],
    'x': by_raw @ w.T, 'w': x.T @ by_raw, 'bias': by_raw.sum(0),
  }  # fmt: skip


def found(total, everything: bool, arrays=(X, W, BIAS)) -> dict[str, np.ndarray]:
  """The same of `total(x, w, bias, **options)` -> (total, (loss, lse, correct))."""
  run = jax.value_and_grad(functools.partial(total, **(EVERYTHING if everything else PLAIN)), (0, 1, 2), has_aux=True)
  (value, (loss, lse, correct)), gradients = jax.jit(run)(*map(jnp.asarray, arrays))
  x, w = (np.asarray(own, np.float32) for own in arrays[:2])
  logits = x.reshape(-1, EMBED) @ w + BIAS
  np.testing.assert_array_equal(np.reshape(correct, -1), logits.argmax(-1) == LABELS.reshape(-1))
  own = {'total': value, 'loss': loss, 'lse': lse} | dict(zip(('x', 'w', 'bias'), gradients, strict=True))
  return {name: np.asarray(x, np.float64) for name, x in own.items()}


def worst(got: dict, want: dict) -> float:
  return np.max([np.abs(got[n].reshape(want[n].shape) - want[n]).max() / np.abs(want[n]).max() for n in want])


def of_tokens(function, x, w, bias, **options):
  losses = function(x.reshape(-1, EMBED), w, jnp.asarray(LABELS.reshape(-1)), bias=bias, **options)
  return (losses[0] * WEIGHTS.reshape(-1)).sum(), losses


def in_chunks(number, x, w, bias, **options):
  return chunked.weighed(x, w, jnp.asarray(LABELS), jnp.asarray(WEIGHTS), bias=bias, number=number, **options)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('everything', [False, True])
def test_it_is_as_exact_as_the_definition_in_values_and_gradients(everything, dtype):
  """In bfloat16 it also rounds the gradient of the logits that it holds: two roundings of at most 2^-9."""
  want, arrays = exact(everything, dtype), (jnp.asarray(X, dtype), jnp.asarray(W, dtype), BIAS)
  definition = worst(found(functools.partial(of_tokens, DEFINITION), everything, arrays), want)
  by_token = functools.partial(of_tokens, functools.partial(chunked.linear_cross_entropy, number=(1, 3)))
  forms = by_token, *(functools.partial(in_chunks, number) for number in ((1, 3), (3, 2)))
  for form in forms:
    assert worst(found(form, everything, arrays), want) < max(ROOM[dtype], 1.5 * definition), form


@pytest.mark.parametrize(
  'sizes', [{'fsdp': 2, 'sequence': 2, 'tensor': 2}, pytest.param({'data': 2, 'tensor': 2}, marks=pytest.mark.slow)]
)
def test_on_a_mesh_it_is_what_it_is_in_float64(sizes):
  """Tokens over rows and lengths, the vocabulary over `tensor`: 3 chunks in each of 2 parts of a device's tokens."""
  shape = [sizes.get(name, 1) for name in AXES]
  mesh = jax.make_mesh(
    shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=jax.devices()[: int(np.prod(shape))]
  )
  places = P(('data', 'fsdp'), 'sequence'), P('fsdp', 'tensor'), P('tensor')
  arrays = [jax.device_put(x, NamedSharding(mesh, place)) for x, place in zip((X, W, BIAS), places, strict=True)]

  def total(x, w, bias, **options):
    with partition.on(mesh):
      return weighed(x, w, jnp.asarray(LABELS), jnp.asarray(WEIGHTS), bias, number=(2, 3), **options)

  assert worst(found(total, True, arrays), exact(True)) < 1e-6


def temporaries(function, *number: int) -> float:
  """MiB of value and gradients for 2,048 tokens and 16,384 words; logits are 128 MiB in f32."""
  shape = lambda *dims: jax.ShapeDtypeStruct(dims, jnp.float32)
  tokens, more = 2048, {'number': number} if number else {}

  def loss(x, w, labels, weights):
    if function is chunked.weighed:
      return function(x, w, labels, weights, **PLAIN, **more)[0]
    return (function(x, w, labels, **PLAIN)[0] * weights).sum()

  arrays = shape(tokens, 16), shape(16, 16384), jax.ShapeDtypeStruct((tokens,), jnp.int32), shape(tokens)
  return jax.jit(jax.grad(loss, (0, 1))).lower(*arrays).compile().memory_analysis().temp_size_in_bytes / 2**20


def test_logits_are_held_for_one_chunk():
  assert temporaries(reference.linear_cross_entropy) >= 128
  assert temporaries(chunked.weighed, 4, 4) < 64


def test_auto_is_the_definition_on_cpus_so_that_losses_keep_their_bits():
  assert [choose(name) for name in ('auto', 'reference', 'chunked')] == ['reference', 'reference', 'chunked']
  assert choose('auto', 1 << 20, 1 << 20) == 'reference'


@pytest.mark.parametrize(
  ('kind', 'tokens', 'words', 'name'),
  [
    ('TPU v5', 32768, 65536, 'chunked'),
    ('TPU v5', 32767, 65536, 'reference'),
    ('TPU v5', 32768, 65535, 'reference'),
    ('TPU v5', 65536, 65536, 'reference'),  # in two parts, which take 3% more cycles
    ('TPU v5 lite', 32768, 65536, 'reference'),
    ('cpu', 32768, 65536, 'reference'),
  ],
)
def test_auto_is_chunked_where_it_was_compiled_with_as_few_cycles(monkeypatch, kind, tokens, words, name):
  monkeypatch.setattr(tuned, 'device_kind', lambda: kind)
  assert choose('auto', tokens, words) == name
  assert choose('reference', tokens, words) == 'reference'
