"""The loss of a linear head, against optax and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pallas_kernels.linear_cross_entropy.api import linear_cross_entropy

RNG = np.random.default_rng(0)
X, W = (jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in ((20, 8), (8, 50)))
LABELS = jnp.asarray(RNG.integers(0, 50, 20), jnp.int32)


def test_loss_and_gradients_equal_optax():
  def theirs(x, w):
    return optax.softmax_cross_entropy_with_integer_labels(x @ w, LABELS).sum()

  def ours(x, w, labels=LABELS):
    return linear_cross_entropy(x, w, labels)[0].sum()

  np.testing.assert_allclose(ours(X, W), theirs(X, W), rtol=1e-6)
  for a, b in zip(jax.grad(ours, (0, 1))(X, W), jax.grad(theirs, (0, 1))(X, W), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
  assert abs(float(ours(X, W, (LABELS + 1) % 50) - theirs(X, W))) > 0.1, 'other labels must change the loss'


def test_correct_and_lse():
  _, lse, correct = linear_cross_entropy(X, W, LABELS)
  np.testing.assert_array_equal(correct, (X @ W).argmax(-1) == LABELS)
  np.testing.assert_allclose(lse, jax.nn.logsumexp(X @ W, -1), rtol=1e-6)
  assert linear_cross_entropy(X, W, (X @ W).argmax(-1))[2].all()


def test_z_loss_smoothing_and_cap():
  plain, lse, _ = linear_cross_entropy(X, W, LABELS)
  np.testing.assert_allclose(linear_cross_entropy(X, W, LABELS, z_loss=0.1)[0], plain + 0.1 * lse**2, rtol=1e-5)
  smooth = linear_cross_entropy(X, W, LABELS, label_smoothing=0.2)[0]
  targets = 0.8 * jax.nn.one_hot(LABELS, 50) + 0.2 / 50
  np.testing.assert_allclose(smooth, optax.softmax_cross_entropy(X @ W, targets), rtol=1e-5)
  capped = linear_cross_entropy(X, W, LABELS, softcap=2.0)[0]
  expected = optax.softmax_cross_entropy_with_integer_labels(2 * jnp.tanh(X @ W / 2), LABELS)
  np.testing.assert_allclose(capped, expected, rtol=1e-5)


def test_an_unknown_implementation_is_refused():
  with pytest.raises(ValueError, match=r"kernels\.linear_cross_entropy='x' is not one of 'auto', 'reference'"):
    linear_cross_entropy(X, W, LABELS, implementation='x')


@pytest.mark.parametrize(('softcap', 'number'), [(None, 1), (30.0, 0)])
def test_the_gradient_of_x_waits_for_that_of_w(softcap, number):
  """So that layers below go backwards when the logits are gone; not with capped logits, which would need more."""
  x, w, labels = jnp.ones((8, 4)), jnp.ones((4, 16)), jnp.zeros(8, jnp.int32)
  loss = lambda x, w: linear_cross_entropy(x, w, labels, softcap=softcap, implementation='reference')[0].sum()
  text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, w).as_text()
  barriers = [line for line in text.splitlines() if 'optimization_barrier' in line]
  assert len(barriers) == number
  assert all('tensor<8x4xf32>, tensor<4x16xf32>' in line for line in barriers)
