"""`linear_cross_entropy`: the head's product and the loss as one op, so that a kernel can avoid writing the logits."""

from jax import Array

from pallas_kernels import tuned
from pallas_kernels.linear_cross_entropy import chunked, reference

IMPLEMENTATIONS = {'reference': reference.linear_cross_entropy, 'chunked': chunked.linear_cross_entropy}
# chip -> the (tokens, words) of a device for which 'chunked' takes at most 1.02 times the cycles of the reference, as
# libtpu 0.0.42 estimates both at a width of 4,096 (scripts/bench/head/cross_entropy.py; table in docs/LOG.md). Larger
# ones need several parts, whose gradients of w are added up, for 3% more cycles.
FASTER = {'v5p': ((32768, 65536),)}


def choose(implementation: str, tokens: int = 0, vocab: int = 0) -> str:
  """The implementation to run for so many tokens and words of a device; 'auto' is 'chunked' on chips and for shapes
  where it takes as few cycles, and 'reference' elsewhere.

  Raises ValueError for an implementation that does not exist.
  """
  if implementation not in ('auto', *IMPLEMENTATIONS):
    known = ', '.join(repr(n) for n in IMPLEMENTATIONS)
    raise ValueError(f"kernels.linear_cross_entropy='{implementation}' is not one of 'auto', {known}.")
  if implementation != 'auto':
    return implementation
  chip = tuned.chip_of(tuned.device_kind()) or ''
  return 'chunked' if (tokens, vocab) in FASTER.get(chip, ()) else 'reference'


def linear_cross_entropy(
  x: Array,
  w: Array,
  labels: Array,
  *,
  bias: Array | None = None,
  z_loss: float = 0.0,
  softcap: float | None = None,
  label_smoothing: float = 0.0,
  implementation: str = 'auto',
) -> tuple[Array, Array, Array]:
  """Losses of x[tokens, embed] w[embed, vocab] against labels[tokens], f32: (loss, lse, correct), each [tokens].

  Logits are x w + bias[vocab]; `softcap` c bends them to c tanh(logits / c). loss = cross entropy + z_loss * lse^2;
  `correct`: whether the label has the largest logit; `label_smoothing` spreads that share of the target over the
  vocabulary.

  Raises ValueError for an implementation that does not exist.
  """
  return IMPLEMENTATIONS[choose(implementation)](
    x, w, labels, bias=bias, z_loss=z_loss, softcap=softcap, label_smoothing=label_smoothing
  )  # fmt: skip
