"""Which sites of a model drop: T5X examples/t5/network.py, and google-research/bert modeling.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.build import build, check_model
from models.families.encoder import EncoderConfig
from models.layers.attention import Attention, Visibility
from models.layers.block import Block
from models.layers.dropout import example_keys
from models.layers.mlp import MlpConfig
from models.layers.norm import LayerNormConfig
from models.specs import initialize
from tests.models.small import shaken

RATE, ROWS, LENGTH, EMBED = 0.4, 64, 16, 32
CFG = EncoderConfig(
  vocab_size=96, embed=EMBED, layers=1, heads=2, head_dim=16, mlp=MlpConfig(hidden=48), norm=LayerNormConfig(),
  bias='all', dropout=RATE,
)  # fmt: skip
SITES = pytest.mark.parametrize('sites', ['t5', 'bert'])


def zeroed(params: dict, *names: str) -> dict:
  """The same, with 0 in the parameters of these names."""
  return jax.tree_util.tree_map_with_path(lambda path, x: x * float(path[-1].key not in names), params)


def keys_of(rows: int):
  return example_keys(jax.random.key(0), jnp.arange(rows))


def share_dropped(dropped: np.ndarray, plain: np.ndarray) -> tuple[float, bool]:
  """(how much of `dropped` is 0, whether all tokens of an example lose the same features).

  What is left must be `plain` divided by 1 - RATE: something that dropped before would have other values.
  """
  gone = dropped == 0
  np.testing.assert_allclose(dropped[~gone], (plain / (1 - RATE))[~gone], rtol=1e-4, atol=1e-6)
  return gone.mean(), bool((gone == gone[:, :1]).all())


def block_update(sites: str, *without: str) -> tuple[np.ndarray, np.ndarray]:
  """What a block adds to 0, with and without dropout; parameters of the names `without` are 0."""
  model = build(dataclasses.replace(CFG, dropout_sites=sites))
  module = model.bind(zeroed(shaken(initialize(model.specs, jax.random.key(1))), *without))
  block: Block = jax.tree.map(lambda x: x[0], module.encoder.blocks)
  shape = (ROWS, LENGTH)
  see = Visibility(causal=False, q_segment_ids=jnp.ones(shape, jnp.int32), kv_segment_ids=jnp.ones(shape, jnp.int32))
  x, positions = jnp.zeros((*shape, EMBED)), jnp.broadcast_to(jnp.arange(LENGTH), shape)
  run = jax.jit(lambda keys: block(x, positions, see, None, keys, jnp.uint32(0), None)[0])
  return np.asarray(run(keys_of(ROWS))), np.asarray(run(None))


def assert_site(sites: str, dropped: np.ndarray, plain: np.ndarray) -> None:
  share, shared = share_dropped(dropped, plain)
  masks = ROWS * EMBED * (1 if sites == 't5' else LENGTH)
  assert abs(share - RATE) < 4 * np.sqrt(RATE * (1 - RATE) / masks)
  assert shared == (sites == 't5')


@pytest.mark.parametrize('sites', [pytest.param('t5', marks=pytest.mark.slow), 'bert'])
def test_the_output_of_attention_drops(sites):
  assert_site(sites, *block_update(sites, 'value', 'value_bias', 'down', 'down_bias'))


def test_in_bert_the_output_of_an_mlp_drops_and_its_hidden_layer_does_not():
  assert_site('bert', *block_update('bert', 'out', 'out_bias'))


def test_in_t5_the_hidden_layer_of_an_mlp_drops_too():
  dropped, plain = block_update('t5', 'out', 'out_bias')
  assert abs((dropped == 0).mean() - RATE) < 0.05
  with pytest.raises(AssertionError, match='Not equal to tolerance'):
    share_dropped(dropped, plain)


@SITES
def test_weights_of_attention_drop(sites):
  """Values name their own key, and the output projection is the identity: what comes out are the weights."""
  model = build(dataclasses.replace(CFG, dropout_sites=sites))
  params = zeroed(initialize(model.specs, jax.random.key(1)), 'out_bias')
  params['encoder']['blocks']['self_attention']['out'] = jnp.eye(EMBED).reshape(1, 2, LENGTH, EMBED)
  attention: Attention = jax.tree.map(lambda x: x[0], model.bind(params).encoder.blocks).self_attention
  segments = jnp.ones((ROWS, LENGTH), jnp.int32)
  see = Visibility(causal=False, q_segment_ids=segments, kv_segment_ids=segments)
  q = jnp.zeros((ROWS, 2, LENGTH, LENGTH))
  v = jnp.broadcast_to(jnp.eye(LENGTH), q.shape)
  weights = np.asarray(attention.attend(q, q, v, see, keys_of(ROWS), 0))
  assert_site(sites, weights, np.full(weights.shape, 1 / LENGTH))


@SITES
def test_embeddings_drop_behind_their_norm_and_the_last_layer_in_t5_alone(sites):
  """Blocks that add nothing: the output is the layer norm of the dropped embeddings. Its equal values were 0."""
  cfg = dataclasses.replace(CFG, dropout_sites=sites, embedding_norm=True, norm_placement='post')
  model = build(cfg)
  params = zeroed(initialize(model.specs, jax.random.key(1)), 'out', 'out_bias', 'down', 'down_bias')
  params['embedding']['table'] += 5.0  # far from a mean of 0, so that the order of norm and dropout matters
  tokens = np.random.default_rng(0).integers(3, 96, (ROWS, LENGTH))
  batch = {
    'encoder_input_tokens': tokens, 'encoder_segment_ids': np.ones_like(tokens),
    'encoder_positions': np.broadcast_to(np.arange(LENGTH), tokens.shape), 'example_index': np.arange(ROWS),
  }  # fmt: skip
  out = np.asarray(jax.jit(model.apply)(params, batch, jax.random.key(0))[0])
  if sites == 't5':
    assert abs((out == 0).mean() - RATE) < 0.05
    return
  assert not (out == 0).any()
  sort = np.sort(out, -1)
  middle = np.nanmedian(np.where(np.isclose(sort[..., 1:], sort[..., :-1], atol=1e-6), sort[..., 1:], np.nan), -1)
  gone = np.isclose(out, middle[..., None], atol=1e-5)
  embedded = normed(np.asarray(params['embedding']['table'])[tokens])
  np.testing.assert_allclose(out, normed(np.where(gone, 0, embedded)), atol=1e-3)
  assert abs(gone.mean() - RATE) < 0.02
  assert not (gone == gone[:, :1]).all()


def normed(x: np.ndarray) -> np.ndarray:
  centred = x - x.mean(-1, keepdims=True)
  return centred / centred.std(-1, keepdims=True)


def test_sites_without_dropout_are_refused():
  with pytest.raises(ValueError, match=r"model\.dropout=0\.4 with model\.dropout_sites='none', where nothing drops"):
    check_model(dataclasses.replace(CFG, dropout_sites='none'))
