"""Published families against the logits of `transformers` (scripts/make_interchange_goldens.py)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.build import KernelsConfig, build, check_model
from models.decode.cached import teacher_forced
from models.layers.norm import LayerNormConfig, RmsNormConfig
from models.layers.positions.rotary import NoScaling, Rope, Yarn, frequencies
from models.partition import check_divisible, shardings
from models.specs import is_spec
from pretrain.devices.mesh import MeshConfig, make_mesh
from tests.models.families import published

TOLERANCE = 3e-6  # of the scale of the logits
FAMILIES = sorted(published.READERS)
WRITERS = [name for name in FAMILIES if name not in ('bert', 'roberta', 'electra')]


def slow(*values):
  return pytest.param(*values, marks=pytest.mark.slow)


def fields(side: str, documents: list[np.ndarray], width: int, inputs: list[np.ndarray] | None = None) -> dict:
  """The batch fields of one row that holds `documents`, then padding."""
  tokens, segments, positions = np.zeros((3, 1, width), np.int32)
  at = 0
  for k, document in enumerate(documents):
    own = slice(at, at + len(document))
    tokens[0, own], segments[0, own], positions[0, own] = document, k + 1, np.arange(len(document))
    at += len(document)
  return {f'{side}_input_tokens': tokens, f'{side}_segment_ids': segments, f'{side}_positions': positions}


def row(cfg, golden: dict, names: list[str], width: int) -> dict:
  documents = [golden[name] for name in names]
  batch = {'example_index': np.zeros(1, np.int32)}
  if cfg.name == 'encoder_decoder':
    targets = [golden[f'{name}_target'] for name in names]
    return batch | fields('encoder', documents, width) | fields('decoder', targets, width)
  return batch | fields(cfg.name, documents, width)


def error(cfg, params, golden, names, width, mesh=None, attention='auto') -> float:
  """The largest difference of a logit, as a share of the largest logit; on a mesh, of two rows."""
  model = build(cfg, KernelsConfig(attention=attention), mesh)
  run = jax.jit(lambda params, batch: model.logits(params, model.apply(params, batch)[0]))
  batch = row(cfg, golden, names, width)
  if mesh is not None:
    batch = {field: np.repeat(values, 2, 0) for field, values in batch.items()}
  return np.max([difference(found, golden, names) for found in np.asarray(run(params, batch))])


def difference(found: np.ndarray, golden: dict, names: list[str]) -> float:
  expected = np.concatenate([golden[f'{name}_logits'] for name in names])
  return np.abs(found[: len(expected)] - expected).max() / np.abs(expected).max()


def some(*fast: str, of=FAMILIES):
  """A test for each family, `fast` ones in every run of the suite."""
  return pytest.mark.parametrize('name', [*fast, *(slow(name) for name in of if name not in fast)])


@some('bert', 'gemma2', 'mixtral', 't5_v1_0')  # of the others the import is tested, on the same logits
def test_logits_equal_those_of_transformers(name):
  """A padded row and a row of two packed documents, of 200 tokens and more, in float32."""
  cfg, params, golden = published.read(name)
  check_model(cfg)
  shapes = lambda tree: jax.tree.map(lambda x: tuple(x.shape), tree, is_leaf=is_spec)
  assert shapes(params) == shapes(build(cfg).specs)
  assert error(cfg, params, golden, ['long'], 210) < TOLERANCE
  assert error(cfg, params, golden, ['short', 'long'], 270) < TOLERANCE


MUTATIONS = {
  'norm.eps': ('llama', {'norm': RmsNormConfig(eps=1.1e-3)}),
  'layer norm.eps': ('gpt2', {'norm': LayerNormConfig(eps=1.1e-3)}),
  'rope_theta': ('mistral', {'rope_theta': 801.0}),
  'rope_scaling none': ('llama', {'rope_scaling': NoScaling()}),
  'yarn without its factor': (
    'qwen3',
    {'rope_scaling': Yarn(factor=4.0, original_max_positions=64, beta_fast=16.0, beta_slow=2.0, attention_factor=1.0)},
  ),
  'a window one longer': ('mistral', {'windows': (49,)}),
  'windows of the other layers': ('gemma2', {'windows': (None, 40)}),
  'soft cap': ('gemma2', {'attention_softcap': 5.1}),
  'norm placement': ('olmo2', {'norm_placement': 'pre'}),
  'parallel': ('gpt_neox', {'parallel': 'none'}),
  'rotary_fraction': ('gpt_neox', {'rotary_fraction': 0.5}),
  'kind of gelu': ('bert', {'head_transform': 'gelu_tanh'}),
  'bias of logits': ('bert', {'head_bias': False}),
  'distance of buckets': ('umt5', {'relative_max_distance': 49}),
  'head': ('t5_v1_0', {'head': 'tied'}),
  'number of experts of a token': ('mixtral', {'experts_per_token': 3}),
}
# Tests of the import have the like, on the same logits.
IMPORTED = (
  'norm.eps', 'layer norm.eps', 'rope_theta', 'rope_scaling none', 'a window one longer', 'parallel',
  'distance of buckets',
)  # fmt: skip


@pytest.mark.parametrize('mutation', [slow(name) if name in IMPORTED else name for name in MUTATIONS])
def test_a_wrong_value_of_a_key_does_not_pass(mutation):
  """The tolerance, the golden's weights and its lengths are such that a slightly wrong config is seen."""
  name, changes = MUTATIONS[mutation]
  cfg, params, golden = published.read(name)
  cfg = dataclasses.replace(cfg, **changes)
  params = {part: params[part] for part in build(cfg).specs}
  assert error(cfg, params, golden, ['long'], 200) > 3 * TOLERANCE


@some('gemma2', of=WRITERS)
def test_decoding_with_a_cache_gives_the_logits_of_transformers(name):
  """20 tokens at once, then one by one, past the windows."""
  cfg, params, golden = published.read(name)
  batch, tokens = row(cfg, golden, ['short'], 60), golden.get('short_target', golden['short'])
  found = teacher_forced(build(cfg), jax.tree.map(jnp.asarray, params), batch, jnp.asarray(tokens)[None], at_once=20)
  assert difference(np.asarray(found)[0], golden, ['short']) < TOLERANCE


@some('falcon', 'mixtral')
def test_a_divided_model_gives_the_logits_of_transformers(name):
  """Norms over all heads, the one key head of Falcon, biases of each layer and of logits, with fsdp and tensor."""
  cfg, params, golden = published.read(name)
  mesh, model = make_mesh(MeshConfig(fsdp=2, tensor=2)), build(cfg)
  check_divisible(model.specs, mesh)
  assert error(cfg, jax.device_put(params, shardings(model.specs, mesh)), golden, ['short'], 64, mesh) < TOLERANCE


@some('gemma2')
def test_the_kernel_gives_the_logits_of_transformers(name):
  """Windows that differ between layers and biases of each layer, in the interpreter."""
  cfg, params, golden = published.read(name)
  assert error(cfg, params, golden, ['short', 'short'], 128, attention='interpret') < TOLERANCE


@pytest.mark.parametrize(
  ('remat', 'name'), [slow('full', 'gemma2'), slow('dots', 'gemma2'), slow('full', 'umt5'), slow('full', 'gpt_neox')]
)
def test_rematerialised_layers_have_the_same_gradients(remat, name):
  """Groups of layers with windows, tables of each layer, parallel layers."""
  cfg, params, golden = published.read(name)
  batch = row(cfg, golden, ['short'], 60)

  def gradients(cfg):
    model = build(cfg)
    total = lambda p: jnp.sum(jnp.sin(model.apply(p, batch)[0]))
    return jax.tree.leaves(jax.jit(jax.grad(total))(jax.tree.map(jnp.asarray, params)))

  for found, expected in zip(gradients(dataclasses.replace(cfg, remat=remat)), gradients(cfg), strict=True):
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize('kind', ['linear', 'llama3', 'yarn', 'yarn_exact'])
def test_frequencies_of_a_scaled_rope_equal_those_of_transformers(kind):
  """Of a head of 64 dims, where some frequencies stay, some are divided and some lie between; `yarn_exact` does not
  round the ends of its ramp.
  """
  family = {'linear': 'yi', 'llama3': 'llama', 'yarn': 'qwen3', 'yarn_exact': 'qwen3'}[kind]
  cfg, golden = published.read(family)[0], np.load(published.GOLDENS / 'rope.npz')
  exact = {'truncate': False} if kind == 'yarn_exact' else {}
  rope = Rope(theta=cfg.rope_theta, dims=64, scaling=dataclasses.replace(cfg.rope_scaling, **exact))
  found, factor = frequencies(rope)
  np.testing.assert_allclose(found, golden[f'{kind}_frequencies'], rtol=1e-6)
  assert factor == pytest.approx(float(golden[f'{kind}_factor']), rel=1e-7)
  ratio = golden[f'{kind}_frequencies'] / frequencies(dataclasses.replace(rope, scaling=NoScaling()))[0]
  assert kind == 'linear' or len(np.unique(ratio.round(5))) > 2, 'the golden must have a ramp'
