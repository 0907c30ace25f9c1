"""Tokens -> vectors, and vectors -> logits."""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from models.layers.dropout import Sites, dropout
from models.layers.linear import Projections, linear
from models.layers.mlp import ACTIVATIONS, Activation
from models.layers.norm import NormConfig, make_norm
from models.partition import constrain
from models.specs import Normal, Zeros, weight

EMBEDDING_SITE = 30


class Embedding(nnx.Module):
  """A row of `table` for each token. T5X draws it at `std` 1.0, for Adafactor, whose updates grow with the parameter.

  A norm follows, so the first output is the same at any `std`. Adam's updates have one size, so it moves a small table
  faster. With `max_positions`, a learned vector for each position is added (Gehring et al. 2017, arXiv:1705.03122;
  GPT-2, BERT). Encoder and decoder share this table, as they share that of tokens; a position beyond it gives NaN.
  """

  def __init__(
    self, vocab: int, embed: int, *, rate: float, std: float, max_positions: int | None = None, sites: Sites = 't5'
  ):
    self.table = weight((vocab, embed), ('vocab', 'embed'), Normal(std))
    self.positions = None if max_positions is None else weight((max_positions, embed), ('length', 'embed'), Normal(std))
    self.rate, self.sites = rate, sites

  def __call__(self, tokens: Array, positions: Array, dtype, keys: Array | None) -> Array:
    # Gathered over fsdp before the lookup: a table split along the features would leave the batch unsplit.
    table = constrain(self.table[...].astype(dtype), 'vocab', None)
    x = jnp.take(table, tokens, axis=0)
    if self.positions is not None:
      x = x + jnp.take(constrain(self.positions[...].astype(dtype), None, None), positions, axis=0)
    x = constrain(x, 'batch', 'length', 'embed')
    return dropout(x, self.rate, keys, EMBEDDING_SITE, self.sites)


class EmbeddingProjection(nnx.Module):
  """Embeddings of `width` -> `embed` features. Source: google-research/electra model/modeling.py, embedding_output."""

  def __init__(self, width: int, embed: int, projections: Projections):
    # The second dim is `mlp`: `tensor` divides it, as it divides that of any matrix, while fsdp divides the first.
    self.kernel = weight((width, embed), ('embed', 'mlp'), projections.init('embed'))
    self.bias = weight((embed,), ('mlp',), Zeros())

  def __call__(self, x: Array) -> Array:
    return constrain(linear(x, self.kernel, self.bias), 'batch', 'length', 'embed')


class HeadTransform(nnx.Module):
  """N(activation(dense(x))) with `width` features, which BERT puts before the head; without `norm` that is left out.

  Sources: google-research/bert run_pretraining.py; google-research/electra pretrain/pretrain_helpers.py (the
  discriminator's has no norm).
  """

  def __init__(self, embed: int, width: int, activation: Activation, norm: NormConfig | None, projections: Projections):
    self.kernel = weight((embed, width), ('embed', 'mlp'), projections.init('embed'))
    self.bias = projections.make_bias((width,), ('mlp',), 'head')
    self.norm, self.activation = None if norm is None else make_norm(width, norm), activation

  def __call__(self, x: Array) -> Array:
    hidden = ACTIVATIONS[self.activation](linear(x, self.kernel, self.bias))
    hidden = constrain(hidden, 'batch', 'length', 'embed')
    return hidden if self.norm is None else self.norm(hidden)


class Head(nnx.Module):
  """The projection to logits where it is not the embedding's table (untied), as in T5 v1.1 and Llama.

  At `scale` 1.0 (T5X's) the first logits have unit variance and the first loss is ln(vocabulary) + 0.5; a smaller scale
  brings it nearer to ln(vocabulary). `bias` is added to the logits (BERT); with `init` None there is only that.
  """

  def __init__(self, embed: int, vocab: int, init: Normal | None, *, bias: bool):
    self.kernel = None if init is None else weight((embed, vocab), ('embed', 'vocab'), init)
    self.bias = weight((vocab,), ('vocab',), Zeros()) if bias else None


class BinaryHead(nnx.Module):
  """The projection to one logit for each token: whether it was replaced. Source: Clark et al. 2020 (ELECTRA),
  arXiv:2003.10555, §2.
  """

  def __init__(self, embed: int, projections: Projections):
    self.kernel = weight((embed, 1), ('embed', 'outputs'), projections.init('embed'))
    self.bias = weight((1,), ('outputs',), Zeros())
