"""The training loss, token cross entropy with z-loss, and its parts for evaluation."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from models import partition
from models.build import KernelsConfig, Model
from models.families.ahead import LOSS as MTP_LOSS
from models.layers.values import ByLayer, Prediction
from models.rendered import IF_SET
from pallas_kernels.linear_cross_entropy import chunked
from pallas_kernels.linear_cross_entropy.api import choose, linear_cross_entropy
from pretrain.errors import ConfigError
from pretrain.step.train_step import Batch, LossFn, Metrics, Seen


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
  """`z_loss` weighs log(Z)^2, which keeps logits near zero (1e-4 in T5X). Source: arXiv:2204.02311, §5.

  With `model.experts`: `load_balance` weighs what is least where experts get equally many tokens (1e-2 in Switch),
  `router_z` the square of the router's log(Z) (1e-3 in ST-MoE): means over layers (models/layers/routing/routers.py).

  With `model.mtp_depth`, `mtp` weighs the mean of the losses of all depths; None is 0.3, with which DeepSeek-V3 began
  before it went down to 0.1 (arXiv:2412.19437): a phase may set it.
  """

  z_loss: Annotated[float, '>= 0'] = 0.0
  label_smoothing: Annotated[float, '[0, 1)'] = 0.0
  load_balance: Annotated[float, '>= 0'] = 0.0
  router_z: Annotated[float, '>= 0'] = 0.0
  mtp: Annotated[float, '>= 0'] | None = dataclasses.field(default=None, metadata=IF_SET)


MTP = 0.3
NONE: Mapping[str, Any] = {}  # read of `TrainState.extra` where no method keeps anything


def _check_head(model: Model) -> None:
  """Raises ConfigError for a head without logits of tokens: labels of all objectives are tokens."""
  if model.cfg.head == 'binary':
    raise ConfigError(
      "model.head='binary' has one logit for each token, and no objective trains it yet. Nothing was written; import "
      "and export work, and model.head='tied' or 'untied' can be trained."
    )


def _token_losses(
  model: Model, kernels: KernelsConfig, params, hidden: Array, labels: Array, share: Array | None = None, **options
):
  """(sum(share * loss), (loss, lse, correct) of each token) of hidden[batch, length, embed] and labels[batch, length].

  Without `share` the sum is 0. It alone has a gradient in chunks, where that is made with the logits.
  """
  head = model.head(params)
  options |= {'softcap': model.cfg.logit_softcap, 'bias': model.head_bias(params)}
  with partition.on(model.mesh):
    rows = partition.rows(labels.shape[0])
    if rows != 'batch':  # what a pipeline gives is the same on all stages
      hidden, labels = partition.constrain(hidden, rows, 'length', 'embed'), partition.constrain(labels, rows, 'length')
    tokens, words = labels.size // partition.parts(rows, 'length'), head.shape[1] // partition.parts('vocab')
    if choose(kernels.linear_cross_entropy, tokens, words) == 'chunked':
      shares = jnp.zeros(labels.shape) if share is None else share.reshape(labels.shape)
      total, found = weighed(hidden, head, labels, shares, **{'z_loss': 0.0, 'label_smoothing': 0.0} | options)
      return total, tuple(x.reshape(-1) for x in found)
  flat = hidden.reshape(-1, hidden.shape[-1])
  found = linear_cross_entropy(flat, head, labels.reshape(-1), implementation='reference', **options)
  return 0.0 if share is None else (found[0] * share).sum(), found


def weighed(x: Array, w: Array, labels: Array, weights: Array, bias: Array | None = None, **options):
  """(sum(weights * loss), (loss, lse, correct)), in chunks, of x[batch, length, embed] and labels[batch, length].

  Each device has its part of the tokens (also over stages: `partition.rows`) and of the vocabulary; gradients of the
  head are added up over devices once, after the last chunk. The other results have no gradient.
  """
  axis = 'tensor' if partition.divides('vocab') else None
  tokens, of_vocab = (partition.rows(labels.shape[0]), 'length'), None if bias is None else ('vocab',)

  def own(x: Array, w: Array, labels: Array, weights: Array, bias: Array | None):
    total, found = chunked.weighed(x, w, labels, weights, bias=bias, axis=axis, **options)
    return total.reshape(1, 1), found

  ins = {'x': (*tokens, None), 'w': (None, 'vocab'), 'labels': tokens, 'weights': tokens, 'bias': of_vocab}
  run = partition.per_shard(own, tuple(ins.values()), (tokens, (tokens,) * 3))
  total, found = run(x, w.astype(x.dtype), labels, weights, bias)
  return total.sum(), jax.lax.stop_gradient(found)


def make_loss(cfg: LossConfig, model: Model, kernels: KernelsConfig, num_sources: int = 1) -> LossFn:
  """`loss(params, batch, key, weight, read)`: summed over the batch, divided by `weight`; metrics: nats per token.

  A scalar in the model's `aux` is a mean over tokens; its metric is that mean, weighed over microbatches, and it is
  added to the value times the weight that `cfg` has for it. A value with a mean for each layer, `ByLayer`, is a metric
  NAME/LAYER for each, or NAME/LAYER/EXPERT. All of them are observations too (`Track`). The losses of a tuple of
  `Prediction`, without z-loss and divided by the same `weight`, are metrics NAME/1, NAME/2, …; their mean is added to
  the value times its weight in `cfg`. With several sources, metrics `source_loss` and `source_weight` are
  float32[sources]: each source's part of the loss and of the weight.
  """
  mtp = MTP if cfg.mtp is None else cfg.mtp
  weights = {'load_balance': cfg.load_balance, 'router_z': cfg.router_z, MTP_LOSS: mtp}

  def predicted(params, own: Prediction, weight: Array) -> Array:
    share = own.weights.reshape(-1) / weight
    options = {'label_smoothing': cfg.label_smoothing}
    return _token_losses(model, kernels, params, own.hidden, own.labels, share, **options)[0]

  def loss(
    params, batch: Batch, key: Array | None, weight: Array, read: Mapping[str, Any] = NONE
  ) -> tuple[Array, tuple[Metrics, Seen]]:
    batch = model.order.arrange(batch)
    share = batch['decoder_loss_weights'].reshape(-1) / weight
    hidden, aux = model.apply(params, batch, key, read)
    options = {'z_loss': cfg.z_loss, 'label_smoothing': cfg.label_smoothing}
    labels = batch['decoder_target_tokens']
    total, (value, lse, correct) = _token_losses(model, kernels, params, hidden, labels, share, **options)
    penalty = cfg.z_loss * jnp.square(lse)
    z_loss = (penalty * share).sum()
    metrics = {'loss': total - z_loss, 'z_loss': z_loss, 'accuracy': (correct * share).sum()}
    if num_sources > 1:
      rows = batch['source_index'].shape[0]
      by_row = jnp.stack([((value - penalty) * share).reshape(rows, -1).sum(1), share.reshape(rows, -1).sum(1)], 1)
      mine = jax.nn.one_hot(batch['source_index'], num_sources, dtype=by_row.dtype)
      metrics['source_loss'], metrics['source_weight'] = mine.T @ by_row[:, 0], mine.T @ by_row[:, 1]
    beside = {name: aux.pop(name) for name, own in [*aux.items()] if isinstance(own, tuple)}
    for name, predictions in beside.items():
      losses = [predicted(params, own, weight) for own in predictions]
      metrics |= {f'{name}/{k}': own for k, own in enumerate(losses, 1)}
      total += weights[name] / len(losses) * sum(losses)
    seen = jax.tree.map(lambda mean: mean * share.sum(), aux)  # that of a microbatch counts as much as its targets do
    for name, mean in seen.items():
      if isinstance(mean, ByLayer):
        metrics |= {'/'.join((name, *map(str, at))): mean.values[at] for at in np.ndindex(mean.values.shape)}
      else:
        metrics[name] = mean
        total += weights.get(name, 0.0) * mean
    return total, (metrics, seen)

  return loss


def make_token_step(model: Model, kernels: KernelsConfig):
  """`token_step(params, batch)` -> (nats, hits) of each target: float32[batch, length]; no dropout, no z-loss."""
  _check_head(model)

  def token_step(params, batch: Batch) -> tuple[Array, Array]:
    batch = model.order.arrange(batch)
    labels = batch['decoder_target_tokens']
    _, (value, _, correct) = _token_losses(model, kernels, params, model.apply(params, batch)[0], labels)
    shape = labels.shape
    return model.order.restore(value.reshape(shape)), model.order.restore(correct.reshape(shape))

  return token_step


def make_eval_step(model: Model, kernels: KernelsConfig, num_pieces: int, not_text: Sequence[int] = (0, 1)):
  """`eval_step(params, batch)` -> sums over the batch: nats, weights and hits of all targets; nats and weights of text.

  Text = targets that are pieces of text: not a sentinel, mode token, EOS or another id of `not_text`. A denoising model
  predicts those almost perfectly, so only a loss without them can be compared with an n-gram model.
  Raises ConfigError for a head without logits of tokens.
  """
  _check_head(model)

  def eval_step(params, batch: Batch) -> Metrics:
    batch = model.order.arrange(batch)
    labels, weights = batch['decoder_target_tokens'], batch['decoder_loss_weights'].reshape(-1)
    _, (value, _, correct) = _token_losses(model, kernels, params, model.apply(params, batch)[0], labels)
    labels = labels.reshape(-1)
    text = weights * ((labels[:, None] != jnp.asarray(not_text)).all(-1) & (labels < num_pieces))
    return {
      'loss': (value * weights).sum(), 'accuracy': (correct * weights).sum(), 'weight': weights.sum(),
      'text_loss': (value * text).sum(), 'text_weight': text.sum(),
    }  # fmt: skip

  return eval_step
