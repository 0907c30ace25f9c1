"""Which activations a block keeps for its gradient: the others are computed again, or come back from host memory.

Policies that MaxText has too have its names (configs/base.yml: remat_policy).
"""

import contextvars
import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
from jax.ad_checkpoint import checkpoint_name

from models.host_memory import HOST
from models.product import KEPT as QUANTIZED

Policy = Literal[
  'none', 'full', 'dots', 'save_out_proj', 'save_qkv_proj', 'save_context', 'save_dot_except_mlp', 'minimal',
  'minimal_with_context', 'custom',
]  # fmt: skip
Name = Literal['input', 'query', 'key', 'value', 'context', 'out', 'gate', 'up', 'down']
QKV: tuple[Name, ...] = ('query', 'key', 'value')
MLP: tuple[Name, ...] = ('gate', 'up', 'down')
# The names that a policy keeps. 'none' keeps everything that a gradient needs, 'dots' every product with parameters.
KEPT: dict[str, tuple[Name, ...]] = {
  'full': (),
  'save_out_proj': ('out',),
  'save_qkv_proj': QKV,
  'save_context': ('context',),
  'save_dot_except_mlp': (*QKV, 'out'),
  'minimal': (*QKV, 'out', *MLP),
  'minimal_with_context': (*QKV, 'context', 'out', *MLP),
}
OF_EXPERTS = 'product_of_experts'
_unit_dim: contextvars.ContextVar[bool] = contextvars.ContextVar('unit_dim', default=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remat:
  """`keep`: names, with the policy 'custom'. `offload`: of the names that are kept, those in host memory."""

  policy: Policy = 'none'
  keep: tuple[Name, ...] = ()
  offload: tuple[Name, ...] = ()

  @property
  def names(self) -> tuple[Name, ...]:
    """The names that are kept, on the device or the host; none where the policy has no names."""
    return self.keep if self.policy == 'custom' else KEPT.get(self.policy, ())


def named(x: jax.Array, name: Name) -> jax.Array:
  """`x`, which a policy can keep by this name; inside `distinct_shapes`, with a leading dim of 1."""
  return checkpoint_name(x[None], name)[0] if _unit_dim.get() else checkpoint_name(x, name)


def distinct_shapes(body: Callable) -> Callable:
  """`body` of a decoder's scan. Arrays that it keeps by name get a leading dim of 1, so that none has the shape of one
  that the encoder keeps.

  A scan writes what it keeps into buffers that start as zeros. The compiler for TPU allocates them without writing
  zeros, unless two scans have buffers of the same shape, as an encoder and a decoder of equal depth and width have.
  """

  def run(carry, inputs):
    token = _unit_dim.set(True)
    try:
      return body(carry, inputs)
    finally:
      _unit_dim.reset(token)

  return run


def product_of_experts(x: jax.Array) -> jax.Array:
  """`x`, a product with the matrices of all experts at once, which the policy 'dots' keeps."""
  return checkpoint_name(x, OF_EXPERTS)


def check(cfg: Remat, *, gated: bool) -> None:
  """Raises ValueError for names that have no effect."""
  if bool(cfg.keep) != (cfg.policy == 'custom'):
    raise ValueError(
      f"model.remat='{cfg.policy}' with model.remat_keep={list(cfg.keep)}; model.remat='custom' keeps the names in "
      'model.remat_keep, and other policies have names of their own.'
    )
  given = (*cfg.keep, *cfg.offload)
  if not gated and 'gate' in given:
    raise ValueError("model.remat_keep or model.remat_offload has 'gate', and model.mlp.gated=False; remove it.")
  # A block's input is kept in any case, so it can be moved with every policy that has names.
  known = (*cfg.names, 'input') if cfg.policy in (*KEPT, 'custom') else ()
  if wrong := [name for name in cfg.offload if name not in known]:
    held = ', '.join(map(repr, dict.fromkeys(known)))
    none = "has no names that could be moved; use one that has ('minimal', 'custom', …), or remove model.remat_offload"
    fix = f'keeps {held}; choose from these' if held else none
    raise ValueError(f"model.remat_offload has {wrong[0]!r}, and model.remat='{cfg.policy}' {fix}.")


def rematerialise(body: Callable, cfg: Remat, *, stages: bool = False) -> Callable:
  """`body(carry, inputs)` of a scan over blocks with fewer activations kept for its gradient; `stages`: it is mapped
  over those of a pipeline.
  """
  if cfg.policy == 'none':
    return body

  def run(carry, inputs):
    return body(named(carry, 'input'), inputs)

  return jax.checkpoint(run, policy=_policy(cfg, stages), prevent_cse=False)


def keeping(cfg: Remat) -> Callable[[Callable], Callable]:
  """Of a function over blocks that `rematerialise` made, what these keep and their inputs are kept, and nothing else:
  no parameters that it chooses. For stages of a pipeline; not with the policy 'none', which keeps everything.
  """
  with_inputs = dataclasses.replace(cfg, keep=('input', *cfg.names), policy='custom')
  own = cfg if cfg.policy == 'dots' or 'input' in cfg.offload else with_inputs
  return lambda function: jax.checkpoint(function, policy=_policy(own, stages=True), prevent_cse=False)


def _policy(cfg: Remat, stages: bool) -> Callable | None:
  policies = jax.checkpoint_policies
  if cfg.policy == 'dots':
    return _is_product_of_stages if stages else _is_product
  if cfg.offload:
    on_device = [name for name in cfg.names if name not in cfg.offload]
    return policies.save_and_offload_only_these_names(
      names_which_can_be_saved=on_device, names_which_can_be_offloaded=list(cfg.offload), offload_src='device',
      offload_dst=HOST,
    )  # fmt: skip
  return policies.save_only_these_names(*cfg.names) if cfg.names else None


def _is_product_of_stages(primitive, *args, **params) -> bool:
  """`_is_product` where one dim of each array is that of stages; inputs of blocks too."""
  if primitive.name == 'name' and params['name'] == 'input':
    return True
  one_batch_dim = primitive.name == 'dot_general' and len(params['dimension_numbers'][1][0]) == 1
  return one_batch_dim or _is_product(primitive, *args, **params)


def _is_product(primitive, *args, **params) -> bool:
  """Whether a result is kept: results of products with parameters, also in experts and quantized ones."""
  kept = jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **params)
  named_so = primitive.name == 'name' and params['name'] in (QUANTIZED, OF_EXPERTS)
  return kept or primitive.name == 'ragged_dot_general' or named_so
