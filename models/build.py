"""Config -> Model: a description, and pure functions of (params, batch)."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, assert_never

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import AbstractMesh, Mesh

from models import partition
from models.decoder import Decoder, DecoderConfig
from models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from models.specs import Tree, as_function, param_specs

ModelConfig = EncoderDecoderConfig | DecoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelsConfig:
  """Implementation of each op: 'auto' chooses by platform, a name that cannot run here fails."""

  attention: str = 'auto'
  linear_cross_entropy: str = 'auto'


@dataclasses.dataclass(frozen=True, eq=False)  # compared and hashed by identity: a static argument of jit
class Model:
  """`specs` describe the parameters; `bind(params)` is the module with arrays in it."""

  cfg: ModelConfig
  specs: Tree
  bind: Callable[[Tree], nnx.Module]
  mesh: Mesh | AbstractMesh | None

  def apply(self, params: Tree, batch: Mapping[str, Array], key: Array | None = None) -> tuple[Array, dict[str, Any]]:
    """(hidden states [batch, length, embed], aux). `key` already folds seed and step; None means no dropout."""
    with partition.on(self.mesh):
      return self.bind(params)(batch, key)

  def head(self, params: Tree) -> Array:
    """The weight [embed, vocab] that turns hidden states into logits."""
    return params['head']['kernel']

  def logits(self, params: Tree, hidden: Array) -> Array:
    """f32[…, vocab]."""
    head = self.head(params).astype(hidden.dtype)
    return jnp.matmul(hidden, head, preferred_element_type=jnp.float32)


def build(cfg: ModelConfig, kernels: KernelsConfig = KernelsConfig(), mesh: Mesh | AbstractMesh | None = None) -> Model:
  """A model without arrays. With a mesh, its activations are placed on it."""
  match cfg:
    case EncoderDecoderConfig():
      module = EncoderDecoder(cfg, kernels.attention)
    case DecoderConfig():
      module = Decoder(cfg, kernels.attention)
    case _:
      assert_never(cfg)
  return Model(cfg, param_specs(module), as_function(module), mesh)
