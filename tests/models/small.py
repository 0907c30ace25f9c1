"""Small models and batches for the tests of models/."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from models.build import KernelsConfig, build
from models.families.decoder import DecoderConfig, DecoderMlpConfig
from models.families.encoder import EncoderConfig
from models.families.encoder_decoder import EncoderDecoderConfig
from models.layers.mlp import MlpConfig
from models.layers.norm import LayerNormConfig, RmsNormConfig
from models.layers.positions.rotary import Clex
from models.specs import initialize

VOCAB = 64
KERNELS = KernelsConfig()
IDS = {'eos': (1,), 'pad': 0, 'decoder_start': 0}
T5 = EncoderDecoderConfig(
  vocab_size=VOCAB, embed=32, encoder_layers=2, decoder_layers=3, heads=4, head_dim=8, mlp=MlpConfig(hidden=48)
)
LLAMA = DecoderConfig(
  vocab_size=VOCAB, embed=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp=DecoderMlpConfig(hidden=48)
)
ENCODER = EncoderConfig(vocab_size=VOCAB, embed=32, layers=2, heads=4, head_dim=8, mlp=MlpConfig(hidden=48))

# Every part that neither T5 v1.1 nor Llama has, in combinations that occur together.
T5_1_0 = dataclasses.replace(
  T5, mlp=MlpConfig(hidden=48, activation='relu', gated=False), head='tied_scaled', bias='all', qk_norm='heads',
  norm=LayerNormConfig(bias=False), norm_placement='sandwich', attention_softcap=2.0, logit_softcap=3.0,
)  # fmt: skip
T5_ALIBI = dataclasses.replace(T5, positions='alibi')
T5_ROTARY = dataclasses.replace(T5, positions='rotary')
ALIBI = dataclasses.replace(
  LLAMA, positions='alibi', qk_norm='heads', attention_softcap=2.0, logit_softcap=3.0, norm_placement='sandwich',
  head='tied_scaled',
)  # fmt: skip
LEARNED = dataclasses.replace(
  LLAMA, positions='learned', max_positions=14, norm=LayerNormConfig(), bias='all', norm_placement='post', head='tied',
  mlp=DecoderMlpConfig(hidden=48, activation='gelu_exact', gated=False),
)  # fmt: skip
BERT = dataclasses.replace(
  ENCODER, positions='learned', max_positions=14, norm=LayerNormConfig(eps=1e-12), bias='all', norm_placement='post',
  head='tied', embedding_norm=True, mlp=MlpConfig(hidden=48, activation='gelu_exact', gated=False),
)  # fmt: skip
DEBERTA = dataclasses.replace(
  BERT, positions='disentangled', max_positions=None, relative_buckets=8, relative_max_distance=12, relative_norm=True,
  dropout_sites='bert', head_transform='gelu_exact', embedding_size=16,
)  # fmt: skip
SINKS = dataclasses.replace(LLAMA, windows=(2, 3), sinks=2)
T5_FAR_SINKS = dataclasses.replace(T5_ROTARY, windows=(2,), sinks=2, sink_distance=2)
FAR_SINKS = dataclasses.replace(LLAMA, windows=(2,), sinks=2, sink_distance=2)
CLEX = dataclasses.replace(LLAMA, rope_scaling=Clex(original_max_positions=4, max_factor=3))
EXPERTS = dataclasses.replace(LLAMA, experts=4)
SAFE = dataclasses.replace(LLAMA, norm=RmsNormConfig(scale='single'), embedding_rotation=True)
T5_SAFE = dataclasses.replace(T5, norm=RmsNormConfig(scale='single'), embedding_rotation=True, kurtosis=True)
ROUTED_T5 = dataclasses.replace(T5, experts=4)


def shaken(params):
  """`params` with noise on everything initialised to ones or zeros: biases and scales without effect hide mistakes."""
  rng = np.random.default_rng(0)

  def shake(x):
    own = np.asarray(x)  # operations of JAX would be compiled for each shape
    return x if np.std(own) else jnp.asarray(own + rng.normal(0, 0.3, x.shape).astype(x.dtype))

  return jax.tree.map(shake, params)


@functools.lru_cache(64)
def made(cfg, mesh):
  model = build(cfg, mesh=mesh)
  return model, initialize(model.specs, jax.random.key(0))


def model_and_params(cfg, mesh=None, **changes):
  """The same model each time: what JAX has compiled for it in one test is compiled for the next ones too."""
  model, params = made(dataclasses.replace(cfg, **changes), mesh)
  return model, jax.tree.map(lambda x: x, params)


def side(name: str, lengths: list[list[int]], width: int, seed: int) -> dict[str, np.ndarray]:
  """Fields of one side: row r holds segments of `lengths[r]` tokens, then padding."""
  rng = np.random.default_rng(seed)
  tokens, segments, positions = np.zeros((3, len(lengths), width), np.int32)
  for row, own in enumerate(lengths):
    at = 0
    for k, n in enumerate(own):
      tokens[row, at : at + n] = rng.integers(3, VOCAB, n)
      segments[row, at : at + n], positions[row, at : at + n] = k + 1, np.arange(n)
      at += n
  return {f'{name}_input_tokens': tokens, f'{name}_segment_ids': segments, f'{name}_positions': positions}


def batch(lengths=((5, 7), (9, 3)), width=14, seed=0) -> dict[str, np.ndarray]:
  lengths = [list(own) for own in lengths]
  both = side('encoder', lengths, width, seed) | side('decoder', lengths, width, seed + 1)
  return both | {'example_index': np.arange(len(lengths), dtype=np.int32)}


def alone(packed: dict[str, np.ndarray], row: int, segment: int) -> dict[str, np.ndarray]:
  """One segment of a packed row as a batch of its own, without padding."""
  cut = {'example_index': packed['example_index'][row : row + 1]}
  for name, values in packed.items():
    if values.ndim == 2:
      own = packed[name.split('_')[0] + '_segment_ids'][row] == segment
      cut[name] = values[row][own][None]
      if name.endswith('segment_ids'):
        cut[name] = np.ones_like(cut[name])
  return cut
