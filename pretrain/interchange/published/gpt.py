"""GPT-2, GPT-NeoX and Falcon, which store query, key and value in one matrix, each in an order of its own."""

from typing import Any

from models.families.decoder import DecoderConfig, DecoderMlpConfig
from models.layers.norm import LayerNormConfig
from pretrain.interchange.config_json import ConfigJson
from pretrain.interchange.family import Family, Tensors, Values
from pretrain.interchange.layout import Entry
from pretrain.interchange.published.ropes import read_rope, write_rope

ACTIVATIONS = {
  'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu_fast': 'gelu_tanh', 'gelu': 'gelu_exact',
  'silu': 'silu', 'relu': 'relu',
}  # fmt: skip
NAMES = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
BLOCK = 'decoder/blocks'
ATTENTION = f'{BLOCK}/self_attention'


def read_gpt2(config: ConfigJson, tensors: Tensors) -> DecoderConfig:
  config.take('scale_attn_weights', True, bool)  # a factor on queries undoes our scale: see `entries_gpt2`
  config.expect('scale_attn_by_inverse_layer_idx', False)
  config.expect('add_cross_attention', False)
  tied = config.take('tie_word_embeddings', True, bool)
  config.ignore(
    'attn_pdrop', 'embd_pdrop', 'resid_pdrop', 'n_ctx', 'reorder_and_upcast_attn', 'summary_activation',
    'summary_first_dropout', 'summary_proj_to_labels', 'summary_type', 'summary_use_proj',
  )  # fmt: skip
  embed, heads = config.take('n_embd'), config.take('n_head')
  return DecoderConfig(
    vocab_size=config.take('vocab_size'), embed=embed, heads=heads, head_dim=embed // heads,
    layers=config.take('n_layer'),
    mlp=DecoderMlpConfig(
      hidden=config.take('n_inner', None) or 4 * embed, gated=False,
      activation=config.choose('activation_function', ACTIVATIONS, 'gelu_new'),
    ),
    norm=LayerNormConfig(eps=config.take('layer_norm_epsilon', 1e-5, float)), bias='all', positions='learned',
    max_positions=config.take('n_positions', 1024), head='tied' if tied else 'untied',
  )  # fmt: skip


def write_gpt2(cfg: DecoderConfig) -> dict[str, Any]:
  return {
    'vocab_size': cfg.vocab_size, 'n_embd': cfg.embed, 'n_head': cfg.heads, 'n_layer': cfg.layers,
    'n_inner': cfg.mlp.hidden, 'n_positions': cfg.max_positions, 'layer_norm_epsilon': cfg.norm.eps,
    'activation_function': NAMES[cfg.mlp.activation], 'bos_token_id': 0, 'eos_token_id': 1, 'pad_token_id': 0,
    'attn_pdrop': cfg.dropout, 'embd_pdrop': cfg.dropout, 'resid_pdrop': cfg.dropout,
    'tie_word_embeddings': cfg.head == 'tied',
  }  # fmt: skip


def _norms(names: dict[str, str]) -> list[Entry]:
  return [
    Entry(f'{ours}/{part}', f'{theirs}.{name}', 'embed')
    for ours, theirs in names.items()
    for part, name in (('scale', 'weight'), ('bias', 'bias'))
  ]


def entries_gpt2(cfg: DecoderConfig, values: Values) -> list[Entry]:
  """Matrices are stored [in, out]."""
  layer, unscaled = 'transformer.h.{0}', cfg.head_dim**0.5 if values.get('scale_attn_weights') is False else 1.0
  found = [
    Entry('head/kernel', 'lm_head.weight', 'vocab embed'),
    Entry('embedding/table', 'transformer.wte.weight', 'vocab embed'),
    Entry('embedding/positions', 'transformer.wpe.weight', 'length embed'),
    Entry(f'{ATTENTION}/out', f'{layer}.attn.c_proj.weight', '(heads head_dim) embed'),
    Entry(f'{ATTENTION}/out_bias', f'{layer}.attn.c_proj.bias', 'embed'),
    Entry(f'{BLOCK}/mlp/up', f'{layer}.mlp.c_fc.weight', 'embed mlp'),
    Entry(f'{BLOCK}/mlp/up_bias', f'{layer}.mlp.c_fc.bias', 'mlp'),
    Entry(f'{BLOCK}/mlp/down', f'{layer}.mlp.c_proj.weight', 'mlp embed'),
    Entry(f'{BLOCK}/mlp/down_bias', f'{layer}.mlp.c_proj.bias', 'embed'),
  ]
  for i, (name, heads) in enumerate((('query', 'heads'), ('key', 'kv_heads'), ('value', 'kv_heads'))):
    fused, scale = f'(@{i}/3 {heads} head_dim)', unscaled if name == 'query' else 1.0
    found.append(Entry(f'{ATTENTION}/{name}', f'{layer}.attn.c_attn.weight', f'embed {fused}', scale=scale))
    found.append(Entry(f'{ATTENTION}/{name}_bias', f'{layer}.attn.c_attn.bias', fused, scale=scale))
  norms = {f'{BLOCK}/self_norm': f'{layer}.ln_1', f'{BLOCK}/mlp_norm': f'{layer}.ln_2'}
  return found + _norms(norms | {'decoder/norm': 'transformer.ln_f'})


def read_gpt_neox(config: ConfigJson, tensors: Tensors) -> DecoderConfig:
  bias = 'all' if config.take('attention_bias', True, bool) else 'mlp'
  embed, heads = config.take('hidden_size'), config.take('num_attention_heads')
  # Files of before transformers 5 have rotary_emb_base and rotary_pct, which count where the common names differ.
  theta, fraction = config.take('rotary_emb_base', 10_000.0, float), config.take('rotary_pct', 0.25, float)
  config.expect('rope_theta', theta)
  config.expect('partial_rotary_factor', fraction)
  rope = read_rope(config, theta, fraction)
  tied = config.take('tie_word_embeddings', False, bool)
  return DecoderConfig(
    vocab_size=config.take('vocab_size'), embed=embed, heads=heads, head_dim=embed // heads,
    layers=config.take('num_hidden_layers'), bias=bias, head='tied' if tied else 'untied',
    mlp=DecoderMlpConfig(
      hidden=config.take('intermediate_size'), gated=False, activation=config.choose('hidden_act', ACTIVATIONS, 'gelu')
    ),
    norm=LayerNormConfig(eps=config.take('layer_norm_eps', 1e-5, float)),
    parallel='two_norms' if config.take('use_parallel_residual', True, bool) else 'none', **rope,
  )  # fmt: skip


def write_gpt_neox(cfg: DecoderConfig) -> dict[str, Any]:
  rope = write_rope(cfg)
  rope['rope_parameters']['partial_rotary_factor'] = cfg.rotary_fraction  # its default is 0.25, not 1
  return rope | {
    'vocab_size': cfg.vocab_size, 'hidden_size': cfg.embed, 'num_attention_heads': cfg.heads,
    'num_hidden_layers': cfg.layers, 'intermediate_size': cfg.mlp.hidden, 'hidden_act': NAMES[cfg.mlp.activation],
    'layer_norm_eps': cfg.norm.eps, 'use_parallel_residual': cfg.parallel == 'two_norms',
    'attention_bias': cfg.bias == 'all',
    'rotary_emb_base': cfg.rope_theta, 'rotary_pct': cfg.rotary_fraction, 'tie_word_embeddings': cfg.head == 'tied',
    'bos_token_id': 0, 'eos_token_id': 1, 'pad_token_id': 0,
  }  # fmt: skip


def entries_gpt_neox(cfg: DecoderConfig, values: Values) -> list[Entry]:
  """Each head has its query, key and value together."""
  layer, fused = 'gpt_neox.layers.{0}', 'gpt_neox.layers.{0}.attention.query_key_value'
  found = [
    Entry('embedding/table', 'gpt_neox.embed_in.weight', 'vocab embed'),
    Entry('head/kernel', 'embed_out.weight', 'vocab embed'),
    Entry(f'{ATTENTION}/out', f'{layer}.attention.dense.weight', 'embed (heads head_dim)'),
    Entry(f'{ATTENTION}/out_bias', f'{layer}.attention.dense.bias', 'embed'),
  ]
  for i, (name, heads) in enumerate((('query', 'heads'), ('key', 'kv_heads'), ('value', 'kv_heads'))):
    found.append(Entry(f'{ATTENTION}/{name}', f'{fused}.weight', f'({heads} @{i}/3 head_dim) embed'))
    found.append(Entry(f'{ATTENTION}/{name}_bias', f'{fused}.bias', f'({heads} @{i}/3 head_dim)'))
  norms = {f'{BLOCK}/self_norm': f'{layer}.input_layernorm', f'{BLOCK}/mlp_norm': f'{layer}.post_attention_layernorm'}
  return found + _dense_mlp(layer) + _norms(norms | {'decoder/norm': 'gpt_neox.final_layer_norm'})


def _dense_mlp(layer: str) -> list[Entry]:
  return [
    Entry(f'{BLOCK}/mlp/up', f'{layer}.mlp.dense_h_to_4h.weight', 'mlp embed'),
    Entry(f'{BLOCK}/mlp/up_bias', f'{layer}.mlp.dense_h_to_4h.bias', 'mlp'),
    Entry(f'{BLOCK}/mlp/down', f'{layer}.mlp.dense_4h_to_h.weight', 'embed mlp'),
    Entry(f'{BLOCK}/mlp/down_bias', f'{layer}.mlp.dense_4h_to_h.bias', 'embed'),
  ]


def read_falcon(config: ConfigJson, tensors: Tensors) -> DecoderConfig:
  """`num_kv_heads` counts only where each group of heads or each head has keys of its own."""
  embed, heads = config.take('hidden_size'), config.take('num_attention_heads')
  new, multi = config.take('new_decoder_architecture', False, bool), config.take('multi_query', True, bool)
  given = config.take('num_kv_heads', None) or heads
  kv_heads = given if new else 1 if multi else heads
  tied, bias = config.take('tie_word_embeddings', True, bool), config.take('bias', False, bool)
  return DecoderConfig(
    vocab_size=config.take('vocab_size'), embed=embed, heads=heads, head_dim=embed // heads,
    kv_heads=None if kv_heads == heads else kv_heads, layers=config.take('num_hidden_layers'),
    bias='all' if bias else 'none', head='tied' if tied else 'untied',
    mlp=DecoderMlpConfig(
      hidden=config.take('ffn_hidden_size', None) or 4 * embed, gated=False,
      activation=config.choose('activation', ACTIVATIONS, 'gelu'),
    ),
    norm=LayerNormConfig(eps=config.take('layer_norm_epsilon', 1e-5, float)), parallel=_parallel(config, new),
    **_falcon_positions(config),
  )  # fmt: skip


def _falcon_positions(config: ConfigJson) -> dict[str, Any]:
  """Falcon-RW adds ALiBi's biases before it scales the scores, so they are scaled too."""
  if not config.take('alibi', False, bool):
    return read_rope(config, 10_000.0)
  config.ignore('rope_theta', 'rope_scaling', 'rope_parameters')
  return {'positions': 'alibi', 'alibi_scaled': True}


def _parallel(config: ConfigJson, new: bool) -> str:
  norms, parallel = config.take('num_ln_in_parallel_attn', None) or 2, config.take('parallel_attn', True, bool)
  if new:
    return 'two_norms' if norms == 2 else 'one_norm'
  return 'one_norm' if parallel else 'none'


def write_falcon(cfg: DecoderConfig) -> dict[str, Any]:
  kv_heads = cfg.kv_heads or cfg.heads
  new = cfg.parallel == 'two_norms' or kv_heads not in (1, cfg.heads)
  return ({} if cfg.positions == 'alibi' else write_rope(cfg)) | {
    'vocab_size': cfg.vocab_size, 'hidden_size': cfg.embed, 'num_attention_heads': cfg.heads, 'num_kv_heads': kv_heads,
    'num_hidden_layers': cfg.layers, 'ffn_hidden_size': cfg.mlp.hidden, 'activation': NAMES[cfg.mlp.activation],
    'layer_norm_epsilon': cfg.norm.eps, 'new_decoder_architecture': new, 'multi_query': new or kv_heads == 1,
    'num_ln_in_parallel_attn': (2 if cfg.parallel == 'two_norms' else 1) if new else None,
    'parallel_attn': cfg.parallel != 'none', 'alibi': cfg.positions == 'alibi', 'bias': cfg.bias == 'all',
    'tie_word_embeddings': cfg.head == 'tied', 'bos_token_id': 0, 'eos_token_id': 1, 'pad_token_id': 0,
  }  # fmt: skip


def entries_falcon(cfg: DecoderConfig, values: Values) -> list[Entry]:
  """Each key head has its query heads, then key and value; a model with one key head has all queries first."""
  layer, fused = 'transformer.h.{0}', 'transformer.h.{0}.self_attention.query_key_value'
  kv_heads = cfg.kv_heads or cfg.heads
  group = cfg.heads // kv_heads
  total, split = group + 2, {'heads': (('kv_heads', kv_heads), ('group', group))}
  found = [
    Entry('embedding/table', 'transformer.word_embeddings.weight', 'vocab embed'),
    Entry('head/kernel', 'lm_head.weight', 'vocab embed'),
    Entry(f'{ATTENTION}/out', f'{layer}.self_attention.dense.weight', 'embed (heads head_dim)'),
    Entry(f'{ATTENTION}/out_bias', f'{layer}.self_attention.dense.bias', 'embed'),
  ]
  for name, place in (('query', f'group@0/{total}'), ('key', f'@{group}/{total}'), ('value', f'@{group + 1}/{total}')):
    own, layout = split if name == 'query' else {}, f'(kv_heads {place} head_dim)'
    found.append(Entry(f'{ATTENTION}/{name}', f'{fused}.weight', f'{layout} embed', own))
    found.append(Entry(f'{ATTENTION}/{name}_bias', f'{fused}.bias', layout, own))
  two = {f'{BLOCK}/self_norm': f'{layer}.ln_attn', f'{BLOCK}/mlp_norm': f'{layer}.ln_mlp'}
  others = {f'{BLOCK}/self_norm': f'{layer}.input_layernorm', f'{BLOCK}/mlp_norm': f'{layer}.post_attention_layernorm'}
  norms = two if cfg.parallel == 'two_norms' else others
  return found + _dense_mlp(layer) + _norms(norms | {'decoder/norm': 'transformer.ln_f'})


GPT2 = Family(
  'gpt2', 'GPT2LMHeadModel', read_gpt2, write_gpt2, entries_gpt2, prefix='transformer.',
  tied=('lm_head.weight', 'transformer.wte.weight'), unused=(r'transformer\.h\.\d+\.attn\.(bias|masked_bias)',),
)  # fmt: skip
GPT_NEOX = Family(
  'gpt_neox', 'GPTNeoXForCausalLM', read_gpt_neox, write_gpt_neox, entries_gpt_neox,
  tied=('embed_out.weight', 'gpt_neox.embed_in.weight'),
  unused=(r'gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)',),
)  # fmt: skip
FALCON = Family(
  'falcon', 'FalconForCausalLM', read_falcon, write_falcon, entries_falcon,
  tied=('lm_head.weight', 'transformer.word_embeddings.weight'),
  unused=(r'transformer\.h\.\d+\.self_attention\.rotary_emb\.inv_freq',),
)  # fmt: skip
