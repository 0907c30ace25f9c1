"""FLOPs of steps that train adapters alone: counted by hand, and by the compiler."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from models.build import build
from models.flops import flops_by_side, flops_per_position, flops_per_step
from models.layers.low_rank import LoraConfig
from models.specs import initialize
from tests.models.small import BERT, LLAMA, T5, batch

INPUTS, TARGETS, RANK = 20, 10, 3


def of(cfg, modules, inputs=INPUTS) -> dict[str, int]:
  lora = LoraConfig(rank=RANK, modules=modules)
  return flops_per_position(cfg, inputs_length=inputs, targets_length=TARGETS, lora=lora)


def test_adapters_of_a_decoder_by_hand():
  """A frozen W: x W and dx = dy W'. A and B: x A, dA = x' dn, dx = dn A', and as many for B. Attention: as without."""
  embed, width, kv, hidden = 32, 4 * 8, 2 * 8, 48
  frozen = 2 * (2 * embed * width + 2 * embed * kv + 3 * embed * hidden) + embed * 64  # two layers and the head
  adapters = 2 * (RANK * (embed + width) + RANK * (embed + kv))  # of query and value, two layers
  attention = 2 * 2 * width * TARGETS  # scores and mixing in two layers
  expected = 2 * (2 * frozen + 3 * adapters + 3 * attention)
  assert of(LLAMA, ('query', 'value'), inputs=0) == {'decoder': expected}


def test_an_encoder_without_adapters_has_the_forward_pass_alone():
  """Adapters in cross-attention: nothing trained is in the encoder, so the gradient of its output is not computed."""
  square, mlp, layers = 32 * 32, 3 * 32 * 48, 3
  own = 2 * (4 * square + mlp)
  across = layers * (2 * square + (2 * 32 + 3 * 32) * RANK * 2)  # x W; x A, dA; n B, dn, dB: of keys and of values
  attention = 2 * 2 * 32 * INPUTS
  decoder = 2 * layers * (4 * square + 2 * square + mlp) + 2 * 32 * 64 + layers * 3 * (2 * RANK * (32 + 32))
  scores = layers * 32 * (6 * TARGETS + 6 * INPUTS)
  assert of(T5, ('cross_attention',)) == {'encoder': 2 * (own + across + attention), 'decoder': 2 * (decoder + scores)}


def test_keys_and_values_that_nothing_trained_has_made_have_no_gradient():
  """`out` and `query` are in self-attention too, so that the encoder is trained; only there its output is not constant.

  An encoder token costs each decoder token a score and a mixing: forward, and both gradients of each product.
  """
  grow = lambda modules: of(T5, modules, 2 * INPUTS)['decoder'] - of(T5, modules)['decoder']
  assert grow(('query',)) == grow(('cross_attention',)) == 3 * INPUTS * 2 * 32 * (3 + 3)


def test_sides_of_rows_and_steps_count_adapters_too():
  lora, lengths = LoraConfig(rank=RANK), {'inputs_length': INPUTS, 'targets_length': TARGETS}
  each = flops_per_position(T5, **lengths, lora=lora)
  sides = flops_by_side(T5, **lengths, lora=lora)
  assert sides == {'encoder': INPUTS * each['encoder'], 'decoder': TARGETS * each['decoder']}
  assert flops_per_step(T5, **lengths, lora=lora) == sum(sides.values()) < flops_per_step(T5, **lengths)


@pytest.mark.parametrize(
  ('cfg', 'modules'),
  [
    pytest.param(T5, ('cross_attention',), marks=pytest.mark.slow), (LLAMA, ('query', 'value')),
    *(pytest.param(cfg, ('all',), marks=pytest.mark.slow) for cfg in (T5, LLAMA, BERT)),
  ],
  ids=['t5 cross', 'llama', 't5', 'llama all', 'bert'],
)  # fmt: skip
def test_flops_equal_the_compilers_count(cfg, modules):
  """Within ten percent, a dense batch. The compiler counts a scan's body once: the steps of one layer a stack, compiled
  with two, because of a single one it leaves out the gradient of the first input."""
  encodes = cfg.name == 'encoder_decoder'
  layers = lambda n: {'encoder_layers': n, 'decoder_layers': n} if encodes else {'layers': n}
  changes = {'max_positions': 64} if cfg.positions == 'learned' else {}
  one = dataclasses.replace(cfg, embed=256, head_dim=64, vocab_size=512, **changes, **layers(1))
  lora = LoraConfig(rank=64, modules=modules)
  model = build(dataclasses.replace(one, **layers(2)), lora=lora)
  own, frozen = model.split(initialize(model.specs, jax.random.key(0)))
  data = batch(((64,),), 64)

  def loss(own, frozen):  # an argument: the compiler computes with constants before it counts
    params = {**own, **frozen}
    return jnp.square(model.logits(params, model.apply(params, data)[0])).sum()

  counted = jax.jit(jax.grad(loss)).lower(own, frozen).compile().cost_analysis()['flops']
  inputs = 64 if encodes else 0
  assert flops_per_step(one, inputs_length=inputs, targets_length=64, lora=lora) == pytest.approx(counted, rel=0.1)
