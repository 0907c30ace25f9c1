"""The training loss and the evaluation with kernels.linear_cross_entropy='chunked'."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from models import partition
from models.build import KernelsConfig, build
from models.specs import initialize
from pretrain.step.loss import LossConfig, make_eval_step, make_loss
from tests.models import small

AXES = ('replica', 'data', 'fsdp', 'sequence', 'tensor', 'expert', 'stage')


@pytest.mark.slow
def test_training_and_evaluation_with_it_are_those_with_the_definition():
  """Four devices, as a step runs: the sum over tokens, its gradients, metrics of tokens, and sums of the evaluation."""
  shape = [{'fsdp': 2, 'tensor': 2}.get(name, 1) for name in AXES]
  mesh = jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=jax.devices()[:4])
  batch = {name: jnp.asarray(x) for name, x in small.batch().items()}
  batch |= {'decoder_target_tokens': batch['decoder_input_tokens']}
  batch |= {'decoder_loss_weights': (batch['decoder_segment_ids'] == 1).astype(jnp.float32)}
  found = {}
  for name in ('reference', 'chunked'):
    model = build(small.LLAMA, KernelsConfig(linear_cross_entropy=name), mesh)
    params = small.shaken(initialize(model.specs, jax.random.key(0)))
    params = jax.device_put(params, partition.shardings(model.specs, mesh))
    kernels = KernelsConfig(linear_cross_entropy=name)
    loss = make_loss(LossConfig(z_loss=1e-2, label_smoothing=0.1), model, kernels)
    evaluate = make_eval_step(model, kernels, 20)

    def both(params, loss=loss, evaluate=evaluate):
      return jax.value_and_grad(loss, has_aux=True)(params, batch, None, jnp.float32(7)), evaluate(params, batch)

    found[name] = jax.jit(both)(params)
  for a, b in zip(*(jax.tree.leaves(x) for x in found.values()), strict=True):
    np.testing.assert_allclose(b, a, atol=2e-5 * max(1e-3, float(jnp.abs(a).max())))
