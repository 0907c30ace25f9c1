"""Models with an attention kernel are the models without: losses and gradients, on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from models.build import KernelsConfig, build
from models.partition import shardings
from models.specs import initialize
from tests.models import small

AXES = ('replica', 'data', 'fsdp', 'sequence', 'tensor', 'expert', 'stage')


@pytest.mark.slow
@pytest.mark.parametrize(
  ('cfg', 'kernel'),
  [
    (small.LLAMA, 'interpret'),
    *(pytest.param(cfg, 'interpret', marks=pytest.mark.slow) for cfg in (small.FAR_SINKS, small.T5)),
    *(pytest.param(cfg, 'blockwise', marks=pytest.mark.slow) for cfg in (small.FAR_SINKS, small.T5)),
  ],
)
def test_a_kernel_on_a_mesh_is_the_reference(cfg, kernel):
  """Two devices for examples, two for heads: of the kernel's arrays, each has its part."""
  mesh = jax.make_mesh((1, 2, 1, 1, 2, 1, 1), AXES, axis_types=(AxisType.Auto,) * 7, devices=jax.devices()[:4])
  batch = {name: jnp.asarray(x) for name, x in small.batch().items()}
  if cfg is not small.T5:
    batch['decoder_prefix_end'] = jnp.where(batch['decoder_segment_ids'] == 1, 4, 0)
  found = {}
  for name in ('reference', kernel):
    model = build(cfg, KernelsConfig(attention=name), mesh)
    params = small.shaken(initialize(model.specs, jax.random.key(0)))
    params = jax.device_put(params, shardings(model.specs, mesh))

    def loss(params, model=model):
      seen = (batch['decoder_segment_ids'] != 0)[..., None]
      hidden = jnp.where(seen, model.apply(params, batch)[0], 0)
      return jnp.square(hidden).mean(), hidden

    run = jax.value_and_grad(loss, has_aux=True)
    assert ('pallas_call' in str(jax.make_jaxpr(run)(params))) == (name == 'interpret')
    found[name] = jax.jit(run)(params)
  for a, b in zip(*(jax.tree.leaves(x) for x in found.values()), strict=True):
    np.testing.assert_allclose(b, a, atol=2e-5 * max(1e-3, float(jnp.abs(a).max())))
