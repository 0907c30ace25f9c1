"""Config -> Model: a description, and pure functions of (params, batch)."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, assert_never

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import AbstractMesh, Mesh

from models import partition
from models.families.decoder import Decoder, DecoderConfig, check_decoder
from models.families.encoder import Encoder, EncoderConfig, check_encoder
from models.families.encoder_decoder import EncoderDecoder, EncoderDecoderConfig, check_encoder_decoder
from models.specs import Tree, as_function, param_specs
from pallas_kernels.attention import api as attention
from pallas_kernels.linear_cross_entropy import api as linear_cross_entropy

ModelConfig = EncoderDecoderConfig | DecoderConfig | EncoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelsConfig:
  """Implementation of each op: 'auto' chooses by platform; a name that cannot run here fails.

  `attention`: 'reference', 'tpu', 'interpret' ('tpu' in an interpreter: slow, on any platform), 'triton',
  'mosaic_gpu' or 'cudnn' (GPU; not yet tried there). Decoding with a cache uses the reference.
  """

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
    """The weight [embed, vocab] that turns hidden states into logits, before their bias and `cfg.logit_softcap`."""
    match self.cfg.head:
      case 'untied':
        return params['head']['kernel']
      case 'tied':
        return params['embedding']['table'].T
      case 'tied_scaled':
        return params['embedding']['table'].T * self.cfg.embed**-0.5

  def head_bias(self, params: Tree) -> Array | None:
    """f32[vocab], added to the logits before `cfg.logit_softcap`."""
    return params['head']['bias'] if self.cfg.head_bias else None

  def logits(self, params: Tree, hidden: Array) -> Array:
    """f32[…, vocab]."""
    head = self.head(params).astype(hidden.dtype)
    logits, cap = jnp.matmul(hidden, head, preferred_element_type=jnp.float32), self.cfg.logit_softcap
    if self.cfg.head_bias:
      logits = logits + self.head_bias(params)
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def check_model(cfg: ModelConfig) -> None:
  """Raises ValueError for sizes that do not fit each other; the fields themselves state their ranges."""
  match cfg:
    case EncoderDecoderConfig():
      check_encoder_decoder(cfg)
    case DecoderConfig():
      check_decoder(cfg)
    case EncoderConfig():
      check_encoder(cfg)
    case _:
      assert_never(cfg)


def check_kernels(cfg: KernelsConfig) -> None:
  """Raises ValueError for an implementation that does not exist; one that cannot run here fails when called."""
  ops = {'attention': attention, 'linear_cross_entropy': linear_cross_entropy}
  for name, op in ops.items():
    given, known = getattr(cfg, name), ('auto', *op.IMPLEMENTATIONS)
    if given not in known:
      raise ValueError(f'kernels.{name}={given!r} is not one of {", ".join(map(repr, known))}.')


def build(cfg: ModelConfig, kernels: KernelsConfig = KernelsConfig(), mesh: Mesh | AbstractMesh | None = None) -> Model:
  """A model without arrays. With a mesh, its activations are placed on it."""
  match cfg:
    case EncoderDecoderConfig():
      module = EncoderDecoder(cfg, kernels.attention)
    case DecoderConfig():
      module = Decoder(cfg, kernels.attention)
    case EncoderConfig():
      module = Encoder(cfg, kernels.attention)
    case _:
      assert_never(cfg)
  return Model(cfg, param_specs(module), as_function(module), mesh)
