"""Each family against logits that `transformers` wrote (scripts/make_interchange_goldens.py)."""

import dataclasses
import json
import shutil

import pytest

from models.layers.positions.rotary import Linear
from pallas_kernels.errors import KernelError
from pretrain.interchange.config_json import ConfigJson
from pretrain.interchange.families import family_for, lost
from tests.pretrain.interchange import goldens

TOLERANCE = 3e-6  # of the logits' scale; wrong eps, theta and distances are further away


@pytest.fixture(scope='module', params=goldens.EACH)
def golden(request):
  return request.param, *goldens.read(request.param), goldens.expected(request.param)


def test_logits_are_those_of_transformers(golden):
  _, source, params, expected = golden
  assert goldens.worst(source.model, params, expected) < TOLERANCE


@pytest.mark.slow
def test_the_kernel_gives_the_logits_of_transformers(golden):
  """TPU's, in the interpreter: padded and packed rows of 260 tokens."""
  _, source, params, expected = golden
  if source.model.positions == 'disentangled':
    with pytest.raises(KernelError, match="'interpret' has no disentangled attention"):
      goldens.worst(source.model, params, expected, attention='interpret')
    return
  assert goldens.worst(source.model, params, expected, attention='interpret') < TOLERANCE


def nearly(values: dict) -> dict[str, dict]:
  """Other values for keys of a config.json, each nearly right: they are read, and change the logits."""
  rope = values.get('rope_parameters', {})
  changes = {key: change(values[key]) for key, change in NEARLY.items() if values.get(key) is not None}
  found = {key: {key: value} for key, value in changes.items()}
  for key, change in NEARLY_ROPE.items():
    if key in rope and not values.get('alibi'):
      found[f'rope_parameters.{key}'] = {'rope_parameters': rope | {key: change(rope[key])}}
  return found


NEARLY = {
  'rms_norm_eps': lambda eps: 1.1 * eps,
  'layer_norm_eps': lambda eps: 1.1 * eps,
  'layer_norm_epsilon': lambda eps: 1.1 * eps,
  'relative_attention_max_distance': lambda distance: distance - 5,
  'sliding_window': lambda window: window + 1,
  'query_pre_attn_scalar': lambda scalar: scalar + 1,
  'attn_logit_softcapping': lambda cap: 1.02 * cap,
  'final_logit_softcapping': lambda cap: 1.02 * cap,
  'use_parallel_residual': lambda parallel: not parallel,
  'num_experts_per_tok': lambda number: number - 1,
  'max_relative_positions': lambda distance: distance + 3,
  'activation_function': lambda name: 'gelu',
  'activation': lambda name: 'gelu_new',
  'scale_attn_weights': lambda scaled: not scaled,
  'alibi': lambda alibi: not alibi,
  'feed_forward_proj': lambda name: {'relu': 'gelu_new', 'gated-gelu': 'gated-silu', 'gated-silu': 'gated-gelu'}[name],
}
NEARLY_ROPE = {
  'rope_theta': lambda theta: theta + 1,
  'factor': lambda factor: 1.01 * factor,
  'high_freq_factor': lambda factor: 1.1 * factor,
  'beta_fast': lambda beta: beta / 4,
  'original_max_position_embeddings': lambda length: 2 * length,
}


def with_config(name: str, tmp_path, change: dict):
  folder = shutil.copytree(goldens.GOLDENS / name, tmp_path / name)
  values = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps(values | change))
  return goldens.load(folder)


def keys_of(name: str) -> list[str]:
  return list(nearly(json.loads((goldens.GOLDENS / name / 'config.json').read_text())))


def is_told_apart(name: str, key: str, tmp_path) -> bool:
  change = nearly(json.loads((goldens.GOLDENS / name / 'config.json').read_text()))[key]
  source, params = with_config(name, tmp_path, change)
  return goldens.worst(source.model, params, goldens.expected(name), [goldens.PADDED]) > TOLERANCE


@pytest.mark.parametrize(
  'mutation',
  [
    {'relative_norm': False}, {'position_scores': ('p2c', 'c2p', 'p2c')}, {'position_scores': ('c2p',)},
    {'position_scores': ('p2c',)},
  ],
  ids=['norm_rel_ebd', 'scale of sqrt(4d)', 'c2p alone', 'p2c alone'],
)  # fmt: skip
def test_parts_of_disentangled_attention_are_told_apart(mutation):
  """A third name changes the scale alone, to 1 / sqrt(4 head_dim)."""
  source, params = goldens.read('deberta_v3')
  if not mutation.get('relative_norm', True):
    params['encoder_bias'].pop('norm')
  model = dataclasses.replace(source.model, **mutation)
  assert goldens.worst(model, params, goldens.expected('deberta_v3'), [goldens.PADDED]) > TOLERANCE


@pytest.mark.parametrize(
  ('name', 'key'),
  [
    ('t5_v1_0', 'relative_attention_max_distance'),
    ('llama', 'rope_parameters.factor'),
    ('mistral', 'sliding_window'),
    ('qwen3', 'rms_norm_eps'),
    ('gemma2', 'query_pre_attn_scalar'),
    ('gpt_neox', 'use_parallel_residual'),
    ('falcon', 'rope_parameters.rope_theta'),
    ('roberta', 'layer_norm_eps'),
    ('gpt2_unscaled', 'scale_attn_weights'),
    ('falcon_rw', 'alibi'),
    ('qwen2_windows', 'sliding_window'),
    ('deberta_v3', 'max_relative_positions'),
  ],
)
def test_a_config_that_is_nearly_right_is_told_apart(name, key, tmp_path):
  assert is_told_apart(name, key, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'key'), [(name, key) for name in goldens.ALL for key in keys_of(name)])
def test_every_config_that_is_nearly_right_is_told_apart(name, key, tmp_path):
  assert is_told_apart(name, key, tmp_path)


def test_the_parts_of_a_model_find_its_family(golden):
  _, source, _, _ = golden
  assert not lost(source.family, source.model)
  assert not lost(family_for(source.model), source.model)


def test_written_values_are_those_that_were_read(golden):
  """Ids and lengths aside: they are no part of a model."""
  name, source, _, _ = golden
  theirs = json.loads((goldens.GOLDENS / name / 'config.json').read_text())
  free = ('max_position_embeddings',) if source.model.name == 'decoder' else ()
  ours = {key: value for key, value in source.family.write(source.model).items() if not key.endswith('_token_id')}
  shared = {key: value for key, value in ours.items() if key in theirs and key not in free + SCALES.get(name, ())}
  assert shared == {key: theirs[key] for key in shared}
  assert len(shared) > 8


# Values that go into weights, that have other forms, or that transformers derives from others.
SCALES = {
  'deberta_v3': ('legacy', 'pos_att_type'),
  'gemma2': ('query_pre_attn_scalar',), 'gemma2_bias': ('query_pre_attn_scalar',), 'falcon': ('num_kv_heads',),
  'qwen2': ('max_window_layers',), 'qwen3': ('max_window_layers',), 'gpt2_unscaled': ('n_inner',),
}  # fmt: skip


@pytest.mark.parametrize('name', goldens.ALL)
def test_a_written_config_gives_the_model_back(name):
  source = goldens.read_source(name)
  values = source.family.write(source.model)
  tensors = {'lm_head.weight': None} if source.model.head == 'untied' else {}
  config = ConfigJson(values, 'test')
  assert source.family.read(config, tensors) == source.model
  config.finish()


def test_windows_follow_from_max_window_layers_where_a_file_has_no_layer_types(tmp_path):
  """As in files of before transformers 4.53."""
  folder = shutil.copytree(goldens.GOLDENS / 'qwen2_windows', tmp_path / 'source')
  values = json.loads((folder / 'config.json').read_text())
  del values['layer_types']
  (folder / 'config.json').write_text(json.dumps(values))
  assert goldens.load(folder)[0].model.windows == (None, None, 40)
  assert goldens.read_source('qwen2_windows').model.windows == (None, None, 40)


@pytest.mark.parametrize(
  'change',
  [
    {'rope_parameters': {'rope_type': 'linear', 'factor': 2.0, 'rope_theta': 700.0, 'partial_rotary_factor': 0.5}},
    {'rope_scaling': {'type': 'linear', 'factor': 2.0}, 'rotary_pct': 0.5, 'rotary_emb_base': 700},
    {
      'rope_scaling': {'rope_type': 'linear', 'factor': 2.0},
      'rotary_pct': 0.5,
      'rotary_emb_base': 700,
      'rope_theta': 700.0,
      'partial_rotary_factor': 0.5,
    },
  ],
)
def test_positions_of_gpt_neox_in_new_and_old_layouts(change):
  """transformers 5 puts everything into rope_parameters; before, the base and the part had names of their own."""
  values = json.loads((goldens.GOLDENS / 'gpt_neox/config.json').read_text())
  del values['rope_parameters']
  config = ConfigJson(values | change, 'test')
  model = goldens.read_source('gpt_neox').family.read(config, {'embed_out.weight': None})
  config.finish()
  assert (model.rope_theta, model.rotary_fraction, model.rope_scaling) == (700.0, 0.5, Linear(factor=2.0))


def test_alibi_of_another_scale_is_not_that_of_falcon():
  source = goldens.read_source('falcon_rw')
  assert lost(source.family, dataclasses.replace(source.model, alibi_scaled=False)) == ['model.alibi_scaled']
