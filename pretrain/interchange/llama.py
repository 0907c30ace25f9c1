"""Llama and the families that name their tensors as it does: Qwen3."""

import dataclasses
from typing import Any

from models.families.decoder import DecoderConfig, DecoderMlpConfig
from models.layers.norm import RmsNormConfig
from pretrain.interchange.config_json import ConfigJson
from pretrain.interchange.family import Family, Tensors
from pretrain.interchange.layout import Entry

ACTIVATIONS = {'silu': 'silu', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu_new': 'gelu_tanh', 'gelu': 'gelu_exact'}
HEAD = 'lm_head.weight'


def common(config: ConfigJson, *, tied: bool = False, theta: float = 10_000.0, eps: float = 1e-6) -> DecoderConfig:
  """What all of them share, with the defaults of the family's config class."""
  embed, heads = config.take('hidden_size'), config.take('num_attention_heads')
  kv_heads = config.take('num_key_value_heads', None) or heads
  config.expect('mlp_bias', False)
  config.expect('pretraining_tp', 1, 2, 4, 8)  # splits a product into parts with the same sum
  return DecoderConfig(
    vocab_size=config.take('vocab_size'), embed=embed, heads=heads, layers=config.take('num_hidden_layers'),
    head_dim=config.take('head_dim', None) or embed // heads, kv_heads=None if kv_heads == heads else kv_heads,
    mlp=DecoderMlpConfig(
      hidden=config.take('intermediate_size'), activation=config.choose('hidden_act', ACTIVATIONS, 'silu')
    ),
    norm=RmsNormConfig(eps=config.take('rms_norm_eps', eps, float)), rope_theta=config.plain_rope(theta),
    head='tied' if config.take('tie_word_embeddings', tied, bool) else 'untied',
  )  # fmt: skip


def read_llama(config: ConfigJson, tensors: Tensors) -> DecoderConfig:
  config.expect('attention_bias', False)
  return common(config)


def read_qwen3(config: ConfigJson, tensors: Tensors) -> DecoderConfig:
  config.expect('attention_bias', False)
  config.expect('use_sliding_window', False)
  config.ignore('sliding_window', 'max_window_layers', 'layer_types')  # without effect where no window is used
  return dataclasses.replace(common(config), qk_norm='heads')


def write(cfg: DecoderConfig) -> dict[str, Any]:
  names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
  return {
    'vocab_size': cfg.vocab_size, 'hidden_size': cfg.embed, 'intermediate_size': cfg.mlp.hidden,
    'num_hidden_layers': cfg.layers, 'num_attention_heads': cfg.heads, 'head_dim': cfg.head_dim,
    'num_key_value_heads': cfg.kv_heads or cfg.heads, 'hidden_act': names.get(cfg.mlp.activation, 'silu'),
    'rms_norm_eps': cfg.norm.eps, 'rope_theta': cfg.rope_theta,
    'rope_parameters': {'rope_type': 'default', 'rope_theta': cfg.rope_theta},
    'tie_word_embeddings': cfg.head == 'tied', 'bos_token_id': 0, 'eos_token_id': 1, 'pad_token_id': 0,
  }  # fmt: skip


def entries(cfg: DecoderConfig) -> list[Entry]:
  block, layer = 'decoder/blocks', 'model.layers.{0}'
  attention, theirs = f'{block}/self_attention', f'{layer}.self_attn'
  return [
    Entry('embedding/table', 'model.embed_tokens.weight', 'vocab embed'),
    Entry('head/kernel', HEAD, 'vocab embed'),
    Entry('decoder/norm/scale', 'model.norm.weight', 'embed'),
    Entry(f'{block}/self_norm/scale', f'{layer}.input_layernorm.weight', 'embed'),
    Entry(f'{block}/mlp_norm/scale', f'{layer}.post_attention_layernorm.weight', 'embed'),
    Entry(f'{attention}/query', f'{theirs}.q_proj.weight', '(heads head_dim) embed'),
    Entry(f'{attention}/key', f'{theirs}.k_proj.weight', '(kv_heads head_dim) embed'),
    Entry(f'{attention}/value', f'{theirs}.v_proj.weight', '(kv_heads head_dim) embed'),
    Entry(f'{attention}/out', f'{theirs}.o_proj.weight', 'embed (heads head_dim)'),
    Entry(f'{attention}/query_norm/scale', f'{theirs}.q_norm.weight', 'head_dim'),
    Entry(f'{attention}/key_norm/scale', f'{theirs}.k_norm.weight', 'head_dim'),
    Entry(f'{block}/mlp/gate', f'{layer}.mlp.gate_proj.weight', 'mlp embed'),
    Entry(f'{block}/mlp/up', f'{layer}.mlp.up_proj.weight', 'mlp embed'),
    Entry(f'{block}/mlp/down', f'{layer}.mlp.down_proj.weight', 'embed mlp'),
  ]


UNUSED = (r'model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq', r'model\.rotary_emb\.inv_freq')
LLAMA = Family('llama', 'LlamaForCausalLM', read_llama, write, entries, unused=UNUSED)
QWEN3 = Family('qwen3', 'Qwen3ForCausalLM', read_qwen3, write, entries, unused=UNUSED)
