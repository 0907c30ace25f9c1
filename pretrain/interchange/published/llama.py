"""Llama and the families that name their tensors as it does: Mistral, Mixtral, Qwen2, Qwen3, OLMo 2 and Gemma 2."""

import dataclasses
from typing import Any

from models.families.decoder import DecoderConfig, DecoderMlpConfig
from models.layers.linear import Bias
from models.layers.norm import RmsNormConfig
from pretrain.interchange.config_json import ConfigJson
from pretrain.interchange.family import Family, Tensors, Values
from pretrain.interchange.layout import Entry
from pretrain.interchange.published.ropes import read_rope, write_rope

ACTIVATIONS = {
  'silu': 'silu', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu_new': 'gelu_tanh', 'gelu': 'gelu_exact', 'relu': 'relu',
}  # fmt: skip
NAMES = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
HEAD, TABLE = 'lm_head.weight', 'model.embed_tokens.weight'
SLIDING, FULL = 'sliding_attention', 'full_attention'
WORDS: dict[tuple[bool, bool], Bias] = {  # of attention_bias and mlp_bias
  (False, False): 'none', (True, False): 'attention', (False, True): 'mlp', (True, True): 'all',
}  # fmt: skip
BIASES = {'attention_bias': ('attention', 'all'), 'mlp_bias': ('mlp', 'all')}


def common(
  config: ConfigJson, *, tied: bool = False, theta: float = 10_000.0, eps: float = 1e-6, kv_heads: int | None = None,
  head_dim: int | None = None, activation: str = 'hidden_act', attention_bias: bool = True, mlp_bias: bool = False,
) -> DecoderConfig:  # fmt: skip
  """What all of them share, with the defaults of the family's config class.

  `attention_bias`, `mlp_bias`: whether the family has this key, and biases where it is true.
  """
  embed, heads = config.take('hidden_size'), config.take('num_attention_heads')
  kv_heads = config.take('num_key_value_heads', kv_heads) or heads
  config.expect('pretraining_tp', 1, 2, 4, 8)  # splits a product into parts with the same sum
  return DecoderConfig(
    vocab_size=config.take('vocab_size'), embed=embed, heads=heads, layers=config.take('num_hidden_layers'),
    head_dim=config.take('head_dim', head_dim) or embed // heads, kv_heads=None if kv_heads == heads else kv_heads,
    mlp=DecoderMlpConfig(
      hidden=config.take('intermediate_size'),
      activation=config.choose(activation, ACTIVATIONS, 'silu' if activation == 'hidden_act' else 'gelu_pytorch_tanh'),
    ),
    norm=RmsNormConfig(eps=config.take('rms_norm_eps', eps, float)),
    bias=_bias(config, attention=attention_bias, mlp=mlp_bias),
    head='tied' if config.take('tie_word_embeddings', tied, bool) else 'untied', **read_rope(config, theta),
  )  # fmt: skip


def _bias(config: ConfigJson, *, attention: bool, mlp: bool) -> Bias:
  given = attention and config.take('attention_bias', False, bool)
  if not mlp:
    config.expect('mlp_bias', False)
  return WORDS[given, mlp and config.take('mlp_bias', False, bool)]


def read_llama(config: ConfigJson, tensors: Tensors) -> DecoderConfig:
  return common(config, mlp_bias=True)


def read_mistral(config: ConfigJson, tensors: Tensors) -> DecoderConfig:
  found = common(config, kv_heads=8, attention_bias=False)
  return dataclasses.replace(found, windows=_one_window(config, 4096))


def _one_window(config: ConfigJson, default: int | None) -> tuple[int, ...]:
  window = config.take('sliding_window', default, optional=True)
  return () if window is None else (window,)


def read_mixtral(config: ConfigJson, tensors: Tensors) -> DecoderConfig:
  config.ignore('output_router_logits', 'router_aux_loss_coef', 'router_jitter_noise')
  found = common(config, kv_heads=8, theta=1_000_000.0, eps=1e-5, attention_bias=False)
  return dataclasses.replace(
    found, windows=_one_window(config, None), experts=config.take('num_local_experts', 8),
    experts_per_token=config.take('num_experts_per_tok', 2),
  )  # fmt: skip


def read_qwen2(config: ConfigJson, tensors: Tensors) -> DecoderConfig:
  found = common(config, kv_heads=32, attention_bias=False)
  return dataclasses.replace(found, bias='qkv', windows=_qwen_windows(config, found.layers))


def read_qwen3(config: ConfigJson, tensors: Tensors) -> DecoderConfig:
  found = common(config, kv_heads=32, head_dim=128)
  return dataclasses.replace(found, qk_norm='heads', windows=_qwen_windows(config, found.layers))


def _qwen_windows(config: ConfigJson, layers: int) -> tuple[int | None, ...]:
  """The last layers have a window, if any has: those from max_window_layers on."""
  config.ignore('sliding_window', 'max_window_layers', 'layer_types')
  if not config.take('use_sliding_window', False, bool):
    return ()
  first = config.take('max_window_layers', 28, least=0)
  return windows(config, layers, [SLIDING if i >= first else FULL for i in range(layers)])


def windows(config: ConfigJson, layers: int, default: list[str]) -> tuple[int | None, ...]:
  """The shortest pattern that repeats over the layers, from layer_types and sliding_window."""
  types, window = config.take('layer_types', default, list), config.take('sliding_window', 4096, optional=True)
  if len(types) != layers or not set(types) <= {SLIDING, FULL}:
    config.problems.append(f'layer_types={types} (supported: {SLIDING!r} or {FULL!r} for each of {layers} layers)')
    return ()
  each = [window if kind == SLIDING else None for kind in types]
  if not any(each):
    return ()
  lengths = [n for n in range(1, layers + 1) if layers % n == 0 and each == each[:n] * (layers // n)]
  return tuple(each[: lengths[0]])


def read_olmo2(config: ConfigJson, tensors: Tensors) -> DecoderConfig:
  return dataclasses.replace(common(config, eps=1e-5), qk_norm='all', norm_placement='inner')


def read_gemma2(config: ConfigJson, tensors: Tensors) -> DecoderConfig:
  """Its norms multiply by 1 + weight, its table by sqrt(embed), and queries have a scale of their own: see `fold`."""
  config.expect('use_bidirectional_attention', None, False)
  config.ignore('hidden_act', 'cache_implementation', 'sliding_window_size')  # hidden_activation is the one it reads
  config.take('query_pre_attn_scalar', 256, float)
  found = common(config, tied=True, kv_heads=4, head_dim=256, activation='hidden_activation')
  default = [FULL if i % 2 else SLIDING for i in range(found.layers)]
  return dataclasses.replace(
    found, head='tied_scaled' if found.head == 'tied' else 'untied', norm_placement='sandwich',
    windows=windows(config, found.layers, default),
    attention_softcap=config.take('attn_logit_softcapping', 50.0, float, optional=True),
    logit_softcap=config.take('final_logit_softcapping', 30.0, float, optional=True),
  )  # fmt: skip


def write(cfg: DecoderConfig) -> dict[str, Any]:
  return {
    'vocab_size': cfg.vocab_size, 'hidden_size': cfg.embed, 'intermediate_size': cfg.mlp.hidden,
    'num_hidden_layers': cfg.layers, 'num_attention_heads': cfg.heads, 'head_dim': cfg.head_dim,
    'num_key_value_heads': cfg.kv_heads or cfg.heads, 'hidden_act': NAMES[cfg.mlp.activation],
    'rms_norm_eps': cfg.norm.eps, **write_rope(cfg), 'tie_word_embeddings': cfg.head == 'tied', 'bos_token_id': 0,
    'eos_token_id': 1, 'pad_token_id': 0, **{key: True for key, words in BIASES.items() if cfg.bias in words},
  }  # fmt: skip


def write_mistral(cfg: DecoderConfig) -> dict[str, Any]:
  return write(cfg) | {'sliding_window': cfg.windows[0] if cfg.windows else None}


def write_mixtral(cfg: DecoderConfig) -> dict[str, Any]:
  return write_mistral(cfg) | {'num_local_experts': cfg.experts, 'num_experts_per_tok': cfg.experts_per_token}


def write_qwen(cfg: DecoderConfig) -> dict[str, Any]:
  """With layer_types, which newer releases read; max_window_layers says the same to older ones where it can."""
  given = {window for window in cfg.windows if window is not None}
  types = [SLIDING if window else FULL for window in (cfg.windows or (None,)) * (cfg.layers // len(cfg.windows or [0]))]
  return write(cfg) | {
    'use_sliding_window': bool(given), 'sliding_window': max(given, default=None), 'layer_types': types,
    'max_window_layers': types.index(SLIDING) if given else cfg.layers,
  }  # fmt: skip


def write_gemma2(cfg: DecoderConfig) -> dict[str, Any]:
  own = write_qwen(cfg)
  activation = own.pop('hidden_act')
  own = {key: value for key, value in own.items() if key not in ('use_sliding_window', 'max_window_layers')}
  return own | {
    'hidden_activation': activation, 'tie_word_embeddings': cfg.head == 'tied_scaled',
    'sliding_window': own['sliding_window'] or 4096, 'query_pre_attn_scalar': cfg.head_dim,
    'attn_logit_softcapping': cfg.attention_softcap, 'final_logit_softcapping': cfg.logit_softcap,
  }  # fmt: skip


BLOCK, LAYER = 'decoder/blocks', 'model.layers.{0}'


def entries(cfg: DecoderConfig, values: Values) -> list[Entry]:
  """Those of Llama, with its biases, which Qwen2 and Qwen3 have too, and Qwen3's norms."""
  norms = {'self_norm': 'input_layernorm', 'mlp_norm': 'post_attention_layernorm'}
  return [*_frame(), *_attention(), *_mlp(), *_norms(norms)]


def _frame(**table: float) -> list[Entry]:
  return [Entry('embedding/table', TABLE, 'vocab embed', **table), Entry('head/kernel', HEAD, 'vocab embed')]


def _attention(*, query: float = 1.0, qk_norm: str = 'head_dim') -> list[Entry]:
  ours, theirs = f'{BLOCK}/self_attention', f'{LAYER}.self_attn'
  found = [
    Entry(f'{ours}/out', f'{theirs}.o_proj.weight', 'embed (heads head_dim)'),
    Entry(f'{ours}/out_bias', f'{theirs}.o_proj.bias', 'embed'),
  ]
  for letter, name, heads, scale in (
    ('q', 'query', 'heads', query), ('k', 'key', 'kv_heads', 1.0), ('v', 'value', 'kv_heads', 1.0)
  ):  # fmt: skip
    layout = f'({heads} head_dim)'
    found.append(Entry(f'{ours}/{name}', f'{theirs}.{letter}_proj.weight', f'{layout} embed', scale=scale))
    found.append(Entry(f'{ours}/{name}_bias', f'{theirs}.{letter}_proj.bias', layout, scale=scale))
    norm = layout if qk_norm == 'all' else 'head_dim'
    found.append(Entry(f'{ours}/{name}_norm/scale', f'{theirs}.{letter}_norm.weight', norm))
  return found


def _mlp() -> list[Entry]:
  layouts = {'gate': 'mlp embed', 'up': 'mlp embed', 'down': 'embed mlp'}
  return [
    Entry(f'{BLOCK}/mlp/{ours}{suffix}', f'{LAYER}.mlp.{ours}_proj.{part}', layout)
    for ours, where in layouts.items()
    for suffix, part, layout in (('', 'weight', where), ('_bias', 'bias', where.split()[0]))
  ]


def _norms(names: dict[str, str], **fold: float) -> list[Entry]:
  found = [
    Entry(f'{BLOCK}/{ours}/scale', f'{LAYER}.{theirs}.weight', 'embed', **fold) for ours, theirs in names.items()
  ]
  return [*found, Entry('decoder/norm/scale', 'model.norm.weight', 'embed', **fold)]


def entries_mixtral(cfg: DecoderConfig, values: Values) -> list[Entry]:
  ours, theirs = f'{BLOCK}/mlp', f'{LAYER}.block_sparse_moe'
  layouts = {'gate': ('w1', 'mlp embed'), 'up': ('w3', 'mlp embed'), 'down': ('w2', 'embed mlp')}
  experts = [
    Entry(f'{ours}/{name}', f'{theirs}.experts.{{1}}.{matrix}.weight', layout)
    for name, (matrix, layout) in layouts.items()
  ]
  router = Entry(f'{ours}/router', f'{theirs}.gate.weight', 'experts embed')
  return [entry for entry in entries(cfg, values) if '/mlp/' not in entry.ours] + [router, *experts]


def entries_olmo2(cfg: DecoderConfig, values: Values) -> list[Entry]:
  norms = {'self_norm': 'post_attention_layernorm', 'mlp_norm': 'post_feedforward_layernorm'}
  return [*_frame(), *_attention(qk_norm='all'), *_mlp(), *_norms(norms)]


def entries_gemma2(cfg: DecoderConfig, values: Values) -> list[Entry]:
  norms = {
    'self_norm': 'input_layernorm', 'self_out_norm': 'post_attention_layernorm',
    'mlp_norm': 'pre_feedforward_layernorm', 'mlp_out_norm': 'post_feedforward_layernorm',
  }  # fmt: skip
  query = (cfg.head_dim / values.get('query_pre_attn_scalar', 256)) ** 0.5
  return [*_frame(scale=cfg.embed**0.5), *_attention(query=query), *_mlp(), *_norms(norms, shift=1.0)]


def _family(model_type: str, architecture: str, read, write=write, entries=entries) -> Family:
  unused = (r'model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq', r'model\.rotary_emb\.inv_freq')
  return Family(model_type, architecture, read, write, entries, tied=(HEAD, TABLE), unused=unused)


LLAMA = _family('llama', 'LlamaForCausalLM', read_llama)
MISTRAL = _family('mistral', 'MistralForCausalLM', read_mistral, write_mistral)
MIXTRAL = _family('mixtral', 'MixtralForCausalLM', read_mixtral, write_mixtral, entries_mixtral)
QWEN2 = _family('qwen2', 'Qwen2ForCausalLM', read_qwen2, write_qwen)
QWEN3 = _family('qwen3', 'Qwen3ForCausalLM', read_qwen3, write_qwen)
OLMO2 = _family('olmo2', 'Olmo2ForCausalLM', read_olmo2, entries=entries_olmo2)
GEMMA2 = _family('gemma2', 'Gemma2ForCausalLM', read_gemma2, write_gemma2, entries_gemma2)
