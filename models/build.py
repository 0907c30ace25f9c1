"""Config -> Model: a description, and pure functions of (params, batch)."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, assert_never

import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict
from jax import Array
from jax.sharding import AbstractMesh, Mesh

from models import partition
from models.families.decoder import Decoder, DecoderConfig, check_decoder
from models.families.encoder import Encoder, EncoderConfig, check_encoder
from models.families.encoder_decoder import EncoderDecoder, EncoderDecoderConfig, check_encoder_decoder
from models.families.parts import dropout_of
from models.layers.low_rank import NONE, LoraConfig, attach, grafted
from models.precision import AMAX, BF16, PrecisionConfig, check_blocks, check_layers, check_trains
from models.precision import attach as attach_precision
from models.product import within
from models.row_order import RowOrder
from models.specs import Tree, as_function, param_specs
from pallas_kernels.attention import api as attention
from pallas_kernels.linear_cross_entropy import api as linear_cross_entropy
from pallas_kernels.quantized_matmul import api as quantized_matmul

ModelConfig = EncoderDecoderConfig | DecoderConfig | EncoderConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelsConfig:
  """Implementation of each op: 'auto' chooses by platform; a name that cannot run here fails.

  `attention`: 'reference', 'tpu', 'interpret' ('tpu' in an interpreter: slow, on any platform), 'triton' (GPU),
  'blockwise' (O(length) memory, on any platform), 'ring' (rows that `mesh.sequence` divides, on any platform). Decoding
  with a cache uses the reference.
  `linear_cross_entropy`: 'reference' or 'chunked', which holds a part of the logits at a time.
  `quantized_matmul`, where `precision` quantizes: 'xla' (codes in XLA's own dot), 'reference', 'tpu' and 'interpret';
  'auto' takes the faster one of 'xla' and 'tpu' from pallas_kernels/tuning/.
  """

  attention: str = 'auto'
  linear_cross_entropy: str = 'auto'
  quantized_matmul: str = 'auto'


@dataclasses.dataclass(frozen=True, eq=False)  # compared and hashed by identity: a static argument of jit
class Model:
  """`specs` describe the parameters; `bind(params)` is the module with arrays in it.

  `adapters` are those of `specs` that low-rank adapters add; where there are any, they alone are trained. `order` is
  the one in which rows are divided over devices: a loss arranges its batch by it. Rows in their own order give the same
  results, at another speed.
  """

  cfg: ModelConfig
  specs: Tree
  bind: Callable[[Tree], nnx.Module]
  mesh: Mesh | AbstractMesh | None
  adapters: Tree = dataclasses.field(default_factory=dict)
  order: RowOrder = RowOrder()

  def split(self, params: Tree) -> tuple[Tree, Tree]:
    """(what is trained, what is frozen) of a tree with the structure of `specs`."""
    frozen = {name: branch for name, branch in params.items() if name not in self.adapters}
    return ({name: params[name] for name in self.adapters}, frozen) if self.adapters else (params, {})

  def apply(
    self, params: Tree, batch: Mapping[str, Array], key: Array | None = None, read: Mapping[str, Any] | None = None
  ) -> tuple[Array, dict[str, Any]]:
    """(hidden states [batch, length, embed], aux). `key` already folds seed and step; None means no dropout. `read` is
    state beside the parameters, by the name of the method that keeps it.
    """
    amax = {'/'.join(path): x for path, x in flatten_dict((read or {}).get(AMAX, {})).items()}
    with partition.on(self.mesh), within(amax=amax):
      return self.bind(params)(batch, key)

  def choices(self, params: Tree, batch: Mapping[str, Array]) -> dict[str, Array]:
    """The experts of each token in each layer: int32[layers, batch, length, per_token] by the name of the stack."""
    module, name = self.bind(params), 'choices/'
    for stack in ('encoder', 'decoder'):
      if hasattr(module, stack):
        getattr(module, stack).blocks.mlp.tells_choices = True
        getattr(module, stack).pipeline = None  # a pipeline returns means over tokens, not the choices of each token
    with partition.on(self.mesh):
      aux = module(batch, None)[1]
    return {key.removeprefix(name): found.values for key, found in aux.items() if key.startswith(name)}

  def head(self, params: Tree) -> Array:
    """The weight [embed, vocab] that turns hidden states into logits, before their bias and `cfg.logit_softcap`.

    With `cfg.head` 'binary' it is [embed, 1]. In an encoder whose head is tied, embed is the width of embeddings.
    """
    match self.cfg.head:
      case 'untied' | 'binary':
        return params['head']['kernel']
      case 'tied':
        return params['embedding']['table'].T
      case 'tied_scaled':
        table = params['embedding']['table']
        return table.T * table.shape[1] ** -0.5

  def head_bias(self, params: Tree) -> Array | None:
    """f32[vocab] or f32[1], added to the logits before `cfg.logit_softcap`."""
    return params['head']['bias'] if self.cfg.head_bias else None

  def logits(self, params: Tree, hidden: Array) -> Array:
    """f32[…, vocab]; f32[…, 1] with `cfg.head` 'binary': that of the probability that a token was replaced."""
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


def trunk_of(cfg: ModelConfig) -> ModelConfig:
  """The model that is left after training: without the depths of multi-token prediction."""
  return dataclasses.replace(cfg, mtp_depth=0) if isinstance(cfg, DecoderConfig) else cfg


def check_kernels(cfg: KernelsConfig) -> None:
  """Raises ValueError for an implementation that does not exist; one that cannot run here fails when called."""
  ops = {
    'attention': attention, 'linear_cross_entropy': linear_cross_entropy, 'quantized_matmul': quantized_matmul,
  }  # fmt: skip
  for name, op in ops.items():
    given, known = getattr(cfg, name), ('auto', *op.IMPLEMENTATIONS)
    if given not in known:
      raise ValueError(f'kernels.{name}={given!r} is not one of {", ".join(map(repr, known))}.')


def check_lora(cfg: ModelConfig, lora: LoraConfig) -> None:
  """Raises ValueError for a name in `lora.modules` that is not a product of the model, and for learned frequencies."""
  if cfg.rope_scaling.name == 'clex':
    raise ValueError(
      f"lora.rank={lora.rank} with model.rope_scaling.name='clex', whose frequencies would stay as drawn; use "
      'lora.rank=0 or another scaling.'
    )
  attach(make_module(cfg, KernelsConfig()), lora)


def check_precision(
  cfg: ModelConfig, precision: PrecisionConfig, lengths: Mapping[str, int], *, forward_only: bool = False
) -> None:
  """Raises ValueError for a name of no product or recipe, for more first and last layers than there are, and where
  blocks divide a size or one of `lengths` not; for training also as `check_trains`.
  """
  specs = param_specs(make_module(cfg, KernelsConfig()))
  check_layers(precision, specs, len(cfg.windows or (None,)))
  if not forward_only:
    check_trains(precision)
  check_blocks(precision, specs, lengths, forward_only=forward_only)


def make_module(cfg: ModelConfig, kernels: KernelsConfig) -> nnx.Module:
  """The model's layers, without arrays."""
  match cfg:
    case EncoderDecoderConfig():
      return EncoderDecoder(cfg, kernels.attention)
    case DecoderConfig():
      return Decoder(cfg, kernels.attention)
    case EncoderConfig():
      return Encoder(cfg, kernels.attention)
    case _:
      assert_never(cfg)


def build(
  cfg: ModelConfig,
  kernels: KernelsConfig = KernelsConfig(),
  mesh: Mesh | AbstractMesh | None = None,
  lora: LoraConfig = NONE,
  precision: PrecisionConfig = BF16,
) -> Model:
  """A model without arrays. With a mesh, its activations are placed on it; with a `lora.rank`, it has adapters;
  `precision` quantizes its products.
  """
  module = make_module(cfg, kernels)
  attach_precision(module, precision, kernels.quantized_matmul)
  specs = param_specs(module)
  order = row_order(cfg, kernels, 1 if mesh is None else mesh.shape.get('sequence', 1))
  if not lora.rank:
    return Model(cfg, specs, as_function(module), mesh, order=order)
  adapters = attach(module, lora)
  bind = as_function(module)
  return Model(cfg, {**specs, **adapters}, lambda params: bind(grafted(params)), mesh, adapters, order)


def row_order(cfg: ModelConfig, kernels: KernelsConfig, devices: int) -> RowOrder:
  """Balanced where a ring of devices shares causal rows, and nothing in the model reads the index of a token: dropout
  that draws a mask for each token, CLEX, which finds the ends of documents, and experts with a capacity, whose places
  earlier tokens take first. All else has explicit positions.
  """
  by_index = (cfg.dropout and cfg.dropout_sites == 'bert') or cfg.rope_scaling.name == 'clex'
  if by_index or cfg.expert_capacity is not None or cfg.name == 'encoder' or kernels.attention not in ('auto', 'ring'):
    return RowOrder()
  return RowOrder(devices)


def check_attention(cfg: ModelConfig, kernels: KernelsConfig, *, divided: bool) -> None:
  """Raises KernelError where the attention that `kernels` names lacks what training `cfg` needs: packed rows, dropout,
  disentangled scores, or, with `divided`, rows that `mesh.sequence` divides. Call it without a mesh in use: then the
  platform is not asked, and a config for another one passes.
  """
  if kernels.attention != 'auto':
    own = dropout_of(cfg)
    attention.choose(
      kernels.attention, dropout=own.outer > 0, shared=own.shared, divided=divided,
      position_scores=cfg.positions == 'disentangled', packed=True,
    )  # fmt: skip
