"""Tokens -> vectors, and vectors -> logits."""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from models.layers.dropout import Dropout, dropout
from models.layers.linear import Projections, linear
from models.layers.mlp import ACTIVATIONS, Activation
from models.layers.norm import NormConfig, make_norm
from models.partition import constrain
from models.specs import Normal, Orthogonal, Zeros, weight

EMBEDDING_SITE = 30


class Rotation(nnx.Module):
  """x P with a learned square P, orthogonal at first: lengths of vectors are the same, and what a table or a head puts
  on a few features is spread over all. Source: EmbProj of Park et al. 2025, arXiv:2506.19697; its code,
  example_modeling_flax.py.
  """

  def __init__(self, embed: int):
    self.kernel = weight((embed, embed), ('embed', 'mlp'), Orthogonal())  # axes as in EmbeddingProjection

  def __call__(self, x: Array) -> Array:
    return constrain(linear(x, self.kernel), 'batch', 'length', 'embed')


class Embedding(nnx.Module):
  """A row of `table` for each token. T5X draws it at `std` 1.0, for Adafactor, whose updates grow with the parameter.

  A norm follows, so the first output is the same at any `std`. Adam's updates have one size, so it moves a small table
  faster. With `max_positions`, a learned vector for each position is added (Gehring et al. 2017, arXiv:1705.03122;
  GPT-2, BERT). Encoder and decoder share this table, as they share that of tokens; a position beyond it gives NaN.
  `rotated`: a `Rotation` follows.
  """

  def __init__(
    self, vocab: int, embed: int, *, drop: Dropout, std: float, max_positions: int | None = None, rotated: bool = False
  ):
    self.rotation = Rotation(embed) if rotated else None
    self.table = weight((vocab, embed), ('vocab', 'embed'), Normal(std))
    self.positions = None if max_positions is None else weight((max_positions, embed), ('length', 'embed'), Normal(std))
    self.drop = drop

  def __call__(self, tokens: Array, positions: Array, dtype, keys: Array | None) -> Array:
    # Gathered over fsdp before the lookup: a table split along the features would leave the batch unsplit.
    table = constrain(self.table[...].astype(dtype), 'vocab', None)
    x = jnp.take(table, tokens, axis=0)
    if self.positions is not None:
      x = x + jnp.take(constrain(self.positions[...].astype(dtype), None, None), positions, axis=0)
    x = constrain(x, 'batch', 'length', 'embed')
    x = x if self.rotation is None else self.rotation(x)
    return dropout(x, self.drop.outer, keys, EMBEDDING_SITE, shared=self.drop.shared)


class EmbeddingProjection(nnx.Module):
  """dense(x): embeddings of another width than the blocks. Source: google-research/electra modeling.py; ALBERT (Lan et
  al. 2019, arXiv:1909.11942, §3.1)."""

  def __init__(self, size: int, embed: int, projections: Projections):
    # The second dim is `mlp`: `tensor` divides it, as it divides that of any matrix, while fsdp divides the first.
    self.kernel = weight((size, embed), ('embed', 'mlp'), projections.init('embed'))
    self.bias = projections.make_bias((embed,), ('mlp',), 'head')

  def __call__(self, x: Array) -> Array:
    return constrain(linear(x, self.kernel, self.bias), 'batch', 'length', 'embed')


class HeadTransform(nnx.Module):
  """N(activation(dense(x))), which BERT puts before the head: [..., embed] -> [..., size].

  Without `norm`, activation(dense(x)), as ELECTRA's discriminator has it. Source: google-research/bert
  run_pretraining.py; google-research/electra run_pretraining.py, _get_discriminator_output.
  """

  def __init__(self, embed: int, size: int, activation: Activation, norm: NormConfig | None, projections: Projections):
    self.kernel = weight((embed, size), ('embed', 'mlp'), projections.init('embed'))  # as in EmbeddingProjection
    self.bias = projections.make_bias((size,), ('mlp',), 'head')
    self.norm, self.activation = None if norm is None else make_norm(size, norm), activation

  def __call__(self, x: Array) -> Array:
    hidden = constrain(ACTIVATIONS[self.activation](linear(x, self.kernel, self.bias)), 'batch', 'length', 'embed')
    return hidden if self.norm is None else self.norm(hidden)


class Head(nnx.Module):
  """The projection to logits where it is not the embedding's table (untied), as in T5 v1.1 and Llama.

  At `scale` 1.0 (T5X's) the first logits have unit variance and the first loss is ln(vocabulary) + 0.5; a smaller scale
  brings it nearer to ln(vocabulary). `bias` is added to the logits (BERT); with `init` None there is only that.
  """

  def __init__(self, embed: int, outputs: int, init: Normal | None, *, bias: bool, axis: str = 'vocab'):
    self.kernel = None if init is None else weight((embed, outputs), ('embed', axis), init)
    self.bias = weight((outputs,), (axis,), Zeros()) if bias else None
