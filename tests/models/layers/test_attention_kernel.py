"""Models with an attention kernel are the models without: losses and gradients, on a mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from models.build import KernelsConfig, build
from models.layers import attention, linear
from models.layers.positions import rotary
from models.partition import shardings
from models.specs import initialize
from pallas_kernels import rotation
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


def test_the_path_for_tpus_is_the_plain_one(monkeypatch):
  """Rotation by its kernel and the output projection by a turned weight: on two devices for rows and two for heads."""
  mesh = jax.make_mesh((1, 2, 1, 1, 2, 1, 1), AXES, axis_types=(AxisType.Auto,) * 7, devices=jax.devices()[:4])
  cfg = dataclasses.replace(small.LLAMA, head_dim=128, heads=4, kv_heads=2, layers=1, dtype='bfloat16')
  batch = {name: jnp.asarray(x) for name, x in small.batch(((100, 20), (128,)), 128).items()}
  model = build(cfg, KernelsConfig(attention='reference'), mesh)
  params = jax.device_put(small.shaken(initialize(model.specs, jax.random.key(0))), shardings(model.specs, mesh))

  def loss(params):
    seen = (batch['decoder_segment_ids'] != 0)[..., None]
    hidden = jnp.where(seen, model.apply(params, batch)[0], 0)
    return jnp.square(hidden.astype(jnp.float32)).mean(), hidden

  run = lambda: jax.jit(jax.value_and_grad(lambda p: loss(p), has_aux=True))(params)  # traced anew each time
  plain = run()
  called = []
  monkeypatch.setattr(rotary, 'mesh_platform', lambda: 'tpu')
  rotate = rotation.rotate
  monkeypatch.setattr(rotation, 'rotate', lambda *args: called.append('rotary') or rotate(*args[:3], True))
  turned = lambda x, w, bias, in_order: called.append('out') or linear.from_heads(x, w, bias, in_order=True)
  monkeypatch.setattr(attention, 'from_heads', turned)
  found = run()
  assert {*called} == {'rotary', 'out'}
  for a, b in zip(*(jax.tree.leaves(x) for x in (plain, found)), strict=True):
    np.testing.assert_allclose(np.float32(b), np.float32(a), atol=0.02 * max(1e-3, float(jnp.abs(a).max())))
