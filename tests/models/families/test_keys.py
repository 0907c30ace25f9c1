"""Config keys of the parts: what does not fit, words that were bools, FLOPs of windows, a bias of logits."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.build import check_model
from models.flops import flops_per_position
from models.layers.positions.rotary import Linear, Llama3, Truncated, Yarn
from pallas_kernels.linear_cross_entropy.api import linear_cross_entropy
from pretrain.config import bindings
from pretrain.errors import ConfigError
from pretrain.experiment.experiment import Experiment
from tests.models.small import ALIBI, BERT, CLEX, DEBERTA, ENCODER, FAR_SINKS, LLAMA, T5


@pytest.mark.parametrize(
  ('cfg', 'changes', 'message'),
  [
    (LLAMA, {'windows': (4, None, None)}, 'model.windows has 3 entries, which do not divide model.layers=2'),
    (T5, {'windows': (4, None)}, 'model.windows has 2 entries, which do not divide model.decoder_layers=3'),
    (LLAMA, {'sinks': 4}, 'model.sinks=4 with model.windows=(); without a window every token sees the first ones'),
    (LLAMA, {'experts_per_token': 3}, 'model.experts_per_token=3 without model.experts; set it, or remove this.'),
    (LLAMA, {'experts': 2, 'experts_per_token': 1}, 'model.experts_per_token=1 weighs the one expert of a token by 1'),
    (LLAMA, {'experts': 2, 'experts_per_token': 3}, 'model.experts_per_token=3 of model.experts=2'),
    (LLAMA, {'expert_capacity': 1.5}, 'model.expert_capacity=1.5 without model.experts; set it, or remove this.'),
    (
      LLAMA,
      {'experts': 8, 'expert_capacity': 4.0},
      'model.expert_capacity=4.0 of model.experts=8 and model.experts_per_token=2: every expert has a place for each '
      'token, so none is ever dropped; use less than 4, or remove it.',
    ),
    (LLAMA, {'experts': 2, 'bias': 'all'}, "model.bias='all' with model.experts; experts have no biases"),
    (LLAMA, {'experts': 2, 'bias': 'mlp'}, "model.bias='mlp' with model.experts; experts have no biases"),
    (LLAMA, {'sink_distance': 4}, 'model.sink_distance=4 without model.sinks; set model.sinks, or remove this.'),
    (
      FAR_SINKS,
      {'sink_distance': 3},
      'model.sink_distance=3 with model.windows=(2,) and model.sink_distance; only sinks',
    ),
    (FAR_SINKS, {'sinks': 3}, 'so use at most 2, or longer windows.'),
    (ALIBI, {'sink_distance': 2}, "model.sink_distance=2 with model.positions='alibi'; it belongs to 'rotary'"),
    (LLAMA, {'alibi_scaled': True}, "model.alibi_scaled=True with model.positions='rotary'; it belongs to 'alibi'"),
    (ENCODER, {'rope_scaling': CLEX.rope_scaling}, "model.rope_scaling.name='clex' with model.name='encoder'"),
    (
      CLEX,
      {'windows': (2,), 'sinks': 1, 'sink_distance': 2},
      "model.rope_scaling.name='clex' with model.sink_distance=2",
    ),
    (CLEX, {'rotary_fraction': 0.25}, "model.rope_scaling.name='clex' with 2 rotated dims; a single frequency cannot"),
    (LLAMA, {'parallel': 'one_norm', 'norm_placement': 'sandwich'}, "use model.norm_placement='pre'"),
    (T5, {'parallel': 'two_norms'}, "model.parallel='two_norms' with model.name='encoder_decoder'"),
    (LLAMA, {'rotary_fraction': 0.3}, 'model.rotary_fraction=0.3 of model.head_dim=8 is 2.4 dims'),
    (LLAMA, {'rotary_fraction': 0.125}, 'is 1 dims, not an even number; rotary positions rotate pairs, use 0.25'),
    (ALIBI, {'rotary_fraction': 0.5}, "model.rotary_fraction=0.5 with model.positions='alibi'"),
    (BERT, {'embedding_size': 32}, 'model.embedding_size=32 is model.embed; remove it, nothing is projected then.'),
    (
      BERT,
      {'embedding_size': 16},
      "model.head='tied' with model.embedding_size=16 and model.embed=32: the table does not fit the last layer",
    ),
    (LLAMA, {'head': 'binary'}, "model.head='binary' with model.name='decoder'; only an encoder has it"),
    (T5, {'positions': 'disentangled'}, "model.positions='disentangled' with model.name='encoder_decoder'"),
    (DEBERTA, {'position_scores': ()}, "model.position_scores=(); name each of 'c2p' and 'p2c' once, or one of them."),
    (DEBERTA, {'position_scores': ('c2p', 'c2p')}, "model.position_scores=('c2p', 'c2p'); name each"),
    (DEBERTA, {'relative_buckets': 9}, "model.relative_buckets=9 with model.positions='disentangled'"),
    (ENCODER, {'relative_norm': True}, "model.relative_norm=True with model.positions='rotary'"),
    (ALIBI, {'rope_scaling': Linear(factor=2.0)}, "model.rope_scaling.name='linear' with model.positions='alibi'"),
    (LLAMA, {'relative_layers': 'each'}, "model.relative_layers=each with model.positions='rotary'"),
    (
      LLAMA,
      {'rope_scaling': Llama3(factor=2.0, original_max_positions=9, low_freq_factor=4.0)},
      'model.rope_scaling.low_freq_factor=4.0 is not below model.rope_scaling.high_freq_factor=4.0',
    ),
    (
      LLAMA,
      {'rope_scaling': Yarn(factor=2.0, original_max_positions=9, beta_slow=40.0)},
      'model.rope_scaling.beta_slow=40.0 is not below model.rope_scaling.beta_fast=32.0',
    ),
    (
      LLAMA,
      {'rope_scaling': Truncated(original_max_positions=9, zero_turns=1.0)},
      'zero_turns=1.0 is not below model.rope_scaling.kept_turns=1.0; the frequencies between them are replaced, so',
    ),
  ],
)
def test_values_that_do_not_fit_are_refused(cfg, changes, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    check_model(dataclasses.replace(cfg, **changes))


def model_of(*overrides: str):
  return bindings.load(Experiment, ['configs/decoder/tiny.gin'], overrides).model


@pytest.mark.parametrize(
  ('key', 'earlier', 'word'),
  [('bias', True, 'all'), ('bias', False, 'none'), ('qk_norm', True, 'heads'), ('qk_norm', False, 'none')],
)
def test_bools_of_earlier_versions_are_read_as_words(key, earlier, word):
  """A config saved by an earlier version still loads; it is written again with the word."""
  cfg = model_of(f'model.{key}={earlier}')
  assert getattr(cfg, key) == word
  assert f'{key} = {word!r}' in bindings.render(cfg)


@pytest.mark.parametrize('given', ["'yes'", '1', '0', 'None', '[True]'])
def test_other_values_are_no_words(given):
  with pytest.raises(ConfigError, match=r"model\.bias=.* is not one of 'none', 'qkv', 'attention', 'mlp', 'all'"):
    model_of(f'model.bias={given}')


def test_windows_and_scalings_are_written_and_read():
  """The resolved config reads back to an equal one."""
  cfg = bindings.load(
    Experiment,
    ['configs/decoder/tiny.gin'],
    ['model.windows=[16, None]', "model.rope_scaling.name='yarn'", 'model.rope_scaling.factor=4',
     'model.rope_scaling.original_max_positions=64'],
  )  # fmt: skip
  assert cfg.model.windows == (16, None)
  assert cfg.model.rope_scaling == Yarn(factor=4.0, original_max_positions=64)
  written = [line for line in bindings.render(cfg).splitlines() if line]
  assert bindings.load(Experiment, [], written) == cfg


SINKS = dataclasses.replace(LLAMA, sinks=4)


@pytest.mark.parametrize(
  ('cfg', 'windows', 'pairs'),
  [
    (LLAMA, (16, None), 16 + 100),
    (SINKS, (16,), 20 + 20),
    (LLAMA, (200,), 100 + 100),
    (ENCODER, (16,), 31 + 31),
    (LLAMA, (), 200),
  ],
)
def test_flops_count_the_keys_in_a_window(cfg, windows, pairs):
  """Two products for scores and two for mixing, forward and twice more backward, for each pair of two layers."""
  of = lambda cfg: sum(flops_per_position(cfg, inputs_length=0, targets_length=100).values())
  saved = of(dataclasses.replace(cfg, sinks=0)) - of(dataclasses.replace(cfg, windows=windows))
  assert saved == 3 * 4 * cfg.heads * cfg.head_dim * (200 - pairs)


@pytest.mark.slow
def test_a_bias_of_logits_is_a_row_of_the_head():
  """x w + b = [x, 1] [w; b], in values and in gradients."""
  draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
  x, w, b, labels = draw(0, 5, 4), draw(1, 4, 7), draw(2, 7), jnp.arange(5)
  options = {'softcap': 2.0, 'z_loss': 0.1, 'label_smoothing': 0.1}
  loss = lambda w, b: linear_cross_entropy(x, w, labels, bias=b, **options)[0].sum()
  wider = lambda wb: linear_cross_entropy(jnp.pad(x, ((0, 0), (0, 1)), constant_values=1), wb, labels, **options)[
    0
  ].sum()
  both = jnp.concatenate([w, b[None]])
  np.testing.assert_allclose(loss(w, b), wider(both), rtol=1e-6)
  found, expected = jax.grad(loss, (0, 1))(w, b), jax.grad(wider)(both)
  np.testing.assert_allclose(jnp.concatenate([found[0], found[1][None]]), expected, atol=1e-6)
