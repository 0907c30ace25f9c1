"""Losses and gradients of models whose rows a ring of devices shares: those of one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from models import partition
from models.build import KernelsConfig, build
from models.specs import initialize
from pretrain.step.loss import LossConfig, make_eval_step, make_loss, make_token_step
from tests.models import small

AXES = ('replica', 'data', 'fsdp', 'sequence', 'tensor', 'expert', 'stage')
KERNELS = KernelsConfig()
LEARNED = dataclasses.replace(small.LEARNED, max_positions=16, bias='mlp')  # that of a key has a gradient of 0
DROPS = {'dropout': 0.2}
CASES = {
  't5, dropout': (small.T5, DROPS, {'sequence': 4, 'tensor': 2}),
  'prefixes, keys shared, dropout': (small.LLAMA, DROPS, {'sequence': 4, 'tensor': 2}),
  'one key head': (small.LLAMA, {'kv_heads': 1}, {'fsdp': 2, 'sequence': 2, 'tensor': 2}),
  'sinks in windows, dropout': (small.SINKS, DROPS, {'sequence': 2, 'tensor': 2}),
  'far sinks, dropout': (small.FAR_SINKS, DROPS, {'data': 2, 'sequence': 2}),
  'slopes, caps': (small.ALIBI, {}, {'sequence': 4}),
  'learned positions, a mask for each token': (LEARNED, {**DROPS, 'dropout_sites': 'bert'}, {'sequence': 4}),
  'clex': (small.CLEX, DROPS, {'sequence': 4}),
  'experts': (small.EXPERTS, DROPS, {'sequence': 4}),
  'an encoder': (small.ENCODER, DROPS, {'sequence': 4}),
  'disentangled': (small.DEBERTA, {'max_positions': None}, {'sequence': 4}),
}


def mesh_of(sizes: dict[str, int]):
  shape = [sizes.get(name, 1) for name in AXES]
  devices = jax.devices()[: int(np.prod(shape))]
  return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def batch_of(cfg) -> dict[str, jax.Array]:
  """Two packed rows of 16 tokens, of which the first ones of the decoder's first documents are prefixes."""
  batch = {name: jnp.asarray(x) for name, x in small.batch(width=16).items()}
  if cfg.name == 'decoder':
    batch['decoder_prefix_end'] = jnp.where(batch['decoder_segment_ids'] == 1, 4, 0)
  targets = batch['encoder_input_tokens' if cfg.name == 'encoder' else 'decoder_input_tokens']
  segments = batch['encoder_segment_ids' if cfg.name == 'encoder' else 'decoder_segment_ids']
  weights = (segments != 0) * (1 + jnp.arange(16)[None] % 3)  # of tokens, so that none can be exchanged
  return batch | {'decoder_target_tokens': targets, 'decoder_loss_weights': weights.astype(jnp.float32)}


def everything(cfg, mesh):
  """(loss, metrics, gradients), sums of the evaluation, and values of single tokens."""
  model, batch = build(cfg, KERNELS, mesh), batch_of(cfg)
  params = small.shaken(initialize(model.specs, jax.random.key(0)))
  loss, evaluate = make_loss(LossConfig(z_loss=1e-2), model, KERNELS), make_eval_step(model, KERNELS, 20)
  of_tokens = make_token_step(model, KERNELS)
  if mesh is not None:
    params = jax.device_put(params, partition.shardings(model.specs, mesh))
  key = jax.random.key(7) if cfg.dropout else None
  learn = lambda p: jax.value_and_grad(loss, has_aux=True)(p, batch, key, jnp.float32(7))
  tokens = [jnp.where(batch['decoder_loss_weights'] > 0, x, 0) for x in jax.jit(of_tokens)(params, batch)]
  return jax.device_get((jax.jit(learn)(params), jax.jit(evaluate)(params, batch), tokens))


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES)
def test_a_model_on_a_ring_is_the_model_on_one_device(case):
  cfg, changes, sizes = CASES[case]
  cfg = dataclasses.replace(cfg, **changes)
  one, ring = everything(cfg, None), everything(cfg, mesh_of(sizes))
  for (path, a), b in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(ring), strict=True):
    limit = 2e-5 * max(1e-3, float(np.abs(a).max()))
    np.testing.assert_allclose(b, a, atol=limit, err_msg=jax.tree_util.keystr(path))
