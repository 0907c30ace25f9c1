"""Weights that are exactly 0 in training: a random part of each matrix, or the smallest, more and more of them.

No mask is stored. A random one follows from the seed and the parameter's path; one of pruning from the weights, which
are exactly 0 where they were pruned. So checkpoints, meshes and resumed runs need nothing for it.
"""

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, assert_never

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from models.specs import ParamSpec, count
from pretrain.errors import ConfigError
from pretrain.optim.optimizer import num_updates
from pretrain.optim.shared import noise, own_dims, sides
from pretrain.optim.state import own_path
from pretrain.step.train_step import NOTHING, Metrics, Seen, Track, Tracks

Params = Mapping[str, Any]
Path = tuple[str, ...]
Masks = Mapping[Path, Array]  # bool in the shape of the parameter: True where it is trained, False where it is 0
Limbs = tuple[Array, Array]  # uint32: a number // 2**16 and % 2**16, exact up to 2**48


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoSparsity:
  name: Literal['none'] = 'none'


@dataclasses.dataclass(frozen=True, kw_only=True)
class FixedSparsity:
  """Each weight of the matrices of blocks is 0 with probability `rate`, from the first step on; a phase that lowers
  `rate` frees weights. Source: Thangarasa et al. 2023, arXiv:2303.10464 (SPDF), who free all of them.
  """

  name: Literal['fixed'] = 'fixed'
  rate: Annotated[float, '[0, 1)'] = 0.75


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pruning:
  """Updates `start_step`, `start_step` + `every`, … `end_step` set the smallest weights of all matrices of blocks to 0,
  up to a share of `rate`; they stay 0. Source: Jin et al. 2025, arXiv:2501.12486, from a quarter to three quarters of
  the steps; its code, tjingrant/sparse-llm-code MaxText/train.py `prune`, ranks all matrices together, every 100 steps.

  `curve`: 'cubic' is that of Zhu and Gupta 2017, arXiv:1710.01878, eq. 1; 'geometric' is that of the code of Jin et
  al., where each time an equal part of the weights that remain is pruned.
  """

  name: Literal['pruning'] = 'pruning'
  rate: Annotated[float, '(0, 1)'] = 0.5
  start_step: Annotated[int, '>= 1']
  end_step: Annotated[int, '>= 1']
  every: Annotated[int, '>= 1'] = 100
  curve: Literal['cubic', 'geometric'] = 'cubic'


Sparsity = NoSparsity | FixedSparsity | Pruning


def shares(cfg: Pruning) -> np.ndarray:
  """float64: the share of weights that are 0 after each update that prunes."""
  done = np.arange((cfg.end_step - cfg.start_step) // cfg.every + 1)
  if cfg.curve == 'cubic':
    return cfg.rate * (1 - (1 - done / done[-1]) ** 3)
  return 1 - (1 - cfg.rate) ** ((done + 1) / len(done))


class Rule(NamedTuple):
  """Two functions that say which weights are trained. `now(params, number)`: of `params`, the weights after update
  `number`. `next(params, number)`: after update `number`, of which `params` are the weights before.
  """

  now: Callable[[Params, Any], Masks]
  next: Callable[[Params, Any], Masks]


DENSE = Rule(lambda params, number: {}, lambda params, number: {})


def sparsity_rule(cfg: Sparsity, specs: Mapping[str, Any], seed: int) -> Rule:
  """The rule of a run. Raises ConfigError where no parameter is a matrix of a block."""
  match cfg:
    case NoSparsity():
      return DENSE
    case FixedSparsity():
      return _fixed(cfg.rate, _matrices(cfg, specs), seed) if cfg.rate else DENSE
    case Pruning():
      return _pruning(cfg, _matrices(cfg, specs))
    case _:
      assert_never(cfg)


def _matrices(cfg: FixedSparsity | Pruning, specs: Mapping[str, Any]) -> dict[Path, ParamSpec]:
  """Those of stacked layers, of attention and MLPs: no embeddings, heads, norms, biases or routers."""
  own = {own_path(path): spec for path, spec in jax.tree_util.tree_flatten_with_path(specs)[0]}
  found = {path: spec for path, spec in own.items() if spec.axes[:1] == ('layers',) and sides(spec) is not None}
  if not found:
    raise ConfigError(
      f"sparsity.name='{cfg.name}' and no parameter of the model is a matrix of a block; set sparsity.name='none'."
    )
  return found


def _fixed(rate: float, matrices: Mapping[Path, ParamSpec], seed: int) -> Rule:
  """The same mask at all times: a hash of seed, path and index. Of a lower rate it is True wherever it was."""
  least = np.uint32(int(rate * 2**32))

  def masks(params: Params, number: Any) -> Masks:
    salts = {path: zlib.crc32('/'.join((str(seed), *path)).encode()) for path in matrices}
    return {path: noise(spec.shape, jnp.uint32(salts[path])) >= least for path, spec in matrices.items()}

  return Rule(masks, masks)


def _pruning(cfg: Pruning, matrices: Mapping[Path, ParamSpec]) -> Rule:
  size = count(matrices)
  pruned = [math.floor(share * size) for share in shares(cfg)]
  table = np.array([divmod(number, 2**16) for number in pruned], np.uint32)

  def now(params: Params, number: Any) -> Masks:
    return {path: (number < cfg.start_step) | (x > 0) for path, x in magnitudes(params, matrices).items()}

  def after(params: Params, number: Any) -> Masks:
    index = jnp.clip((number - cfg.start_step) // cfg.every, 0, len(table) - 1)
    due = (number >= cfg.start_step) & (number <= cfg.end_step) & ((number - cfg.start_step) % cfg.every == 0)
    sizes, (high, low) = magnitudes(params, matrices), jnp.asarray(table)[index]
    least = jax.lax.cond(due, lambda: ranked(sizes, matrices, (high, low)), lambda: jnp.uint32(0))
    return {path: mask & (sizes[path] >= least) for path, mask in now(params, number - 1).items()}

  return Rule(now, after)


def magnitudes(params: Params, matrices: Mapping[Path, ParamSpec]) -> dict[Path, Array]:
  """uint32, the bits of the absolute values: in the same order, and compared exactly on all hardware."""
  own = {own_path(path): x for path, x in jax.tree_util.tree_flatten_with_path(params)[0]}
  return {path: jax.lax.bitcast_convert_type(jnp.abs(own[path].astype(jnp.float32)), jnp.uint32) for path in matrices}


def ranked(sizes: Mapping[Path, Array], matrices: Mapping[Path, ParamSpec], number: Limbs) -> Array:
  """The value of rank `number`, from 0, among all `sizes`: the largest uint32 with at most so many of them below it.

  It is found bit by bit, by counting: integers are added in any order, so it is the same on all meshes.
  """

  def refined(i: Array, found: Array) -> Array:
    tried = found | (jnp.uint32(1) << (30 - i).astype(jnp.uint32))  # the sign, bit 31, is 0
    high, low = total(matrices, {path: x < tried for path, x in sizes.items()})
    few = (high < number[0]) | ((high == number[0]) & (low <= number[1]))
    return jnp.where(few, tried, found)

  return jax.lax.fori_loop(0, 31, refined, jnp.uint32(0))


def total(matrices: Mapping[Path, ParamSpec], masks: Masks) -> Limbs:
  """How many values of all masks are True. Each layer's are fewer than 2**32, together they may be more."""
  high = low = jnp.uint32(0)
  for path, spec in matrices.items():
    counts = masks[path].sum(own_dims(spec), dtype=jnp.uint32)
    low += (counts & 0xFFFF).sum(dtype=jnp.uint32)
    high += (counts >> 16).sum(dtype=jnp.uint32) + (low >> 16)
    low &= 0xFFFF
  return high, low


def chosen(masks: Masks, tree: Any, other: Any) -> Any:
  """`tree`, of parameters or an optimizer's state, with the values of `other` under the masks. What has another shape
  than its parameter (factored means, scales of blocks) is that of `tree`.
  """

  def one(path: Any, x: Array, y: Array) -> Array:
    mask = masks.get(own_path(path))
    return x if mask is None or mask.shape != x.shape else jnp.where(mask, x, y)

  return jax.tree_util.tree_map_with_path(one, tree, other)


def begun(rule: Rule, params: Params) -> Params:
  """The initial parameters, with masked weights set to 0."""
  return chosen(rule.now(params, 0), params, jax.tree.map(jnp.zeros_like, params))


def sparse(tx: optax.GradientTransformation, rule: Rule) -> optax.GradientTransformation:
  """`tx`, made by `make_optimizer`, that trains what `rule` says and makes all other weights exactly 0.

  Their gradients are 0 to `tx`, and their moments what they are in a new optimizer, which is 0. Factored means are over
  all weights of a row or column, with 0 for these. The state is that of `tx`.
  """
  if rule is DENSE:
    return tx
  tx = optax.with_extra_args_support(tx)

  def update(grads, state, params=None, **extra):
    masks = rule.next(params, num_updates(state) + 1)
    grads = chosen(masks, grads, jax.tree.map(jnp.zeros_like, grads))
    updates, moved = tx.update(grads, state, params, **extra)
    return chosen(masks, updates, jax.tree.map(jnp.negative, params)), chosen(masks, moved, tx.init(params))

  return optax.GradientTransformationExtraArgs(tx.init, update)


def sparsity_tracks(cfg: Sparsity, rule: Rule, specs: Mapping[str, Any]) -> Tracks:
  """What sparsity keeps in `TrainState.extra`: nothing, or 'sparsity', how many parameters are trained, embeddings and
  all, and their sum over updates (Kahan 1965: `lost` is what rounding took from it).
  """
  if isinstance(cfg, NoSparsity):
    return NOTHING
  first = lambda params: {name: jnp.zeros((), jnp.float32) for name in ('active', 'updates', 'sum', 'lost')}

  def update(entry: Mapping[str, Array], seen: Seen, params: Params, step: Array) -> Any:
    own = _active(rule.now(params, step), specs)
    term = own - entry['lost']
    added = entry['sum'] + term
    lost = (added - entry['sum']) - term
    return {'active': own, 'updates': entry['updates'] + 1, 'sum': added, 'lost': lost}

  place = lambda params, everywhere: jax.tree.map(lambda _: everywhere, jax.eval_shape(first, None))
  return {'sparsity': Track(first, update, place, shown=_shown)}


def _active(masks: Masks, specs: Mapping[str, Any]) -> Array:
  """float32: the number of parameters that are trained."""
  own = {own_path(path): spec for path, spec in jax.tree_util.tree_flatten_with_path(specs)[0]}
  high, low = total({path: own[path] for path in masks}, masks)
  others = float(count([spec for path, spec in own.items() if path not in masks]))
  return high.astype(jnp.float32) * 2**16 + low.astype(jnp.float32) + others


def _shown(entry: Mapping[str, Array]) -> Metrics:
  return {'active_parameters': entry['active'], 'active_parameters_mean': entry['sum'] / entry['updates']}
